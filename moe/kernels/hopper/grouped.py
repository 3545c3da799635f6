"""Grouped matmul on Hopper: body one of the family, a row tile of a group by a column tile, K going round the ring.

A tile begins where its group does, rounded down to 8 rows (`metadata.matmul_steps(..., align=8)`), which is as fine as
TMA can start a swizzled tile. So only the first and the last tile of a group have rows of another, and only those are
written in parts. Blocks work as pairs on neighbouring column tiles and share the tile of x, unless its rows are
gathered (`gpu_gather`). Quantised weights are widened in the slots of the ring (`gpu_widen`).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.hopper import combine as gpu_combine
from moe.kernels.hopper import gather as gpu_gather
from moe.kernels.hopper import ring as gpu_ring
from moe.kernels.hopper import store, widen
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


class Way(NamedTuple):
    """What a kernel is made for.

    Fields:
      spec: what is asked.
      tile: rows, columns and step of the contraction.
      k, n: sizes of the contraction and the columns.
      weights: one, or gate and up.
      gathered: rows of x are picked.
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
        """Whether rows are added to those of the output."""
        return self.spec.epilogue == "combine"

    @property
    def out_dtype(self) -> Any:
        """What the kernel writes."""
        return jnp.float32 if self.added else self.spec.out_dtype

    @property
    def parts(self) -> int:
        """Buffers of a slot that belong to one weight."""
        return 3 if self.quantized else 1

    @property
    def name(self) -> str:
        """Of the kernel, as profilers show it."""
        said = {"transposed": self.spec.transpose, "gathered": self.gathered, "quantized": self.quantized}
        return "_".join(["grouped", self.spec.epilogue, *(word for word, so in said.items() if so)])


def grouped(operands: GroupedOperands, spec: GroupedSpec, *, interpret: bool) -> tuple[jax.Array, ...]:
    """The product: (out,) or (out, gate, up), (M', N) each with M' >= M, or for "combine" (num_tokens, N) float32.

    Rows of x are a multiple of 8 unless they are gathered, K and N of 64.
    """
    x, weights, rows = operands.x, len(operands.w), operands.rows
    k, n = operands.w[0].shape[:0:-1] if spec.transpose else operands.w[0].shape[1:]
    most = min(spec.tiling.cols, QUANTIZED_COLS) if operands.scales else spec.tiling.cols
    # The sums of all weights share the registers; columns come in swizzled tiles of 64, and there are two of a pair.
    cols = min(max(most // weights // 64, 1), -(-n // 128)) * 64
    tile, step = spec.tiling.rows, spec.tiling.inner
    said = {"gathered": operands.gather is not None, "quantized": bool(operands.scales)}
    said |= {"weighted": operands.weights is not None, "interpret": interpret}
    way = Way(spec, (tile, cols, step), k, n, weights, **said)
    steps = matmul_steps(operands.sizes, rows=rows, tile=tile, align=ALIGN)
    table = jnp.stack([steps.a, steps.b, steps.begin, steps.end, steps.live])
    gather = () if operands.gather is None else (gpu_gather.pad(operands.gather, tile),)
    inputs = (table, steps.count[None], x, *operands.w, *operands.scales, *gather)
    options: dict[str, Any] = {"consumers": CONSUMERS, "pairs": True, "interpret": interpret, "name": way.name}
    launch = partial(gpu_ring.launch, partial(_kernel, way), memory=_memory(way, operands), **options)
    if way.added:
        sums = gpu_combine.start(spec, n)
        launch(out=[])(*inputs, *gpu_combine.inputs(operands, tile), sums)
        return (vary(jax.freeze(sums), table),)
    shape = jax.ShapeDtypeStruct((-(-rows // ALIGN) * ALIGN, n), spec.out_dtype)
    return tuple(launch(out=[shape] * (3 if spec.save_residuals else 1))(*inputs))


def _memory(way, operands):
    (tile, cols, step), dtype = way.tile, operands.x.dtype
    if way.gathered:
        left = Tile((tile, step), dtype, copies=tile, layout=gpu_gather.layout(dtype))
    else:
        left = Tile((tile, step), dtype)
    if way.quantized:
        right = widen.tiles(step, cols, operands.w[0].dtype, dtype)
    else:
        right = [Tile((cols, step) if way.spec.transpose else (step, cols), dtype)]
    tiles = [left, *right * way.weights]
    mine = tile // CONSUMERS
    other = store.size(mine, consumers=CONSUMERS) + 4 * tile * way.gathered
    other += gpu_combine.size(mine, consumers=CONSUMERS) * way.added
    memory = {
        "ring": gpu_ring.scratch(tiles, slots=gpu_ring.stages(tiles, other=other), consumers=CONSUMERS, pairs=True),
        "stage": store.scratch(mine, way.out_dtype, consumers=CONSUMERS),
    }
    if way.added:
        memory["kept"] = gpu_combine.scratch(mine, consumers=CONSUMERS)
    if way.gathered:
        memory["picked"] = gpu_gather.scratch(tile)
    if way.quantized:
        memory["made"] = plgpu.Barrier(num_arrivals=CONSUMERS)
    return memory


def _kernel(way, table, count, x, *refs, ring, stage, picked=None, made=None, kept=None):
    refs, spec = list(refs), way.spec
    w, scales = _take(refs, way.weights), _take(refs, way.weights * way.quantized)
    gather, combine, outs = _take(refs, way.gathered), _take(refs, way.added * (1 + way.weighted)), refs
    rows, cols, step = way.tile
    wg, mine = lax.axis_index("wg"), rows // CONSUMERS
    # The second of a pair may have a tile past the end: it is multiplied (by zeros) and never written.
    column_pairs = -(-way.n // (2 * cols))

    def plan(t):
        s, column = plgpu.planar_snake(t, (count[0], column_pairs), 1, min(SWATH, column_pairs))
        column = 2 * column + lax.axis_index(gpu_ring.PAIR)
        # A silent step multiplies nothing and writes zeros.
        return (s, table[A, s] * ALIGN, table[B, s], column * cols), table[LIVE, s] * -(-way.k // step)

    def load(where, i, slot, barrier):
        _, first, group, col = where
        inner = pl.ds(i * step, step)
        if way.gathered:
            gpu_gather.load(x, picked, inner, slot[0], barrier)
        else:
            plgpu.copy_gmem_to_smem(x.at[pl.ds(first, rows), inner], slot[0], barrier, collective_axes=gpu_ring.PAIR)
        _load_weights(way, w, scales, (group, i * step, col), slot[1:], barrier)

    def multiply(totals, where, i, slot):
        del where, i
        left, right = slot[0].at[pl.ds(wg * mine, mine)], slot[1:]
        if way.quantized:
            right = widen.widen([right[j * way.parts :][: way.parts] for j in range(way.weights)], CONSUMERS)
            gpu_ring.meet(made)
        if way.gathered and not (way.interpret and "registers" in gpu_ring.LACKING):
            left = gpu_gather.read(left)
        for total, buffer in zip(totals, right, strict=True):
            plgpu.wgmma(total, left, buffer.transpose((1, 0)) if spec.transpose else buffer)

    def bounds(s):
        """Rows of this warpgroup's half of the tile that the step owns."""
        return [jnp.clip(table[field, s] - wg * mine, 0, mine) for field in (BEGIN, END)]

    def busy(where):
        begin, end = bounds(where[0])
        return begin < end

    def finish(where, sums):
        s, first, _, col = where
        first = first + wg * mine
        begin, end = bounds(s)
        if way.added:
            bounds_of = {"first": first, "col": col, "begin": begin, "end": end * table[LIVE, s]}
            return gpu_combine.add(stage, kept, sums[0], outs[0], *combine, **bounds_of)

        def place(out):
            return lambda r, c, height, width: out.at[pl.ds(first + r, height), pl.ds(col + c, width)]

        targets = [place(out) for out in outs]
        store.write(stage, sums, targets, partial(_epilogue, spec), dtype=spec.out_dtype, begin=begin, end=end)

    work: dict[str, Any] = {"plan": plan, "load": load, "multiply": multiply, "finish": finish}
    if way.gathered:
        work |= {"begin": lambda where: gpu_gather.begin(picked, gather[0], where[1]), "registers": True}
    if not way.quantized:  # a warpgroup without rows has weights to widen
        work["busy"] = busy
    total, sums = count[0] * column_pairs, [(mine, cols)] * way.weights
    gpu_ring.run(Ring(*ring), total, consumers=CONSUMERS, sums=sums, **work)


def _load_weights(way, w, scales, at, slot, barrier):
    """One weight, or gate and up, of a step: `at` is the group, the first of K and the first column."""
    _, cols, step = way.tile
    group, inner, across = at[0], pl.ds(at[1], step), pl.ds(at[2], cols)
    for j, each in enumerate(w):
        parts = slot[j * way.parts :][: way.parts]
        if way.quantized:
            widen.load(each, scales[j], at, step, parts, barrier)
        else:
            source = each.at[group, across, inner] if way.spec.transpose else each.at[group, inner, across]
            plgpu.copy_gmem_to_smem(source, parts[0], barrier)


def _take(refs: list[Any], count: int) -> list[Any]:
    """The next `count`, which go."""
    taken, refs[:] = refs[:count], refs[count:]
    return taken


def _epilogue(spec, sums):
    if spec.epilogue != "swiglu":
        return sums
    return [swiglu(*sums), *sums] if spec.save_residuals else [swiglu(*sums)]
