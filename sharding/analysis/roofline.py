"""Placement of parameters, communication by cause, and the roofline of a step, as records for tables."""

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
    """One array of a sharded tree: its path, global shape, mesh axes by dimension, and bytes of one device's shard."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[tuple[str, ...], ...]
    local: tuple[int, ...]
    bytes: int

    @property
    def sharding(self) -> str:
        """Its sharding in text, such as "64 by fsdp, 256 by tp"; "replicated" if unsharded."""
        split = [f"{size} by {'·'.join(axes)}" for size, axes in zip(self.shape, self.axes, strict=True) if axes]
        return ", ".join(split) or "replicated"


def placements(tree: PyTree, specs: PyTree, sizes: Mapping[str, int]) -> list[Placed]:
    """List the sharding of every leaf of a tree, with shapes and bytes of one device.

    Args:
      tree: arrays or shapes.
      specs: their PartitionSpecs, a tree of the same structure.
      sizes: mesh axis -> size.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sharding.analysis import placements
      >>> from jax.sharding import PartitionSpec as P
      >>> tree = {"w": jax.ShapeDtypeStruct((64, 256), jnp.float32)}
      >>> [one] = placements(tree, {"w": P("fsdp", "tp")}, {"fsdp": 4, "tp": 2})
      >>> one.sharding, one.local, one.bytes
      ('64 by fsdp, 256 by tp', (16, 128), 8192)
    """
    leaves = jax.tree.leaves_with_path(tree)
    found = []
    for (path, leaf), spec in zip(leaves, jax.tree.leaves(specs, is_leaf=is_spec), strict=True):
        axes = _by_dimension(spec, len(leaf.shape))
        ways = [math.prod(sizes.get(axis, 1) for axis in names) for names in axes]
        local = tuple(-(-size // way) for size, way in zip(leaf.shape, ways, strict=True))
        item = leaf.dtype.itemsize if hasattr(leaf.dtype, "itemsize") else np.dtype(leaf.dtype).itemsize
        size = math.prod(local) * item // (2 if str(leaf.dtype) == "int4" else 1)  # two 4-bit values to a byte
        found.append(Placed(path_name(path), tuple(leaf.shape), str(leaf.dtype), axes, local, size))
    return found


def _by_dimension(spec: PartitionSpec, ndim: int) -> tuple[tuple[str, ...], ...]:
    entries: list[Any] = [*spec, *[None] * (ndim - len(spec))]
    return tuple((entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in entries)


class Moved(NamedTuple):
    """The sum of collectives of one kind, group and cause: runs per step and bytes that one device sends."""

    kind: str
    axes: tuple[str, ...]
    group: int
    cause: str
    runs: int
    moved: float


# Named scopes of the libraries, most specific first; JAX marks derivatives, the backward pass.
CAUSES = (
    "gather_params",
    "spread_dimension",
    "ring",
    "exchange_heads",
    "exchange_time",
    "experts",
    "route",
    "all_gather_sequence",
    "reduce_scatter_sequence",
    "embed",
    "head",
    "loss",
    "layer",
)


def cause(scope: str) -> str:
    """Format the named scopes of a collective: "layer, gather_params, backward"."""
    scopes = re.split(r"[/()\s]+", scope)
    found = [name for name in ("layer", "embed", "head", "loss") if name in scopes][:1]
    found += [name for name in CAUSES if name in scopes and name not in found][:1]
    if any(name.startswith("transpose") for name in scopes):
        found.append("backward")
    elif any(name in ("checkpoint", "rematted_computation", "remat") for name in scopes):
        found.append("forward or recomputed")
    return ", ".join(found) or "step"


def summarize(collectives: Iterable[Collective]) -> list[Moved]:
    """Sum collectives by kind, axes, group and cause, by falling bytes moved.

    Example:
      >>> from sharding.analysis import Collective, summarize
      >>> [row] = summarize([Collective("all-gather", ("fsdp",), 4, 2, 4000, "layer/gather_params")] * 3)
      >>> row.cause, row.runs, row.moved
      ('layer, gather_params', 6, 18000.0)
    """
    total: dict[tuple[str, tuple[str, ...], int, str], tuple[int, float]] = {}
    for one in collectives:
        key = (one.kind, one.axes, one.group, cause(one.scope))
        count, moved = total.get(key, (0, 0.0))
        total[key] = (count + one.count, moved + one.moved)
    rows = [Moved(*key, count, moved) for key, (count, moved) in total.items()]
    return sorted(rows, key=lambda row: (-row.moved, row.kind, row.cause))


@dataclass(frozen=True)
class Roofline:
    """Roofline of a step (Williams et al. 2009): lower bounds in seconds by compute, memory and communication.

    Attributes:
      compute: all FLOPs at the peak.
      memory: all bytes from and to HBM at the peak bandwidth.
      communication: all bytes between devices at the peak of the links their groups span.
      bubble: idle fraction of a pipeline.

    Example:
      >>> from sharding.analysis import Roofline
      >>> step = Roofline(compute=1.0, memory=0.5, communication=0.25)
      >>> step.bound, step.overlapped, step.serial
      ('compute', 1.0, 1.25)
    """

    compute: float
    memory: float
    communication: float
    bubble: float = 0.0

    @property
    def overlapped(self) -> float:
        """Seconds with full overlap: no step can be shorter."""
        return max(self.compute, self.memory, self.communication) / (1 - self.bubble)

    @property
    def serial(self) -> float:
        """Seconds without overlap of communication and compute, both at their peaks."""
        return (max(self.compute, self.memory) + self.communication) / (1 - self.bubble)

    @property
    def bound(self) -> str:
        """The bottleneck: "compute", "memory" or "communication"."""
        times = {name: getattr(self, name) for name in ("compute", "memory", "communication")}
        return max(times, key=times.__getitem__)


def step_roofline(
    hardware: Hardware,
    *,
    flops: float,
    traffic: float,
    moved: Sequence[tuple[int, bool, float]],
    bubble: float = 0.0,
) -> Roofline:
    """Compute the roofline of a step.

    Args:
      hardware: one device.
      flops: of one device.
      traffic: bytes one device reads from and writes to HBM.
      moved: (devices of the group, whether it crosses slices, bytes one device sends) of the collectives.
      bubble: idle fraction of a pipeline.

    Example:
      >>> from sharding.analysis import find_hardware, step_roofline
      >>> step_roofline(find_hardware("H100"), flops=1e15, traffic=1e12, moved=[(8, False, 9e11)]).bound
      'communication'
    """
    seconds = sum((amount / hardware.speed(group, crosses=crosses) for group, crosses, amount in moved), 0.0)
    return Roofline(flops / hardware.flops, traffic / hardware.bandwidth, seconds, bubble)
