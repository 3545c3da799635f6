"""The weighted sum of each token's rows on Hopper: in the kernel by TMA reductions, or behind it in a fixed order.

In the kernel a row of the product leaves shared memory as an addition to its token's row: one copy of 128 bytes for 32
float32 columns, which L2 carries out. The order in which a token's rows arrive differs from run to run, and with it
the last bits of the sum. Behind the kernel the rows are gathered and summed in the order they have: the same sum every
time, for a second pass over them.
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

# Row numbers that a warpgroup reads at a time: one for each of its threads, at least.
NUMBERS = 128


def scratch(rows: int, *, consumers: int) -> Any:
    """Where each warpgroup keeps the destinations of its rows: (consumers, rows or more) int32."""
    return plgpu.SMEM((consumers, max(rows, NUMBERS)), jnp.int32)


def size(rows: int, *, consumers: int) -> int:
    """Bytes that `scratch` takes."""
    return 4 * consumers * max(rows, NUMBERS)


def inputs(operands: GroupedOperands, tile: int) -> tuple[jax.Array, ...]:
    """Destinations and, if there are any, weights, with a tile behind them: the last tile reads past the end."""
    arrays = [operands.tokens.astype(jnp.int32)]  # type: ignore[union-attr]  # a combine has them
    if operands.weights is not None:
        arrays.append(operands.weights.astype(jnp.float32))
    return tuple(jnp.pad(array, (0, tile + NUMBERS)) for array in arrays)


def start(spec: GroupedSpec, columns: int) -> Any:
    """The output that a kernel adds to: zeros, (num_tokens, columns) float32."""
    return jax.new_ref(jnp.zeros((spec.num_tokens, columns), jnp.float32))


def add(
    stage: Any,
    kept: Any,
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
    """Add one warpgroup's rows to the rows of the output that they belong to.

    Args:
      stage: this kernel's shared memory for results, of float32.
      kept: as made by `scratch`.
      total: (rows, cols) float32 sums.
      out: (num_tokens, N) float32 in device memory; what lies outside is dropped.
      tokens, weights: as made by `inputs`, in device memory.
      first: number of the first row among all rows, a multiple of 8.
      col: first column.
      begin, end: rows that count.
    """
    (rows, cols), wg, width = total.shape, lax.axis_index("wg"), chunk(jnp.float32)
    numbers = kept.at[wg]
    row = lax.broadcasted_iota(jnp.int32, numbers.shape, 0)
    mine = jnp.logical_and(row >= begin, row < end)
    # Rows of others go where there is nothing.
    numbers[...] = jnp.where(mine, tokens[pl.ds(first, numbers.shape[0])], out.shape[0])
    if weights is not None:
        part, layout = weights.at[pl.ds(first, rows)], plgpu.Layout.WGMMA.reduce(1)
        scale = plgpu.load(part, layout=layout, optimized=False)  # type: ignore[call-arg]  # JAX 0.11
    for turn, at in enumerate(range(0, cols, width)):
        buffer = stage.at[wg, turn % SLOTS]
        piece = total[:, at : at + width]
        buffer[...] = piece if weights is None else piece * lax.broadcast_in_dim(scale, piece.shape, (0,))
        plgpu.commit_smem()

        def send(at_row, number, buffer=buffer, at=at):
            target = out.at[pl.ds(number, 1), pl.ds(col + at, width)]
            plgpu.copy_smem_to_gmem(buffer.at[pl.ds(at_row, 1)], target, commit_group=False, reduction_op="add")

        spread(numbers, rows, send, last=_sent)


def _sent():
    """Each warp, for the copies that it began: the slot of the chunk to come, the one before this, has been read."""
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
