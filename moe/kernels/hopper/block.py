"""Block-sparse matmul and its gradients on Hopper, with steps made on the host (`moe.kernels.structure`).

Forward and input gradient: an output tile is a row tile by a block column; its live blocks are the pipeline's steps,
shared by a pair of row tiles. Weight gradient: an output tile is a live block, and row tiles are the steps.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.hopper import ring, store
from moe.kernels.hopper.ring import Ring, Tile
from moe.kernels.spec import BlockOperands, BlockSpec

CONSUMERS = 2
# Output columns that run side by side, so that x is read from L2.
SWATH = 8
# Rows of a step of the weight gradient.
STEP = 64


def block_matmul(operands: BlockOperands, spec: BlockSpec, *, interpret: bool) -> jax.Array:
    """Block-sparse matmul: (M, outputs x b); the rows are a multiple of 8."""
    x, steps, b = operands.x, operands.steps, spec.block
    tile, step = spec.tiling.rows, min(spec.tiling.inner, b)
    # Steps of one output are adjacent; an output without live blocks has one with live 0.
    bounds = jnp.searchsorted(steps.o, jnp.arange(spec.outputs + 1, dtype=jnp.int32)).astype(jnp.int32)
    columns = jnp.stack([bounds[:-1], (bounds[1:] - bounds[:-1]) * steps.live[bounds[:-1]]])
    tiles = [Tile((tile, step), x.dtype), Tile((b, step) if spec.transpose else (step, b), x.dtype)]
    memory = _memory(tiles, tile // CONSUMERS, spec.out_dtype, consumers=CONSUMERS, pairs=True)
    body = partial(_matmul, spec, (tile, step))
    out = jax.ShapeDtypeStruct((x.shape[0], spec.outputs * b), spec.out_dtype)
    name = f"block_matmul{'_transposed' if spec.transpose else ''}"
    options: dict[str, Any] = {"consumers": CONSUMERS, "pairs": True, "interpret": interpret, "name": name}
    call = ring.launch(body, [out], memory, **options)
    return call(columns, jnp.stack([steps.a, steps.b]), x, operands.other)[0]


def _matmul(spec, tile, columns, steps, x, blocks, out, *, slots, stage):
    (rows, step), b = tile, spec.block
    wg, mine, parts = lax.axis_index("wg"), rows // CONSUMERS, b // step
    row_pairs = -(-x.shape[0] // (2 * rows))

    def plan(t):
        i, column = plgpu.planar_snake(t, (row_pairs, spec.outputs), 1, min(SWATH, spec.outputs))
        row = (2 * i + lax.axis_index(ring.PAIR)) * rows
        return (row, column, columns[0, column]), columns[1, column] * parts

    def load(where, i, slot, barrier):
        row, _, first = where
        s = first + lax.div(i, jnp.int32(parts))
        at = lax.rem(i, jnp.int32(parts)) * step
        plgpu.copy_gmem_to_smem(x.at[pl.ds(row, rows), pl.ds(steps[0, s] * b + at, step)], slot[0], barrier)
        inner, across = pl.ds(at, step), pl.ds(0, b)
        block = blocks.at[steps[1, s], across, inner] if spec.transpose else blocks.at[steps[1, s], inner, across]
        plgpu.copy_gmem_to_smem(block, slot[1], barrier, collective_axes=ring.PAIR)

    def multiply(totals, where, i, slot):
        del where, i
        right = slot[1].transpose((1, 0)) if spec.transpose else slot[1]
        plgpu.wgmma(totals[0], slot[0].at[pl.ds(wg * mine, mine)], right)

    def finish(where, sums):
        row, column, _ = where

        def place(r, c, height, width):
            return out.at[pl.ds(row + wg * mine + r, height), pl.ds(column * b + c, width)]

        store.write(stage, sums, [place], list, dtype=spec.out_dtype)

    work = {"plan": plan, "load": load, "multiply": multiply, "finish": finish}
    ring.run(Ring(*slots), jnp.int32(row_pairs * spec.outputs), consumers=CONSUMERS, sums=[(mine, b)], **work)


def block_contract(operands: BlockOperands, spec: BlockSpec, *, interpret: bool) -> jax.Array:
    """Weight gradient of the live blocks: (outputs, b, b); the rows are a multiple of 8."""
    x, dy, steps, b = operands.x, operands.other, operands.steps, spec.block
    # Each warpgroup has 64 rows of the block.
    consumers = b // 64
    memory = _memory([Tile((STEP, b), x.dtype)] * 2, 64, spec.out_dtype, consumers=consumers, pairs=False)
    out = jax.ShapeDtypeStruct((spec.outputs, b, b), spec.out_dtype)
    body = partial(_contract, spec, consumers)
    options: dict[str, Any] = {
        "consumers": consumers,
        "pairs": False,
        "interpret": interpret,
        "name": "block_contraction",
    }
    call = ring.launch(body, [out], memory, **options)
    return call(jnp.stack([steps.a, steps.b, steps.o]), x, dy)[0]


def _contract(spec, consumers, steps, x, dy, out, *, slots, stage):
    b, wg = spec.block, lax.axis_index("wg")

    def plan(t):
        return tuple(steps[field, t] for field in range(3)), jnp.int32(-(-x.shape[0] // STEP))

    def load(where, i, slot, barrier):
        a, column, _ = where
        plgpu.copy_gmem_to_smem(x.at[pl.ds(i * STEP, STEP), pl.ds(a * b, b)], slot[0], barrier)
        plgpu.copy_gmem_to_smem(dy.at[pl.ds(i * STEP, STEP), pl.ds(column * b, b)], slot[1], barrier)

    def multiply(totals, where, i, slot):
        del where, i
        plgpu.wgmma(totals[0], slot[0].at[:, pl.ds(wg * 64, 64)].transpose((1, 0)), slot[1])

    def finish(where, sums):
        def place(r, c, height, width):
            return out.at[where[2], pl.ds(wg * 64 + r, height), pl.ds(c, width)]

        store.write(stage, sums, [place], list, dtype=spec.out_dtype)

    work = {"plan": plan, "load": load, "multiply": multiply, "finish": finish}
    ring.run(Ring(*slots), jnp.int32(spec.outputs), consumers=consumers, sums=[(64, b)], **work)


def _memory(tiles, rows, out_dtype, *, consumers, pairs):
    count = ring.stages(tiles, other=store.size(rows, consumers=consumers))
    return {
        "slots": ring.scratch(tiles, slots=count, consumers=consumers, pairs=pairs),
        "stage": store.scratch(rows, out_dtype, consumers=consumers),
    }
