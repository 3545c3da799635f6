"""Weighted combine in the Hopper kernel by TMA reductions (atomic additions in L2): fast, not deterministic.

A row of the product is added to its token's row by copies of 128 bytes, 32 float32 columns, from SMEM. The order of a
token's rows differs from run to run, and with it the last bits of the sum. The deterministic combine is a pass after
the kernel (`moe.kernels.xla.ragged.combine`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.hopper.gather import spread
from moe.kernels.hopper.ring import chunk
from moe.kernels.hopper.store import SLOTS
from moe.kernels.spec import GroupedOperands, GroupedSpec

# Destinations that a warpgroup loads at a time: at least one for each of its threads.
NUMBERS = 128


def scratch(rows: int, *, consumers: int) -> Any:
    """Return the SMEM allocation of the destinations of each warpgroup's rows: (consumers, rows or more) int32."""
    return plgpu.SMEM((consumers, max(rows, NUMBERS)), jnp.int32)


def size(rows: int, *, consumers: int) -> int:
    """Return the bytes of `scratch`."""
    return 4 * consumers * max(rows, NUMBERS)


def inputs(operands: GroupedOperands, tile: int) -> tuple[jax.Array, ...]:
    """Return destinations and, if any, weights, padded by a tile, which the last tile may read."""
    arrays = [operands.tokens.astype(jnp.int32)]  # type: ignore[union-attr]
    if operands.weights is not None:
        arrays.append(operands.weights.astype(jnp.float32))
    return tuple(jnp.pad(array, (0, tile + NUMBERS)) for array in arrays)


def start(spec: GroupedSpec, columns: int) -> Any:
    """Return the output ref of zeros that a kernel adds to, (num_tokens, columns) float32."""
    return jax.new_ref(jnp.zeros((spec.num_tokens, columns), jnp.float32))


def add(
    stage: Any,
    destinations: Any,
    total: Any,
    out: Any,
    tokens: Any,
    weights: Any | None = None,
    *,
    first: Any,
    col: Any,
    begin: Any,
    end: Any,
) -> None:
    """Add one warpgroup's rows to their destination rows.

    Args:
      stage: the float32 staging buffer made by `store.scratch`.
      destinations: the SMEM buffer made by `scratch`.
      total: (rows, cols) float32 accumulators.
      out: (num_tokens, N) float32 in GMEM; additions outside of it are dropped.
      tokens, weights: as made by `inputs`, in GMEM.
      first: number of the first row among all rows, a multiple of 8.
      col: first column.
      begin, end: rows to add.
    """
    (rows, cols), wg, width = total.shape, lax.axis_index("wg"), chunk(jnp.float32)
    numbers = destinations.at[wg]
    row = lax.broadcasted_iota(jnp.int32, numbers.shape, 0)
    mine = jnp.logical_and(row >= begin, row < end)
    # Rows of other groups get a destination out of bounds.
    numbers[...] = jnp.where(mine, tokens[pl.ds(first, numbers.shape[0])], out.shape[0])
    if weights is not None:
        part, layout = weights.at[pl.ds(first, rows)], plgpu.Layout.WGMMA.reduce(1)
        scale = plgpu.load(part, layout=layout, optimized=False)  # type: ignore[call-arg]  # JAX 0.11
    for turn, at in enumerate(range(0, cols, width)):
        buffer = stage.at[wg, turn % SLOTS]
        values = total[:, at : at + width]
        buffer[...] = values if weights is None else values * lax.broadcast_in_dim(scale, values.shape, (0,))
        plgpu.commit_smem()

        def send(at_row, number, buffer=buffer, at=at):
            target = out.at[pl.ds(number, 1), pl.ds(col + at, width)]
            plgpu.copy_smem_to_gmem(buffer.at[pl.ds(at_row, 1)], target, commit_group=False, reduction_op="add")

        spread(numbers, rows, send, last=_commit)


def _commit():
    """Commit this warp's bulk copies, and wait until the previous stage's SMEM slot can be reused."""
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
