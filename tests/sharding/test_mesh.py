from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from sharding.errors import PlanError
from sharding.mesh import abstract_mesh, make_mesh
from sharding.plan import Plan


@pytest.mark.parametrize(
    "axes, shape",
    [
        ("tp=8", {"tp": 8}),
        ("tp=2, fsdp=4", {"fsdp": 4, "tp": 2}),
        ("cp=1, tp=2, pp=2, dp=2", {"pp": 2, "dp": 2, "tp": 2}),
        ("dcn.dp=2, fsdp=4", {"dp": 2, "fsdp": 4}),
    ],
)
def test_axes_larger_than_one_in_the_house_order(axes, shape):
    plan = Plan(axes)
    for mesh in (make_mesh(plan), abstract_mesh(plan)):
        assert dict(mesh.shape) == shape and list(mesh.shape) == list(shape)
        # Linen modules do not work under Explicit axes, which jax.make_mesh would make.
        assert set(mesh.axis_types) == {AxisType.Auto}


def test_one_device():
    assert dict(make_mesh(Plan(""), jax.devices()[:1]).shape) == {"dp": 1}


def test_the_dcn_part_of_an_axis_is_its_slow_part():
    ids = np.vectorize(lambda device: device.id)(make_mesh(Plan("dcn.dp=2, dp=2, tp=2")).devices)
    # dp = (slice, within the slice): the first two rows are devices of the first half.
    np.testing.assert_array_equal(ids, [[0, 1], [2, 3], [4, 5], [6, 7]])
    ids = np.vectorize(lambda device: device.id)(make_mesh(Plan("dcn.tp=2, dp=2, tp=2")).devices)
    np.testing.assert_array_equal(ids, [[0, 1, 4, 5], [2, 3, 6, 7]])


@dataclass(frozen=True)
class Chip:
    """What the mesh reads of a device that has a slice."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "none"
    device_kind: str = "none"


def devices(slices, per_slice):
    return [Chip(i, i % slices) for i in range(slices * per_slice)]


def test_slices_are_told_by_their_number():
    mesh = make_mesh(Plan("dcn.dp=2, tp=4"), devices(2, 4))
    assert [[device.slice_index for device in row] for row in mesh.devices] == [[0] * 4, [1] * 4]


def test_dcn_sizes_must_fit_the_slices():
    with pytest.raises(PlanError, match="multiply to 4 and there are 2 slices .* make the dcn. sizes multiply to 2"):
        make_mesh(Plan("dcn.dp=4, tp=2"), devices(2, 4))


def test_a_plan_for_other_devices_is_refused():
    with pytest.raises(PlanError, match="makes 4 devices and there are 8; nearest valid: tp=8"):
        make_mesh(Plan("tp=4"))
