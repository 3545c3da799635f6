"""The addresses at which TMA, wgmma and register transfers of the interpreted Hopper kernels meet in shared memory.

Each unit swizzles 16-byte columns by three (128 bytes) or two (64 bytes) bits of a row's number, but counts rows from a
place of its own: TMA and wgmma from address zero, registers from the start of the part of the buffer that they
are given (`FragmentedArray.transfer_tiled` of Mosaic GPU). Pallas's interpreter has no addresses. So every part of a
buffer that a kernel accesses there is recorded, and `mistaken` compares the unit's addresses with those of the buffer.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import gpu_interpreter
import numpy as np
from jax._src.pallas.mosaic_gpu import core
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.state.indexing import NDIndexer, Slice


@dataclass(frozen=True)
class View:
    """A part of a buffer as one unit accesses it.

    Attributes:
      unit: "tma", "wgmma" or "registers".
      shape: of the buffer.
      itemsize: bytes of an element.
      tiling: rows and columns of a tile.
      swizzle: bytes of a row of the swizzle pattern.
      indices: slices and numbers of each indexing, in order.
    """

    unit: str
    shape: tuple[int, ...]
    itemsize: int
    tiling: tuple[int, int]
    swizzle: int
    indices: tuple[tuple[Any, ...], ...]


def swizzled(address, swizzle):
    return address ^ (((address >> 7) & (swizzle // 16 - 1)) << 4)


def tiled(values, tiling):
    """Tiles of the last two axes, row by row."""
    (*lead, rows, cols), (r, c) = values.shape, tiling
    return values.reshape(*lead, rows // r, r, cols // c, c).swapaxes(-3, -2)


def mistaken(view):
    """Why the unit would access other bytes than the buffer's layout has; None if it is right."""
    flat = np.arange(np.prod(view.shape)).reshape(view.shape)
    linear = np.empty_like(flat)
    linear.flat[tiled(flat, view.tiling).reshape(-1)] = flat.reshape(-1) * view.itemsize
    part = linear
    for index in view.indices:
        part = part[index]
    start, right = int(part.flat[0]), swizzled(part, view.swizzle)
    if view.unit == "wgmma":
        atom = view.tiling == (8, view.swizzle // view.itemsize)
        return None if atom and start % (8 * view.swizzle) == 0 else f"a descriptor at byte {start} of {view.tiling}"
    if view.unit == "tma":
        box = start + view.itemsize * np.arange(part.size)
        found, right = swizzled(box, view.swizzle), tiled(right, view.tiling).reshape(-1)
    else:
        found = start + swizzled(part - start, view.swizzle)
    wrong = found != right
    return f"{wrong.mean():.0%} of the elements lie elsewhere" if wrong.any() else None


def watch(monkeypatch):
    """Record the swizzled parts of shared memory that interpreted kernels access from now on, in the set returned."""
    seen = set()

    def note(unit, key, transforms):
        swizzle = [each.swizzle for each in transforms if isinstance(each, core.UnswizzleRef)]
        if not swizzle:
            return
        tiling = next(each.tiling for each in transforms if isinstance(each, core.UntilingTransform))
        key = gpu_callbacks.HostAllocationKey.from_array(key)
        shape, dtype = gpu_callbacks._get_shared_memory().buffer_shape_and_dtype(key)
        indices = [tuple(map(part, each.indices)) for each in transforms if isinstance(each, NDIndexer)]
        seen.add(View(unit, tuple(shape), np.dtype(dtype).itemsize, tuple(tiling), swizzle[0], tuple(indices)))

    def part(index):
        if not isinstance(index, Slice):
            return int(index)
        start, size = int(index.start), int(index.size)
        return slice(start, start + size * index.stride, index.stride)

    def positional(plain, *args, **kwargs):
        note("registers", args[3], args[4])
        return plain(*args, **kwargs)

    def named(plain, unit, sides, **kwargs):
        for side in sides:
            note(unit, kwargs[f"{side}_allocation_key_as_array"], kwargs[f"{side}_transforms"])
        return plain(**kwargs)

    for name in ("_get", "_swap"):
        monkeypatch.setattr(gpu_callbacks, name, partial(positional, getattr(gpu_callbacks, name)))
    for name, unit, sides in (
        ("copy_gmem_to_smem", "tma", ["dst"]),
        ("copy_smem_to_gmem", "tma", ["src"]),
        ("wgmma", "wgmma", ["a", "b"]),
    ):
        monkeypatch.setattr(gpu_callbacks, name, partial(named, getattr(gpu_callbacks, name), unit, sides))

    def of_registers(plain, **kwargs):
        note("wgmma", *kwargs["b"])
        return plain(**kwargs)

    wgmma = partial(of_registers, gpu_interpreter.wgmma_of_registers)
    monkeypatch.setattr(gpu_interpreter, "wgmma_of_registers", wgmma)
    return seen
