"""The pure functions image networks are made of: convolution, pooling, batch and group normalization.

Axes: B batch, H and W height and width, C channels, I and O channels in and out. Statistics are float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

IMPLEMENTATIONS = ("auto", "conv", "patches")


def conv(
    x_BHWI: Float[Array, "B H W I"],
    kernel_hwIO: Float[Array, "h w I O"],
    stride: int = 1,
    implementation: str = "auto",
) -> Float[Array, "B P Q O"]:
    """Cross-correlation with zeros around the image ("SAME": P = ceil(H / stride), Q likewise).

    Args:
      x_BHWI: images, channels last.
      kernel_hwIO: filters.
      stride: of both directions.
      implementation: "conv" is XLA's convolution; "patches" cuts out the neighbourhood of every pixel and multiplies
        once; "auto" takes "patches" on CPU, where XLA's convolution inside a scan is many times slower (and with a
        kernel per ticket, under vmap, a grouped convolution), and "conv" elsewhere.

    Raises:
      ValueError: an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "auto":
        implementation = "patches" if jax.default_backend() == "cpu" else "conv"
    if implementation == "conv":
        return jax.lax.conv_general_dilated(
            x_BHWI, kernel_hwIO, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    height, width, inputs, outputs = kernel_hwIO.shape
    patches = _patches(x_BHWI, (height, width), stride)
    return patches @ kernel_hwIO.reshape(height * width * inputs, outputs)


def _patches(x_BHWI: Array, window: tuple[int, int], stride: int) -> Array:
    """[B, P, Q, h * w * I]: the neighbourhood of every output pixel."""
    out = [-(-size // stride) for size in x_BHWI.shape[1:3]]
    total = [
        max((n - 1) * stride + side - size, 0) for n, side, size in zip(out, window, x_BHWI.shape[1:3], strict=True)
    ]
    x_BHWI = jnp.pad(x_BHWI, ((0, 0), *((pad // 2, pad - pad // 2) for pad in total), (0, 0)))
    shifted = [
        x_BHWI[:, i : i + (out[0] - 1) * stride + 1 : stride, j : j + (out[1] - 1) * stride + 1 : stride]
        for i in range(window[0])
        for j in range(window[1])
    ]
    return jnp.concatenate(shifted, axis=-1)


def max_pool(x_BHWC: Float[Array, "B H W C"], side: int = 2) -> Float[Array, "B P Q C"]:
    """The largest value of every side x side square; rows and columns that fill no square are left out."""
    b, height, width, channels = x_BHWC.shape
    p, q = height // side, width // side
    tiles = x_BHWC[:, : p * side, : q * side].reshape(b, p, side, q, side, channels)
    return tiles.max((2, 4))


def batch_statistics(x: Float[Array, "*N C"]) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    """Mean and (biased) variance over all axes but the last, float32 (Ioffe & Szegedy 2015, algorithm 1)."""
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    return x.mean(axes), x.var(axes)


def normalise(
    x: Float[Array, "*N C"],
    mean: Float[Array, " C"],
    variance: Float[Array, " C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    eps: float = 1e-5,
) -> Float[Array, "*N C"]:
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, in x's dtype."""
    factor = scale * jax.lax.rsqrt(variance + eps)
    shape = (1,) * (x.ndim - 1) + (-1,)
    return (x * factor.reshape(shape) + (bias - mean * factor).reshape(shape)).astype(x.dtype)


def group_norm(
    x_BHWC: Float[Array, "B H W C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    groups: int,
    eps: float = 1e-5,
) -> Float[Array, "B H W C"]:
    """Every image's channels normalised in `groups` groups: Wu & He 2018 (arXiv:1803.08494), equation 7.

    Raises:
      ValueError: groups do not divide the channels.
    """
    b, height, width, channels = x_BHWC.shape
    if channels % groups:
        raise ValueError(f"{groups} groups do not divide {channels} channels")
    grouped = x_BHWC.astype(jnp.float32).reshape(b, height, width, groups, channels // groups)
    mean = grouped.mean((1, 2, 4), keepdims=True)
    variance = grouped.var((1, 2, 4), keepdims=True)
    flat = ((grouped - mean) * jax.lax.rsqrt(variance + eps)).reshape(x_BHWC.shape)
    shape = (1, 1, 1, -1)
    return (flat * scale.reshape(shape) + bias.reshape(shape)).astype(x_BHWC.dtype)


def cut_group_norm(
    x_BHWC: Float[Array, "B H W C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    size: int,
    left: tuple[int, ...],
    eps: float = 1e-5,
) -> Float[Array, "B H W C"]:
    """`group_norm` where channels that are zero everywhere were cut out: they still count in their group's statistics.

    Args:
      x_BHWC: the channels that are left, in order. scale, bias: theirs.
      size: channels every group had. left: channels left of each group, from 0 to size, C together.

    Raises:
      ValueError: numbers that do not fit.
    """
    _, height, width, channels = x_BHWC.shape
    if sum(left) != channels or min(left) < 0 or max(left) > size:
        raise ValueError(f"groups of {left} channels, once of {size}, do not make {channels} channels")
    group_C = np.repeat(np.arange(len(left)), left)
    member_CG = jnp.asarray(np.eye(len(left), dtype=np.float32)[group_C])
    x, pixels = x_BHWC.astype(jnp.float32), height * width
    mean_BG = x.sum((1, 2)) @ member_CG / (size * pixels)
    centred = x - mean_BG[:, None, None, group_C]
    gone_G = pixels * (size - np.asarray(left, np.float32))
    variance_BG = ((centred**2).sum((1, 2)) @ member_CG + gone_G[None] * mean_BG**2) / (size * pixels)
    shape = (1, 1, 1, -1)
    flat = centred * jax.lax.rsqrt(variance_BG + eps)[:, None, None, group_C]
    return (flat * scale.reshape(shape) + bias.reshape(shape)).astype(x_BHWC.dtype)
