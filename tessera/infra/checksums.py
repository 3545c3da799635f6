"""Checksums of pytrees of arrays, computed where the arrays live and equal under every sharding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


def checksums(tree: PyTree) -> dict[str, list]:
    """Dtype, shape and two 32-bit checksums of each leaf, by path.

    The checksums are integer sums modulo 2^32 of the array's words, plain and weighted by position, so they are equal
    under every sharding and device, and any single altered word changes the first. They are computed where the array
    lives.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {name_of(path): leaf for path, leaf in leaves}
    on_device = {name: leaf for name, leaf in arrays.items() if isinstance(leaf, jax.Array)}
    sums = jax.device_get(_device_sums(on_device))
    sums |= {name: _sums(_words_numpy(np.asarray(leaf)), np) for name, leaf in arrays.items() if name not in on_device}
    return {name: [*signature(leaf), int(sums[name][0]), int(sums[name][1])] for name, leaf in arrays.items()}


def name_of(path: tuple) -> str:
    """A leaf's path as JAX's tree functions give it, as one string: "params/embed/table"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def signature(leaf: Any) -> tuple[str, list[int]]:
    """Dtype and shape of an array, a scalar or a `jax.ShapeDtypeStruct`, as JSON values."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return str(leaf.dtype), list(leaf.shape)


@jax.jit
def _device_sums(arrays: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {name: _sums(_words_jax(array), jnp) for name, array in arrays.items()}


def _sums(words: Any, xp: Any) -> tuple[Any, Any]:
    weights = xp.ones((1,) * words.ndim, np.uint32)
    for axis, size in enumerate(words.shape):
        shape = [1] * words.ndim
        shape[axis] = size
        # Even multipliers far apart: neighbours on any axis get different weights, and every weight is odd.
        multiplier = np.uint32((0x9E3779B2 + 0x3C6EF372 * axis) & 0xFFFFFFFE)
        weights = weights + xp.arange(size, dtype=np.uint32).reshape(shape) * multiplier
    words = words.astype(np.uint32)
    return xp.sum(words, dtype=np.uint32), xp.sum(words * weights, dtype=np.uint32)


def _words_numpy(x: np.ndarray) -> np.ndarray:
    if x.dtype == bool:
        return x.astype(np.uint8)[..., None]
    if _bits(x.dtype) < 8:
        return x.astype(np.int32).astype(np.uint32)[..., None]
    x = np.ascontiguousarray(x).reshape(x.shape)
    return x[..., None].view(f"u{min(x.dtype.itemsize, 4)}")


def _words_jax(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        return x.astype(np.uint8)[..., None]
    if jnp.issubdtype(x.dtype, np.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
        words = jax.lax.bitcast_convert_type(x, np.uint32)
        return words.reshape(*x.shape[:-1], -1)
    bits = _bits(x.dtype)
    if bits < 8:
        return x.astype(np.int32).astype(np.uint32)[..., None]
    words = jax.lax.bitcast_convert_type(x, {8: np.uint8, 16: np.uint16}.get(bits, np.uint32))
    return words if bits > 32 else words[..., None]


def _bits(dtype: Any) -> int:
    """Width of an element: 4 for int4, which NumPy stores in a byte."""
    if jnp.issubdtype(dtype, np.integer):
        return jnp.iinfo(dtype).bits
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, np.floating) else np.dtype(dtype).itemsize * 8
