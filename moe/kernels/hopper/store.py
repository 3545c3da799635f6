"""Epilogue store of the Hopper kernels: accumulators -> SMEM -> device memory (GMEM) by TMA, 128 bytes a row."""

from collections.abc import Callable, Sequence
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.hopper.ring import ROW_BYTES, chunk

# Stores in flight.
SLOTS = 2


def scratch(rows: int, dtype: Any, *, consumers: int) -> Any:
    """Return the SMEM staging buffer for `rows` rows a warpgroup: (consumers, SLOTS, rows, chunk).

    Tiles of one row, so that a copy may start at any row; swizzled against bank conflicts.
    """
    transforms = plgpu.TilingTransform((1, chunk(dtype))), plgpu.SwizzleTransform(ROW_BYTES)
    return plgpu.SMEM((consumers, SLOTS, rows, chunk(dtype)), dtype, transforms=transforms)


def size(rows: int, *, consumers: int) -> int:
    """Return the bytes of `scratch`."""
    return consumers * SLOTS * rows * ROW_BYTES


def write(
    stage: Any,
    sums: Sequence[Any],
    outs: Sequence[Callable[[Any, Any, int, int], Any]],
    epilogue: Callable[[list[Any]], Sequence[Any]],
    *,
    dtype: Any,
    begin: Any = 0,
    end: Any = None,
) -> None:
    """Store one warpgroup's accumulators.

    Args:
      stage: the staging buffer made by `scratch`.
      sums: (rows, cols) float32 each.
      outs: for each output, a function of (first row, first column, rows, columns), counted within the sums, to the
        part of the output in GMEM.
      epilogue: chunks of the sums -> chunks of the outputs.
      dtype: of the outputs.
      begin, end: rows to write, all by default; a range is one copy for each set bit of its length.
    """
    (rows, cols), wg, width = sums[0].shape, lax.axis_index("wg"), chunk(dtype)
    turn = 0
    # The first slot may still be read by a copy of the previous tile.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for col in range(0, cols, width):
        chunks = epilogue([total[:, col : col + width] for total in sums])
        for out, values in zip(outs, chunks, strict=True):
            buffer = stage.at[wg, turn % SLOTS]
            plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
            buffer[...] = values.astype(dtype)
            plgpu.commit_smem()
            if end is None:
                plgpu.copy_smem_to_gmem(buffer, out(0, col, rows, width))
            else:
                _copy_rows(buffer, out, col, begin, end)
            turn += 1


def _copy_rows(buffer, out, col, begin, end):
    """Copy rows [begin, end): a copy's size is static, so a dynamic length is split into powers of two."""
    rows, width = buffer.shape
    length, row, bit = end - begin, begin, 1 << rows.bit_length() - 1
    while bit:
        size = length & bit

        @pl.when(size != 0)
        def _copy(row=row, bit=bit):
            part = buffer.at[pl.ds(row, bit)]
            plgpu.copy_smem_to_gmem(part, out(row, col, bit, width), commit_group=False)

        row, bit = row + size, bit // 2
    plgpu.commit_smem_to_gmem_group()
