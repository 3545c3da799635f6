"""Placements, causes and bounds against numbers worked out by hand; figures by what they draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sharding.analysis.collectives import Collective
from sharding.analysis.hardware import HARDWARE, chips, find
from sharding.analysis.products import products
from sharding.analysis.roofline import Roofline, cause, placements, roofline, summarise
from sharding.analysis.search import Judged, plans, rank
from sharding.errors import PlanError
from sharding.mesh import abstract_mesh, make_mesh
from sharding.plan import Plan
from tessera.reports.sharding import placement_figure

SIZES = {"pp": 2, "fsdp": 4, "tp": 2}
TREE = {"a": jax.ShapeDtypeStruct((4, 8, 6), jnp.float32), "b": jax.ShapeDtypeStruct((5,), jnp.bfloat16)}
SPECS = {"a": P("pp", ("fsdp", "tp")), "b": P()}


def test_placements_say_what_a_device_stores():
    a, b = placements(TREE, SPECS, SIZES)
    assert (a.path, a.local, a.bytes, a.axes) == ("a", (2, 1, 6), 48, (("pp",), ("fsdp", "tp"), ()))
    assert a.words == "4 by pp, 8 by fsdp·tp" and b.words == "whole on every device" and b.bytes == 10


def test_placements_are_where_jax_puts_them():
    plan = Plan("pp=2, fsdp=2, tp=2")
    mesh, spec = make_mesh(plan), P("pp", None, ("fsdp", "tp"))
    array = jax.device_put(np.zeros((4, 3, 8), np.float32), jax.NamedSharding(mesh, spec))
    (placed,) = placements({"x": array}, {"x": spec}, plan.sizes)
    shard = array.addressable_shards[0].data
    assert placed.local == shard.shape and placed.bytes == shard.nbytes


def test_a_picture_has_a_tile_for_every_part_and_every_device():
    a, _ = placements(TREE, SPECS, SIZES)
    array, mesh = placement_figure(SIZES, a).axes
    colours = {patch.get_facecolor() for patch in array.patches}
    assert len(array.patches) == len(colours) == 2 * 8 and len(mesh.patches) == 16
    assert {patch.get_facecolor() for patch in mesh.patches} == colours
    assert "on 1 device" in mesh.get_title(loc="left")
    # What no axis splits is on all devices.
    array, mesh = placement_figure(SIZES, placements(TREE, SPECS, SIZES)[1]).axes
    assert len(array.patches) == 1 and "on 16 devices" in mesh.get_title(loc="left")


@pytest.mark.parametrize(
    "scope, words",
    [
        ("jvp()/shard_map/while/body/layer/gather_params/all_gather", "layer, gather_params"),
        ("transpose(jvp(shard_map))/layer/gather_params", "layer, gather_params, backward"),
        ("shard_map/layer/experts", "layer, experts"),
        ("head/enter", "head, enter"),
        ("", "step"),
    ],
)
def test_causes(scope, words):
    assert cause(scope) == words


def test_collectives_of_one_cause_are_added_up():
    one = Collective("all-reduce", ("tp",), 2, 3, 100, "layer/leave")
    other = Collective("all-gather", ("fsdp",), 4, 1, 4000, "layer/gather_params")
    first, second = summarise([one, other, one])
    assert (first.kind, first.runs, first.moved) == ("all-gather", 1, 3000)
    assert (second.kind, second.runs, second.moved) == ("all-reduce", 6, 600)


def test_a_roofline_by_hand():
    h100 = find("H100")
    found = roofline(
        h100,
        flops=989.4e12,
        traffic=3350e9 / 2,
        moved=[(8, False, 450e9), (8, True, 50e9), (16, False, 50e9)],
        bubble=0.2,
    )
    assert found == Roofline(1.0, 0.5, 3.0, 0.2) and found.bound == "communication"
    assert found.overlapped == pytest.approx(3 / 0.8) and found.serial == pytest.approx(4 / 0.8)


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
    assert find(name).speed(group, crosses=crosses) == pytest.approx(speed)


def test_every_device_has_sources_and_sane_numbers():
    for name, device in HARDWARE.items():
        assert device.name == name and device.sources and 100 < device.ridge < 1000
        assert device.network < device.links < device.bandwidth < device.flops


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: find("v5"), "did you mean 'v5[ep]'"),
        (lambda: find("h200"), "did you mean 'H200'"),
        (lambda: chips("v5p:8x8xx"), "v5p:8x8x8"),
        (lambda: chips("v5p"), "v5p:8x8x8"),
    ],
)
def test_unknown_hardware_is_refused(call, message):
    with pytest.raises(PlanError, match=message):
        call()
    assert chips("v5p:8x8x8") == 512


def test_products_are_counted_with_their_trips():
    def work(x, w):
        def body(x, _):
            with jax.named_scope("inside"):
                return x @ w, None

        x = jax.lax.scan(body, x, None, length=5)[0]
        return jax.lax.cond(x.sum() > 0, lambda: (x @ w) @ w, lambda: x)

    mesh = abstract_mesh(Plan("dp=2"))
    function = jax.shard_map(work, mesh=mesh, in_specs=(P("dp"), P()), out_specs=P("dp"))
    found = products(function, jnp.ones((8, 4)), jnp.ones((4, 4)))
    # One device has 4 of the 8 rows: 2 x 4 x 4 x 4 FLOPs, and 3 arrays of 16 float32.
    assert [(one.flops, one.bytes, one.runs) for one in found] == [(128, 192, 5), (128, 192, 1), (128, 192, 1)]
    assert "inside" in found[0].scope


def test_every_factoring_is_looked_at_once_and_the_fastest_that_fits_wins():
    seen = list(plans(8, Plan(zero=1), allowed={"pp": [1], "ep": [1], "cp": [1]}))
    assert {plan.axes for plan in seen} >= {"dp=8", "fsdp=8", "tp=8", "dp=2, fsdp=2, tp=2"} and len(seen) == 10
    assert len(set(seen)) == 10 and all(plan.devices == 8 and plan.zero == 1 for plan in seen)
    assert all(plan.sequence == (plan.size("tp") > 1) for plan in seen)
    piped = [plan for plan in plans(8, Plan()) if plan.axes == "pp=8"]
    assert [plan.microbatches for plan in piped] == [8, 16, 32, 64]

    def judge(plan):
        if plan.size("tp") == 8:
            raise PlanError("too many heads")
        return Judged(plan, 100 / plan.size("fsdp"), 1.0 * plan.size("tp"), float(plan.size("dp")))

    ranking = rank(seen, judge, 60.0)
    assert ranking.fits[0].plan.axes == "fsdp=8" and ranking.smallest.plan.axes == "fsdp=8"
    assert (ranking.tried, ranking.refused, ranking.too_large, len(ranking.fits)) == (10, 1, 3, 6)
