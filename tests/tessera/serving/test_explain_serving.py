"""Costs of a decode step by hand: what a layer, a device and a text more add."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from moe.gate import RouterConfig
from moe.layer import MoEConfig
from sharding.analysis.hardware import find_hardware
from sharding.inference.quantize import QuantConfig
from sharding.plan import Plan
from tessera.models.transformer import TransformerConfig, param_shapes
from tessera.serving import explain
from tessera.serving.explain import _touched, filled, serving_plans, table, token_cost
from tessera.serving.programs import ServeConfig
from tessera.serving.quantized import quantise_decoder, quantized_shapes
from tessera.serving.served import serve

CONFIG = TransformerConfig(vocab_size=64, layers=4, width=16, heads=8, kv_heads=4, ff=24)
SIZES = ServeConfig(slots=8, length=32, chunk=16)
SHAPES = param_shapes(CONFIG)
V5E = find_hardware("v5e")


@pytest.fixture(autouse=True, scope="module")
def programs_are_traced_once():
    """Latency, context and hardware change nothing in them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain, "_traced", functools.cache(explain._traced))
        yield


def cost(axes, config=CONFIG, sizes=SIZES, **options):
    return token_cost(config, Plan(axes), sizes, V5E, **options)


@pytest.mark.long
def test_one_device_reads_its_weights_and_the_texts_and_sends_nothing():
    one = cost("", context=20)
    weights = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(CONFIG))) * 4
    head = CONFIG.width // CONFIG.heads
    text = 2 * CONFIG.layers * CONFIG.kv_heads * head * 4  # bytes of a token
    assert (one.weights, one.cache, one.collectives, one.moved) == (weights, text * 32 * 8, 0, 0.0)
    assert one.traffic == weights + text * 20 * 8
    # Two per weight of a kernel and token, the tied table as the head, scores and values over the cache and the token.
    kernels = weights / 4 - CONFIG.width * (2 * CONFIG.layers + 1)
    attention = 4 * CONFIG.layers * CONFIG.width * (32 + 1)
    assert one.flops == 8 * (2 * kernels + attention)
    assert one.seconds == pytest.approx(max(one.flops / V5E.flops, one.traffic / V5E.bandwidth))
    assert one.tokens_per_second == pytest.approx(8 / one.seconds)
    longer = cost("", context=30)
    assert longer.traffic - one.traffic == text * 10 * 8 and longer.seconds > one.seconds
    untied = cost("", replace(CONFIG, tied=False), context=20)
    assert untied.weights - one.weights == 64 * 16 * 4, "a table of its own"
    assert untied.traffic == one.traffic, "of which a step reads a few rows only"


def test_pages_take_the_memory_that_they_have_and_more_texts_have_more_of_them():
    sizes = replace(SIZES, pages=10, page_size=8)
    page = 8 * 2 * CONFIG.layers * CONFIG.width // CONFIG.heads * CONFIG.kv_heads * 4  # bytes
    one = cost("dp=2", sizes=sizes)
    assert one.cache == 5 * page
    more = filled(one, CONFIG, sizes, V5E)  # 1,024 texts at most, 128 times as many
    assert (more.slots, more.cache) == (1024, 128 * 5 * page)


@pytest.mark.parametrize(
    "axes, collectives, moved",
    [
        # A layer of tp: two all-reduces of [8, 16] float32; twice (n - 1) / n of it is sent.
        pytest.param("tp=2", 2, 2 * 2 * (1 / 2) * 8 * 16 * 4, marks=pytest.mark.slow),
        ("tp=4", 2, 2 * 2 * (3 / 4) * 8 * 16 * 4),
        # Of cp: the maximum of every row and head, then numerators [h] and denominator: 8 heads of 2.
        ("cp=2", 2, 2 * (1 / 2) * 8 * 8 * (1 + 2 + 1) * 4),
        ("dp=2, tp=2", 2, 2 * 2 * (1 / 2) * 4 * 16 * 4),
        pytest.param("dp=8", 0, 0.0, marks=pytest.mark.slow),
    ],
)
def test_a_layer_more_adds_what_is_exchanged_in_it(axes, collectives, moved):
    small, large = cost(axes, latency=0.0), cost(axes, replace(CONFIG, layers=8), latency=0.0)
    assert large.collectives - small.collectives == 4 * collectives
    assert large.moved - small.moved == 4 * moved
    slow = cost(axes, latency=1e-3)
    assert slow.seconds - small.seconds == pytest.approx(1e-3 * small.collectives)


def test_stages_read_their_weights_once_for_every_group_of_slots():
    """Of the activations of a group of 4 slots and four numbers of each, a tick sends one stage's to the next."""
    one, two = cost("", context=16), cost("pp=2", context=16)
    blocks = one.weights - 64 * 16 * 4 - 16 * 4
    assert two.weights == one.weights - blocks / 2
    assert two.cache == one.cache / 2
    assert two.traffic == 2 * two.weights + two.cache / 2, "two groups take turns; a text is half full"
    four = cost("pp=2", sizes=replace(SIZES, groups=4), context=16)
    assert four.traffic == 4 * four.weights + four.cache / 2
    assert four.moved == pytest.approx(two.moved, rel=0.5) and four.collectives == 2 * two.collectives


@pytest.mark.long
def test_experts_are_read_where_a_token_goes_to_them():
    moe = MoEConfig(router=RouterConfig(experts=8, k=2))
    routed = replace(CONFIG, mlp="routed", moe=moe)
    _, decoder = serve(jax.tree.map(lambda one: np.zeros(one.shape, one.dtype), param_shapes(routed)), routed, Plan())
    rng = np.random.default_rng(0)
    hits = [len({e for _ in range(5) for e in rng.permutation(8)[:2]}) / 8 for _ in range(4000)]
    assert _touched(decoder, 5) == pytest.approx(np.mean(hits), abs=0.01)
    one, split = cost("", routed), cost("ep=2", routed)
    experts = 4 * 8 * 3 * 16 * 24 * 4
    assert one.weights - split.weights == experts / 2
    more = cost("ep=2", replace(routed, layers=8))
    assert more.collectives - split.collectives == 4 * 3, "sizes, tokens there, and back"


WAYS = {"int8": QuantConfig(8), "int4": QuantConfig(4, group=2), "awq": QuantConfig(4, "awq", 2)}


@pytest.mark.parametrize(
    "how, axes",
    [
        pytest.param(how, axes, id=f"{name}-{axes}", marks=[pytest.mark.slow] * (not axes and name != "int4"))
        for name, how in WAYS.items()
        for axes in ("", "tp=2")
    ],
)
def test_quantized_weights_are_counted_as_they_are_held(how, axes):
    """Bytes by hand: 8 or 4 bits a weight, a float32 scale a group and output, AWQ's factor an input."""
    into_out = {"query": (16, 16), "key": (16, 8), "value": (16, 8), "output": (16, 16)}
    into_out |= {"gate": (16, 24), "up": (16, 24), "down": (24, 16)}
    ways, wanted = Plan(axes).size("tp"), 0.0
    for name, (inputs, outputs) in into_out.items():
        groups, inner = (inputs // how.group if how.group else 1), name in ("output", "down")  # tp splits their inputs
        scales = groups * outputs / (1 if inner and not how.group else ways)
        factors = inputs / (ways if inner else 1) if how.method == "awq" else 0
        wanted += 4 * (inputs * outputs * how.bits / 8 / ways + 4 * (scales + factors))
    rest = 4 * (64 * 16 / ways + 9 * 16)
    found, plain = cost(axes, weights=how), cost(axes)
    assert found.weights == wanted + rest
    assert plain.traffic - found.traffic == plain.weights - found.weights
    assert (found.flops, found.cache, found.moved) == (plain.flops, plain.cache, plain.moved)
    made = quantise_decoder(jax.tree.map(lambda one: np.ones(one.shape), SHAPES), CONFIG, replace(how, method="rtn"))
    shapes = quantized_shapes(SHAPES, replace(how, method="rtn"))
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), made["blocks"], shapes["blocks"])
    assert all(leaf for path, leaf in jax.tree.leaves_with_path(same) if "gain" not in str(path))


@pytest.mark.parametrize("axes", [pytest.param("", marks=pytest.mark.slow), "dp=2", "pp=2"])
def test_a_filled_plan_has_as_many_texts_as_the_memory_holds(axes):
    one = cost(axes)
    per = one.cache / (8 // one.plan.data)
    small = replace(V5E, memory=(one.weights + 20.5 * per) / 0.92)
    full = filled(one, CONFIG, SIZES, small)
    assert full.slots == 20 * one.plan.data and full.fits(small)
    assert full.cache == round(20 * per)


def test_every_plan_of_so_many_devices_is_there_or_says_why_not():
    found, refused = serving_plans(CONFIG, 6, SIZES, V5E)
    axes = [one.plan.axes for one in found]
    assert len(set(axes) | set(refused)) == len(axes) + len(refused) == 4**2, "factorings of 2 x 3 over pp, dp, cp, tp"
    assert "tp=6" in refused and "heads" in refused["tp=6"]
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    rows = table(found, V5E)
    assert len(rows) == len(found) and all(len(row) == 9 for row in rows)
    tiny = replace(V5E, memory=100.0)
    assert all(row[3].endswith("does not fit") for row in table(found, tiny))
