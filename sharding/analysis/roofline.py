"""What a plan does to a model, as records and tables: where each parameter lies, what moves, and how fast it can be."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from sharding.analysis.collectives import Collective
from sharding.analysis.hardware import Hardware
from sharding.rules import path_name
from sharding.zero import is_spec


class Placed(NamedTuple):
    """One array of a sharded tree: its path, global shape, mesh axes by dimension, and bytes of one device's part."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[tuple[str, ...], ...]
    local: tuple[int, ...]
    bytes: int

    @property
    def words(self) -> str:
        """How it is split: "width/fsdp"-like words by dimension number, "whole" where nothing splits it."""
        split = [f"{size} by {'·'.join(axes)}" for size, axes in zip(self.shape, self.axes, strict=True) if axes]
        return ", ".join(split) or "whole on every device"


def placements(tree: PyTree, specs: PyTree, sizes: Mapping[str, int]) -> list[Placed]:
    """Where every leaf lies.

    Args:
      tree: arrays or shapes.
      specs: their partitions, a tree of the same structure.
      sizes: mesh axis -> size.
    """
    leaves = jax.tree.leaves_with_path(tree)
    found = []
    for (path, leaf), spec in zip(leaves, jax.tree.leaves(specs, is_leaf=is_spec), strict=True):
        axes = _by_dimension(spec, len(leaf.shape))
        ways = [math.prod(sizes.get(axis, 1) for axis in names) for names in axes]
        local = tuple(-(-size // way) for size, way in zip(leaf.shape, ways, strict=True))
        item = leaf.dtype.itemsize if hasattr(leaf.dtype, "itemsize") else np.dtype(leaf.dtype).itemsize
        found.append(Placed(path_name(path), tuple(leaf.shape), str(leaf.dtype), axes, local, math.prod(local) * item))
    return found


def _by_dimension(spec: PartitionSpec, ndim: int) -> tuple[tuple[str, ...], ...]:
    entries: list[Any] = [*spec, *[None] * (ndim - len(spec))]
    return tuple((entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in entries)


class Moved(NamedTuple):
    """Collectives of one kind, group and cause, added up: runs per step and bytes one device sends."""

    kind: str
    axes: tuple[str, ...]
    group: int
    cause: str
    runs: int
    moved: float


# Named scopes of the house, most telling first; what JAX marks as derived from a scope is its backward pass.
CAUSES = (
    "gather_params",
    "ring",
    "exchange_heads",
    "exchange_time",
    "experts",
    "route",
    "enter",
    "leave",
    "embed",
    "head",
    "loss",
    "layer",
)


def cause(scope: str) -> str:
    """The named scopes a collective stands in, in words: "layer, gather_params, backward"."""
    words = re.split(r"[/()\s]+", scope)
    found = [name for name in ("layer", "embed", "head", "loss") if name in words][:1]
    found += [name for name in CAUSES if name in words and name not in found][:1]
    if any(word.startswith("transpose") for word in words):
        found.append("backward")
    elif any(word in ("checkpoint", "rematted_computation", "remat") for word in words):
        found.append("forward or recomputed")
    return ", ".join(found) or "step"


def summarise(collectives: Iterable[Collective]) -> list[Moved]:
    """Add up collectives by kind, axes, group and cause, those that move most first."""
    total: dict[tuple[str, tuple[str, ...], int, str], tuple[int, float]] = {}
    for one in collectives:
        key = (one.kind, one.axes, one.group, cause(one.scope))
        count, moved = total.get(key, (0, 0.0))
        total[key] = (count + one.count, moved + one.moved)
    rows = [Moved(*key, count, moved) for key, (count, moved) in total.items()]
    return sorted(rows, key=lambda row: (-row.moved, row.kind, row.cause))


@dataclass(frozen=True)
class Roofline:
    """Least seconds of a step on named hardware (Williams et al. 2009), by what would limit it.

    Attributes:
      compute: all FLOPs at the peak.
      memory: all bytes from and to HBM at the peak bandwidth.
      communication: all bytes between devices at the peak of the links their groups span.
      bubble: idle fraction of a pipeline.
    """

    compute: float
    memory: float
    communication: float
    bubble: float = 0.0

    @property
    def overlapped(self) -> float:
        """Everything at once: no step can be shorter."""
        return max(self.compute, self.memory, self.communication) / (1 - self.bubble)

    @property
    def serial(self) -> float:
        """Communication waits for computing and computing for it, both at their peaks."""
        return (max(self.compute, self.memory) + self.communication) / (1 - self.bubble)

    @property
    def bound(self) -> str:
        """What takes longest: "compute", "memory" or "communication"."""
        times = {name: getattr(self, name) for name in ("compute", "memory", "communication")}
        return max(times, key=times.__getitem__)


def roofline(
    hardware: Hardware,
    *,
    flops: float,
    traffic: float,
    moved: Sequence[tuple[int, bool, float]],
    bubble: float = 0.0,
) -> Roofline:
    """Bound the time of a step.

    Args:
      hardware: one device.
      flops: of one device.
      traffic: bytes one device reads from and writes to HBM.
      moved: (devices of the group, whether it crosses slices, bytes one device sends) of the collectives.
      bubble: idle fraction of a pipeline.
    """
    seconds = sum(amount / hardware.speed(group, crosses=crosses) for group, crosses, amount in moved)
    return Roofline(flops / hardware.flops, traffic / hardware.bandwidth, seconds, bubble)
