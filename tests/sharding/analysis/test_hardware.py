"""Peaks, links and topologies of named accelerators."""

import pytest

from sharding.analysis.hardware import HARDWARE, chips, find_hardware
from sharding.errors import PlanError


@pytest.mark.parametrize(
    "name, group, crosses, speed",
    [
        ("v5e", 16, False, 100e9),  # one side of the 16 x 16 torus: two of four links
        ("v5e", 17, False, 200e9),
        ("v5e", 512, False, 3.125e9),
        ("v5p", 8, False, 200e9),
        ("v5p", 512, False, 600e9),
        ("v5p", 8, True, 6.25e9),
        ("H200", 8, False, 450e9),
        ("H200", 16, False, 50e9),
    ],
)
def test_a_groups_links(name, group, crosses, speed):
    assert find_hardware(name).speed(group, crosses=crosses) == pytest.approx(speed)


def test_every_device_has_sources_and_sane_numbers():
    for name, device in HARDWARE.items():
        assert device.name == name and device.sources and 100 < device.ridge < 1000
        assert device.network < device.links < device.bandwidth < device.flops


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: find_hardware("v5"), "did you mean 'v5[ep]'"),
        (lambda: find_hardware("h200"), "did you mean 'H200'"),
        (lambda: chips("v5p:8x8xx"), "v5p:8x8x8"),
        (lambda: chips("v5p"), "v5p:8x8x8"),
    ],
)
def test_unknown_hardware_is_refused(call, message):
    with pytest.raises(PlanError, match=message):
        call()
    assert chips("v5p:8x8x8") == 512
