"""Grouped matmul on TPUs, over a grid of (column tiles, steps, contraction tiles)."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe.kernels.implementations import struct
from moe.kernels.metadata import matmul_steps
from moe.kernels.quantize import dequantize
from moe.kernels.spec import GroupedOperands, GroupedSpec, swiglu
from moe.kernels.tpu import gather
from moe.kernels.tpu.tiles import LANES, LARGE, SUBLANES, Tiles, fit, round_up, split

# Rows of the step table in scalar memory.
A, B, OUT, BEGIN, END, LIVE, NEXT = range(7)


def precision(dtype) -> jax.lax.Precision | None:
    """Return HIGHEST for float32 operands, which the MXU would round to bfloat16, else None."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def step_table(steps) -> jax.Array:
    """Stack the steps into one (7, S) int32 array for scalar prefetch; its last row is `a` of the following step."""
    after = jnp.append(steps.a[1:], steps.a[-1:])
    return jnp.stack([steps.a, steps.b, steps.o, steps.begin, steps.end, steps.live, after])


def grouped(operands: GroupedOperands, spec: GroupedSpec, *, interpret: bool):
    """Grouped matmul, see `spec.GroupedOperands` and `spec.GroupedSpec`."""
    tiles = _tiles(operands, spec)
    shares = operands.scales[0].shape[1] if operands.scales else 1
    if shares > 1 and (tiles.inner // shares % tiles.k or tiles.k % LANES):
        # A tile of x has whole lanes and one scale: weights with other blocks are dequantized first.
        w = tuple(dequantize(w, s, operands.x.dtype) for w, s in zip(operands.w, operands.scales, strict=True))
        return grouped(operands._replace(w=w, scales=()), spec, interpret=interpret)
    if operands.gather is not None and not gather.fits(operands.x, tiles):
        operands = operands._replace(x=operands.x[operands.gather], gather=None)
        return grouped(operands, spec, interpret=interpret)
    if spec.epilogue == "combine" and not _combine_fits(spec, tiles):
        rows = grouped(
            operands._replace(tokens=None, weights=None),
            replace(spec, epilogue="none", num_tokens=0),
            interpret=interpret,
        )
        return _combine_rows(rows, operands, spec)
    outs = _launch(operands, spec, tiles, shares, interpret)
    return outs if spec.save_residuals else outs[0][: spec.num_tokens or None].astype(spec.out_dtype)


def _tiles(operands, spec):
    """Fit the spec's tiles to the shape and to VMEM; a block of K with one scale has full tiles if possible."""
    k, n = operands.w[0].shape[:0:-1] if spec.transpose else operands.w[0].shape[1:]
    share = k // operands.scales[0].shape[1] if operands.scales else k
    m = round_up(min(spec.tiling.rows, operands.rows), SUBLANES)
    tiles = Tiles(m, split(share, spec.tiling.inner), split(n, spec.tiling.cols), operands.rows, k, n)
    sizes = {"x_bytes": operands.x.dtype.itemsize, "w_bytes": operands.w[0].dtype.itemsize}
    sizes["out_bytes"] = spec.out_dtype.itemsize
    tiles = fit(replace(tiles, inner=share), **sizes, weights=len(operands.w), outs=3 if spec.save_residuals else 1)
    tiles = replace(tiles, inner=k)
    if operands.gather is not None:
        tiles = replace(tiles, k=min(round_up(tiles.k, 2 * LANES), round_up(k, 2 * LANES)))
        tiles = gather.shorten(operands.x, tiles)
    if spec.epilogue == "combine":
        # All destinations of a column tile stay in VMEM over its steps.
        while not _combine_fits(spec, tiles) and tiles.n > LANES:
            tiles = replace(tiles, n=split(n, max(tiles.n // 2, LANES)))
    return tiles


def _combine_fits(spec, tiles):
    # Two buffers of float32.
    return 8 * spec.num_tokens * round_up(tiles.n, LANES) <= LARGE // 2


def _combine_rows(rows_MN, operands, spec):
    """Combine after the kernel by a scatter-add; rows past the sum of the sizes are zero."""
    values = rows_MN.astype(jnp.float32)
    if operands.weights is not None:
        values = values * operands.weights[:, None]
    out = jnp.zeros((spec.num_tokens, rows_MN.shape[1]), jnp.float32)
    return out.at[operands.tokens].add(values).astype(spec.out_dtype)


def _launch(operands, spec, tiles, shares, interpret):
    """Build block specs and scratch, and call the kernel: (out,) or (out, gate, up)."""
    x, count_w, combine = operands.x, len(operands.w), spec.epilogue == "combine"
    steps = matmul_steps(operands.sizes, rows=tiles.rows, tile=tiles.m)
    by_row = {}
    if operands.gather is not None:
        picked = gather.numbers(operands.gather, tiles, below=x.shape[0])
        by_row = {"here": (picked, A), "next": (picked, NEXT)}
    if combine:
        by_row["tokens"] = gather.numbers(operands.tokens, tiles, below=spec.num_tokens), A
    if combine and operands.weights is not None:
        by_row["weights"] = gather.numbers(operands.weights, tiles), A
    x_spec = pl.BlockSpec((tiles.m, tiles.k), lambda n, s, k, t, *_: (t[A, s], k))
    if operands.gather is not None:
        x, x_spec = gather.pack(x, tiles.k), pl.BlockSpec(memory_space=pl.ANY)
    w_spec = pl.BlockSpec((None, tiles.k, tiles.n), lambda n, s, k, t, *_: (t[B, s], k, n))
    if spec.transpose:
        w_spec = pl.BlockSpec((None, tiles.n, tiles.k), lambda n, s, k, t, *_: (t[B, s], n, k))
    per_share = -(-tiles.inner // shares // tiles.k)
    scale_spec = pl.BlockSpec(
        (None, None, 1, tiles.n), lambda n, s, k, t, *_: (t[B, s], jax.lax.div(k, per_share), 0, n)
    )
    scales = [scale[:, :, None] for scale in operands.scales]
    out_spec = pl.BlockSpec((tiles.m, tiles.n), lambda n, s, k, t, *_: (t[OUT, s], n))
    out_shape = struct((tiles.rows, tiles.cols), spec.out_dtype, x)
    if combine:
        tokens = round_up(spec.num_tokens, SUBLANES)
        out_spec = pl.BlockSpec((tokens, tiles.n), lambda n, s, k, t, *_: (0, n))
        out_shape = struct((tokens, tiles.cols), jnp.float32, x)
    scratch = [pltpu.VMEM((tiles.m, tiles.n), jnp.float32)] * count_w
    if operands.gather is not None:
        scratch += gather.scratch(x, tiles)
    number_specs = [gather.numbers_spec(tiles, 1, field) for _, field in by_row.values()]
    outs = 3 if spec.save_residuals else 1
    large = combine or operands.gather is not None
    call = pl.pallas_call(
        partial(_kernel, tuple(by_row), spec, tiles, count_w, bool(scales), operands.x.dtype),
        out_shape=[out_shape] * outs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            in_specs=[*number_specs, x_spec, *[w_spec] * count_w, *[scale_spec] * len(scales)],
            out_specs=[out_spec] * outs,
            grid=(tiles.grid[2], steps.count, tiles.grid[1]),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=LARGE if large else None,
            disable_bounds_checks=large,
        ),
        cost_estimate=_cost(operands, tiles),
        interpret=interpret,
        name=f"grouped_{spec.epilogue}{'_transposed' if spec.transpose else ''}",
    )
    return tuple(call(step_table(steps), *[array for array, _ in by_row.values()], x, *operands.w, *scales))


def _cost(operands, tiles):
    w, x = operands.w, operands.x
    groups = w[0].shape[0]
    per_step = len(w) * tiles.inner * tiles.cols * w[0].dtype.itemsize
    return pl.CostEstimate(
        flops=2 * len(w) * tiles.rows * tiles.inner * tiles.cols,
        bytes_accessed=tiles.rows * tiles.inner * tiles.grid[2] * x.dtype.itemsize + groups * per_step,
        transcendentals=0,
    )


def _kernel(names, spec, tiles, count_w, scaled, dtype, steps, *refs):
    by_row, refs = dict(zip(names, refs, strict=False)), refs[len(names) :]
    x, w, refs = refs[0], refs[1 : 1 + count_w], refs[1 + count_w :]
    scales, refs = (refs[:count_w], refs[count_w:]) if scaled else ((), refs)
    count_out = 3 if spec.save_residuals else 1
    outs, sums, buffers = refs[:count_out], refs[count_out : count_out + count_w], refs[count_out + count_w :]
    s, k = pl.program_id(1), pl.program_id(2)
    # Outside of branches: the interpreter has no program ids inside.
    count = pl.num_programs(1)

    @pl.when(k == 0)
    def _begin():
        for total in sums:
            total[...] = jnp.zeros_like(total)
        if buffers:
            gather.advance(x, (by_row["here"], by_row["next"]), steps, buffers, s, count)

    # Mosaic multiplies vectors in float32 only.
    wide = jnp.dtype(jnp.float32) if 1 in (tiles.k, tiles.n) else dtype

    @pl.when(steps[LIVE, s] > 0)
    def _multiply():
        x_RK = gather.read(buffers, tiles, dtype, s, k) if buffers else x[...]
        x_RK = _mask(x_RK, 1, tiles, k).astype(wide)
        for i in range(count_w):
            w_KN = _mask(w[i][...], 1 if spec.transpose else 0, tiles, k)
            product = jax.lax.dot_general(
                x_RK,
                w_KN.astype(wide),
                (((1,), (1 if spec.transpose else 0,)), ((), ())),
                precision=precision(wide),
                preferred_element_type=jnp.float32,
            )
            if scales:
                product *= scales[i][...]
            sums[i][...] += product

    @pl.when(k == tiles.grid[1] - 1)
    def _finish():
        if spec.epilogue == "combine":
            _add_rows(by_row, steps, outs[0], sums[0], s)
            return
        values = [total[...] for total in sums]
        if spec.epilogue == "swiglu":
            values = [swiglu(*values), *values]
        row = jax.lax.broadcasted_iota(jnp.int32, outs[0].shape, 0)
        mine = (row >= steps[BEGIN, s]) & (row < steps[END, s])
        for out, value in zip(outs, values, strict=False):
            # Selected in float32, whose layout the mask has.
            out[...] = jnp.where(mine, value, out[...].astype(jnp.float32)).astype(out.dtype)


def _mask(tile, axis, tiles, k):
    """Zero the columns past the end of the contraction, where a tile reads out of bounds."""
    if tiles.inner % tiles.k == 0:
        return tile
    index = jax.lax.broadcasted_iota(jnp.int32, tile.shape, axis) + k * tiles.k
    return jnp.where(index < tiles.inner, tile.astype(jnp.float32), 0).astype(tile.dtype)


def _add_rows(by_row, steps, out, total, s):
    """Add the step's rows to their destinations, one at a time: adjacent rows may share one."""

    @pl.when(s == 0)
    def _zero():
        out[...] = jnp.zeros_like(out)

    begin, end = steps[BEGIN, s], steps[END, s]

    @pl.when((steps[LIVE, s] > 0) & ((begin > 0) | (end < total.shape[0])))
    def _mask_others():
        # A row of another group may be NaN.
        row = jax.lax.broadcasted_iota(jnp.int32, total.shape, 0)
        total[...] = jnp.where((row >= begin) & (row < end), total[...], 0)

    by_run = total.reshape(-1, gather.RUN, total.shape[1])

    def some(i, _):
        for j in range(gather.RUN):
            r = i * gather.RUN + j
            value = by_run[i, pl.ds(j, 1), :]
            if "weights" in by_row:
                value = value * by_row["weights"][0, r]
            out[pl.ds(by_row["tokens"][0, r], 1), :] += value
        return 0

    # Steps with live 0 add no rows.
    jax.lax.fori_loop(*gather.runs(steps, s), some, 0)
