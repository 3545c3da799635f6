"""Placements, causes and bounds against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sharding.analysis.collectives import Collective
from sharding.analysis.hardware import find_hardware
from sharding.analysis.roofline import Roofline, cause, placements, step_roofline, summarize
from sharding.mesh import make_mesh
from sharding.plan import Plan

SIZES = {"pp": 2, "fsdp": 4, "tp": 2}
TREE = {"a": jax.ShapeDtypeStruct((4, 8, 6), jnp.float32), "b": jax.ShapeDtypeStruct((5,), jnp.bfloat16)}
SPECS = {"a": P("pp", ("fsdp", "tp")), "b": P()}


def test_placements_say_what_a_device_stores():
    a, b = placements(TREE, SPECS, SIZES)
    assert (a.path, a.local, a.bytes, a.axes) == ("a", (2, 1, 6), 48, (("pp",), ("fsdp", "tp"), ()))
    assert a.sharding == "4 by pp, 8 by fsdp·tp" and b.sharding == "replicated" and b.bytes == 10


def test_placements_are_where_jax_puts_them():
    plan = Plan("pp=2, fsdp=2, tp=2")
    mesh, spec = make_mesh(plan), P("pp", None, ("fsdp", "tp"))
    array = jax.device_put(np.zeros((4, 3, 8), np.float32), jax.NamedSharding(mesh, spec))
    (placed,) = placements({"x": array}, {"x": spec}, plan.sizes)
    shard = array.addressable_shards[0].data
    assert placed.local == shard.shape and placed.bytes == shard.nbytes


@pytest.mark.parametrize(
    "scope, text",
    [
        ("jvp()/shard_map/while/body/layer/gather_params/all_gather", "layer, gather_params"),
        ("transpose(jvp(shard_map))/layer/gather_params", "layer, gather_params, backward"),
        ("shard_map/layer/experts", "layer, experts"),
        ("head/all_gather_sequence", "head, all_gather_sequence"),
        ("", "step"),
    ],
)
def test_causes(scope, text):
    assert cause(scope) == text


def test_collectives_of_one_cause_are_added_up():
    one = Collective("all-reduce", ("tp",), 2, 3, 100, "layer/reduce_scatter_sequence")
    other = Collective("all-gather", ("fsdp",), 4, 1, 4000, "layer/gather_params")
    first, second = summarize([one, other, one])
    assert (first.kind, first.runs, first.moved) == ("all-gather", 1, 3000)
    assert (second.kind, second.runs, second.moved) == ("all-reduce", 6, 600)


def test_a_roofline_by_hand():
    h100 = find_hardware("H100")
    found = step_roofline(
        h100,
        flops=989.4e12,
        traffic=3350e9 / 2,
        moved=[(8, False, 450e9), (8, True, 50e9), (16, False, 50e9)],
        bubble=0.2,
    )
    assert found == Roofline(1.0, 0.5, 3.0, 0.2) and found.bound == "communication"
    assert found.overlapped == pytest.approx(3 / 0.8) and found.serial == pytest.approx(4 / 0.8)
