"""Gathered rows of x on TPUs: one DMA per row from HBM to VMEM, a step ahead (double buffering).

DMAs address single rows of 32-bit arrays only, so 16-bit rows are packed into uint32: in every tile of the contraction
the first half of the columns is in the low bits and the second half in the high bits. Packing reads and writes the
tokens once, unpermuted.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe.kernels.tpu.tiles import LARGE, SUBLANES, Tiles, round_up

A, BEGIN, END, LIVE, NEXT = 0, 3, 4, 5, 6
# Rows per loop iteration (unrolling), for instruction-level parallelism.
RUN = 8


def fits(x_TK: jax.Array, tiles: Tiles) -> bool:
    """Whether two tiles of full rows fit in VMEM."""
    row = tiles.grid[1] * tiles.k * x_TK.dtype.itemsize
    return 2 * tiles.m * row <= LARGE // 3


def shorten(x_TK: jax.Array, tiles: Tiles) -> Tiles:
    """Halve the rows of a tile until they fit, down to 128."""
    while not fits(x_TK, tiles) and tiles.m >= 256:
        tiles = replace(tiles, m=round_up(tiles.m // 2, SUBLANES))
    return tiles


def numbers(values_M: jax.Array, tiles: Tiles, below: int | None = None) -> jax.Array:
    """Reshape a number per row to row tiles: (tiles, 1, rows of a tile), for SMEM blocks of one tile.

    Row numbers are clipped to [0, below): DMAs are not bounds-checked.
    """
    values_M = values_M if below is None else jnp.clip(values_M, 0, below - 1)
    return jnp.pad(values_M, (0, -values_M.shape[0] % tiles.m)).reshape(-1, 1, tiles.m)


def numbers_spec(tiles: Tiles, step_axis: int, field: int = A) -> pl.BlockSpec:
    """Return the block spec of `numbers` of the current step, or for NEXT of the following one."""
    block = (None, 1, tiles.m)
    return pl.BlockSpec(block, lambda *at: (at[3][field, at[step_axis]], 0, 0), memory_space=pltpu.SMEM)


def pack(x_TK: jax.Array, tile: int) -> jax.Array:
    """Pad K to a multiple of the tile, and pack 16-bit dtypes into uint32 (T, K / 2)."""
    x_TK = jnp.pad(x_TK, [(0, 0), (0, -x_TK.shape[1] % tile)])
    if x_TK.dtype.itemsize == 4:
        return x_TK
    halves = jax.lax.bitcast_convert_type(x_TK, jnp.uint16).reshape(x_TK.shape[0], -1, 2, tile // 2).astype(jnp.uint32)
    return (halves[:, :, 0] | halves[:, :, 1] << 16).reshape(x_TK.shape[0], -1)


def scratch(packed: jax.Array, tiles: Tiles) -> list:
    """Return the VMEM allocation of two tiles of full rows, by runs for cheap addressing, with a semaphore each."""
    shape = 2, tiles.m // RUN, RUN, packed.shape[1]
    return [pltpu.VMEM(shape, packed.dtype), pltpu.SemaphoreType.DMA((2,))]


def runs(steps, step) -> tuple[jax.Array, jax.Array]:
    """Return the range of runs of `RUN` rows that cover a step's rows; empty for steps with live 0."""
    first, last = (jax.lax.div(row, RUN) for row in (steps[BEGIN, step], steps[END, step] + RUN - 1))
    return first, jnp.where(steps[LIVE, step] > 0, last, first)


def advance(x, picked, steps, buffers, s, count) -> None:
    """Start the DMAs of the next step's rows and wait for those of step s of `count`; to be called once a step.

    `picked` are the `numbers` of this step and of the next. The first step of a column tile starts its own, so that
    column tiles are independent and may run on different cores.
    """
    buffer, semaphores = buffers

    def send(step, numbers):
        slot = jax.lax.rem(step, 2)

        def some(i, _):
            for j in range(RUN):
                one = x.at[pl.ds(numbers[0, i * RUN + j], 1)], buffer.at[slot, i, pl.ds(j, 1)]
                pltpu.make_async_copy(*one, semaphores.at[slot]).start()
            return 0

        jax.lax.fori_loop(*runs(steps, step), some, 0)

    pl.when(s == 0)(lambda: send(s, picked[0]))
    pl.when(s + 1 < count)(lambda: send(s + 1, picked[1]))

    def wait(_, carry):
        # A wait counts bytes, here of a run, whatever the source.
        slot = jax.lax.rem(s, 2)
        run = buffer.at[slot, 0]
        pltpu.make_async_copy(run, run, semaphores.at[slot]).wait()
        return carry

    jax.lax.fori_loop(*runs(steps, s), wait, 0)


def read(buffers, tiles: Tiles, dtype, s, k) -> jax.Array:
    """Read this step's rows of contraction tile k, (rows, K tile); rows of other steps are undefined."""
    buffer, slot = buffers[0], jax.lax.rem(s, 2)
    width = tiles.k if dtype.itemsize == 4 else tiles.k // 2
    packed = buffer[slot, :, :, pl.ds(pl.multiple_of(k * width, 128), width)].reshape(tiles.m, width)
    if dtype.itemsize == 4:
        return packed
    # A bfloat16 is the upper half of a float32.
    low = jax.lax.bitcast_convert_type(packed << 16, jnp.float32)
    high = jax.lax.bitcast_convert_type(packed & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.concatenate([low, high], axis=1).astype(dtype)
