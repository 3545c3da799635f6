"""Criteria against their definitions: masks' derivatives, dense Hessians, sums over paths."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from lottery import allocation, criteria, masks, prune, schedules


def apply_fn(params, x):
    return jnp.tanh(x @ params["one"]["kernel"]) @ params["two"]["kernel"]


def loss_fn(params, batch):
    return jnp.mean((apply_fn(params, batch) - batch[:, :2]) ** 2)


PARAMS = {
    "one": {"kernel": jax.random.normal(jax.random.key(0), (3, 4))},
    "two": {"kernel": jax.random.normal(jax.random.key(1), (4, 2))},
}
BATCHES = jax.random.normal(jax.random.key(2), (5, 7, 3))


def whole(params):
    """The loss over all batches: they are equally large, so their mean is the mean over examples."""
    return loss_fn(params, BATCHES.reshape(-1, 3))


slope = jax.jit(jax.grad(loss_fn))


def assert_close(got, want):
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-4, atol=1e-6)


def test_snip_is_the_derivative_with_respect_to_the_mask():
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    want = jax.jit(jax.grad(lambda c: whole(jax.tree.map(jnp.multiply, c, PARAMS))))(ones)
    assert_close(jax.jit(lambda p: criteria.snip(loss_fn, p, BATCHES))(PARAMS), jax.tree.map(jnp.abs, want))


def test_grasp_is_the_weight_times_hessian_times_gradient():
    flat, unravel = ravel_pytree(PARAMS)
    hessian, gradient = jax.jit(lambda v: (jax.hessian(lambda v: whole(unravel(v)))(v), jax.grad(whole)(unravel(v))))(
        flat
    )
    want = unravel(flat * (hessian @ ravel_pytree(gradient)[0]))
    assert_close(jax.jit(lambda p: criteria.grasp(loss_fn, p, BATCHES))(PARAMS), want)


def test_taylor_and_fisher_average_squares_over_batches():
    grads = [slope(PARAMS, batch) for batch in BATCHES]
    mean = jax.tree.map(lambda *g: sum(x**2 for x in g) / len(g), *grads)
    score = jax.jit(lambda p: (criteria.taylor(loss_fn, p, BATCHES), criteria.fisher(loss_fn, p, BATCHES)))
    taylor, fisher = score(PARAMS)
    assert_close(taylor, jax.tree.map(lambda w, f: w**2 * f, PARAMS, mean))
    assert_close(fisher, jax.tree.map(lambda w, f: w**2 * f / 2, PARAMS, mean))


def test_magnitude_increase():
    initial = jax.tree.map(lambda w: -2 * w, PARAMS)
    assert_close(criteria.magnitude_increase(PARAMS, initial), jax.tree.map(lambda w: -jnp.abs(w), PARAMS))


def test_movement_adds_up_minus_weight_times_gradient_and_changes_no_update():
    tx = optax.chain(criteria.track_movement(), optax.sgd(0.1))
    params, state = PARAMS, tx.init(PARAMS)
    total = jax.tree.map(jnp.zeros_like, PARAMS)
    for batch in BATCHES:
        grads = slope(params, batch)
        total = jax.tree.map(lambda t, w, g: t - w * g, total, params, grads)
        updates, state = tx.update(grads, state, params)
        assert_close(updates, jax.tree.map(lambda g: -0.1 * g, grads))
        params = optax.apply_updates(params, updates)
    assert_close(criteria.movement(state), total)
    with pytest.raises(ValueError, match="track_movement"):
        criteria.movement(optax.adam(1.0).init(PARAMS))


def test_synflow_is_the_sum_over_paths_through_the_weight_up_to_one_factor():
    linear = lambda p, x: jax.nn.relu(x @ p["one"]["kernel"]) @ p["two"]["kernel"]  # noqa: E731
    got = criteria.synflow(linear, PARAMS, jnp.zeros((1, 3)))
    one, two = (np.abs(np.asarray(PARAMS[name]["kernel"], np.float64)) for name in ("one", "two"))
    want = {"one": one * two.sum(1)[None], "two": two * one.sum(0)[:, None]}
    factor = float(got["one"]["kernel"][0, 0]) / want["one"][0, 0]
    for name in want:
        np.testing.assert_allclose(got[name]["kernel"], factor * want[name], rtol=1e-5)
        # Tanaka et al. 2020, theorem 2: the scores of every layer add up to the same.
        assert float(got[name]["kernel"].sum()) == pytest.approx(factor * want["one"].sum(), rel=1e-5)


DEPTH, WIDTH = 100, 16


def deep(params, x):
    x, _ = jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, params["blocks"]["kernel"])
    return x @ params["output"]["kernel"]


def test_synflow_prunes_a_hundred_layers_without_collapse_where_snip_in_one_shot_collapses():
    """Tanaka et al. 2020, figure 1 and section 6: SynFlow reaches densities at which SNIP empties whole layers."""
    he = (2 / WIDTH) ** 0.5
    params = {
        "blocks": {"kernel": he * jax.random.normal(jax.random.key(0), (DEPTH, WIDTH, WIDTH))},
        "output": {"kernel": he * jax.random.normal(jax.random.key(1), (WIDTH, 4))},
    }
    which, ones = masks.prunable(params), masks.ones(params)
    x = jax.random.normal(jax.random.key(2), (1, 32, WIDTH))
    total = sum(prune.sizes(params, which).values())

    def error(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(deep(params, batch), jnp.arange(32) % 4).mean()

    density, rounds = 0.04, 100
    levels = schedules.densities(schedules.geometric(1 - density ** (1 / rounds), rounds))
    shapes = {path: leaf.shape for path, leaf in masks.flatten(params).items()}
    counts = [allocation.counts(prune.sizes(params, which), allocation.Everywhere(d), shapes) for d in levels]
    flow = lambda p: criteria.synflow(deep, p, jnp.ones((1, WIDTH)))  # noqa: E731
    kept = jax.jit(lambda p: prune.iterate(flow, p, ones, which, counts))(params)
    snip = jax.jit(lambda p: prune.keep(criteria.snip(error, p, x), ones, which, counts[-1]))(params)
    assert sum(int(m.sum()) for m in jax.tree.leaves(kept)) == round(density * total)
    assert sum(int(m.sum()) for m in jax.tree.leaves(snip)) == round(density * total)
    alive = {name: np.asarray(m["blocks"]["kernel"]).sum((1, 2)) for name, m in (("synflow", kept), ("snip", snip))}
    assert alive["synflow"].min() > 0, alive
    assert alive["snip"].min() == 0, alive
    # What flows: with absolute weights, SynFlow's network still connects inputs and outputs.
    through = lambda m: float(deep(jax.tree.map(jnp.abs, masks.apply(params, m)), jnp.ones((1, WIDTH))).sum())  # noqa: E731
    assert through(kept) > 0 and through(snip) == 0


TREE = {"a": {"kernel": jnp.array([[-2.0, 0.5], [0.0, -0.0]], jnp.bfloat16)}, "b": jnp.array([3.0, -3.0])}


def test_magnitude():
    out = criteria.magnitude(TREE)
    np.testing.assert_array_equal(out["a"]["kernel"], [[2, 0.5], [0, 0]])
    np.testing.assert_array_equal(out["b"], [3, 3])
    assert not np.any(np.signbit(out["a"]["kernel"]))


@pytest.mark.parametrize("name", ["magnitude", "random"])
def test_every_score_is_a_float32_tree_like_the_parameters_under_jit_and_vmap(name):
    score = lambda params, key: criteria.score(name, params, criteria.ScoreInputs(key=key))  # noqa: E731
    out = score(TREE, key=jax.random.key(0))
    chex.assert_trees_all_equal_shapes(out, TREE)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(out))
    chex.assert_trees_all_equal(out, score(TREE, key=jax.random.key(0)))
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), TREE)
    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
    both = jax.jit(jax.vmap(lambda p, k: score(p, k)))(stack, keys)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[0], both), out)


def test_random_scores_do_not_depend_on_the_weights_or_on_other_leaves():
    key = jax.random.key(3)
    out = criteria.random(TREE, key=key)
    chex.assert_trees_all_equal(out, criteria.random(jax.tree.map(jnp.zeros_like, TREE), key=key))
    chex.assert_trees_all_equal(out["b"], criteria.random({"b": TREE["b"]}, key=key)["b"])
    big = criteria.random({"x": jnp.zeros(10_000), "y": jnp.zeros(10_000)}, key=key)
    assert float(jnp.mean(big["x"])) == pytest.approx(0.5, abs=0.02)
    assert abs(np.corrcoef(big["x"], big["y"])[0, 1]) < 0.05


def test_magnitude_of_complex_weights_is_their_modulus():
    weights = np.array([3 + 4j, -1j, 2], np.complex64)
    np.testing.assert_allclose(criteria.magnitude({"kernel": jnp.asarray(weights)})["kernel"], np.abs(weights))


def test_a_search_can_switch_synflows_normalization_off():
    """With a skip around every layer the two orders differ; that of the paper is |w| dR/d|w| at the weights given."""
    params = {f"dense{i}": {"kernel": jax.random.normal(jax.random.key(i), (4, 4)) * 3.0**i} for i in range(3)}

    def skips(params, x):
        for name in params:
            x = x + x @ params[name]["kernel"]
        return x

    given = criteria.ScoreInputs(apply_fn=skips, inputs=jnp.ones((1, 4)), normalize=False)
    plain = criteria.score("synflow", params, given)
    # R = 1' prod (I + |W|) 1 in float64: dR/dW_i = (left of i)' (right of i)'.
    factors = [np.eye(4) + np.abs(np.asarray(p["kernel"], np.float64)) for p in params.values()]
    for i, name in enumerate(params):
        before = np.ones(4) @ np.linalg.multi_dot([np.eye(4), np.eye(4), *factors[:i]])
        after = np.linalg.multi_dot([np.eye(4), np.eye(4), *factors[i + 1 :]]) @ np.ones(4)
        want = np.abs(np.asarray(params[name]["kernel"])) * np.outer(before, after)
        np.testing.assert_allclose(plain[name]["kernel"], want, rtol=1e-5)
    normalized = criteria.score("synflow", params, dataclasses.replace(given, normalize=True))
    assert any(
        np.any(np.argsort(np.ravel(x)) != np.argsort(np.ravel(y)))
        for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(normalized), strict=True)
    )
