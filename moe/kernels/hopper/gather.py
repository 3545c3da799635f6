"""Rows picked by `gather`, fetched as a step needs them: no permuted copy of the tokens.

Hopper's TMA moves boxes, so every row of a step is a copy of its own, 128 bytes for 64 columns, shared out among the
four warps of the loading warpgroup. A row may land at any place of a slot only if slots are tiles of one row, which
wgmma does not read: the multiplying warpgroups take rows through registers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.hopper.ring import ROW_BYTES, chunk

WARPS = 4
# Rows that a warp fetches at a time.
EACH = 8


def layout(dtype: Any) -> tuple[Any, ...]:
    """Layout of a slot: rows one by one, swizzled as wgmma's tiles are: registers reach it without conflicts."""
    return plgpu.TilingTransform((1, chunk(dtype))), plgpu.SwizzleTransform(ROW_BYTES)


def scratch(rows: int) -> Any:
    """Where a tile's row numbers lie while its steps are loaded: (rows,) int32."""
    return plgpu.SMEM((rows,), jnp.int32)


def pad(gather_M: jax.Array, tile: int) -> jax.Array:
    """Row numbers with a tile of zeros behind them: the last tile reads past the end."""
    return jnp.pad(gather_M.astype(jnp.int32), (0, tile))


def begin(picked: Any, gather: Any, first: Any) -> None:
    """Read the row numbers of the steps that follow, from row `first` on; called by the loading warpgroup."""
    picked[...] = gather[pl.ds(first, picked.shape[0])]


def load(x: Any, picked: Any, columns: Any, slot: Any, barrier: Any, skip: Any = 0) -> None:
    """Fetch as many picked rows as the slot has, from number `skip` on; the barrier counts one arrival a row."""

    def fetch(row, number):
        plgpu.copy_gmem_to_smem(x.at[pl.ds(number, 1), columns], slot.at[pl.ds(row, 1)], barrier)

    spread(picked, slot.shape[0], fetch, skip)


def read(rows: Any) -> jax.Array:
    """A part of a slot, in registers as wgmma takes its left operand; a transposed part is turned on the way."""
    values = plgpu.load(rows, layout=plgpu.Layout.WGMMA, optimized=False)  # type: ignore[call-arg]  # JAX 0.11
    # TMA, which fills the slot next, is ordered behind reads by threads only by a fence.
    plgpu.commit_smem()
    return values


def spread(
    numbers: Any, rows: int, copy: Callable[[Any, Any], None], skip: Any = 0, last: Callable[[], None] | None = None
) -> None:
    """Share out copies of single rows among the warps of a warpgroup.

    Args:
      numbers: (skip + rows or more,) int32 in shared memory.
      rows: how many, a multiple of 32.
      copy: (row, its number) -> None; called for rows 0 to rows - 1 with numbers from `skip` on, by one warp each.
      skip: numbers to pass over.
      last: called by each warp after its copies. With it the copies are not in a loop.
    """

    def some(i, _, last=None):
        first = i * WARPS * EACH
        # A warp on its own reads no memory: the numbers are read by all, and each warp chooses its own.
        read = [[numbers[skip + first + warp * EACH + j] for warp in range(WARPS)] for j in range(EACH)]

        def each(warp):
            for j, of_warps in enumerate(read):
                number = of_warps[0]
                for other in range(1, WARPS):
                    number = jnp.where(warp == other, of_warps[other], number)
                copy(first + warp * EACH + j, number)
            if last is not None:
                last()

        plgpu.warp_map(each)

    turns = rows // (WARPS * EACH)
    if last is None:
        lax.fori_loop(0, turns, some, None)
        return
    for i in range(turns):
        some(i, None, last if i == turns - 1 else None)
