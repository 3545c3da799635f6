"""Masks that move during training: counts, zeros, schedules, and that moving pays where it should."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from lottery import dynamic, masks

KEY = jax.random.key(0)
PARAMS = {"a": {"kernel": jax.random.normal(KEY, (10, 6)), "bias": jnp.zeros(6)}, "b": {"kernel": jnp.ones((6, 4))}}
WHICH = masks.prunable(PARAMS)
START = masks.random_like(
    {
        "a": {"kernel": (jnp.arange(60) < 21).reshape(10, 6), "bias": jnp.ones(6, bool)},
        "b": {"kernel": (jnp.arange(24) < 11).reshape(6, 4)},
    },
    key=jax.random.key(1),
)
STEPS = 12


def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None]) @ params["b"]["kernel"] - 1) ** 2)


def run(tx, params, steps=STEPS):
    """All states by scan under jit: (params, masks, inner state) after every step, stacked."""

    def step(carry, i):
        params, state = carry
        x = jax.random.normal(jax.random.fold_in(KEY, i), (16, 10))
        updates, state = tx.update(jax.grad(loss_fn)(params, x), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, dynamic.masks_of(state), state.inner)

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), jnp.arange(steps))[1])(params)


@pytest.mark.parametrize("grow", ["gradient", "random"])
@pytest.mark.parametrize("inner", [optax.adamw(1e-2), optax.sgd(0.1, momentum=0.9)], ids=["adamw", "momentum"])
def test_set_and_rigl_keep_the_count_of_every_leaf_at_every_step(grow, inner):
    config = dynamic.DynamicConfig(grow, every=3, until=9, fraction=0.5)
    tx = dynamic.dynamic(inner, START, WHICH, config, key=jax.random.key(2))
    params, mask, inner_state = run(tx, masks.apply(PARAMS, START))
    for name, count in (("a", 21), ("b", 11)):
        kernel, kept = np.asarray(params[name]["kernel"]), np.asarray(mask[name]["kernel"])
        assert np.all(kept.reshape(STEPS, -1).sum(1) == count)
        assert not np.any(kernel[~kept]), "exactly zero outside"
        moved = [bool(np.any(kept[i] != (kept[i - 1] if i else START[name]["kernel"]))) for i in range(STEPS)]
        # What was dropped may grow back at once, so a move need not change a small leaf.
        assert {i for i in range(STEPS) if moved[i]} in ({3}, {3, 6})
        for i in (3, 6):
            grown = kept[i] & ~kept[i - 1]
            assert not np.any(kernel[i][grown]), "what grows starts at zero"
            stayed = kernel[i] != 0
            np.testing.assert_array_equal(kernel[i][stayed], kernel[i - 1][stayed], "a move trains nothing")
    moments = [inner_state[0].mu, inner_state[0].nu] if hasattr(inner_state[0], "mu") else [inner_state[0].trace]
    for moment in moments:
        for leaf, kept in zip(jax.tree.leaves(moment), jax.tree.leaves(mask), strict=True):
            assert not np.any(np.asarray(leaf)[~np.asarray(kept)])
    assert np.all(mask["a"]["bias"])


def test_rewire_by_hand():
    params = {"kernel": jnp.array([[3.0, 0.1, -2.0, 0.0, 0.0, 0.0]])}
    mask = {"kernel": jnp.array([[True, True, True, False, False, False]])}
    which = {"kernel": True}
    grow = {"kernel": jnp.array([[9.0, 9.0, 9.0, 1.0, 5.0, 2.0]])}
    kept, new = dynamic.rewire(params, grow, mask, which, 1 / 3)
    np.testing.assert_array_equal(kept["kernel"], [[1, 0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(new["kernel"], [[1, 1, 1, 0, 0, 0]])  # the dropped one has the largest gradient
    grow["kernel"] = grow["kernel"].at[0, 1].set(0.0)
    np.testing.assert_array_equal(dynamic.rewire(params, grow, mask, which, 1 / 3)[1]["kernel"], [[1, 0, 1, 0, 1, 0]])
    np.testing.assert_array_equal(dynamic.rewire(params, grow, mask, which, 0.0)[1]["kernel"], mask["kernel"])


def test_rigl_finds_the_support_of_a_sparse_regression_that_a_fixed_random_mask_misses():
    truth = jnp.zeros((40, 1)).at[jnp.arange(0, 40, 5)].set(2.0)
    x = jax.random.normal(jax.random.key(3), (200, 40))
    mask = {"kernel": (jnp.arange(40) >= 32)[:, None]}
    which = {"kernel": True}
    error = lambda p: jnp.mean((x @ (p["kernel"] - truth)) ** 2)  # noqa: E731

    def final(fraction):
        config = dynamic.DynamicConfig("gradient", every=10, until=150, fraction=fraction)
        tx = dynamic.dynamic(optax.sgd(0.05), mask, which, config, key=KEY)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(error)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        start = {"kernel": jnp.zeros((40, 1))}
        (params, state), _ = jax.lax.scan(step, (start, tx.init(start)), None, length=200)
        return error(params), dynamic.masks_of(state)["kernel"]

    moving, found = jax.jit(lambda: final(0.5))()
    fixed, _ = jax.jit(lambda: final(0.0))()
    np.testing.assert_array_equal(found[:, 0], truth[:, 0] != 0)
    assert float(moving) < 1e-3 < 1 < float(fixed)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_gradual_pruning_follows_zhu_and_guptas_equation(scope):
    config = dynamic.GradualConfig(0.25, begin=2, end=9, every=3, scope=scope)
    tx = dynamic.gradual(optax.adamw(1e-2), WHICH, config)
    params, mask, inner = run(tx, PARAMS)
    density, expected = 1.0, []
    for step in range(STEPS):
        if step in (2, 5, 8, 9):
            density = 0.25 + 0.75 * (1 - (step - 2) / 7) ** 3
        expected.append(density)
    alive = {name: np.asarray(mask[name]["kernel"]).reshape(STEPS, -1).sum(1) for name in ("a", "b")}
    if scope == "layer":
        for name, size in (("a", 60), ("b", 24)):
            np.testing.assert_array_equal(alive[name], np.round(np.float32(expected) * size))
    else:
        np.testing.assert_array_equal(alive["a"] + alive["b"], np.round(np.float32(expected) * 84))
    for name in ("a", "b"):
        kept = np.asarray(mask[name]["kernel"])
        assert not np.any(np.asarray(params[name]["kernel"])[~kept])
        assert not np.any(np.asarray(inner[0].mu[name]["kernel"])[~kept])
        assert not np.any(kept[1:] & ~kept[:-1])


@pytest.mark.parametrize(("every", "ramp"), [(1, 0), (2, 6)])
def test_straight_through_is_dpf_with_momentum_and_decay_against_numpy(every, ramp):
    """Against Lin et al. 2020, algorithm 1, as PyTorch code trains it (INCHEON-CHO/Dynamic_Model_Pruning_...).

    There masks are chosen before the forward pass over all layers together, by the cubic, the threshold itself out;
    gradients at the sparse weights, momentum and decay move all dense weights.
    """
    rate, momentum, decay, size, left = 0.1, 0.9, 0.01, 12, 3
    which = {"a": {"kernel": True}, "b": {"kernel": True}}
    dense = np.random.default_rng(3).normal(size=(2, 2, 3)) * 0.3
    target = np.zeros((2, 2, 3))
    target[0, 1], target[1, 0, 0] = [1.0, 1.0, -1.0], 0.2
    one = lambda part: {"kernel": np.float32(part)}  # noqa: E731
    tree = lambda x: {"a": one(x[0]), "b": one(x[1])}  # noqa: E731
    flat = lambda t: np.stack([t["a"]["kernel"], t["b"]["kernel"]])  # noqa: E731
    inner = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=momentum))
    tx = dynamic.straight_through(inner, which, {"*": left}, every, ramp=ramp)
    state = tx.init(jax.tree.map(jnp.asarray, tree(dense)))
    params = masks.apply(tree(dense), dynamic.masks_of(state))

    @jax.jit
    def step_of(gradient, state, params):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    buffer, mask = np.zeros_like(dense), np.ones(dense.shape, bool)
    first = None
    for step in range(12):
        if step % every == 0:
            part = min(step / ramp, 1) if ramp else 1
            count = round(left + (size - left) * (1 - part) ** 3)
            mask = np.abs(dense) >= np.sort(np.abs(dense).ravel())[size - count]
        first = mask if first is None else first
        np.testing.assert_allclose(flat(params), dense * mask, atol=2e-6)
        params, state = step_of(tree(dense * mask - target), state, params)
        buffer = momentum * buffer + (dense * mask - target) + decay * dense
        dense = dense - rate * buffer
    np.testing.assert_allclose(flat(state.dense), dense, atol=2e-6)
    assert np.any(mask & ~first) or ramp, "pruned weights came back"


def test_early_bird_stops_when_the_window_is_full_of_close_masks():
    params = {"kernel": jnp.zeros((10, 10))}
    which = {"kernel": True}
    bird = dynamic.early_bird(params, window=3)
    watch = jax.jit(lambda bird, mask: dynamic.observe(bird, mask, which, threshold=0.1))
    sequence = [0, 40, 55, 60, 63, 66, 67, 67]  # how many entries are False; distances are differences / 100
    found, distances = [], []
    for dropped in sequence:
        bird, stop, distance = watch(bird, {"kernel": (jnp.arange(100) >= dropped).reshape(10, 10)})
        found.append(bool(stop))
        distances.append(float(distance))
    assert distances == pytest.approx([0, 0.4, 0.55, 0.6, 0.23, 0.11, 0.07, 0.04])
    assert found == [False, False, False, False, False, False, True, True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dynamic.DynamicConfig("weights"), "'weights' is not one of gradient, random"),
        (lambda: dynamic.DynamicConfig(fraction=1.5), "fraction"),
        (lambda: dynamic.GradualConfig(1.2), "GradualConfig.density is 1.2"),
        (lambda: dynamic.GradualConfig(0.5, begin=5, end=5), "begin < end"),
        (lambda: dynamic.early_bird(PARAMS, 0), "window is 0"),
        (lambda: dynamic.masks_of(optax.sgd(0.1).init(PARAMS)), "carries no masks"),
        (
            lambda: dynamic.dynamic(optax.sgd(0.1), {"a": START["a"]}, WHICH, dynamic.DynamicConfig(), key=KEY).init(
                PARAMS
            ),
            "no mask for parameter b/kernel",
        ),
    ],
)
def test_wrong_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def published(weights, moments, mask, gradient, count):
    """One move of google-research/rigl, sparse_optimizers_base.py, generic_mask_update, in NumPy.

    There `count`, of weights that move, is int(fraction * alive); here it is rounded, at most one more.
    """
    drop, grow = np.abs(weights).ravel(), np.abs(gradient).ravel()
    keep = int(mask.sum()) - count
    first = np.zeros(mask.size)
    first[np.argsort(-np.where(mask.ravel(), drop, -1), kind="stable")[:keep]] = 1
    lifted = np.where(first == 1, grow.min() - 1, grow)
    second = np.zeros(mask.size)
    second[np.argsort(-lifted, kind="stable")[:count]] = 1
    new = (second == 1) & ~mask.ravel()
    after = ((first + second) > 0).reshape(mask.shape)
    reset = lambda x: np.where(new, 0, x.ravel()).reshape(x.shape) * after  # noqa: E731
    return reset(weights), reset(moments), after


@pytest.mark.parametrize(
    # The cosine at step k of 8; 12 weights are alive, the published count is the floor of the product.
    ("fraction", "step", "count", "floor"),
    [(0.5, 4, 3, 3), (0.4, 4, 2, 2), (0.3, 2, 3, 3), (0.55, 3, 5, 4), (0.25, 6, 0, 0), (0.5, 8, 0, 0)],
)
def test_a_move_is_the_published_one_also_for_what_is_dropped_and_grown_at_once(fraction, step, count, floor):
    annealed = fraction / 2 * (1 + np.cos(np.pi * step / 8))
    assert (round(annealed * 12), int(annealed * 12)) == (count, floor)
    generator = np.random.default_rng(0)
    weights, moments, gradient = (generator.normal(size=(4, 6)).astype(np.float32) for _ in range(3))
    mask = np.isin(np.arange(24), generator.permutation(24)[:12]).reshape(4, 6)
    weights, moments = weights * mask, moments * mask
    smallest = np.argmin(np.where(mask, np.abs(weights), np.inf))
    gradient.flat[smallest] = 9.0  # goes and comes back
    config = dynamic.DynamicConfig(every=1, until=8, fraction=fraction)
    tx = dynamic.dynamic(optax.sgd(0.1, momentum=0.9), {"kernel": jnp.asarray(mask)}, {"kernel": True}, config, key=KEY)
    params = {"kernel": jnp.asarray(weights)}
    state = tx.init(params)
    trace = state.inner[0]._replace(trace={"kernel": jnp.asarray(moments)})
    state = state._replace(step=jnp.int32(step), inner=(trace, *state.inner[1:]))
    updates, state = jax.jit(tx.update)({"kernel": jnp.asarray(gradient)}, state, params)
    got = optax.apply_updates(params, updates)["kernel"], state.inner[0].trace["kernel"], state.masks["kernel"]
    if step == 8:  # `until`: there the published code moves int(0 * alive) weights, and here training goes on
        np.testing.assert_array_equal(got[2], mask)
        return
    want = published(weights, moments, mask, gradient, count)
    for one, two in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, two)
    assert want[0].flat[smallest] != 0


@pytest.mark.parametrize(
    "inner", [optax.contrib.acprop(1e-2), optax.flatten(optax.adam(1e-2))], ids=["acprop", "flatten"]
)
def test_any_optimizer_stays_finite_and_forgets_what_is_dropped(inner):
    mask = {"kernel": (jnp.arange(12) % 2 == 0).reshape(3, 4)}
    config = dynamic.DynamicConfig("random", every=3, until=9, fraction=0.5)
    tx = dynamic.dynamic(inner, mask, {"kernel": True}, config, key=jax.random.key(2))

    def step(carry, i):
        params, state = carry
        updates, state = tx.update({"kernel": jnp.cos(params["kernel"] + i)}, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params["kernel"], state.masks["kernel"], state.inner[0].mu)

    start = masks.apply({"kernel": jax.random.normal(KEY, (3, 4))}, mask)
    run = jax.jit(lambda start: jax.lax.scan(step, (start, tx.init(start)), jnp.arange(STEPS))[1])
    weights, alive, moments = run(start)
    assert np.all(np.isfinite(weights)) and np.abs(weights).max() < 10
    assert np.any(alive[4] != alive[1]), "weights moved"
    (moments,) = jax.tree.leaves(moments)
    assert not np.any(moments.reshape(alive.shape)[~alive]), "moments of dropped weights are zero"


def test_straight_through_ramps_along_the_cubic_and_then_keeps_its_mask():
    tx = dynamic.straight_through(optax.sgd(0.3), WHICH, {"a/kernel": 6, "b/kernel": 4}, every=2, ramp=6, until=8)
    params, mask, _ = run(tx, PARAMS)
    for name, size, final in (("a", 60, 6), ("b", 24, 4)):
        alive = np.asarray(mask[name]["kernel"]).reshape(STEPS, -1)
        # Step i + 1 chooses if it is even: the cubic in exact numbers.
        parts = [min((i + 1) // 2 * 2 / 6, 1) for i in range(STEPS)]
        np.testing.assert_array_equal(alive.sum(1), [round(final + (size - final) * (1 - p) ** 3) for p in parts])
        assert np.all(alive[8:] == alive[7]), "no choice after step 8"
        assert not np.any(np.asarray(params[name]["kernel"]).reshape(STEPS, -1)[~alive])
    # Where the ramp ends with the last choice, that choice is made.
    tx = dynamic.straight_through(optax.sgd(0.3), WHICH, {"a/kernel": 6, "b/kernel": 4}, every=4, ramp=6, until=6)
    _, mask, _ = run(tx, PARAMS)
    assert [int(np.asarray(mask[name]["kernel"])[-1].sum()) for name in "ab"] == [6, 4]


def test_set_grows_at_places_drawn_anew_at_every_move():
    """Places of 60 moves from one state: every dead one is among them, about as often as any other."""
    mask = {"kernel": (jnp.arange(60) < 20).reshape(6, 10)}
    config = dynamic.DynamicConfig("random", every=1, until=10**6, fraction=0.25)
    tx = dynamic.dynamic(optax.sgd(0.1), mask, {"kernel": True}, config, key=jax.random.key(2))
    params = masks.apply({"kernel": jax.random.normal(KEY, (6, 10))}, mask)

    def grown(step):
        state = tx.init(params)._replace(step=step)
        return tx.update(params, state, params)[1].masks["kernel"] & ~mask["kernel"]

    often = np.asarray(jax.jit(jax.vmap(grown))(jnp.arange(1, 61))).sum(0)[~np.asarray(mask["kernel"])]
    # 5 of the 40 dead places and of the 5 that were dropped, 60 times: 6.7 each, with a deviation of 2.4.
    assert often.min() > 0 and often.max() < 6.7 + 5 * 2.4
