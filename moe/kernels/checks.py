"""Checks of the kernels' arguments: dtypes while tracing; values at once outside jit, and by checkify inside.

Inside jit values are checked where the environment variable TESSERA_CHECKIFY is set while a program is traced.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Int

DTYPES = ("bfloat16", "float16", "float32")


def multiplied(dtype: Any, what: str) -> None:
    """Check that the kernels multiply a dtype: sums are float32, so wider, complex and integer ones would be wrong.

    Raises:
      TypeError: naming the array.
    """
    if jnp.dtype(dtype).name not in DTYPES:
        raise TypeError(
            f"{what} is {jnp.dtype(dtype).name}: the kernels multiply {', '.join(DTYPES)} with float32 sums; cast it"
        )


def fixed(**arrays: Any) -> None:
    """Check that shapes are numbers: tiles are cut for a shape while tracing.

    Raises:
      ValueError: naming the array with a symbolic dimension (`jax.export`).
    """
    for what, array in arrays.items():
        if not all(isinstance(size, int) for size in array.shape):
            raise ValueError(
                f"{what} has shape {array.shape}: the kernels need sizes that are numbers; export a program for each"
            )


def numbers(array: Array, what: str) -> None:
    """Check that an array of sizes or of row numbers has an integer dtype.

    Raises:
      TypeError: naming the array.
    """
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{what} is {array.dtype}: integers are needed")


def sizes(sizes_G: Int[Array, " G"]) -> None:
    """Check that no group has a negative number of rows.

    Raises:
      ValueError: outside jit; inside, `jax.experimental.checkify` finds it if asked for (TESSERA_CHECKIFY), and without
        that nothing does.
    """
    _require(
        jnp.all(sizes_G >= 0), "group_sizes has a negative size, {least}: 0 or more is needed", least=sizes_G.min()
    )


def within(numbers_M: Int[Array, " M"], below: int, sizes_G: Int[Array, " G"], what: str) -> None:
    """Check the row numbers of the rows in groups: [0, below); the others are not used. Raises as `sizes` does."""
    used_M = jnp.where(live(numbers_M.shape[0], sizes_G), numbers_M, 0)
    message = what + f" has row numbers from {{least}} to {{most}}: [0, {below}) is needed"
    least, most = used_M.min(), used_M.max()
    _require((least >= 0) & (most < below), message, least=least, most=most)


def live(rows: int, sizes_G: Int[Array, " G"]) -> Array:
    """Return for each row whether a group has it: those past the sum of the sizes may hold anything."""
    return jnp.arange(rows) < jnp.sum(sizes_G)


def _require(holds: Array, message: str, **values: Array) -> None:
    if isinstance(holds, jax.core.Tracer):
        # A check is an effect of the program, which a scan of layers (flax's lifted scan, under JAX 0.12) refuses.
        if os.environ.get("TESSERA_CHECKIFY"):
            checkify.debug_check(holds, message, **values)
    elif not holds:
        raise ValueError(message.format(**values))
