"""From the sums in registers to the output: through shared memory, by TMA, a chunk of 128 bytes a row at a time."""

from collections.abc import Callable, Sequence
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.hopper.ring import ROW_BYTES, chunk

# Chunks on their way out at a time.
SLOTS = 2


def scratch(rows: int, dtype: Any, *, consumers: int) -> Any:
    """What a kernel allocates for results of `rows` rows a warpgroup: (consumers, SLOTS, rows, chunk).

    Tiles of one row, so that a copy may start at any of them; swizzled, so that registers reach it without conflicts.
    """
    transforms = plgpu.TilingTransform((1, chunk(dtype))), plgpu.SwizzleTransform(ROW_BYTES)
    return plgpu.SMEM((consumers, SLOTS, rows, chunk(dtype)), dtype, transforms=transforms)


def size(rows: int, *, consumers: int) -> int:
    """Bytes that `scratch` takes."""
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
    """Write one warpgroup's sums.

    Args:
      stage: this kernel's shared memory for results.
      sums: (rows, cols) float32 each.
      outs: for each output, a function of (first row, first column, rows, columns), counted within the sums, to the
        part of the output in device memory.
      epilogue: chunks of the sums -> chunks of the outputs.
      dtype: of the outputs.
      begin, end: rows to write, all of them by default; a part of them takes up to one copy for each bit of its length.
    """
    (rows, cols), wg, width = sums[0].shape, lax.axis_index("wg"), chunk(dtype)
    turn = 0
    # The first slot may be the last one of the tile before.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for col in range(0, cols, width):
        pieces = epilogue([total[:, col : col + width] for total in sums])
        for out, piece in zip(outs, pieces, strict=True):
            buffer = stage.at[wg, turn % SLOTS]
            plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
            buffer[...] = piece.astype(dtype)
            plgpu.commit_smem()
            if end is None:
                plgpu.copy_smem_to_gmem(buffer, out(0, col, rows, width))
            else:
                _copy_rows(buffer, out, col, begin, end)
            turn += 1


def _copy_rows(buffer, out, col, begin, end):
    """A copy's rows are fixed when the kernel is compiled: a length that is not is made up of powers of two."""
    rows, width = buffer.shape
    length, row, bit = end - begin, begin, 1 << rows.bit_length() - 1
    while bit:
        taken = length & bit

        @pl.when(taken != 0)
        def _copy(row=row, bit=bit):
            part = buffer.at[pl.ds(row, bit)]
            plgpu.copy_smem_to_gmem(part, out(row, col, bit, width), commit_group=False)

        row, bit = row + taken, bit // 2
    plgpu.commit_smem_to_gmem_group()
