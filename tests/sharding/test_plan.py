import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.errors import PlanError
from sharding.plan import MESH_AXES, Plan, factorings


def test_a_plan_reads_as_it_is_written():
    plan = Plan("dcn.dp=2, pp=4, fsdp=8, tp=4, ep=2, cp=1", microbatches=16)
    assert plan.sizes == {"pp": 4, "dp": 2, "fsdp": 8, "ep": 2, "cp": 1, "tp": 4}
    assert plan.dcn["dp"] == 2 and plan.ici["dp"] == 1
    assert plan.devices == 512 and plan.data == 32 and plan.microbatch_count == 16
    assert plan.present("tp", "cp", "dp") == ("tp", "dp")
    assert Plan("").devices == 1 and Plan("pp=4").microbatch_count == 4


@pytest.mark.parametrize(
    "axes, options, texts",
    [
        ("tq=4", {}, ["'tq'", "did you mean 'tp'?", ", ".join(MESH_AXES)]),
        ("icy.tp=4", {}, ["icy.tp", "dcn."]),
        ("tp", {}, ["tp=N"]),
        ("tp=four", {}, ["'tp=four'", "N >= 1"]),
        ("tp=0", {}, ["'tp=0'", "N >= 1"]),
        ("tp=2, tp=4", {}, ["twice", "2 and 4"]),
        ("tp=-1, dp=-1", {}, ["only one axis"]),
        ("pp=8", {"microbatches": 4}, ["microbatches=4", "8 stages", "nearest valid: microbatches=8"]),
        ("pp=2", {"schedule": "1b1f"}, ["'1b1f'", "did you mean '1f1b'?", "gpipe"]),
        ("pp=2", {"virtual": 2}, ["virtual=2", "interleaved"]),
        ("", {"zero": 2}, ["zero=2", "One of 1, 3"]),
        ("cp=2", {"context": "rings"}, ["did you mean 'ring'?"]),
    ],
)
def test_a_bad_plan_is_refused_with_the_numbers(axes, options, texts):
    with pytest.raises(PlanError) as error:
        Plan(axes, **options)
    for text in texts:
        assert text in str(error.value)


@pytest.mark.parametrize(
    "axes, devices, texts",
    [
        ("tp=4, fsdp=4", 8, ["tp=4 x fsdp=4", "16 devices", "there are 8", "nearest valid:"]),
        ("tp=3", 8, ["nearest valid: tp=8"]),
        ("dcn.dp=2, tp=8", 8, ["dcn.dp=2 x tp=8", "nearest valid: dcn.dp=2, tp=4"]),
        ("", 8, ["no axis makes 1 devices", "nearest valid: dp=8"]),
        ("tp=3, fsdp=-1", 8, ["take 3", "nearest valid: tp="]),
    ],
)
def test_axes_that_do_not_multiply_to_the_devices(axes, devices, texts):
    with pytest.raises(PlanError) as error:
        Plan(axes).fill(devices)
    for text in texts:
        assert text in str(error.value)


def test_one_axis_takes_what_is_left():
    assert Plan("tp=2, fsdp=-1").fill(8) == Plan("tp=2, fsdp=4")


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 96), st.integers(1, 4))
def test_factorings_are_all_of_them(number, slots):
    found = list(factorings(number, slots))
    assert all(math.prod(factors) == number for factors in found) and len(set(found)) == len(found)
    # The number of ordered factorings is the product over primes of C(exponent + slots - 1, slots - 1).
    expected, rest = 1, number
    for prime in range(2, number + 1):
        exponent = 0
        while rest % prime == 0:
            rest, exponent = rest // prime, exponent + 1
        expected *= math.comb(exponent + slots - 1, slots - 1)
    assert len(found) == expected


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(MESH_AXES), min_size=1, max_size=4, unique=True), st.data())
def test_the_nearest_valid_choice_is_valid(axes, data):
    sizes = [data.draw(st.integers(1, 9)) for _ in axes]
    plan = Plan(", ".join(f"{axis}={size}" for axis, size in zip(axes, sizes, strict=True)))
    try:
        assert plan.fill(8).devices == 8 == plan.devices
    except PlanError as error:
        assert plan.devices != 8
        assert Plan(str(error).split("nearest valid: ")[1]).fill(8).devices == 8
