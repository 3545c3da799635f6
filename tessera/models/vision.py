"""Image classifiers for ticket searches: LeNet-300-100, Conv-2/4/6, VGG-16/19, ResNet-20 and a vision transformer.

The modules only declare parameters and call `tessera.models.convolution` and `tessera.models.transformer`. Kernels of
convolutions are [h, w, I, O]; running statistics of batch normalization are in the collection "batch_stats" (mean, var
[C]).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tessera.models.convolution import (
    IMPLEMENTATIONS,
    batch_statistics,
    conv,
    cut_group_norm,
    group_norm,
    max_pool,
    normalise,
)
from tessera.models.transformer import attention, from_heads, to_heads

NORMS = ("none", "batch", "group")
MOMENTUM = 0.9


@dataclass(frozen=True)
class MLPConfig:
    """Sizes of a `LeNet`.

    Attributes:
      hidden: units of the hidden layers, first to last.
      classes: number of logits.
    """

    hidden: tuple[int, ...] = (300, 100)
    classes: int = 10

    def __post_init__(self):
        if any(size < 1 for size in self.hidden) or self.classes < 1:
            raise ValueError(f"hidden={self.hidden} and classes={self.classes} must all be at least 1")


@dataclass(frozen=True)
class ConvConfig:
    """A chain of 3x3 convolutions with max-pooling, then dense layers.

    Attributes:
      blocks: output channels of every convolution, in groups that end with 2x2 max-pooling.
      dense: hidden units after them; () averages over the image instead of flattening it (VGG).
      norm: "none", "batch" or "group", after every convolution.
      groups: of group normalization, at most the channels.
      left: of every convolution, what compaction leaves of its groups: channels a group had, then channels left of each
        group (`tessera.models.convolution.cut_group_norm`); () where nothing was cut out.
      classes: number of logits.
      implementation: see `tessera.models.convolution.conv`.
    """

    blocks: tuple[tuple[int, ...], ...] = ((64, 64),)
    dense: tuple[int, ...] = (256, 256)
    norm: str = "none"
    groups: int = 8
    left: tuple[tuple[int, ...], ...] = ()
    classes: int = 10
    implementation: str = "auto"

    def __post_init__(self):
        _check(self, [size for block in self.blocks for size in block])
        if min((size for block in self.blocks for size in block), default=0) < 1 or any(n < 1 for n in self.dense):
            raise ValueError(f"blocks={self.blocks} and dense={self.dense} must be at least 1 everywhere")


@dataclass(frozen=True)
class ResNetConfig:
    """ResNet for small images (He et al. 2016, section 4.2): 6 blocks + 2 layers deep, 3 for ResNet-20.

    Attributes:
      blocks: residual blocks per stage.
      widths: channels of the stages; from the second on the first block halves the image.
      inner: channels between the two convolutions of every block; () are those of its stage. What compaction leaves.
      left: of the groups of these channels in every block, as in `ConvConfig`.
      norm, groups, classes, implementation: as in `ConvConfig`, norm "batch" or "group".
    """

    blocks: int = 3
    widths: tuple[int, ...] = (16, 32, 64)
    inner: tuple[int, ...] = ()
    norm: str = "batch"
    groups: int = 8
    left: tuple[tuple[int, ...], ...] = ()
    classes: int = 10
    implementation: str = "auto"

    def __post_init__(self):
        _check(self, self.inner or [width for width in self.widths for _ in range(self.blocks)])
        if self.blocks < 1 or not self.widths or min(self.widths) < 1:
            raise ValueError(f"blocks={self.blocks} and widths={self.widths} must be at least 1")
        if self.inner and (len(self.inner) != self.blocks * len(self.widths) or min(self.inner) < 1):
            raise ValueError(f"inner={self.inner}: one number for each of {self.blocks * len(self.widths)} blocks")


@dataclass(frozen=True)
class ViTConfig:
    """A small vision transformer (Dosovitskiy et al. 2021), pre-norm, mean over patches instead of a class token.

    Attributes:
      patch: side of a patch, which must divide the image's.
      layers: blocks.
      width: channels of a token.
      heads: of attention.
      ff: hidden units of the feed-forward layers.
      classes: number of logits.
    """

    patch: int = 4
    layers: int = 6
    width: int = 128
    heads: int = 4
    ff: int = 256
    classes: int = 10

    def __post_init__(self):
        if min(self.patch, self.layers, self.width, self.heads, self.ff, self.classes) < 1:
            raise ValueError(f"{self}: all sizes must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")


def _check(config: ConvConfig | ResNetConfig, channels: Sequence[int]) -> None:
    if config.norm not in NORMS or config.implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"norm={config.norm!r}, implementation={config.implementation!r}: choose from {', '.join(NORMS)} and "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    if config.groups < 1 or config.classes < 1:
        raise ValueError(f"groups={config.groups} and classes={config.classes} must be at least 1")
    sums = [sum(left[1:]) if left else size for left, size in zip(config.left, channels, strict=False)]
    if config.left and (config.norm != "group" or len(config.left) != len(channels) or sums != list(channels)):
        raise ValueError(f"left={config.left} with norm={config.norm!r} does not fit channels {tuple(channels)}")


class LeNet(nn.Module):
    """A ReLU network on flattened images (LeCun et al. 1998; Frankle & Carbin 2019, section 2 and appendix G).

    Kernels are Gaussian Glorot: normal, not truncated, with variance 2 / (fan_in + fan_out). Biases start at zero.
    Parameters: dense0/{kernel [X, hidden0], bias}, dense1/..., output/{kernel, bias}, all float32.
    """

    config: MLPConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B ..."]) -> Float[Array, "B C"]:
        """Map images [B, H, W, C] or features [B, X] to logits [B, classes] in float32."""
        # Not `glorot_normal`, which is truncated.
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")
        x = x.reshape(x.shape[0], -1)
        for i, size in enumerate(self.config.hidden):
            x = nn.relu(nn.Dense(size, kernel_init=init, name=f"dense{i}")(x))
        return nn.Dense(self.config.classes, kernel_init=init, name="output")(x)


class Conv(nn.Module):
    """One convolution; no bias when a norm follows."""

    features: int
    side: int = 3
    stride: int = 1
    bias: bool = False
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B P Q O"]:
        """Convolve; kernels are Kaiming normal (He et al. 2015)."""
        shape = (self.side, self.side, x.shape[-1], self.features)
        x = conv(x, self.param("kernel", nn.initializers.he_normal(), shape), self.stride, self.implementation)
        if self.bias:
            x = x + self.param("bias", nn.initializers.zeros, (self.features,))[None, None, None]
        return x


class Norm(nn.Module):
    """Batch or group normalization with scale and bias; "none" is the identity."""

    kind: str
    training: bool
    groups: int = 8
    left: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Normalise; in training batch normalization uses the batch's statistics and moves the running ones."""
        if self.kind == "none":
            return x
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        if self.kind == "group" and self.left:
            return cut_group_norm(x, scale, bias, self.left[0], self.left[1:])
        if self.kind == "group":
            return group_norm(x, scale, bias, min(self.groups, channels))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        if not self.training:
            return normalise(x, mean.value, var.value, scale, bias)
        now_mean, now_var = batch_statistics(x)
        if not self.is_initializing():
            mean.value = MOMENTUM * mean.value + (1 - MOMENTUM) * now_mean
            var.value = MOMENTUM * var.value + (1 - MOMENTUM) * now_var
        return normalise(x, now_mean, now_var, scale, bias)


class ConvNet(nn.Module):
    """Conv-2/4/6 (Frankle & Carbin 2019, figure 2) and VGG (Simonyan & Zisserman 2015): conv0, norm0, ..., output."""

    config: ConvConfig
    training: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Map images to logits."""
        c, index = self.config, 0
        for block in c.blocks:
            for features in block:
                bias = c.norm == "none"
                x = Conv(features, bias=bias, implementation=c.implementation, name=f"conv{index}")(x)
                left = c.left[index] if c.left else ()
                x = nn.relu(Norm(c.norm, self.training, c.groups, left, name=f"norm{index}")(x))
                index += 1
            x = max_pool(x)
        x = x.reshape(x.shape[0], -1) if c.dense else x.mean((1, 2))
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")
        for i, size in enumerate(c.dense):
            x = nn.relu(nn.Dense(size, kernel_init=init, name=f"dense{i}")(x))
        return nn.Dense(c.classes, kernel_init=init, name="output")(x)


class ResNet(nn.Module):
    """ResNet-20 and its like: stem, stage0_0, ..., output; 1x1 convolutions where the shape changes (option B)."""

    config: ResNetConfig
    training: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Map images to logits."""
        c = self.config

        def layer(
            x: Array, features: int, name: str, side: int = 3, stride: int = 1, left: tuple[int, ...] = ()
        ) -> Array:
            x = Conv(features, side, stride, c.norm == "none", c.implementation, name=f"{name}_conv")(x)
            return Norm(c.norm, self.training, c.groups, left, name=f"{name}_norm")(x)

        x = nn.relu(layer(x, c.widths[0], "stem"))
        for stage, width in enumerate(c.widths):
            for block in range(c.blocks):
                name, stride = f"stage{stage}_{block}", 2 if stage and not block else 1
                at = stage * c.blocks + block
                inner, left = c.inner[at] if c.inner else width, c.left[at] if c.left else ()
                y = nn.relu(layer(x, inner, f"{name}_first", stride=stride, left=left))
                y = layer(y, width, f"{name}_second")
                if x.shape != y.shape:
                    x = layer(x, width, f"{name}_skip", side=1, stride=stride)
                x = nn.relu(x + y)
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")
        return nn.Dense(c.classes, kernel_init=init, name="output")(x.mean((1, 2)))


class Kernel(nn.Module):
    """One kernel whose first `fan_in` axes are contracted."""

    shape: tuple[int, ...]
    fan_in: int = 1

    @nn.compact
    def __call__(self) -> Float[Array, "..."]:
        """Return the parameter: truncated normal of variance 1 / fan-in."""
        axes = tuple(range(len(self.shape)))
        split = axes[: self.fan_in], axes[self.fan_in :]
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=split[0], out_axis=split[1])
        return self.param("kernel", init, self.shape)


class SelfAttention(nn.Module):
    """Attention among all patches; kernels attention/{query, key, value} [D, H, h] and attention/output [H, h, D]."""

    heads: int

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Mix patches."""
        width = x_BTD.shape[-1]
        shape = (width, self.heads, width // self.heads)
        q, k, v = (to_heads(x_BTD, Kernel(shape, name=name)()) for name in ("query", "key", "value"))
        output = Kernel((self.heads, width // self.heads, width), 2, name="output")()
        return from_heads(attention(q, k, v, causal=False), output)


class ViTBlock(nn.Module):
    """attention_norm, attention, mlp_norm, up, down: attention and a GELU layer, each added to what comes in."""

    heads: int
    ff: int

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Transform patches."""
        width = x_BTD.shape[-1]
        x_BTD = x_BTD + SelfAttention(self.heads, name="attention")(nn.LayerNorm(name="attention_norm")(x_BTD))
        y_BTD = nn.LayerNorm(name="mlp_norm")(x_BTD)
        y_BTF = jax.nn.gelu(y_BTD @ Kernel((width, self.ff), name="up")())
        return x_BTD + y_BTF @ Kernel((self.ff, width), name="down")()


class ViT(nn.Module):
    """embed_patch, embed_position, layer0, ..., final_norm, output."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        """Map images to logits.

        Raises:
          ValueError: patches do not divide the image.
        """
        c = self.config
        b, height, width, channels = x.shape
        if height % c.patch or width % c.patch:
            raise ValueError(f"patches of {c.patch} pixels do not divide images of {height} x {width}")
        tiles = x.reshape(b, height // c.patch, c.patch, width // c.patch, c.patch, channels)
        x_BTP = tiles.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, c.patch**2 * channels)
        x_BTD = x_BTP @ Kernel((x_BTP.shape[-1], c.width), name="embed_patch")()
        place = self.param("embed_position", nn.initializers.normal(0.02), (x_BTD.shape[1], c.width))
        x_BTD = x_BTD + place[None]
        for i in range(c.layers):
            x_BTD = ViTBlock(c.heads, c.ff, name=f"layer{i}")(x_BTD)
        return nn.Dense(c.classes, name="output")(nn.LayerNorm(name="final_norm")(x_BTD).mean(1))
