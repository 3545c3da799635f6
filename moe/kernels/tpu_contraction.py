"""Ragged contraction on TPUs (weight gradients): body two of the family, with the steps innermost."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe.kernels.implementations import struct
from moe.kernels.metadata import contraction_steps
from moe.kernels.spec import ContractionOperands, ContractionSpec
from moe.kernels.tpu_grouped import BEGIN, END, LIVE, OUT, A, precision, step_table
from moe.kernels.tpu_plan import SUBLANES, Tiles, fit, round_up, split


def contract(operands: ContractionOperands, spec: ContractionSpec, *, interpret: bool):
    """Ragged contraction: (G, K, N), zeros for empty groups.

    A gathered x is permuted first: its tile is cut in both directions, and fetching parts of rows once per tile of the
    output would cost more copies than rows.
    """
    x, dy = operands.x if operands.gather is None else operands.x[operands.gather], operands.dy
    (rows, k), n = x.shape, dy.shape[1]
    # The sums are (k, n) here, so the roles of `fit` are turned: the rows are what is contracted.
    m = round_up(min(spec.tiling.rows, rows), SUBLANES)
    tiles = Tiles(m, split(k, spec.tiling.inner), split(n, spec.tiling.cols), rows, k, n)
    tiles = fit(tiles, x_bytes=x.dtype.itemsize, w_bytes=spec.out_dtype.itemsize + 2, out_bytes=2, weights=1, outs=1)
    steps = contraction_steps(operands.sizes, rows=rows, tile=tiles.m)
    groups = operands.sizes.shape[0]
    return pl.pallas_call(
        partial(_kernel, tiles),
        out_shape=struct((groups, k, n), spec.out_dtype, x),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            in_specs=[
                pl.BlockSpec((tiles.m, tiles.k), lambda k, n, s, t: (t[A, s], k)),
                pl.BlockSpec((tiles.m, tiles.n), lambda k, n, s, t: (t[A, s], n)),
            ],
            out_specs=pl.BlockSpec((None, tiles.k, tiles.n), lambda k, n, s, t: (t[OUT, s], k, n)),
            grid=(tiles.grid[1], tiles.grid[2], steps.count),
            scratch_shapes=[pltpu.VMEM((tiles.k, tiles.n), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * k * n,
            bytes_accessed=rows * (k * tiles.grid[2] + n * tiles.grid[1]) * x.dtype.itemsize
            + groups * k * n * spec.out_dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name="ragged_contraction",
    )(step_table(steps), x, dy)


def _kernel(tiles, steps, x, dy, out, total):
    s, count = pl.program_id(2), pl.num_programs(2)
    group = steps[OUT, s]

    @pl.when((s == 0) | (steps[OUT, jnp.maximum(s - 1, 0)] != group))
    def _begin():
        total[...] = jnp.zeros_like(total)

    @pl.when(steps[LIVE, s] > 0)
    def _multiply():
        def mine(tile):
            row = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0)
            inside = (row >= steps[BEGIN, s]) & (row < steps[END, s])
            return jnp.where(inside, tile.astype(jnp.float32), 0).astype(tile.dtype)

        # Both sides: a row that is not ours may hold NaN in either, and NaN times zero is NaN.
        total[...] += jax.lax.dot_general(
            mine(x[...]),
            mine(dy[...]),
            (((0,), (0,)), ((), ())),
            precision=precision(x.dtype),
            preferred_element_type=jnp.float32,
        )

    @pl.when((s == count - 1) | (steps[OUT, jnp.minimum(s + 1, steps.shape[1] - 1)] != group))
    def _finish():
        out[...] = total[...].astype(out.dtype)
