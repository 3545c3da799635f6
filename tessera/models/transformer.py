"""A decoder-only transformer: RMSNorm, pre-norm or post-norm, rotary positions, grouped-query attention, SwiGLU.

The modules only declare parameters and call pure functions. Parameters are plain nested dicts of float32
arrays; with `scan` (the default) those of all blocks are stacked along a leading layer axis L, so that the program does
not grow with the depth:

    embed/table [V, D]    final_norm/gain [D]    head/kernel [D, V] (absent when tied)
    blocks/attention_norm/gain [L, D]    blocks/mlp_norm/gain [L, D]
    blocks/attention/{query [L, D, H, h], key [L, D, K, h], value [L, D, K, h], output [L, H, h, D]}/kernel
    blocks/mlp/{gate [L, D, F], up [L, D, F], down [L, F, D]}/kernel
    with `qkv_bias` blocks/attention/{query [L, H, h], key [L, K, h], value [L, K, h]}/bias
    with `output_bias` blocks/attention/output_bias/bias [L, D]    with `sinks` blocks/attention/sinks/logit [L, H]
    with `qk_norm` blocks/attention/{query_norm, key_norm}/gain [L, h], or with its scope "projection"
        blocks/attention/{query [L, H, h], key [L, K, h]}/gain
    with `norm_position` "both" also blocks/{attention_post_norm, mlp_post_norm}/gain [L, D]
    with `latent` (ranks R, Q; n, r and v channels of a head, h = n + r), in place of query, key and value:
        blocks/attention/{query_down [L, D, Q], query_up [L, Q, H, h], latent_down [L, D, R], key_rope [L, D, r],
        key_up [L, R, H, n], value_up [L, R, H, v], output [L, H, v, D]}/kernel, {query_down_norm [L, Q],
        latent_norm [L, R]}/gain; without Q query/kernel [L, D, H, h]

Without `scan` the blocks are blocks_0, blocks_1, ... and the same leaves lack the L axis. With mlp="routed" every n-th
block has routed experts (`moe.layer`); for n > 1 a scanned unit is n blocks, blocks/layer_0, ..., stacked along L / n.
Where the first k layers are dense (`moe.first_k_dense_replace`) they are a stack of their own, dense_blocks [k, ...].
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PyTree

from moe.layer import ONE_DEVICE, ExpertAxes, MoE, MoEConfig
from sharding.attention import AttentionForm, packed_window
from sharding.inference.few_rows import Kernel, Projection
from sharding.tensor_parallel import INSIDE, RESIDUAL
from tessera.models.attention_forms import (
    IMPLEMENTATIONS,
    LatentConfig,
    LayerForm,
    RopeScaling,
    attention,
    check_implementation,
    scaled_frequencies,
)
from tessera.models.remat import Remat, layers_of, parse_remat


class Stack(NamedTuple):
    """Consecutive blocks whose parameters are one part of the tree.

    Attributes:
      name: of the part: "dense_blocks" or "blocks" of a scanned decoder, "blocks_3" for one block of another.
      pattern: feed-forward layers of the blocks of one step, a key of `MLPS` each.
      start: the first block's number in the decoder.
      layers: blocks in all.
    """

    name: str
    pattern: tuple[str, ...]
    start: int
    layers: int

    @property
    def units(self) -> int:
        """Steps of the scan over the stack."""
        return self.layers // len(self.pattern)


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and numerics of a `Decoder`.

    Attributes:
      vocab_size: V, tokens are 0..V-1.
      layers: L, number of blocks.
      width: D, size of the residual stream.
      heads: H, query heads.
      kv_heads: K, key/value heads; must divide `heads`. 0 takes `heads` (no grouping).
      head_dim: h, must be even; 0 takes width / heads.
      ff: F, feed-forward width; 0 takes 8/3 width rounded up to a multiple of 64 (Touvron et al. 2023, section 2.2).
      mlp: which feed-forward layer a block has, a key of `MLPS`; "routed" has experts in every `moe.every`-th after the
        first `moe.first_k_dense_replace`.
      moe: the routed experts.
      qkv_bias: biases on queries, keys and values (Qwen2).
      output_bias: a bias on what attention adds to the residual stream (gpt-oss).
      sinks: attention sinks, see `sharding.attention.AttentionForm` (gpt-oss).
      query_pre_attn_scalar: scores of attention are divided by its square root (Gemma); 0 takes h.
      attention_softcap: soft-cap of the scores, see `sharding.attention.AttentionForm`; 0 has none (Gemma 2).
      attention_implementation: "auto", "xla", "cudnn" (GPUs) or "splash" (TPUs), wherever there is no KV
        cache; see `tessera.models.attention_forms.IMPLEMENTATIONS`. "auto" is "xla": the others are experimental.
      latent: multi-head latent attention in place of grouped queries; `kv_heads` and `head_dim` are then 0.
      qk_norm: RMSNorm of the queries and keys before their rotation.
      qk_norm_scope: what its mean square is over: each "head" by itself, one gain [h] for all heads (Qwen3), or the
        whole "projection", all heads of a token together with a gain [H, h] (OLMoE, OLMo-2).
      rope_theta: base of the rotary wavelengths.
      rope_scaling: of the rotary wavelengths, for a longer context.
      local_rope_theta: base in local layers, whose wavelengths are then not scaled (Gemma 3); 0 rotates as in others.
      rotary_dim: rotated channels of a head, the first ones (Phi-3); 0 rotates all.
      window: sliding-window attention (Beltagy et al. 2020): tokens that a query of a local layer sees, itself
        included; 0 has no local layers.
      attention_pattern: attention by layer, a letter each, repeated over the depth: "L" local (in the window), "G"
        global, "N" global without rotary positions (NoPE: Kazemnejad et al. 2023); "LLLLLG" is Gemma 3's, "GGGN"
        SmolLM3's. "" has all layers local where there is a window, else global.
      norm_eps: epsilon of RMSNorm.
      norm_position: where the norms of attention and of the feed-forward layer are: "pre", on what these read, or
        "post", on what they add to the residual stream, which they read as it is (OLMo-2), or "both" (Gemma 2).
      gain_offset: added to the gains of all norms, which start at 1 - gain_offset (1 in Gemma).
      embed_scale: factor on embeddings that are looked up (sqrt(D) in Gemma).
      logit_softcap: soft-cap of the logits: z becomes logit_softcap tanh(z / logit_softcap) (Gemma 2); 0 has none.
      tied: the output layer reads the transposed embedding table.
      dtype: "float32" or "bfloat16" (mixed precision), for activations; parameters, softmax, statistics and logits
        are float32.
      remat: what a backward pass recomputes: "none", "full" (all of a block), "dots" (all but matrix products), names
        to keep or to offload, or several of these by group of layers; see `tessera.models.remat`.
      scan: run the blocks as one `lax.scan` over stacked parameters.
      init_scale: factor on the standard deviation of every initial kernel.
    """

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int = 0
    head_dim: int = 0
    ff: int = 0
    mlp: str = "swiglu"
    moe: MoEConfig = MoEConfig()
    qkv_bias: bool = False
    output_bias: bool = False
    sinks: bool = False
    query_pre_attn_scalar: int = 0
    attention_softcap: float = 0.0
    attention_implementation: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    latent: LatentConfig = LatentConfig()
    qk_norm: bool = False
    qk_norm_scope: Literal["head", "projection"] = "head"
    rope_theta: float = 1e4
    rope_scaling: RopeScaling = RopeScaling()
    local_rope_theta: float = 0.0
    rotary_dim: int = 0
    window: int = 0
    attention_pattern: str = ""
    norm_eps: float = 1e-6
    norm_position: Literal["pre", "post", "both"] = "pre"
    gain_offset: float = 0.0
    embed_scale: float = 1.0
    logit_softcap: float = 0.0
    tied: bool = True
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = True
    init_scale: float = 1.0

    def __post_init__(self):
        for name in ("vocab_size", "layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("kv_heads", "head_dim", "ff", "window", "rotary_dim", *SCALARS):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive, or 0 for the default")
        if self.heads % self.kv_size:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_size}")
        if not (self.head_dim or self.latent.kv_rank) and self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}; set head_dim yourself")
        if not self.latent.kv_rank and self.head_size % 2:
            raise ValueError(f"head_dim={self.head_size} is odd; rotary positions need an even one")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_size:
            raise ValueError(f"rotary_dim={self.rotary_dim} must be even and at most head_dim={self.head_size}")
        if self.latent.kv_rank:
            self.latent.check({name: getattr(self, name) for name in NOT_LATENT})
            if self.kv_size != self.heads:
                raise ValueError(f"kv_heads={self.kv_heads} of heads={self.heads}: latent attention has one key a head")
        if self.rope_theta <= 0 or self.norm_eps <= 0 or self.init_scale <= 0:
            raise ValueError(
                f"rope_theta={self.rope_theta}, norm_eps={self.norm_eps}, init_scale={self.init_scale} must be positive"
            )
        if set(self.attention_pattern) - set("LGN"):
            raise ValueError(f"attention_pattern={self.attention_pattern!r}: letters L (local), G (global), N (NoPE)")
        if self.attention_pattern and ("L" in self.attention_pattern) != (self.window > 0):
            raise ValueError(
                f"window={self.window} with attention_pattern={self.attention_pattern!r}: a window is that of local "
                "layers ('L'), which need one"
            )
        choices_of: dict[str, Any] = {"attention_implementation": ("auto", *IMPLEMENTATIONS)}
        choices_of |= {"qk_norm_scope": ("head", "projection"), "norm_position": ("pre", "post", "both")}
        for name, choices in ({"dtype": DTYPES, "mlp": MLPS} | choices_of).items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if self.mlp == "routed":
            first, every = self.first_dense, self.moe.every
            if first >= self.layers:
                raise ValueError(f"moe.first_k_dense_replace={first} of layers={self.layers}: none would be routed")
            if (self.layers - first) % every:
                after = f" after moe.first_k_dense_replace={first}" if first else ""
                raise ValueError(f"layers={self.layers}{after} is not a multiple of moe.every={every}")
        cut = [group.layers for stack in self.stacks for group in self.groups(stack)]
        uneven = [layers for layers in cut if layers % len(self.pattern)] if len(self.remat_groups) > 1 else []
        if uneven and len(self.pattern) > 1:
            raise ValueError(
                f"remat={self.remat!r}: a group of {uneven[0]} layers is not a multiple of moe.every={self.moe.every}"
            )
        if self.mlp == "routed":
            self.moe.width_of(self.ff_size)
            if not self.moe.router.causal:
                raise ValueError(
                    f"moe.router.name={self.moe.router.name!r} chooses among all tokens, later ones too, which a model "
                    "that predicts the next token must not see: choose top_k, switch, gshard, sigmoid or hash"
                )

    @property
    def pattern(self) -> tuple[str, ...]:
        """The feed-forward layers of consecutive blocks, a key of `MLPS` each, repeated after the first dense ones."""
        return ("swiglu",) * (self.moe.every - 1) + ("routed",) if self.mlp == "routed" else (self.mlp,)

    @property
    def first_dense(self) -> int:
        """First blocks of a routed decoder that are dense."""
        return self.moe.first_k_dense_replace if self.mlp == "routed" else 0

    @property
    def mlps(self) -> tuple[str, ...]:
        """The feed-forward layer of every block in order of depth, a key of `MLPS` each."""
        first = self.first_dense
        return ("swiglu",) * first + self.pattern * ((self.layers - first) // len(self.pattern))

    @property
    def attention_kinds(self) -> str:
        """The attention of every layer in order of depth, a letter of `attention_pattern` each."""
        pattern = self.attention_pattern or ("L" if self.window else "G")
        return (pattern * (self.layers // len(pattern) + 1))[: self.layers]

    def form(self, layer: int) -> LayerForm:
        """Attention of one layer."""
        kind = self.attention_kinds[layer]
        size = self.latent.rope_dim if self.latent.kv_rank else self.rotary_dim or self.head_size
        window = self.window if kind == "L" else None
        if kind == "N":
            return LayerForm(None, jnp.zeros(size // 2), 1.0)
        if kind == "L" and self.local_rope_theta:
            return LayerForm(window, rope_frequencies(size, self.local_rope_theta), 1.0)
        scaling = self.rope_scaling
        magnitude = 1.0 if scaling.kind == "none" else scaling.magnitude
        return LayerForm(window, rope_frequencies(size, self.rope_theta, scaling), magnitude)

    def forms(self, stack: Stack) -> LayerForm | None:
        """Attention of a stack's layers, float32 [units, blocks of a unit, ...]; None where all layers are alike."""
        if len(set(self.attention_kinds)) == 1:
            return None
        layers = range(stack.start, stack.start + stack.layers)
        windows = [self.window * (self.attention_kinds[layer] == "L") for layer in layers]
        each = [self.form(layer)._replace(window=window) for layer, window in zip(layers, windows, strict=True)]
        shape = stack.units, len(stack.pattern)
        stacked = (jnp.stack([jnp.asarray(leaf, jnp.float32) for leaf in leaves]) for leaves in zip(*each, strict=True))
        return LayerForm(*(leaf.reshape(*shape, *leaf.shape[1:]) for leaf in stacked))

    @property
    def attend(self) -> "Attend":
        """Attention as `attention_implementation` says."""
        return functools.partial(attention, implementation=self.attention_implementation)

    def check_attention(self, platform: str, length: int, devices: int = 1, packed: bool = False) -> str:
        """Check that `attention_implementation` can run on devices of a platform, for sequences of a length.

        Returns:
          A line for the log: which one runs, and which others could.

        Raises:
          ValueError: it cannot, and why.
        """
        size = self.head_size
        both = {"sinks": self.sinks, "latent attention": bool(self.latent.kv_rank)}
        cudnn = {f"dtype={self.dtype!r} (bfloat16 is needed)": self.dtype != "bfloat16"}
        cudnn |= {"attention_softcap": bool(self.attention_softcap)}
        cudnn |= {f"heads of {size} channels (8 to 128 in steps of 8)": size % 8 > 0 or size > 128}
        splash = {f"length={length} (a multiple of 128 is needed)": length % 128 > 0, "several devices": devices > 1}
        splash |= {f"layers of several kinds ({self.attention_pattern!r})": len(set(self.attention_kinds)) > 1}
        splash |= {"packed documents in a window": packed and self.window > 0}
        wrong = {"cudnn": both | cudnn, "splash": both | splash}
        unsuited = {name: tuple(what for what, is_so in all_of.items() if is_so) for name, all_of in wrong.items()}
        return check_implementation(self.attention_implementation, platform, unsuited)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The blocks by part of the parameter tree, in order of depth."""
        if not self.scan:
            return tuple(Stack(f"blocks_{i}", (mlp,), i, 1) for i, mlp in enumerate(self.mlps))
        first = self.first_dense
        dense = (Stack("dense_blocks", ("swiglu",), 0, first),) if first else ()
        return *dense, Stack("blocks", self.pattern, first, self.layers - first)

    def groups(self, stack: Stack) -> tuple[Remat, ...]:
        """Activation checkpointing of a stack's layers, in order."""
        found, start = [], 0
        for group in self.remat_groups:
            inside = min(start + group.layers, stack.start + stack.layers) - max(start, stack.start)
            found += [replace(group, layers=inside)] if inside > 0 else []
            start += group.layers
        return tuple(found)

    @property
    def remat_groups(self) -> tuple[Remat, ...]:
        """Activation checkpointing of consecutive layers."""
        return (Remat(self.layers, "none"),) if self.remat == "none" else parse_remat(self.remat, self.layers)

    @property
    def kv_size(self) -> int:
        """K with the default filled in."""
        return self.kv_heads or self.heads

    @property
    def head_size(self) -> int:
        """h of queries and keys, with the default filled in."""
        if self.latent.kv_rank:
            return self.latent.nope_dim + self.latent.rope_dim
        return self.head_dim or self.width // self.heads

    @property
    def value_size(self) -> int:
        """Channels of a head's value: h but in latent attention."""
        return self.latent.value_dim if self.latent.kv_rank else self.head_size

    @property
    def score_scale(self) -> float:
        """Factor on the scores of attention; 0 for h^-0.5."""
        if self.latent.kv_rank:
            return self.head_size**-0.5 * self.rope_scaling.latent_scale
        return self.query_pre_attn_scalar**-0.5 if self.query_pre_attn_scalar else 0.0

    def norm(self, x: Float[Array, "*N D"], gain: Float[Array, " D"], axis: str | None = None) -> Float[Array, "*N D"]:
        """`rms_norm` with this model's epsilon and offset of the gain."""
        return rms_norm(x, gain + self.gain_offset if self.gain_offset else gain, self.norm_eps, axis)

    def embedded(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Embeddings times the model's factor."""
        return x if self.embed_scale == 1 else x * self.embed_scale

    def cap(self, logits: Float[Array, "*N V"]) -> Float[Array, "*N V"]:
        """Logits with the model's soft-cap."""
        return self.logit_softcap * jnp.tanh(logits / self.logit_softcap) if self.logit_softcap else logits

    def logits(self, x: Float[Array, "*N D"], head_DV: Float[Array, "D V"]) -> Float[Array, "*N V"]:
        """float32 logits: products in the dtype of `x`, sums in float32, as they feed a softmax over the vocabulary."""
        return self.cap(jnp.einsum("...d,dv->...v", x, head_DV.astype(x.dtype), preferred_element_type=jnp.float32))

    @property
    def ff_size(self) -> int:
        """F with the default filled in."""
        return self.ff or -(-8 * self.width // (3 * 64)) * 64

    @property
    def residual_scale(self) -> float:
        """Factor on initial output kernels: 2 L of them add up in the residual stream (Radford et al. 2019, 2.3)."""
        return 1 / sqrt(2 * self.layers)


SCALARS = ("query_pre_attn_scalar", "attention_softcap", "logit_softcap", "local_rope_theta", "gain_offset")
# Fields of plain attention that latent attention does without.
NOT_LATENT = ("head_dim", "rotary_dim", "qkv_bias", "output_bias", "qk_norm", "query_pre_attn_scalar")

Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
"""(activations, logical axes) -> the same activations, laid out so over devices; see `sharding.rules` for the names."""

Attend = Callable[[jax.Array, jax.Array, jax.Array, AttentionForm], jax.Array]
"""Causal attention: (queries [B, T, H, h], keys [B, T, K, h], values [B, T, K, h], form) -> [B, T, H, h]."""


def unconstrained(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Leave x where it is."""
    del axes
    return x


# Pure functions. B batch, T and S query and key times, D width, H query heads, K key/value heads (K divides H), h head
# dimension, F feed-forward width. They compute in the dtype of `x` and take parameters of any float dtype; statistics
# (means, softmax, angles) are float32. Kernels are never fused, so that no sharded axis is ever sliced.


def rms_norm(
    x: Float[Array, "*N D"], gain: Float[Array, " D"], eps: float = 1e-6, axis: str | None = None
) -> Float[Array, "*N D"]:
    """Divide by the root mean square over the last axis and scale: Zhang & Sennrich (2019), eq. 4.

    The statistics are float32, and `eps` keeps a zero vector zero.

    Args:
      x: activations of any float dtype, which is the result's.
      gain: one factor per channel.
      eps: added to the mean square.
      axis: mesh axis inside `jax.shard_map` that splits the channels evenly; the mean is over all of them.
    """
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    scale = jax.lax.rsqrt((jax.lax.pmean(mean, axis) if axis else mean) + eps)
    # Spelled out because the tests forbid implicit rank promotion.
    gain = gain.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (x32 * scale * gain).astype(x.dtype)


def rope_frequencies(dim: int, theta: float, scaling: RopeScaling | None = None) -> Float[Array, " f"]:
    """Radians per position of every pair of `dim` channels, float32 [dim / 2], the fastest first; see `RopeScaling`."""
    if scaling is not None and scaling.kind != "none":
        return scaled_frequencies(dim, theta, scaling)
    return theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def rotate(
    x_BTHh: Float[Array, "B T H h"],
    positions_BT: Int[Array, "B T"],
    frequency_f: Float[Array, " f"],
    magnitude: Float[Array, ""] | float = 1.0,
) -> Float[Array, "B T H h"]:
    """Rotate pairs of channels by an angle that grows with the position: RoFormer (Su et al. 2021), eq. 34.

    Channel i is paired with i + f (the GPT-NeoX and Llama layout, not the interleaved one of the paper; the two differ
    by a fixed permutation of channels) and turns by position * frequency_f[i] radians, times `magnitude`. Channels from
    2 f on stay as they are.
    """
    if (turned := 2 * frequency_f.shape[0]) < x_BTHh.shape[-1]:
        head_BTHh, rest_BTHh = x_BTHh[..., :turned], x_BTHh[..., turned:]
        return jnp.concatenate([rotate(head_BTHh, positions_BT, frequency_f, magnitude), rest_BTHh], axis=-1)
    angle_BTf = positions_BT[..., None].astype(jnp.float32) * frequency_f[None, None, :]
    cos, sin = (magnitude * turn(angle_BTf)[:, :, None, :] for turn in (jnp.cos, jnp.sin))
    first, second = jnp.split(x_BTHh.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHh.dtype)


def to_heads(x_BTD: Float[Array, "B T D"], kernel_DHh: Kernel) -> Float[Array, "B T H h"]:
    """Project activations to one vector per head; computes in x's dtype."""
    if isinstance(kernel_DHh, Projection):
        return kernel_DHh(x_BTD)
    return jnp.einsum("btd,dhk->bthk", x_BTD, kernel_DHh.astype(x_BTD.dtype))


def project_qkv(
    params: PyTree,
    x_BTD: Float[Array, "B T D"],
    positions_BT: Int[Array, "B T"],
    config: TransformerConfig,
    form: LayerForm,
    axis: str | None = None,
) -> tuple[Float[Array, "B T H h"], Float[Array, "B T K h"], Float[Array, "B T K h"]]:
    """Project to queries, keys and values, with biases, norms and rotary positions as `config` says.

    Args:
      params: {query, key, value: {kernel, bias, gain}, query_norm, key_norm: {gain}} of one block's attention.
      x_BTD: normalized residual stream.
      positions_BT: rotary positions.
      config: the model; H and K are those of the kernels.
      form: of the layer.
      axis: mesh axis inside `jax.shard_map` that splits the heads, over which a norm of the whole projection is taken.
    """

    def project(name: str) -> jax.Array:
        y_BTHh = to_heads(x_BTD, params[name]["kernel"])
        if config.qkv_bias:
            y_BTHh += params[name]["bias"].astype(y_BTHh.dtype)[None, None]
        if name == "value":
            return y_BTHh
        if config.qk_norm and config.qk_norm_scope == "projection":
            flat_BTN, gain_N = y_BTHh.reshape(*y_BTHh.shape[:2], -1), params[name]["gain"].reshape(-1)
            y_BTHh = config.norm(flat_BTN, gain_N, axis).reshape(y_BTHh.shape)
        elif config.qk_norm:
            y_BTHh = config.norm(y_BTHh, params[f"{name}_norm"]["gain"])
        return rotate(y_BTHh, positions_BT, form.frequency_f, form.magnitude)

    return project("query"), project("key"), project("value")


def project_latent(
    params: PyTree,
    x_BTD: Float[Array, "B T D"],
    positions_BT: Int[Array, "B T"],
    config: TransformerConfig,
    form: LayerForm,
) -> tuple[Float[Array, "B T H h"], Float[Array, "B T K h"], Float[Array, "B T K v"]]:
    """Project to queries, keys and values through latents: DeepSeek-V2, section 2.1.2 and eq. 37-47.

    Every head's key is its own channels without positions and then the rotated ones that all heads share. With
    `latent.absorbed` K is 1: the value is the latent, the key the latent and the shared channels. `params` are those of
    one block's attention with `latent`, H that of the kernels; x_BTD is the normalized residual stream.
    """
    kernel = lambda name: params[name]["kernel"]  # noqa: E731
    turn = lambda x_BTHr: rotate(x_BTHr, positions_BT, form.frequency_f, form.magnitude)  # noqa: E731
    size, base = config.latent.nope_dim, params["query"] if "query" in params else params["query_up"]
    q_in = x_BTD
    if "query_down" in params:
        q_in = rms_norm(x_BTD @ kernel("query_down").astype(x_BTD.dtype), params["query_down_norm"]["gain"])
    q_BTHh = to_heads(q_in, base["kernel"])
    latent_BTR = rms_norm(x_BTD @ kernel("latent_down").astype(x_BTD.dtype), params["latent_norm"]["gain"])
    shared_BT1r = turn((x_BTD @ kernel("key_rope").astype(x_BTD.dtype))[:, :, None])
    if config.latent.absorbed:
        q_BTHR = jnp.einsum("bthn,rhn->bthr", q_BTHh[..., :size], kernel("key_up").astype(x_BTD.dtype))
        latent_BT1R = latent_BTR[:, :, None]
        q_BTHh = jnp.concatenate([q_BTHR, turn(q_BTHh[..., size:])], axis=-1)
        return q_BTHh, jnp.concatenate([latent_BT1R, shared_BT1r], axis=-1), latent_BT1R
    k_BTHn, v_BTHv = (to_heads(latent_BTR, kernel(name)) for name in ("key_up", "value_up"))
    shared_BTHr = jnp.broadcast_to(shared_BT1r, (*k_BTHn.shape[:3], shared_BT1r.shape[-1]))
    q_BTHh = jnp.concatenate([q_BTHh[..., :size], turn(q_BTHh[..., size:])], axis=-1)
    return q_BTHh, jnp.concatenate([k_BTHn, shared_BTHr], axis=-1), v_BTHv


def from_heads(x_BTHh: Float[Array, "B T H h"], kernel_HhD: Kernel) -> Float[Array, "B T D"]:
    """Project the heads' outputs back to the residual stream; computes in x's dtype."""
    if isinstance(kernel_HhD, Projection):
        return kernel_HhD(x_BTHh)
    return jnp.einsum("bthk,hkd->btd", x_BTHh, kernel_HhD.astype(x_BTHh.dtype))


def swiglu(
    x: Float[Array, "*N D"],
    gate: Float[Array, "D F"] | Projection,
    up: Float[Array, "D F"] | Projection,
    down: Float[Array, "F D"] | Projection,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
) -> Float[Array, "*N D"]:
    """Gated feed-forward layer (silu(x gate) * (x up)) down without biases, or of another activation than SiLU.

    SwiGLU is eq. 6 of Shazeer (2020), GeGLU, of GELU, eq. 5.
    """
    gate, up, down = (kernel.astype(x.dtype) for kernel in (gate, up, down))
    gated, raised = checkpoint_name(x @ gate, "gate_up"), checkpoint_name(x @ up, "gate_up")
    return (activation(gated) * raised) @ down


# Modules: they declare parameters and call the functions.


class Weight(nn.Module):
    """One float32 kernel whose first `fan_in` axes are contracted; initial variance scale^2 / (their product)."""

    shape: tuple[int, ...]
    fan_in: int = 1
    scale: float = 1.0

    @nn.compact
    def __call__(self) -> Kernel:
        """Return the parameter."""
        return self.param("kernel", _kernel_init(self.shape, self.fan_in, self.scale), self.shape, jnp.float32)


def _kernel_init(shape: tuple[int, ...], fan_in: int, scale: float) -> Callable[..., jax.Array]:
    axes = tuple(range(len(shape)))
    return nn.initializers.variance_scaling(
        scale**2, "fan_in", "truncated_normal", in_axis=axes[:fan_in], out_axis=axes[fan_in:]
    )


class HeadProjection(nn.Module):
    """A kernel [D, H, h] and, if asked for, a bias [H, h] that starts at zero and a norm's gain [H, h] at `gain`."""

    shape: tuple[int, int, int]
    scale: float = 1.0
    bias: bool = False
    gain: float | None = None

    @nn.compact
    def __call__(self) -> dict[str, Kernel]:
        """Return the parameters by name."""
        made: Kernel = self.param("kernel", _kernel_init(self.shape, 1, self.scale), self.shape, jnp.float32)
        found = {"kernel": made}
        if self.bias:
            found["bias"] = self.param("bias", nn.initializers.zeros, self.shape[1:], jnp.float32)
        if self.gain is not None:
            init = nn.initializers.constant(self.gain)
            found["gain"] = self.param("gain", init, self.shape[1:], jnp.float32)
        return found


class Vector(nn.Module):
    """One vector [size] that starts at `value`: a norm's gain, a bias, the logits of attention sinks."""

    size: int
    kind: str = "gain"
    value: float = 1.0

    @nn.compact
    def __call__(self) -> dict[str, Float[Array, " size"]]:
        """Return the parameter by its kind."""
        init = nn.initializers.constant(self.value)
        return {self.kind: self.param(self.kind, init, (self.size,), jnp.float32)}


class Table(nn.Module):
    """The embedding table: float32 [V, D], normal with standard deviation scale / sqrt(D)."""

    shape: tuple[int, int]
    scale: float = 1.0

    @nn.compact
    def __call__(self) -> Float[Array, "V D"]:
        """Return the table."""
        init = nn.initializers.normal(self.scale / sqrt(self.shape[1]))
        return self.param("table", init, self.shape, jnp.float32)


class Norm(nn.Module):
    """RMSNorm whose gain starts at one, the config's offset added."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Normalise the last axis."""
        init = nn.initializers.constant(1.0 - self.config.gain_offset)
        return self.config.norm(x, self.param("gain", init, (x.shape[-1],), jnp.float32))


class Attention(nn.Module):
    """Causal self-attention with rotary positions, of grouped queries or through latents.

    `axis` is the mesh axis that splits the heads. If `packed`, see `Decoder`, attention stays within documents.
    """

    config: TransformerConfig
    attend: Attend | None = None
    axis: str | None = None
    packed: bool = False

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "B T"], form: LayerForm
    ) -> Float[Array, "B T D"]:
        """Mix tokens; token t reads tokens 0..t, or those of its window, in the order of the axis T."""
        c, d, scale = self.config, self.config.width, self.config.init_scale
        params = self._latent() if c.latent.kv_rank else self._grouped()
        output_HvD = Weight((c.heads, c.value_size, d), fan_in=2, scale=scale * c.residual_scale, name="output")()
        given = params, x_BTD, positions_BT, c, form
        projected = project_latent(*given) if c.latent.kv_rank else project_qkv(*given, self.axis)
        q_BTHh, k_BTKh, v_BTKv = (checkpoint_name(x, "qkv") for x in projected)
        sinks_H = Vector(c.heads, "logit", 0.0, name="sinks")()["logit"] if c.sinks else None
        window = packed_window(positions_BT, form.window) if self.packed else form.window
        how = AttentionForm(window, sinks_H, c.score_scale, c.attention_softcap)
        y_BTHv = checkpoint_name((self.attend or c.attend)(q_BTHh, k_BTKh, v_BTKv, how), "attended")
        if c.latent.absorbed:
            y_BTHv = jnp.einsum("bthr,rhv->bthv", y_BTHv, params["value_up"]["kernel"].astype(y_BTHv.dtype))
        y_BTD = from_heads(y_BTHv, output_HvD)
        if c.output_bias:
            bias_D = Vector(d, "bias", 0.0, name="output_bias")()["bias"].astype(y_BTD.dtype)
            if self.axis is not None:  # partial results are summed over the axis: one device adds it
                bias_D = jnp.where(jax.lax.axis_index(self.axis) == 0, bias_D, 0)
            y_BTD += bias_D[None, None]
        return y_BTD

    def _grouped(self) -> PyTree:
        c, h = self.config, self.config.head_size
        whole, first = c.qk_norm and c.qk_norm_scope == "projection", 1.0 - c.gain_offset
        params: PyTree = {
            name: HeadProjection(
                (c.width, heads, h), c.init_scale, c.qkv_bias, first if whole and name != "value" else None, name=name
            )()
            for name, heads in (("query", c.heads), ("key", c.kv_size), ("value", c.kv_size))
        }
        if c.qk_norm and not whole:
            params |= {name: Vector(h, value=first, name=name)() for name in ("query_norm", "key_norm")}
        return params

    def _latent(self) -> PyTree:
        c = self.config
        shapes, gains = c.latent.shapes(c.width, c.heads)
        params = {name: {"kernel": Weight(shape, scale=c.init_scale, name=name)()} for name, shape in shapes.items()}
        return params | {name: Vector(size, name=name)() for name, size in gains.items()}


class SwiGLU(nn.Module):
    """The dense feed-forward layer, with SiLU or another function of the gate."""

    config: TransformerConfig
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Transform every token by itself."""
        c = self.config
        d, f, scale = c.width, c.ff_size, c.init_scale
        gate_DF = Weight((d, f), scale=scale, name="gate")()
        up_DF = Weight((d, f), scale=scale, name="up")()
        down_FD = Weight((f, d), scale=scale * c.residual_scale, name="down")()
        return swiglu(x_BTD, gate_DF, up_DF, down_FD, self.activation)


def routed(config: TransformerConfig, name: str, axes: ExpertAxes = ONE_DEVICE) -> nn.Module:
    """Routed experts in place of the dense feed-forward layer; `axes` are the mesh axes that split them."""
    c, width = config, config.moe.width_of(config.ff_size)
    return MoE(c.moe, c.width, width, c.init_scale, c.residual_scale, causal=True, axes=axes, name=name)


# A feed-forward layer is a module made from the config that maps [B, T, D] to [B, T, D]. What it sows into the
# collection "intermediates" (auxiliary losses, loads) comes out stacked by layer.
MLPS: dict[str, Callable[..., nn.Module]] = {
    "swiglu": SwiGLU,
    # Gemma's GeGLU, of GELU's approximation by tanh.
    "geglu_tanh": functools.partial(SwiGLU, activation=functools.partial(jax.nn.gelu, approximate=True)),
    "routed": routed,
}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Block(nn.Module):
    """One block; returns (activations, None) as a scan over layers wants it.

    `constrain` is called where a layer begins (with `INSIDE`) and on what it adds to the residual stream (`RESIDUAL`);
    under tensor parallelism the latter is where partial sums are added up. S is T, or a device's part of it where the
    residual stream is split along time. `expert_axes` are the mesh axes that split routed experts; that of their width
    splits the heads too. If `packed`, see `Decoder`, attention stays within documents and no expert gets padding.
    """

    config: TransformerConfig
    constrain: Constrain = unconstrained
    attend: Attend | None = None
    mlp: str = ""
    expert_axes: ExpertAxes = ONE_DEVICE
    packed: bool = False

    @nn.compact
    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        positions_BT: Int[Array, "B T"],
        tokens_BT: Int[Array, "B T"] | None = None,
        form: LayerForm | None = None,
    ) -> tuple[Float[Array, "B S D"], None]:
        """Add attention, then the feed-forward layer, to the residual stream.

        Args:
          x_BSD: the stream.
          positions_BT: rotary positions.
          tokens_BT: token ids, for hash routing.
          form: of the layer's attention; None is the config's first layer's.
        """
        c, constrain = self.config, self.constrain
        x_BSD = checkpoint_name(x_BSD, "residual")
        mlp = self.mlp or c.mlp

        def added(name: str, x_BSD: jax.Array, layer: Callable[[jax.Array], jax.Array]) -> jax.Array:
            if c.norm_position != "post":
                x_BSD = Norm(c, name=f"{name}_norm")(x_BSD)
            y_BSD = constrain(layer(constrain(x_BSD, INSIDE)), RESIDUAL)
            if c.norm_position != "pre":
                y_BSD = Norm(c, name=f"{name}_post_norm" if c.norm_position == "both" else f"{name}_norm")(y_BSD)
            return checkpoint_name(y_BSD, name)

        attend = Attention(c, self.attend, self.expert_axes.width, self.packed, name="attention")
        x_BSD += added("attention", x_BSD, lambda y_BTD: attend(y_BTD, positions_BT, form or c.form(0)))
        feed: Callable[..., jax.Array]
        if mlp == "routed":
            mask_BT = positions_BT >= 0 if self.packed else None
            feed = functools.partial(routed(c, "mlp", self.expert_axes), mask_BT=mask_BT, tokens_BT=tokens_BT)
        else:
            feed = MLPS[mlp](c, name="mlp")
        return x_BSD + added("mlp", x_BSD, feed), None


class Unit(nn.Module):
    """The blocks of one `TransformerConfig.pattern`, `mlps`, as one step of a scan."""

    config: TransformerConfig
    constrain: Constrain = unconstrained
    attend: Attend | None = None
    mlps: tuple[str, ...] = ()
    packed: bool = False

    @nn.compact
    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        positions_BT: Int[Array, "B T"],
        tokens_BT: Int[Array, "B T"] | None = None,
        forms: LayerForm | None = None,
    ) -> tuple[Float[Array, "B S D"], None]:
        """Run the blocks in order."""
        for i, mlp in enumerate(self.mlps):
            block = Block(self.config, self.constrain, self.attend, mlp, packed=self.packed, name=f"layer_{i}")
            x_BSD, _ = block(x_BSD, positions_BT, tokens_BT, form_of(forms, i))
        return x_BSD, None


def form_of(forms: LayerForm | None, index: Any) -> LayerForm | None:
    """One layer's form of several."""
    return None if forms is None else LayerForm(*(leaf[index] for leaf in forms))


class Decoder(nn.Module):
    """Tokens to next-token logits.

    The embedding table starts with variance 1 / D, so that tied logits start at unit scale. What is looked up is not
    multiplied by sqrt(D) as in Vaswani et al. (2017), section 3.4, unless `embed_scale` says so: the residual stream
    would then point at the token just read, which tied logits predict at first (8.1 instead of 5.7 nats at D = 128, V =
    256).
    """

    config: TransformerConfig
    constrain: Constrain = unconstrained
    attend: Attend | None = None

    @nn.compact
    def __call__(
        self, tokens_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"] | None = None, logits: bool = True
    ) -> Float[Array, "B T V"] | tuple[Float[Array, "B T D"], Float[Array, "D V"]]:
        """Compute the logits.

        Args:
          tokens_BT: token ids in 0..V-1; another id gives NaN from its position on.
          positions_BT: default 0..T-1 in every row. Where documents are packed into rows, they restart at 0 in every
            document, at whose boundaries attention stops, and are -1 for padding.
          logits: False stops before them, for a loss that computes them in chunks (`sharding.linear_cross_entropy`).

        Returns:
          float32 logits; row t predicts token t + 1 and depends on tokens 0..t only. Without `logits` the normalized
          inputs of the output layer and its kernel.
        """
        c, packed = self.config, positions_BT is not None
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
        table_VD = Table((c.vocab_size, c.width), c.init_scale, name="embed")()
        known_BT = (tokens_BT >= 0) & (tokens_BT < c.vocab_size)  # as `sharding.lookup` of a plan
        x_BTD = jnp.where(known_BT[..., None], table_VD[tokens_BT], jnp.nan)
        x_BTD = self.constrain(c.embedded(x_BTD.astype(DTYPES[c.dtype])), RESIDUAL)
        x_BTD = run_blocks(self, x_BTD, positions_BT, tokens_BT, packed)
        x_BTD = self.constrain(Norm(c, name="final_norm")(x_BTD), INSIDE)
        head_DV: Any = table_VD.T if c.tied else Weight((c.width, c.vocab_size), scale=c.init_scale, name="head")()
        if not logits:
            return x_BTD, head_DV
        return self.constrain(c.logits(x_BTD, head_DV), ("batch", "time", "vocab"))


@functools.lru_cache(maxsize=16)  # a plan is checked many times, its shapes made once
def param_shapes(config: TransformerConfig) -> PyTree:
    """Shapes of a decoder's parameters; nothing is allocated."""
    model, tokens = Decoder(config, attend=attention), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def run_blocks(
    decoder: Decoder,
    x_BTD: Float[Array, "B T D"],
    positions_BT: Int[Array, "B T"],
    tokens_BT: Int[Array, "B T"],
    packed: bool,
) -> Float[Array, "B T D"]:
    """Run all blocks with activation checkpointing (`TransformerConfig.remat`), inside the decoder's compact method.

    One block after the other, or one `lax.scan` for every group of layers with the same policy.

    Raises:
      ValueError: groups of scanned layers with routed experts, whose metrics would be stacked apart.
    """
    c = decoder.config
    options = (c, decoder.constrain, decoder.attend)

    def scan(stack: Stack, group: Remat, x_BTD: jax.Array, start: int = 0) -> jax.Array:
        single, end = len(stack.pattern) == 1, start + group.layers // len(stack.pattern)
        unit, mlp = (Block, stack.pattern[0]) if single else (Unit, stack.pattern)
        forms = form_of(c.forms(stack), (slice(start, end), 0) if single else slice(start, end))
        layers = nn.scan(
            checkpointed(unit, group, scanned=True),
            variable_axes={"params": 0, "intermediates": 0, "routings": 0, "balance": 0},
            split_rngs={"params": True, "router": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=end - start,
        )
        return layers(*options, mlp, packed=packed, name=stack.name)(x_BTD, positions_BT, tokens_BT, forms)[0]

    for stack in c.stacks:
        groups, start = c.groups(stack), 0
        if not c.scan:
            block = checkpointed(Block, groups[0], scanned=False)
            form = form_of(c.forms(stack), (0, 0))
            block = block(*options, stack.pattern[0], packed=packed, name=stack.name)
            x_BTD, _ = block(x_BTD, positions_BT, tokens_BT, form)
        elif len(groups) == 1 or decoder.is_initializing():
            x_BTD = scan(stack, replace(groups[0], layers=stack.layers), x_BTD)
        elif "routed" in stack.pattern:
            raise ValueError(f"remat={c.remat!r}: groups of layers with routed experts need a plan, or scan=False")
        else:
            for group in groups:
                x_BTD = nn.map_variables(
                    lambda _, x, stack=stack, group=group, start=start: scan(stack, group, x, start),
                    "params",
                    trans_in_fn=layers_of(stack.name, start, start + group.layers),
                )(decoder, x_BTD)
                start += group.layers
    return x_BTD


def checkpointed(block: Callable[..., nn.Module], group: Remat, scanned: bool) -> Callable[..., nn.Module]:
    """The module `block` with activation checkpointing (rematerialization) by a group's policy."""
    if group.base == "none":
        return block
    # Inside a scan XLA cannot merge the recomputation with the forward pass, so the barrier is not needed there.
    return nn.remat(block, policy=group.policy, prevent_cse=not scanned)
