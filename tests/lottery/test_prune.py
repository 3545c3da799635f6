"""Pruning against a NumPy reference that sorts Python tuples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lottery import masks, prune

PARAMS = {"bias": jnp.zeros(3), "one": {"kernel": jnp.zeros((3, 4))}, "two": {"kernel": jnp.zeros((2, 5))}}
WHICH = masks.prunable(PARAMS)
LEAVES = ("one/kernel", "two/kernel")


def reference(scores, alive, groups):
    """groups: (paths, count). Sort the alive weights of a group by (score, leaf, flat index) and drop the first."""
    new = {path: alive[path].copy() for path in alive}
    for paths, count in groups:
        units = [
            (bool(np.isnan(x := scores[path].flat[i])), np.nan_to_num(x, nan=0.0, posinf=np.inf), paths.index(path), i)
            for path in paths
            for i in np.flatnonzero(alive[path])
        ]
        for *_, leaf, i in sorted(units)[: max(count, 0)]:
            new[paths[leaf]].flat[i] = False
    return new


# Few distinct values, so that ties are the rule.
values = st.sampled_from([0.0, 0.25, 0.5, 1.0, float("inf"), float("nan")])


@st.composite
def problems(draw):
    scores, alive = {}, {}
    for path, size in zip(LEAVES, (12, 10), strict=True):
        shape = masks.flatten(PARAMS)[path].shape
        scores[path] = np.array(draw(st.lists(values, min_size=size, max_size=size)), np.float32).reshape(shape)
        alive[path] = np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size))).reshape(shape)
    return scores, alive


def trees(scores, alive):
    """The two leaves in a parameter tree."""

    def build(leaves, bias):
        return {"bias": bias, **{path.split("/")[0]: {"kernel": jnp.asarray(leaves[path])} for path in LEAVES}}

    return build(scores, jnp.zeros(3)), build(alive, jnp.ones(3, bool))


JITTED = jax.jit(lambda scores, masks, removals: prune.remove(scores, masks, WHICH, removals))


@settings(max_examples=60, deadline=None)
@given(problem=problems(), one=st.integers(-2, 14), two=st.integers(-2, 14))
def test_layerwise_removes_exactly_the_quota_ties_by_index(problem, one, two):
    scores, alive = trees(*problem)
    out = JITTED(scores, alive, {"one/kernel": one, "two/kernel": two})
    expected = reference(*problem, [(("one/kernel",), one), (("two/kernel",), two)])
    for path, count in zip(LEAVES, (one, two), strict=True):
        got = np.asarray(masks.flatten(out)[path])
        before = problem[1][path].sum()
        assert got.sum() == before - min(max(count, 0), before)
        np.testing.assert_array_equal(got, expected[path])
    assert bool(jnp.all(out["bias"]))


@settings(max_examples=60, deadline=None)
@given(problem=problems(), count=st.integers(-2, 25))
def test_global_removes_exactly_the_quota_over_all_leaves(problem, count):
    scores, alive = problem
    out = masks.flatten(JITTED(*trees(scores, alive), {prune.EVERYTHING: count}))
    for path, expected in reference(scores, alive, [(LEAVES, count)]).items():
        np.testing.assert_array_equal(np.asarray(out[path]), expected)


def test_scores_that_are_not_numbers_go_last_but_before_anything_dead():
    scores = jnp.array([jnp.nan, jnp.inf, 1.0, 0.0])
    alive = jnp.array([True, True, True, False])
    for count, expected in [(1, [1, 1, 0, 0]), (2, [1, 0, 0, 0]), (3, [0, 0, 0, 0])]:
        np.testing.assert_array_equal(prune.drop_lowest(scores, alive, count), np.array(expected, bool))


def test_a_stack_is_pruned_like_its_members_with_one_quota_or_one_each():
    key = jax.random.key(0)
    scores = jax.tree.map(lambda p: jax.random.uniform(key, (4, *p.shape)), PARAMS)
    alive = jax.tree.map(lambda s: s > 0.3, scores) | {"bias": jnp.ones((4, 3), bool)}
    removals = {"one/kernel": jnp.arange(4), "two/kernel": jnp.arange(4) + 1}
    stacked = jax.jit(jax.vmap(lambda s, m, q: prune.remove(s, m, WHICH, q)))(scores, alive, removals)
    shared = jax.jit(jax.vmap(lambda s, m: prune.remove(s, m, WHICH, {"one/kernel": 2})))(scores, alive)
    for i in range(4):
        at = lambda tree: jax.tree.map(lambda x: x[i], tree)  # noqa: E731, B023
        for got, want in [
            (at(stacked), prune.remove(at(scores), at(alive), WHICH, at(removals))),
            (at(shared), prune.remove(at(scores), at(alive), WHICH, {"one/kernel": 2})),
        ]:
            for path in LEAVES:
                np.testing.assert_array_equal(masks.flatten(got)[path], masks.flatten(want)[path])
    np.testing.assert_array_equal(
        stacked["two"]["kernel"].sum((1, 2)), alive["two"]["kernel"].sum((1, 2)) - np.arange(1, 5)
    )


@pytest.mark.parametrize(
    ("scope", "alive", "expected"),
    [
        (prune.Layerwise(0.2), {"a": 100, "b": 7, "c": 2, "d": 0}, {"a": 20, "b": 1, "c": 0, "d": 0}),
        (prune.Layerwise(0.5), {"a": 5, "b": 7}, {"a": 2, "b": 4}),  # halves to the even number, as np.round
        (prune.Layerwise(0.2, (("^b", 0.1),)), {"a": 100, "b": 100}, {"a": 20, "b": 10}),
        (prune.Layerwise(0.2, (("b", 0.1), (".", 1.0))), {"a": 9, "b": 100}, {"a": 9, "b": 10}),
        (prune.Global(0.2), {"a": 100, "b": 7}, {"*": 21}),
        (prune.Global(0.0), {"a": 100}, {"*": 0}),
        (prune.Layerwise(0.2), {"a": 10**12 + 3}, {"a": 200000000001}),
    ],
)
def test_removal_counts(scope, alive, expected):
    assert prune.removal_counts(alive, scope) == expected


@settings(deadline=None)
@given(rate=st.floats(0, 1), alive=st.integers(0, 10**9))
def test_removal_counts_round_as_numpy_and_never_empty_a_layer(rate, alive):
    count = prune.removal_counts({"a": alive}, prune.Layerwise(rate))["a"]
    assert count == (alive if rate == 1 else min(int(np.round(rate * alive)), max(alive - 1, 0)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: prune.removal_counts({"a": 1}, prune.Layerwise(0.2, (("^head", 0.1),))),
            r"'\^head' matches no parameter.*a",
        ),
        (lambda: prune.Layerwise(1.2), r"Layerwise.rate is 1.2"),
        (lambda: prune.Global(-0.1), r"Global.rate is -0.1"),
        (lambda: prune.Layerwise(0.2, (("x", 2.0),)), "overrides 'x' is 2.0"),
        (lambda: prune.remove(PARAMS, masks.ones(PARAMS), WHICH, {"bias": 1}), "bias.*one/kernel, two/kernel"),
        (lambda: prune.remove(PARAMS, masks.ones(PARAMS), WHICH, {"*": 1}, "blocks"), "'blocks'.*unstructured"),
    ],
)
def test_impossible_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("structure", "alive"),
    [
        ("neuron", lambda mask: mask.any(0).sum()),
        ("2x3", lambda mask: mask.reshape(3, 2, 2, 3).any((1, 3)).sum()),
        ("2:3", lambda mask: mask.sum()),
    ],
)
def test_a_unit_is_alive_while_any_of_its_weights_is(structure, alive):
    mask = np.random.default_rng(0).random((6, 6)) < 0.25
    mask[:, 0] = mask[2:4, 3:] = False
    params, which = {"one": {"kernel": jnp.asarray(mask)}}, {"one": {"kernel": True}}
    (found,) = prune.alive_units(params, which, structure).values()
    assert int(found) == alive(mask) < mask.size


@pytest.mark.parametrize(("structure", "stay"), [("2:4", 2), ("1:4", 1), ("3:4", 3)])
def test_a_pattern_protects_its_weights_whatever_is_asked_for(structure, stay):
    score = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)}
    which, size = {"kernel": True}, prune.sizes(score, {"kernel": True})["kernel"]
    found = prune.remove(score, masks.ones(score), which, {"kernel": size}, structure)["kernel"]
    groups = np.asarray(found).reshape(2, 4, 3)
    assert (groups.sum(1) == stay).all()
    best = np.sort(np.asarray(score["kernel"]).reshape(2, 4, 3), axis=1)[:, -stay:]
    left = np.where(groups, score["kernel"].reshape(2, 4, 3), -9)
    np.testing.assert_array_equal(np.sort(left, axis=1)[:, -stay:], best)
