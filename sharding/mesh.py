"""Device meshes of a plan, laid out along ICI (fast links) and DCN (between slices)."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from sharding.errors import PlanError
from sharding.plan import MESH_AXES, Plan


def make_mesh(plan: Plan, devices: Sequence[Any] | None = None) -> Mesh:
    """Make the device mesh of a plan: its axes that are larger than 1 (a single "dp" of size 1 where none is).

    Within a slice `jax.experimental.mesh_utils` lays the axes along the torus, the last axes on the nearest links.
    Across slices the `dcn.` part of every axis is its outer, slow part. Devices without a slice number (GPU, CPU) are
    grouped by process; devices of a single process are cut into equal parts in order, which emulates slices in tests.

    All axes have type Auto: Linen modules do not work under the Explicit axes that `jax.make_mesh` makes.

    Args:
      plan: its sizes must multiply to the number of devices, see `Plan.fill`.
      devices: JAX devices, default all.

    Raises:
      PlanError: the sizes do not fit the devices or the slices.

    Example:
      >>> import jax, sharding
      >>> dict(sharding.make_mesh(sharding.Plan("fsdp=-1"), jax.devices()[:1]).shape)
      {'dp': 1}
    """
    devices = list(jax.devices() if devices is None else devices)
    plan = plan.fill(len(devices))
    names = axis_names(plan)
    ici, dcn = (tuple(sizes[name] for name in names) for sizes in (plan.ici, plan.dcn))
    slices = _slices(devices, math.prod(dcn), plan)
    # One slice at a time, so that an ordinary mesh is the case of a single slice.
    parts = [mesh_utils.create_device_mesh(ici, part, allow_split_physical_axes=True) for part in slices]
    blocks = np.array(parts, dtype=object).reshape(*dcn, *ici)
    order = [axis for i in range(len(names)) for axis in (i, len(names) + i)]
    grid = blocks.transpose(order).reshape([d * i for d, i in zip(dcn, ici, strict=True)])
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def abstract_mesh(plan: Plan) -> AbstractMesh:
    """Make a plan's mesh without devices: enough to trace a step and count its collectives on any machine.

    Example:
      >>> import sharding
      >>> dict(sharding.abstract_mesh(sharding.Plan("pp=4, fsdp=8, tp=2")).shape)
      {'pp': 4, 'fsdp': 8, 'tp': 2}
    """
    names = axis_names(plan)
    sizes = tuple(plan.size(name) for name in names)
    return AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))


def axis_names(plan: Plan) -> tuple[str, ...]:
    """List the axes of the plan's mesh."""
    return plan.present(*MESH_AXES) or ("dp",)


def _slices(devices: list[Any], count: int, plan: Plan) -> list[list[Any]]:
    """Group devices by slice (or process, or equal part) into `count` groups of one size."""
    if count == 1:
        return [devices]
    groups: dict[int, list[Any]] = {}
    by_slice = len({getattr(device, "slice_index", 0) for device in devices}) > 1
    for device in devices:
        groups.setdefault(device.slice_index if by_slice else device.process_index, []).append(device)
    if len(groups) == 1:
        size = len(devices) // count
        return [devices[i * size : (i + 1) * size] for i in range(count)]
    found = [groups[key] for key in sorted(groups)]
    if len(found) % count or len({len(group) for group in found}) > 1:
        kind = "slices" if by_slice else "processes"
        raise PlanError(
            f"plan {plan.axes!r}: the dcn. sizes multiply to {count} and there are {len(found)} {kind} of "
            f"{sorted({len(group) for group in found})} devices; make the dcn. sizes multiply to {len(found)}"
        )
    # Several processes may make up one part (a slice of many hosts).
    merge = len(found) // count
    return [sum(found[i * merge : (i + 1) * merge], []) for i in range(count)]
