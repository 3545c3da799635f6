"""Ragged contraction on Hopper: the weight gradient x^T dy of each group, with rows as the pipeline's steps.

The tile of x is transposed by its wgmma descriptor, without a transposed copy. Rows of another group in a group's first
and last step are set to zero in SMEM, in both operands, because they may be NaN. Thread blocks are pairs on neighboring
columns of x that share the tile of dy. Gathered rows of x are loaded one by one and transposed on their way into
registers (`moe.kernels.hopper.gather`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.hopper import gather, ring, store
from moe.kernels.hopper.ring import ALIGN, Ring, Tile
from moe.kernels.metadata import contraction_steps
from moe.kernels.spec import ContractionOperands, ContractionSpec

CONSUMERS = 2
# Rows of a step, and columns of x (rows of the output) that a tile has: 64 a warpgroup.
STEP, HIGH = 64, 64 * CONSUMERS
# Column tiles of dy that run side by side.
SWATH = 8
# Steps whose row numbers are loaded at a time, for gathered rows.
AHEAD = 8
# Rows of the table of groups.
A, BEGIN, END = range(3)


def contract(operands: ContractionOperands, spec: ContractionSpec, *, interpret: bool) -> jax.Array:
    """Ragged contraction: (G, K, N), zeros for empty groups.

    The rows are a multiple of 8 (those of x unless gathered), K and N of 64.
    """
    x, dy, groups = operands.x, operands.dy, operands.sizes.shape[0]
    k, n = x.shape[1], dy.shape[1]
    cols = min(spec.tiling.cols, n)
    # A tile as long as the array: each group is one step of the metadata, split into steps of the pipeline.
    steps = contraction_steps(operands.sizes, rows=dy.shape[0], tile=dy.shape[0], align=ALIGN)
    table = jnp.stack([steps.a, steps.begin, steps.end])[:, :groups]
    numbers = () if operands.gather is None else (gather.pad(operands.gather, STEP * (AHEAD + 1)),)
    left = Tile((STEP, HIGH), x.dtype)
    if numbers:
        chunks, width = HIGH // ring.chunk(x.dtype), ring.chunk(x.dtype)
        left = Tile((chunks, STEP, width), x.dtype, copies=chunks * STEP, layout=gather.layout(x.dtype))
    tiles = [left, Tile((STEP, cols), x.dtype)]
    other = store.size(HIGH // CONSUMERS, consumers=CONSUMERS) + 4 * STEP * AHEAD * bool(numbers)
    count = ring.stages(tiles, other=other)
    memory = {
        "slots": ring.scratch(tiles, slots=count, consumers=CONSUMERS, pairs=True),
        "stage": store.scratch(HIGH // CONSUMERS, spec.out_dtype, consumers=CONSUMERS),
        "masked": plgpu.Barrier(num_arrivals=CONSUMERS),
    }
    if numbers:
        memory["picked"] = gather.scratch(STEP * AHEAD)
    body = partial(_kernel, cols, (groups, k, n), spec.out_dtype, interpret)
    out = jax.ShapeDtypeStruct((groups, k, n), spec.out_dtype)
    name = "contraction_gathered" if numbers else "contraction"
    options: dict[str, Any] = {"consumers": CONSUMERS, "pairs": True, "interpret": interpret, "name": name}
    call = ring.launch(body, [out], memory, **options)
    return call(table, x, dy, *numbers)[0]


def _kernel(cols, sizes, dtype, interpret, table, x, dy, *refs, slots, stage, masked, picked=None):
    (groups, k, n), out = sizes, refs[-1]
    wg, mine = lax.axis_index("wg"), HIGH // CONSUMERS
    row_pairs, column_tiles = -(-k // (2 * HIGH)), -(-n // cols)

    def plan(t):
        group = lax.div(t, jnp.int32(row_pairs * column_tiles))
        inside = t - group * (row_pairs * column_tiles)
        i, j = plgpu.planar_snake(inside, (row_pairs, column_tiles), 1, min(SWATH, column_tiles))
        first, begin, end = (table[field, group] for field in (A, BEGIN, END))
        # An empty group has no steps.
        count = jnp.where(end > begin, lax.div(end + STEP - 1, jnp.int32(STEP)), 0)
        return (group, first * ALIGN, begin, end, (2 * i + lax.axis_index(ring.PAIR)) * HIGH, j * cols), count

    def load(where, i, slot, barrier):
        _, first, _, _, row, col = where
        at = pl.ds(first + i * STEP, STEP)
        if picked is None:
            plgpu.copy_gmem_to_smem(x.at[at, pl.ds(row, HIGH)], slot[0], barrier)
        else:
            step = lax.rem(i, jnp.int32(AHEAD))
            pl.when(step == 0)(partial(gather.begin, picked, refs[0], first + i * STEP))
            gather.load(x, picked, row, slot[0], barrier, skip=step * STEP)
        plgpu.copy_gmem_to_smem(dy.at[at, pl.ds(col, cols)], slot[1], barrier, collective_axes=ring.PAIR)

    def multiply(totals, where, i, slot):
        begin, end = (bound - i * STEP for bound in where[2:4])

        @pl.when(jnp.logical_or(begin > 0, end < STEP))
        def _mask():
            for turn, buffer in enumerate(slot):
                # Each warpgroup masks one operand; both are read by both.
                pl.when(wg == turn)(partial(_zero_outside, buffer, begin, end))
            ring.meet(masked)

        left = slot[0].at[:, pl.ds(wg * mine, mine)] if picked is None else slot[0].at[wg]
        left = left.transpose((1, 0))
        if picked is not None and not (interpret and "registers" in ring.LACKING):
            left = gather.read(left)
        plgpu.wgmma(totals[0], left, slot[1])

    def finish(where, sums):
        group, _, _, _, row, col = where

        def place(r, c, height, width):
            return out.at[group, pl.ds(row + wg * mine + r, height), pl.ds(col + c, width)]

        store.write(stage, sums, [place], list, dtype=dtype)

    work: dict[str, Any] = {"plan": plan, "load": load, "multiply": multiply, "finish": finish}
    work |= {"consumers": CONSUMERS, "sums": [(mine, cols)], "registers": picked is not None}
    ring.run(Ring(*slots), jnp.int32(groups * row_pairs * column_tiles), **work)


def _zero_outside(ref, begin, end):
    """Zero the rows outside [begin, end), a chunk of columns at a time: the accumulators leave few registers."""
    shape = STEP, ring.chunk(ref.dtype)
    row = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, shape, 0), plgpu.Layout.WGMMA)
    inside = jnp.logical_and(row >= begin, row < end)
    chunks = range(ref.shape[0]) if len(ref.shape) == 3 else range(0, ref.shape[1], shape[1])
    for at in chunks:
        here = ref.at[at] if len(ref.shape) == 3 else ref.at[:, pl.ds(at, shape[1])]
        here[...] = jnp.where(inside, here[...], jnp.zeros(shape, ref.dtype))
    plgpu.commit_smem()
