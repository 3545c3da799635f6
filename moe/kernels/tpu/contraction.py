"""Ragged contraction on TPUs (weight gradients), over a grid with the steps innermost."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe.kernels.implementations import struct
from moe.kernels.metadata import contraction_steps
from moe.kernels.spec import ContractionOperands, ContractionSpec
from moe.kernels.tpu import gather
from moe.kernels.tpu.grouped import BEGIN, END, LIVE, NEXT, OUT, A, precision, step_table
from moe.kernels.tpu.tiles import LANES, LARGE, SUBLANES, Tiles, fit, round_up, split


def contract(operands: ContractionOperands, spec: ContractionSpec, *, interpret: bool):
    """Ragged contraction: (G, K, N), zeros for empty groups.

    For gathered rows of x a step loads full rows and multiplies all of K: tiles split N only, so that a row is loaded
    once for each column tile. Rows that do not fit in VMEM (`gather.fits`) are permuted before the kernel.
    """
    x, rows_M = operands.x, operands.gather
    tiles = None if rows_M is None else _full_row_tiles(operands, spec)
    if tiles is None:
        x, rows_M = x if rows_M is None else x[rows_M], None
        tiles = _tiles(x, operands.dy, spec)
    return _launch(x, operands.dy, rows_M, operands.sizes, spec, tiles, interpret)


def _tiles(x, dy, spec):
    (rows, k), n = x.shape, dy.shape[1]
    # The accumulators are (k, n), so the roles in `fit` are exchanged: rows are the contraction.
    m = round_up(min(spec.tiling.rows, rows), SUBLANES)
    tiles = Tiles(m, split(k, spec.tiling.inner), split(n, spec.tiling.cols), rows, k, n)
    return fit(tiles, x_bytes=x.dtype.itemsize, w_bytes=spec.out_dtype.itemsize + 2, out_bytes=2, weights=1, outs=1)


def _full_row_tiles(operands, spec):
    """Choose tiles with all of K in a step and as many columns as fit in VMEM; None if 128 do not."""
    (rows, n), k = operands.dy.shape, operands.x.shape[1]
    m = round_up(min(spec.tiling.rows, rows), SUBLANES)
    inner = min(round_up(spec.tiling.inner, 2 * LANES), round_up(k, 2 * LANES))
    tiles = gather.shorten(operands.x, Tiles(m, inner, split(n, spec.tiling.cols), rows, k, n))
    if not gather.fits(operands.x, tiles):
        return None
    while True:
        cols, height = round_up(tiles.n, LANES), tiles.grid[1] * tiles.k
        sums = height * cols * (4 + 2 * spec.out_dtype.itemsize)
        need = sums + 2 * tiles.m * (height * operands.x.dtype.itemsize + cols * operands.dy.dtype.itemsize)
        # The rest is for temporaries.
        if need <= LARGE * 2 // 3:
            return tiles
        if cols == LANES:
            return None
        tiles = replace(tiles, n=split(n, max(tiles.n // 2, LANES)))


def _launch(x, dy, rows_M, sizes, spec, tiles, interpret):
    (rows, n), k, groups = dy.shape, x.shape[1], sizes.shape[0]
    steps = contraction_steps(sizes, rows=rows, tile=tiles.m)
    gathered = rows_M is not None
    height = tiles.grid[1] * tiles.k if gathered else tiles.k
    x_spec = pl.BlockSpec((tiles.m, tiles.k), lambda k, n, s, t, *_: (t[A, s], k))
    scratch: list[Any] = [pltpu.VMEM((height, tiles.n), jnp.float32)]
    numbers, number_specs = [], []
    if gathered:
        x, x_spec = gather.pack(x, tiles.k), pl.BlockSpec(memory_space=pl.ANY)
        numbers = [gather.numbers(rows_M, tiles, below=x.shape[0])] * 2
        number_specs = [gather.numbers_spec(tiles, 2, field) for field in (A, NEXT)]
        scratch += gather.scratch(x, tiles)
    return pl.pallas_call(
        partial(_kernel, tiles, gathered),
        out_shape=struct((groups, k, n), spec.out_dtype, x),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            in_specs=[*number_specs, x_spec, pl.BlockSpec((tiles.m, tiles.n), lambda k, n, s, t, *_: (t[A, s], n))],
            out_specs=pl.BlockSpec(
                (None, k if gathered else tiles.k, tiles.n), lambda k, n, s, t, *_: (t[OUT, s], k, n)
            ),
            grid=(1 if gathered else tiles.grid[1], tiles.grid[2], steps.count),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=LARGE if gathered else None,
            disable_bounds_checks=gathered,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * k * n,
            bytes_accessed=rows * (k * tiles.grid[2] + n * (1 if gathered else tiles.grid[1])) * dy.dtype.itemsize
            + groups * k * n * spec.out_dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name=f"ragged_contraction{'_gathered' if gathered else ''}",
    )(step_table(steps), *numbers, x, dy)


def _kernel(tiles, gathered, steps, *refs):
    s, count = pl.program_id(2), pl.num_programs(2)
    group = steps[OUT, s]
    picked, (x, dy, out, total, *buffers) = refs[: 2 * gathered], refs[2 * gathered :]
    if gathered:
        gather.advance(x, picked, steps, buffers, s, count)

    @pl.when((s == 0) | (steps[OUT, jnp.maximum(s - 1, 0)] != group))
    def _begin():
        total[...] = jnp.zeros_like(total)

    @pl.when(steps[LIVE, s] > 0)
    def _multiply():
        def mine(tile):
            row = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0)
            inside = (row >= steps[BEGIN, s]) & (row < steps[END, s])
            return jnp.where(inside, tile.astype(jnp.float32), 0).astype(tile.dtype)

        # In both operands: rows of other groups may be NaN, and NaN times zero is NaN.
        right = mine(dy[...])
        for part in range(total.shape[0] // tiles.k):
            left = gather.read(buffers, tiles, dy.dtype, s, part) if gathered else x[...]
            total[part * tiles.k : (part + 1) * tiles.k, :] += jax.lax.dot_general(
                mine(left),
                right,
                (((0,), (0,)), ((), ())),
                precision=precision(dy.dtype),
                preferred_element_type=jnp.float32,
            )

    @pl.when((s == count - 1) | (steps[OUT, jnp.minimum(s + 1, steps.shape[1] - 1)] != group))
    def _finish():
        out[...] = total[: out.shape[0], :].astype(out.dtype)
