"""Grouped matmul on Hopper: an output tile is a row tile of a group by a column tile, with K as the pipeline's steps.

A group's first tile begins at its first row rounded down to 8 (`metadata.matmul_steps(..., align=8)`), the alignment of
a swizzled TMA tile. So only the first and the last tile of a group have rows of another, and only those are written in
parts. Thread blocks are pairs on neighboring column tiles that share the tile of x, unless its rows are gathered
(`moe.kernels.hopper.gather`). Quantized weights are dequantized in SMEM (`moe.kernels.hopper.widen`).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.hopper import combine, gather, ring, store, widen
from moe.kernels.hopper.ring import ALIGN, Ring, Tile
from moe.kernels.implementations import vary
from moe.kernels.metadata import matmul_steps
from moe.kernels.spec import GroupedOperands, GroupedSpec, swiglu

CONSUMERS = 2
# Pairs of column tiles that run side by side, so that their row tiles of x are read from L2.
SWATH = 4
# Columns of all weights of a step where they are quantized: four slots fit.
QUANTIZED_COLS = 128
# Rows of the step table.
A, B, BEGIN, END, LIVE = range(5)


class KernelSpec(NamedTuple):
    """Static parameters of one kernel.

    Fields:
      spec: of the product.
      tile: rows, columns and step of the contraction.
      k, n: sizes of the contraction and the columns.
      weights: 1, or 2 for gate and up.
      gathered: rows of x are gathered.
      quantized: weights have scales.
      weighted: rows of a combine have weights.
      interpret: run by the interpreter.
    """

    spec: GroupedSpec
    tile: tuple[int, int, int]
    k: int
    n: int
    weights: int
    gathered: bool
    quantized: bool
    weighted: bool
    interpret: bool

    @property
    def added(self) -> bool:
        """Whether rows are added to the output (combine)."""
        return self.spec.epilogue == "combine"

    @property
    def out_dtype(self) -> Any:
        """Dtype that the kernel writes."""
        return jnp.float32 if self.added else self.spec.out_dtype

    @property
    def parts(self) -> int:
        """Buffers of a slot for one weight."""
        return 3 if self.quantized else 1

    @property
    def name(self) -> str:
        """Name of the kernel in profiles."""
        suffixes = {"transposed": self.spec.transpose, "gathered": self.gathered, "quantized": self.quantized}
        return "_".join(["grouped", self.spec.epilogue, *(suffix for suffix, given in suffixes.items() if given)])


def grouped(operands: GroupedOperands, spec: GroupedSpec, *, interpret: bool) -> tuple[jax.Array, ...]:
    """Grouped matmul: (out,) or (out, gate, up), (M', N) each with M' >= M, or for "combine" (num_tokens, N) float32.

    The rows of x are a multiple of 8 unless they are gathered, K and N of 64.
    """
    x, weights, rows = operands.x, len(operands.w), operands.rows
    k, n = operands.w[0].shape[:0:-1] if spec.transpose else operands.w[0].shape[1:]
    most = min(spec.tiling.cols, QUANTIZED_COLS) if operands.scales else spec.tiling.cols
    # All accumulators share the registers; columns are swizzled tiles of 64, divided between the two of a pair.
    cols = min(max(most // weights // 64, 1), -(-n // 128)) * 64
    tile, step = spec.tiling.rows, spec.tiling.inner
    flags = {"gathered": operands.gather is not None, "quantized": bool(operands.scales)}
    flags |= {"weighted": operands.weights is not None, "interpret": interpret}
    kernel = KernelSpec(spec, (tile, cols, step), k, n, weights, **flags)
    steps = matmul_steps(operands.sizes, rows=rows, tile=tile, align=ALIGN)
    table = jnp.stack([steps.a, steps.b, steps.begin, steps.end, steps.live])
    numbers = () if operands.gather is None else (gather.pad(operands.gather, tile),)
    inputs = (table, steps.count[None], x, *operands.w, *operands.scales, *numbers)
    options: dict[str, Any] = {"consumers": CONSUMERS, "pairs": True, "interpret": interpret, "name": kernel.name}
    launch = partial(ring.launch, partial(_kernel, kernel), memory=_memory(kernel, operands), **options)
    if kernel.added:
        sums = combine.start(spec, n)
        launch(out=[])(*inputs, *combine.inputs(operands, tile), sums)
        return (vary(jax.freeze(sums), table),)
    shape = jax.ShapeDtypeStruct((-(-rows // ALIGN) * ALIGN, n), spec.out_dtype)
    return tuple(launch(out=[shape] * (3 if spec.save_residuals else 1))(*inputs))


def _memory(kernel, operands):
    (tile, cols, step), dtype = kernel.tile, operands.x.dtype
    if kernel.gathered:
        left = Tile((tile, step), dtype, copies=tile, layout=gather.layout(dtype))
    else:
        left = Tile((tile, step), dtype)
    if kernel.quantized:
        right = widen.tiles(step, cols, operands.w[0].dtype, dtype)
    else:
        right = [Tile((cols, step) if kernel.spec.transpose else (step, cols), dtype)]
    tiles = [left, *right * kernel.weights]
    mine = tile // CONSUMERS
    other = store.size(mine, consumers=CONSUMERS) + 4 * tile * kernel.gathered
    other += combine.size(mine, consumers=CONSUMERS) * kernel.added
    memory = {
        "slots": ring.scratch(tiles, slots=ring.stages(tiles, other=other), consumers=CONSUMERS, pairs=True),
        "stage": store.scratch(mine, kernel.out_dtype, consumers=CONSUMERS),
    }
    if kernel.added:
        memory["destinations"] = combine.scratch(mine, consumers=CONSUMERS)
    if kernel.gathered:
        memory["picked"] = gather.scratch(tile)
    if kernel.quantized:
        memory["made"] = plgpu.Barrier(num_arrivals=CONSUMERS)
    return memory


def _kernel(kernel, table, count, x, *refs, slots, stage, picked=None, made=None, destinations=None):
    refs, spec = list(refs), kernel.spec
    w, scales = _pop(refs, kernel.weights), _pop(refs, kernel.weights * kernel.quantized)
    numbers, tokens, outs = _pop(refs, kernel.gathered), _pop(refs, kernel.added * (1 + kernel.weighted)), refs
    rows, cols, step = kernel.tile
    wg, mine = lax.axis_index("wg"), rows // CONSUMERS
    # The second of a pair may have a tile past the end: it multiplies zeros and is not written.
    column_pairs = -(-kernel.n // (2 * cols))

    def plan(t):
        s, column = plgpu.planar_snake(t, (count[0], column_pairs), 1, min(SWATH, column_pairs))
        column = 2 * column + lax.axis_index(ring.PAIR)
        # A step with live 0 has no products and writes zeros.
        return (s, table[A, s] * ALIGN, table[B, s], column * cols), table[LIVE, s] * -(-kernel.k // step)

    def load(where, i, slot, barrier):
        _, first, group, col = where
        inner = pl.ds(i * step, step)
        if kernel.gathered:
            gather.load(x, picked, i * step, slot[0], barrier)
        else:
            plgpu.copy_gmem_to_smem(x.at[pl.ds(first, rows), inner], slot[0], barrier, collective_axes=ring.PAIR)
        _load_weights(kernel, w, scales, (group, i * step, col), slot[1:], barrier)

    def multiply(totals, where, i, slot):
        del where, i
        left, right = slot[0].at[pl.ds(wg * mine, mine)], slot[1:]
        if kernel.quantized:
            right = widen.widen([right[j * kernel.parts :][: kernel.parts] for j in range(kernel.weights)], CONSUMERS)
            ring.meet(made)
        if kernel.gathered and not (kernel.interpret and "registers" in ring.LACKING):
            left = gather.read(left)
        for total, buffer in zip(totals, right, strict=True):
            plgpu.wgmma(total, left, buffer.transpose((1, 0)) if spec.transpose else buffer)

    def bounds(s):
        """Return the range of rows of this warpgroup's half of the tile that the step owns."""
        return [jnp.clip(table[field, s] - wg * mine, 0, mine) for field in (BEGIN, END)]

    def busy(where):
        begin, end = bounds(where[0])
        return begin < end

    def finish(where, sums):
        s, first, _, col = where
        first = first + wg * mine
        begin, end = bounds(s)
        if kernel.added:
            bounds_of = {"first": first, "col": col, "begin": begin, "end": end * table[LIVE, s]}
            return combine.add(stage, destinations, sums[0], outs[0], *tokens, **bounds_of)

        def place(out):
            return lambda r, c, height, width: out.at[pl.ds(first + r, height), pl.ds(col + c, width)]

        targets = [place(out) for out in outs]
        store.write(stage, sums, targets, partial(_epilogue, spec), dtype=spec.out_dtype, begin=begin, end=end)

    work: dict[str, Any] = {"plan": plan, "load": load, "multiply": multiply, "finish": finish}
    if kernel.gathered:
        work |= {"begin": lambda where: gather.begin(picked, numbers[0], where[1]), "registers": True}
    if not kernel.quantized:  # a warpgroup without rows still dequantizes weights
        work["busy"] = busy
    total, sums = count[0] * column_pairs, [(mine, cols)] * kernel.weights
    ring.run(Ring(*slots), total, consumers=CONSUMERS, sums=sums, **work)


def _load_weights(kernel, w, scales, at, slot, barrier):
    """Load one weight, or gate and up, of a step; `at` is the group, the first of K and the first column."""
    _, cols, step = kernel.tile
    group, inner, across = at[0], pl.ds(at[1], step), pl.ds(at[2], cols)
    for j, each in enumerate(w):
        parts = slot[j * kernel.parts :][: kernel.parts]
        if kernel.quantized:
            widen.load(each, scales[j], at, step, parts, barrier)
        else:
            source = each.at[group, across, inner] if kernel.spec.transpose else each.at[group, inner, across]
            plgpu.copy_gmem_to_smem(source, parts[0], barrier)


def _pop(refs: list[Any], count: int) -> list[Any]:
    """Remove the first `count` from a list and return them."""
    first, refs[:] = refs[:count], refs[count:]
    return first


def _epilogue(spec, sums):
    if spec.epilogue != "swiglu":
        return sums
    return [swiglu(*sums), *sums] if spec.save_residuals else [swiglu(*sums)]
