"""Weight quantization to int8, int4 and fp8 with scales by channel or block, for inference."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

DTYPES = {
    "int8": (jnp.int8, 127.0),
    "int4": (jnp.int4, 7.0),
    "float8_e4m3fn": (jnp.float8_e4m3fn, 448.0),
    "float8_e5m2": (jnp.float8_e5m2, 57344.0),
}


class Quantized(NamedTuple):
    """Quantized weight: values (G, K, N) times scales (G, Q, N), scale q for rows q K/Q to (q+1) K/Q.

    With `channel` (G, K) its rows are divided by one factor each (AWQ: Lin et al. 2023, section 3.2).

    Example:
      >>> import jax.numpy as jnp
      >>> from moe.kernels import Quantized, grouped_matmul
      >>> w = Quantized(jnp.ones((1, 4, 2), jnp.int8), jnp.full((1, 1, 2), 0.5))
      >>> grouped_matmul(jnp.ones((3, 4)), w, jnp.array([3]))[0].tolist()
      [2.0, 2.0]
    """

    values: Num[Array, "G K N"]
    scales: Float[Array, "G Q N"]
    channel: Float[Array, "G K"] | None = None


def quantize(w_GKN: Float[Array, "G K N"], dtype: str = "int8", *, block: int | None = None) -> Quantized:
    """Quantize a weight symmetrically (absmax scaling by output channel or by blocks of K).

    Args:
      w_GKN: weights.
      dtype: "int8", "int4", "float8_e4m3fn" or "float8_e5m2".
      block: rows of K that share a scale; None for one scale per output channel.

    Raises:
      ValueError: an unknown dtype, or a block that does not divide K.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe.kernels import quantize
      >>> quantized = quantize(jnp.array([[[1.0], [-0.5]]]))
      >>> quantized.values.ravel().tolist(), quantized.values.dtype.name
      ([127, -64], 'int8')
    """
    if dtype not in DTYPES:
        raise ValueError(f"quantize to {dtype!r}: choose one of {', '.join(DTYPES)}")
    groups, k, n = w_GKN.shape
    block = k if block is None else block
    if block < 1 or k % block:
        raise ValueError(f"block={block} does not divide K={k}")
    target, largest = DTYPES[dtype]
    w_GQRN = w_GKN.astype(jnp.float32).reshape(groups, k // block, block, n)
    scales_GQN = jnp.max(jnp.abs(w_GQRN), axis=2) / largest
    # A channel of zeros: any scale will do.
    scales_GQN = jnp.where(scales_GQN == 0, 1.0, scales_GQN)
    scaled = jnp.clip(w_GQRN / scales_GQN[:, :, None], -largest, largest)
    values = jnp.round(scaled) if dtype.startswith("int") else scaled
    return Quantized(values.astype(target).reshape(groups, k, n), scales_GQN)


def dequantize(
    values: Num[Array, "G K N"],
    scales: Float[Array, "G Q N"],
    dtype: jax.typing.DTypeLike,
    channel: Float[Array, "G K"] | None = None,
) -> Float[Array, "G K N"]:
    """Compute the weight that a quantized one stands for, in float32, rounded to `dtype`."""
    groups, k, n = values.shape
    blocks = values.astype(jnp.float32).reshape(groups, scales.shape[1], -1, n)
    w_GKN = (blocks * scales[:, :, None]).reshape(groups, k, n)
    return (w_GKN if channel is None else w_GKN / channel[:, :, None]).astype(dtype)
