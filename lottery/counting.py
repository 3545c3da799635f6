"""Exact counts beyond 2**31 where JAX has 32-bit integers only: pairs int32 [..., 2], count = 4096 * high + low.

A layer has fewer than 2**31 weights, so its own counts are plain int32; sums over the layers of a large model are pairs
(up to 2**43). Everything here runs under jit and vmap.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

__all__ = ["as_float", "less", "share", "split", "subtract", "total"]

BITS = 12
LOW = (1 << BITS) - 1


def split(count: int | np.integer | Int[Array | np.ndarray, "..."]) -> Int[Array, "... 2"]:
    """Write counts as pairs (high, low): Python or NumPy int64 of any size, or int32 [...]; pairs [2] stay as they are.

    Example:
      >>> lottery.counting.split(70_000_000_000).tolist()
      [17089843, 3072]
    """
    if isinstance(count, int) or (isinstance(count, np.ndarray | np.integer) and count.dtype != np.int32):
        wide = np.asarray(count, np.int64)
        return jnp.asarray(np.stack([wide >> BITS, wide & LOW], -1), jnp.int32)
    count = jnp.asarray(count)
    return count if count.shape[-1:] == (2,) else jnp.stack([count >> BITS, count & LOW], -1)


def total(counts: Sequence[Int[Array, "..."]]) -> Int[Array, "2"]:
    """Add int32 counts up to a pair.

    Example:
      >>> lottery.counting.total([jnp.full(40, 2**31 - 1)]).tolist(), divmod(40 * (2**31 - 1), 4096)
      ([20971519, 4056], (20971519, 4056))
    """
    flat = jnp.concatenate([jnp.ravel(count) for count in counts])
    return _carry(jnp.sum(split(flat[:, None])[:, 0], axis=0))


def subtract(a: Int[Array, "*#G 2"], b: Int[Array, "*#G 2"]) -> Int[Array, "*G 2"]:
    """Subtract pairs; the difference may be negative, its high part then is.

    Example:
      >>> lottery.counting.subtract(lottery.counting.split(5), lottery.counting.split(4097)).tolist()
      [-1, 4]
    """
    return _carry(a - b)


def less(a: Int[Array, "*#G 2"], b: Int[Array, "*#G 2"]) -> Bool[Array, "*G"]:
    """Compare pairs: a < b.

    Example:
      >>> bool(lottery.counting.less(lottery.counting.split(4095), lottery.counting.split(4096)))
      True
    """
    return subtract(a, b)[..., 0] < 0


def as_float(a: Int[Array, "*G 2"]) -> Float[Array, "*G"]:
    """Convert pairs to float32, exact below 2**24.

    Example:
      >>> float(lottery.counting.as_float(lottery.counting.split(2**40)))
      1099511627776.0
    """
    return a[..., 0].astype(jnp.float32) * (LOW + 1) + a[..., 1].astype(jnp.float32)


def share(fraction: float | Float[Array, ""], count: Int[Array, "..."]) -> Int[Array, "..."]:
    """Compute round(fraction * count), halves to the even number, int32; exact for float32 fractions of 1/64 or more.

    float32 holds no product beyond 2**24. The fraction is read as a multiple of 2**-30, the product is made of four
    16-bit ones.

    Example:
      >>> int(lottery.counting.share(0.5, jnp.int32(2**31 - 3))), round(0.5 * (2**31 - 3))
      (1073741822, 1073741822)
    """
    count = count.astype(jnp.uint32)
    scaled = jnp.round(jnp.asarray(fraction, jnp.float32) * 2.0**30).astype(jnp.uint32)
    a, b, c, d = count >> 16, count & 0xFFFF, scaled >> 15, scaled & 0x7FFF
    low = b * d
    middle = 2 * (a * d) + b * c + (low >> 15)  # in units of 2**15
    result = 2 * (a * c) + ((middle + (1 << 14)) >> 15)
    tie = ((middle & 0x7FFF) == 1 << 14) & ((low & 0x7FFF) == 0)
    return (result - (tie & ((result & 1) == 1)).astype(jnp.uint32)).astype(jnp.int32)


def _carry(pair: Array) -> Array:
    return jnp.stack([pair[..., 0] + (pair[..., 1] >> BITS), pair[..., 1] & LOW], -1)
