"""Block-sparse matmul on TPUs and its weight gradient, over live blocks."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe.kernels.implementations import struct
from moe.kernels.metadata import Steps
from moe.kernels.spec import BlockOperands, BlockSpec
from moe.kernels.tpu.grouped import LIVE, OUT, A, B, precision, step_table
from moe.kernels.tpu.tiles import LANES, even, round_up


def block_matmul(operands: BlockOperands, spec: BlockSpec, *, interpret: bool):
    """Block-sparse matmul: (M, outputs x b)."""
    x, blocks, steps = operands.x, operands.other, operands.steps
    if spec.block < LANES:
        blocks, steps = _place(blocks, steps, spec.transpose)
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % LANES)])
    rows, columns = x.shape[0], spec.outputs * spec.block
    m = even(rows, spec.tiling.rows)
    out = pl.pallas_call(
        partial(_matmul, spec.transpose),
        out_shape=struct((rows, round_up(columns, LANES)), spec.out_dtype, x),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            in_specs=[
                pl.BlockSpec((m, LANES), lambda i, s, t: (i, t[A, s])),
                pl.BlockSpec((None, LANES, LANES), lambda i, s, t: (t[B, s], 0, 0)),
            ],
            out_specs=pl.BlockSpec((m, LANES), lambda i, s, t: (i, t[OUT, s])),
            grid=(-(-rows // m), steps.a.shape[0]),
            scratch_shapes=[pltpu.VMEM((m, LANES), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=f"block_matmul{'_transposed' if spec.transpose else ''}",
    )(step_table(steps), x, blocks)
    return out[:, :columns]


def block_contract(operands: BlockOperands, spec: BlockSpec, *, interpret: bool):
    """Weight gradient of the live blocks: (outputs, b, b)."""
    x, dy, steps = operands.x, operands.other, operands.steps
    narrow = spec.block < LANES
    if narrow:
        x, dy = (jnp.pad(v, [(0, 0), (0, -v.shape[1] % LANES)]) for v in (x, dy))
        quarter_S = (steps.a % 2, steps.b % 2)
        steps = steps._replace(a=steps.a // 2, b=steps.b // 2)
    rows = x.shape[0]
    m = even(rows, spec.tiling.rows)
    out = pl.pallas_call(
        partial(_contract, rows, m),
        out_shape=struct((spec.outputs, LANES, LANES), spec.out_dtype, x),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            in_specs=[
                pl.BlockSpec((m, LANES), lambda s, i, t: (i, t[A, s])),
                pl.BlockSpec((m, LANES), lambda s, i, t: (i, t[B, s])),
            ],
            out_specs=pl.BlockSpec((None, LANES, LANES), lambda s, i, t: (t[OUT, s], 0, 0)),
            grid=(steps.a.shape[0], -(-rows // m)),
            scratch_shapes=[pltpu.VMEM((LANES, LANES), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="block_contraction",
    )(step_table(steps), x, dy)
    if not narrow:
        return out
    # Of each 128 by 128 product, the quarter that is the block.
    quarters = out.reshape(spec.outputs, 2, spec.block, 2, spec.block)
    return quarters[jnp.arange(spec.outputs), quarter_S[0], :, quarter_S[1]]


def _place(blocks, steps: Steps, transpose: bool) -> tuple[jax.Array, Steps]:
    """Embed blocks of 64 in zero blocks of 128, one per step, with the steps on the coarser grid.

    The MXU is 128 wide: a block of 64 costs as much as one of 128. Steps with the same o stay adjacent.
    """
    side = blocks.shape[1]
    k, n = (steps.o % 2, steps.a % 2) if transpose else (steps.a % 2, steps.o % 2)
    number = jnp.arange(steps.a.shape[0], dtype=jnp.int32)
    live = jnp.where(steps.live[:, None, None] > 0, blocks[steps.b], 0)
    placed = jnp.zeros((number.shape[0], 2, side, 2, side), blocks.dtype).at[number, k, :, n].set(live)
    steps = steps._replace(a=steps.a // 2, b=number, o=steps.o // 2)
    return placed.reshape(-1, 2 * side, 2 * side), steps


def _matmul(transpose, steps, x, block, out, total):
    s, count = pl.program_id(1), pl.num_programs(1)
    column = steps[OUT, s]

    @pl.when((s == 0) | (steps[OUT, jnp.maximum(s - 1, 0)] != column))
    def _begin():
        total[...] = jnp.zeros_like(total)

    @pl.when(steps[LIVE, s] > 0)
    def _multiply():
        total[...] += jax.lax.dot_general(
            x[...],
            block[...],
            (((1,), (1 if transpose else 0,)), ((), ())),
            precision=precision(x.dtype),
            preferred_element_type=jnp.float32,
        )

    @pl.when((s == count - 1) | (steps[OUT, jnp.minimum(s + 1, steps.shape[1] - 1)] != column))
    def _finish():
        out[...] = total[...].astype(out.dtype)


def _contract(rows, m, steps, x, dy, out, total):
    del steps
    i = pl.program_id(1)

    @pl.when(i == 0)
    def _begin():
        total[...] = jnp.zeros_like(total)

    def mine(tile):
        if rows % m == 0:
            return tile
        row = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0) + i * m
        return jnp.where(row < rows, tile.astype(jnp.float32), 0).astype(tile.dtype)

    total[...] += jax.lax.dot_general(
        mine(x[...]),
        mine(dy[...]),
        (((0,), (0,)), ((), ())),
        precision=precision(x.dtype),
        preferred_element_type=jnp.float32,
    )

    @pl.when(i == pl.num_programs(1) - 1)
    def _finish():
        out[...] = total[...].astype(out.dtype)
