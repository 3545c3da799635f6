"""Gathered rows of x, loaded by TMA as a step needs them, without a permuted copy.

Hopper's TMA copies boxes, so every row of a step is a copy of its own, 128 bytes for 64 columns, issued by the four
warps of the producer warpgroup. A row may be written anywhere in a slot only if SMEM tiles have one row, which wgmma
does not read: the consumer warpgroups load rows into registers.

TMA swizzles by the SMEM address, a load into registers by the distance from the start of its part of the slot. Both
agree where that start is a multiple of 8 rows of 128 bytes. So a slot from which a warpgroup loads some of the columns
is stored by chunks of 64 columns, (chunks, rows, 64), with a copy for each chunk of a row.
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
# Rows that a warp loads at a time.
EACH = 8


def layout(dtype: Any) -> tuple[Any, ...]:
    """Return the SMEM layout of a slot: tiles of one row, swizzled like wgmma's against bank conflicts."""
    return plgpu.TilingTransform((1, chunk(dtype))), plgpu.SwizzleTransform(ROW_BYTES)


def scratch(rows: int) -> Any:
    """Return the SMEM allocation of a tile's row numbers: (rows,) int32."""
    return plgpu.SMEM((rows,), jnp.int32)


def pad(gather_M: jax.Array, tile: int) -> jax.Array:
    """Pad row numbers by a tile of zeros, which the last tile may read."""
    return jnp.pad(gather_M.astype(jnp.int32), (0, tile))


def begin(picked: Any, gather: Any, first: Any) -> None:
    """Load the row numbers of the following steps, from row `first` on; called by the producer warpgroup."""
    picked[...] = gather[pl.ds(first, picked.shape[0])]


def load(x: Any, picked: Any, first: Any, slot: Any, barrier: Any, skip: Any = 0) -> None:
    """Load the gathered rows of a slot, from number `skip` on; the barrier counts one arrival for each copy.

    Args:
      x: (T, K) in GMEM.
      picked: row numbers in SMEM.
      first: first column.
      slot: (rows, columns), a copy a row, or (chunks, rows, columns of a chunk), a copy for each chunk of a row.
      barrier: of the slot.
      skip: numbers to pass over.
    """
    (*chunks, rows, width) = slot.shape

    def fetch(row, number):
        for i in range(chunks[0] if chunks else 1):
            to = slot.at[i, pl.ds(row, 1)] if chunks else slot.at[pl.ds(row, 1)]
            plgpu.copy_gmem_to_smem(x.at[pl.ds(number, 1), pl.ds(first + i * width, width)], to, barrier)

    spread(picked, rows, fetch, skip)


def read(rows: Any) -> jax.Array:
    """Load a part of a slot into registers in wgmma's layout of the left operand; a transposed part by LDSM.T."""
    values = plgpu.load(rows, layout=plgpu.Layout.WGMMA, optimized=False)  # type: ignore[call-arg]  # JAX 0.11
    # A fence orders the next TMA write to the slot behind these reads.
    plgpu.commit_smem()
    return values


def spread(
    numbers: Any, rows: int, copy: Callable[[Any, Any], None], skip: Any = 0, last: Callable[[], None] | None = None
) -> None:
    """Distribute copies of single rows over the warps of a warpgroup.

    Args:
      numbers: (skip + rows or more,) int32 in SMEM.
      rows: rows to copy, a multiple of 32.
      copy: (row, its number) -> None; called for rows 0 to rows - 1 with numbers from `skip` on, by one warp each.
      skip: numbers to pass over.
      last: called by each warp after its copies. With it the copies are not in a loop.
    """

    def some(i, _, last=None):
        first = i * WARPS * EACH
        # No loads inside warp_map: all warps read all numbers, and each selects its own.
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
