"""Structured tickets, cut out: the same outputs from fewer numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lottery import align, compact, coupled, criteria, masks, prune
from moe import dispatch, experts, route
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.models.vision import LeNet, MLPConfig

LAYERS = ("dense0", "dense1", "output")


def lenet():
    params = jax.jit(LeNet(MLPConfig((20, 12))).init)(jax.random.key(0), jnp.zeros((1, 30)))["params"]
    rng = np.random.default_rng(1)
    for name in LAYERS:
        params[name]["bias"] = jnp.asarray(rng.normal(size=params[name]["bias"].shape), jnp.float32)
    return params


def same(config, params, small_config, small, x):
    want, got = (jax.jit(LeNet(c).apply)({"params": p}, x) for c, p in ((config, params), (small_config, small)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-6)


def test_coupled_neurons_of_lenet_are_cut_out():
    params = lenet()
    which, groups = masks.prunable(params), coupled.mlp_neurons(LAYERS)
    assert coupled.unit_counts(params, groups) == {"dense0": 20, "dense1": 12}
    counts = {"dense0": 7, "dense1": 5}
    keep = jax.jit(lambda p: coupled.keep_units(criteria.magnitude(p), masks.ones(p), which, groups, counts))
    mask = keep(params)
    mean = np.abs(params["dense0"]["kernel"]).sum(0) + np.abs(params["dense1"]["kernel"]).sum(1)
    best = set(np.argsort(-mean)[:7])
    assert set(np.flatnonzero(np.asarray(mask["dense0"]["kernel"]).any(0))) == best
    assert set(np.flatnonzero(np.asarray(mask["dense1"]["kernel"]).any(1))) == best
    ticket = masks.apply(params, mask)
    small, hidden = compact.compact_mlp(ticket, LAYERS)
    assert hidden == (7, 5) and small["dense1"]["kernel"].shape == (7, 5)
    same(MLPConfig((20, 12)), ticket, MLPConfig(hidden), small, jax.random.normal(jax.random.key(2), (50, 30)))


@pytest.mark.parametrize("count", [1, 6, 12])
def test_neurons_that_read_nothing_become_part_of_the_next_bias(count):
    params = lenet()
    which = masks.prunable(params)
    removals = {"dense0/kernel": count, "dense1/kernel": min(count, 11)}
    remove = jax.jit(lambda p: prune.remove(criteria.magnitude(p), masks.ones(p), which, removals, "neuron"))
    mask = remove(params)
    ticket = masks.apply(params, mask)
    small, hidden = compact.compact_mlp(ticket, LAYERS)
    assert hidden == (20 - count, 12 - min(count, 11))
    same(MLPConfig((20, 12)), ticket, MLPConfig(hidden), small, jax.random.normal(jax.random.key(2), (50, 30)))


def test_a_network_of_nothing_keeps_one_neuron_a_layer_and_its_constant_output():
    params = jax.tree.map(lambda x: x * (x.ndim == 1), lenet())
    small, hidden = compact.compact_mlp(params, LAYERS)
    assert hidden == (1, 1)
    same(MLPConfig((20, 12)), params, MLPConfig(hidden), small, jnp.ones((3, 30)))


@pytest.mark.parametrize("kv_heads", [pytest.param(4, marks=pytest.mark.slow), 2])
def test_the_decoder_loses_heads_and_neurons_and_says_the_same(kv_heads):
    config = TransformerConfig(vocab_size=31, layers=2, width=16, heads=4, kv_heads=kv_heads, ff=12)
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 31)
    run = jax.jit(lambda params: Decoder(config).apply({"params": params}, tokens))
    params = jax.jit(Decoder(config).init)(jax.random.key(1), tokens)["params"]
    which = masks.prunable(params)
    groups = coupled.decoder_neurons() | coupled.decoder_heads(4, kv_heads)
    units = {"blocks_0/mlp": 12, "blocks_1/mlp": 12, "blocks_0/attention": kv_heads, "blocks_1/attention": kv_heads}
    assert coupled.unit_counts(params, groups) == units
    # The layers keep different numbers, and one is padded.
    counts = {"blocks_0/mlp": 5, "blocks_1/mlp": 6, "blocks_0/attention": 1, "blocks_1/attention": kv_heads - 1}
    keep = jax.jit(lambda p: coupled.keep_units(criteria.magnitude(p), masks.ones(p), which, groups, counts))
    mask = keep(params)
    ticket = masks.apply(params, mask)
    small, sizes = compact.compact_decoder(ticket)
    assert 4 * sizes["ff"] < 4 * 12 and sizes["ff"] >= 6 and sizes["head_dim"] == 4
    assert sizes["heads"] == sizes["kv_heads"] * (4 // kv_heads)
    small_config = dataclasses.replace(config, **sizes)
    want = run(ticket)
    got = jax.jit(Decoder(small_config).apply)({"params": small}, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-6)
    assert not np.allclose(want, run(params), atol=1e-3)


@pytest.mark.parametrize("function", [compact.compact_decoder, align.open_decoder])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv_bias": True}, "biases on query, key, value"),
        ({"qk_norm": True, "qk_norm_scope": "projection"}, "gains of a norm over all heads on query, key"),
    ],
    ids=["biases", "a norm over all heads"],
)
def test_heads_with_more_than_kernels_are_refused_and_nothing_is_forgotten(function, changes, message):
    config = TransformerConfig(vocab_size=8, layers=1, width=8, heads=2, ff=8, **changes)
    params = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    with pytest.raises(ValueError, match=message):
        function(zeros)


def test_single_leaf_heads_and_stacked_layouts():
    config = TransformerConfig(vocab_size=31, layers=2, width=16, heads=4, ff=12)
    tokens = jnp.zeros((1, 3), jnp.int32)
    params = jax.eval_shape(lambda: Decoder(config).init(jax.random.key(1), tokens))["params"]
    which = masks.prunable(params, (("mlp/", False),))
    found = prune.units(params, which, "head")
    assert set(found.values()) == {4} and len(found) == 2 * 4
    which = masks.prunable(params, (("attention/", False),))
    assert prune.units(params, which, "neuron")["blocks_1/mlp/down/kernel"] == 16
    assert prune.units(params, which, "4x4")["blocks_1/mlp/gate/kernel"] == 4 * 3
    moe = {"blocks": {"mlp": {"experts": {"up": {"kernel": jnp.zeros((2, 5, 4, 6))}}}}}
    assert prune.units(moe, masks.prunable(moe), "expert") == {
        "blocks_0/mlp/experts/up/kernel": 5,
        "blocks_1/mlp/experts/up/kernel": 5,
    }
    with pytest.raises(ValueError, match="blocks/mlp/down/kernel: .*no axis of heads"):
        prune.units(params, masks.prunable(params, (("(gate|up|attention).*", False),)), "head")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compact.compact_mlp(lenet(), ("dense0", "head")), "no layer head"),
        (lambda: compact.compact_mlp(lenet(), ("dense1", "dense0")), "dense1 has 12 outputs, dense0 30 inputs"),
        (lambda: coupled.decoder_heads(5, 2), "5 query heads"),
    ],
)
def test_wrong_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_groups_that_do_not_fit_name_the_path():
    params = lenet()
    which = masks.prunable(params)
    for groups, message in [
        ({"g": (coupled.Member("dense0/bias", (0,)),)}, "dense0/bias is not a prunable"),
        ({"g": (coupled.Member("dense0/kernel", (2,)),)}, "dense0/kernel of shape"),
        ({"g": (coupled.Member("dense0/kernel", (1,)), coupled.Member("output/kernel", (0,)))}, "different units"),
        ({"h": ()}, "groups: h"),
    ]:
        with pytest.raises(ValueError, match=message):
            coupled.keep_units(params, masks.ones(params), which, groups, {"g": 1})


@pytest.mark.parametrize("keep", [1, 3])
def test_dead_experts_leave_and_the_layer_says_the_same(keep):
    params = jax.jit(lambda key: experts.initialize(8, 12, 6, key=key))(jax.random.key(0))
    tree = {"experts": {name: {"kernel": kernel} for name, kernel in params.items()}}
    which = masks.prunable(tree)
    members = tuple(coupled.Member(f"experts/{name}/kernel", (0,)) for name in params)
    groups, counts = {"experts": members}, {"experts": keep}
    run = jax.jit(lambda p: coupled.keep_units(criteria.magnitude(p), masks.ones(p), which, groups, counts))
    mask = run(tree)
    ticket = masks.apply(tree, mask)["experts"]
    small, numbers = compact.compact_experts(ticket)
    assert small["up"]["kernel"].shape == (keep, 8, 12) and sorted(numbers)[-1] == keep
    x = jax.random.normal(jax.random.key(1), (20, 8))
    routing = jax.jit(route.top_k, static_argnames="k")(jax.random.normal(jax.random.key(2), (20, 6)), k=2)

    @jax.jit
    def layer(params, routing):
        return dispatch.dropless(x, routing, lambda rows, sizes: experts.expert_ffn(params, rows, sizes))

    want = layer({name: leaf["kernel"] for name, leaf in ticket.items()}, routing)
    ids, weights = compact.renumber(routing.experts_NK, routing.weights_NK, numbers, keep)
    first = {name: getattr(routing, name)[:, :keep] for name in ("probs_NE", "logits_NE")}
    fewer = dataclasses.replace(routing, experts_NK=ids, weights_NK=weights, **first)
    got = layer({name: jnp.asarray(leaf["kernel"]) for name, leaf in small.items()}, fewer)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-6)


def test_kernels_of_different_numbers_of_experts_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 3\] experts"):
        compact.compact_experts({"up": np.ones((2, 3, 4)), "down": np.ones((3, 4, 3))})


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_a_neuron_is_dead_by_any_of_its_kernels(name):
    config = TransformerConfig(vocab_size=5, layers=1, width=4, heads=2, ff=6)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    kernel = np.moveaxis(params["blocks"]["mlp"][name]["kernel"], 1 if name == "down" else 2, 0)
    kernel[[1, 4]] = 0
    assert compact.compact_decoder(params)[1]["ff"] == 4


def test_an_expert_without_a_gate_stays_for_the_bias_that_it_adds():
    stack = {"up": {"kernel": np.ones((3, 2, 4))}, "down": {"kernel": np.ones((3, 4, 2)), "bias": np.zeros((3, 2))}}
    stack["up"]["kernel"][:2] = 0  # relu of zeros is zero, whatever reads it
    stack["down"]["bias"][1] = 5
    small, numbers = compact.compact_experts(stack)
    assert numbers.tolist() == [2, 0, 1] and small["down"]["bias"].tolist() == [[5, 5], [0, 0]]


def test_choices_of_cut_experts_have_no_weight():
    """An expert that is gone, and a choice that was dropped before (expert 3 of 3)."""
    chosen, weights = jnp.array([[0, 2], [1, 3]]), jnp.array([[0.25, 0.75], [0.5, 0.5]])
    ids, factors = compact.renumber(chosen, weights, np.array([2, 0, 1]), 2)
    assert ids.tolist() == [[2, 1], [0, 2]] and factors.tolist() == [[0.0, 0.75], [0.5, 0.0]]


@pytest.mark.parametrize("structure", ["coupled", "2:4", "2x4"])
def test_scores_of_pruned_weights_count_for_nothing(structure):
    """Whatever they are, the units that go next are the same."""
    generator = np.random.default_rng(0)
    draw = lambda: {name: {"kernel": np.float32(generator.normal(size=(8, 8)))} for name in ("a", "b")}  # noqa: E731
    score, mask = draw(), jax.tree.map(lambda x: jnp.asarray(np.abs(x) > 0.5), draw())
    which, groups = masks.prunable(score), coupled.mlp_neurons(("a", "b"))

    @jax.jit
    def kept(score):
        if structure == "coupled":
            return coupled.keep_units(score, mask, which, groups, {"a": 3})
        counts = {name: n // 2 for name, n in prune.units(score, which, structure).items()}
        return prune.keep(score, mask, which, counts, structure)

    found = kept(score)
    for value in (1e6, -1e6, np.nan):
        changed = kept(jax.tree.map(lambda s, m: np.where(m, s, np.float32(value)), score, mask))  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, changed, found)
    assert sum(x.sum() for x in jax.tree.leaves(found)) < sum(x.sum() for x in jax.tree.leaves(mask))
