"""One table of optimizers: under every one of them pruned weights and their moments are exactly zero."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optax import contrib

from lottery import masks, transform


def sam():
    return contrib.sam(optax.adam(1e-2), optax.chain(contrib.normalize(), optax.sgd(0.05)), opaque_mode=True)


OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "sgd": lambda: optax.sgd(1e-2),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "nesterov": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "lion": lambda: optax.lion(1e-3, weight_decay=0.1),
    "muon": lambda: contrib.muon(1e-2, weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4, weight_decay_rate=0.1, momentum=0.9),
    "adafactor, not factored": lambda: optax.adafactor(1e-2, factored=False),
    "adagrad": lambda: optax.adagrad(1e-2, initial_accumulator_value=0.1),
    "rmsprop": lambda: optax.rmsprop(1e-2, momentum=0.9, centered=True, initial_scale=1.0),
    "lamb": lambda: optax.lamb(1e-2, weight_decay=0.1),
    "lars": lambda: optax.lars(1e-2, weight_decay=0.1),
    "nadam": lambda: optax.nadam(1e-2),
    "radam": lambda: optax.radam(1e-2),
    "yogi": lambda: optax.yogi(1e-2),
    "adabelief": lambda: optax.adabelief(1e-2),
    "adan": lambda: optax.adan(1e-2, weight_decay=0.1),
    "amsgrad": lambda: optax.amsgrad(1e-2),
    "adamax": lambda: optax.adamax(1e-2),
    "novograd": lambda: optax.novograd(1e-2, weight_decay=0.1),
    "sm3": lambda: optax.sm3(1e-2),
    "rprop": lambda: optax.rprop(1e-2),
    "noisy sgd": lambda: optax.noisy_sgd(1e-2, key=0),
    "prodigy": lambda: contrib.prodigy(),
    "dadapt_adamw": lambda: contrib.dadapt_adamw(),
    "ademamix": lambda: contrib.ademamix(1e-2, weight_decay=0.1),
    "adopt": lambda: contrib.adopt(1e-2),
    "madgrad": lambda: contrib.madgrad(1e-2),
    "schedule_free": lambda: contrib.schedule_free_adamw(1e-2, weight_decay=0.1),
    "dog": lambda: contrib.dog(),
    "momo": lambda: contrib.momo_adam(),
    "sophia": lambda: contrib.sophia(1e-2),
    "sam": sam,
    "MultiSteps": lambda: optax.MultiSteps(optax.adamw(1e-2), 3).gradient_transformation(),
    "clip and decay": lambda: optax.chain(
        optax.clip_by_global_norm(0.1), optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale(-1e-2)
    ),
    "adaptive clip": lambda: optax.chain(optax.adaptive_grad_clip(0.01), optax.adam(1e-2)),
    "partition": lambda: optax.partition(
        {"a": optax.adam(1e-2), "b": optax.sgd(1e-2, momentum=0.9)},
        lambda params: {k: "a" if k == "dense0" else "b" for k in params},
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2, weight_decay=0.1),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 5),
    "ema": lambda: optax.chain(optax.adam(1e-2), optax.ema(0.9)),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.sgd(1e-2, momentum=0.9)),
}


@jax.jit
def init_params(key):
    first, second = jax.random.split(key)
    return {
        "dense0": {"kernel": jax.random.normal(first, (6, 8)), "bias": jnp.full(8, 0.1)},
        "output": {"kernel": jax.random.normal(second, (8, 4)), "bias": jnp.full(4, -0.1)},
    }


@jax.jit
def random_masks(params, density, key):
    which = masks.prunable(params)
    keys = jax.tree.unflatten(jax.tree.structure(params), jax.random.split(key, 4))
    draw = lambda p, w, k: jax.random.uniform(k, p.shape) < (density if w else 2.0)  # noqa: E731
    return jax.tree.map(draw, params, which, keys)


def loss_fn(params, x):
    hidden = jnp.tanh(x @ params["dense0"]["kernel"] + params["dense0"]["bias"][None])
    return jnp.mean((hidden @ params["output"]["kernel"] + params["output"]["bias"][None] - x[:, :4]) ** 2)


@functools.partial(jax.jit, static_argnums=(0, 4))
def train(name, params, mask, key, moments="out"):
    """Seven steps; returns the parameters and states of every step."""
    tx = transform.sparse(OPTIMIZERS[name](), mask, moments=moments)

    def step(carry, key):
        params, state = carry
        x = jax.random.normal(key, (16, 6))
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        extra = {"grad_fn": lambda p, i: jax.grad(loss_fn)(p, x)}
        if name != "sam":  # optax's sam takes no other extra argument
            extra |= {"value": loss, "obj_fn": lambda p: loss_fn(p, x)}
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state, loss)

    return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, 7))[1]


def mirrored(state, mask):
    """Values of the state's leaves at pruned entries, by path, for leaves that end in a parameter's path and shape."""
    found = {}
    for path, leaf in masks.flatten(state).items():
        for name, m in masks.flatten(mask).items():
            if path.endswith(name) and leaf.shape[1:] == m.shape:
                found[path] = np.asarray(leaf)[:, ~np.asarray(m)]
    return found


@pytest.mark.parametrize("name", ["adam", "momentum", "adabelief", "muon"])
def test_masking_moments_on_the_way_in_trains_the_same_weights(name):
    params = init_params(jax.random.key(1))
    mask = random_masks(params, 0.4, jax.random.key(2))
    runs = [train(name, params, mask, jax.random.key(3), moments)[0] for moments in ("out", "in")]
    for out, into in zip(*map(jax.tree.leaves, runs), strict=True):
        np.testing.assert_allclose(into, out, rtol=1e-4, atol=1e-6)


def test_another_place_for_moments_is_refused():
    with pytest.raises(ValueError, match="choose 'out' or 'in'"):
        transform.sparse(optax.sgd(0.1), {}, moments="never")


# Leaves of the state that mirror parameters, in units of one per kernel and bias (4): so nothing is skipped silently.
MOMENTS = {"adam": 2, "adamw": 2, "sgd": 0, "momentum": 1, "lion": 1, "sam": 2, "MultiSteps": 3, "ema": 3, "muon": 1}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_pruned_weights_and_moments_are_exactly_zero_from_the_first_step(name):
    # The starting weights are dense on purpose.
    params = init_params(jax.random.key(1))
    mask = random_masks(params, 0.4, jax.random.key(2))
    after, states, losses = train(name, params, mask, jax.random.key(3))
    assert np.all(np.isfinite(losses))
    for path, leaf in masks.flatten(after).items():
        dead = ~np.asarray(masks.flatten(mask)[path])
        first = 2 if name == "MultiSteps" else 0
        np.testing.assert_array_equal(np.asarray(leaf)[first:, dead], 0, err_msg=path)
        assert np.all(np.isfinite(leaf))
        assert np.any(np.asarray(leaf)[-1][~dead] != np.asarray(masks.flatten(params)[path])[~dead]), path
    found = mirrored(states, mask)
    for path, values in found.items():
        np.testing.assert_array_equal(values, 0, err_msg=path)
    if name in MOMENTS:
        assert len(found) >= 4 * MOMENTS[name], list(found)


@pytest.mark.long
@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["adam", "nesterov", "adamw", "lion", "muon", "MultiSteps", "sam", "clip and decay"]),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_any_mask_holds_under_any_gradient(name, density, seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = init_params(keys[0])
    mask = random_masks(params, density, keys[1])
    after, states, _ = train(name, masks.apply(params, mask), mask, keys[2])
    masks.check_zeros(jax.tree.map(lambda x: x[-1], after), mask)
    for path, values in mirrored(states, mask).items():
        np.testing.assert_array_equal(values, 0, err_msg=path)


@pytest.mark.parametrize("name", ["adam", "adamw", "momentum", "lion", "clip and decay", "muon", "adafactor"])
def test_with_nothing_pruned_it_is_the_optimizer_itself(name):
    params, inner = init_params(jax.random.key(0)), OPTIMIZERS[name]()
    tx = transform.sparse(inner, masks.ones(params))
    mine, theirs = tx.init(params), inner.init(params)
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)

    @jax.jit
    def both(mine, theirs):
        grads = jax.grad(loss_fn)(params, jnp.ones((3, 6)))
        return tx.update(grads, mine, params), inner.update(grads, theirs, params)

    for _ in range(2):
        (a, mine), (b, theirs) = both(mine, theirs)
        for x, y in zip(jax.tree.leaves((a, mine)), jax.tree.leaves((b, theirs)), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["adam", "momentum", "lion", "adamw", "rmsprop"])
def test_surviving_weights_train_as_if_the_pruned_ones_did_not_exist(name):
    """The same problem with the survivors gathered in a vector, under plain optax."""
    key = jax.random.key(4)
    params = {"kernel": jax.random.normal(key, (6, 8))}
    mask = {"kernel": jax.random.bernoulli(key, 0.4, (6, 8))}
    kept = np.flatnonzero(mask["kernel"])
    loss = lambda kernel: jnp.sum(jnp.sin(kernel) ** 2 * (1 + jnp.arange(48.0).reshape(6, 8)))  # noqa: E731
    compact_loss = lambda v: loss(jnp.zeros(48).at[kept].set(v).reshape(6, 8))  # noqa: E731
    inner = OPTIMIZERS[name]()
    tx = transform.sparse(inner, mask)
    params, small = masks.apply(params, mask), params["kernel"].ravel()[kept]
    state, small_state = tx.init(params), inner.init(small)

    @jax.jit
    def step(params, state, small, small_state):
        updates, state = tx.update(jax.grad(lambda p: loss(p["kernel"]))(params), state, params)
        params = optax.apply_updates(params, updates)
        updates, small_state = inner.update(jax.grad(compact_loss)(small), small_state, small)
        return params, state, optax.apply_updates(small, updates), small_state

    for _ in range(5):
        params, state, small, small_state = step(params, state, small, small_state)
    np.testing.assert_allclose(params["kernel"].ravel()[kept], small, rtol=1e-6, atol=1e-7)


def test_global_norm_clipping_measures_the_sparse_gradient():
    params = {"kernel": jnp.zeros((1, 2))}
    tx = transform.sparse(optax.clip_by_global_norm(1.0), {"kernel": jnp.array([[True, False]])})
    updates, _ = tx.update({"kernel": jnp.array([[0.5, 1e6]])}, tx.init(params), params)
    np.testing.assert_array_equal(updates["kernel"], [[0.5, 0.0]])


def test_gradients_that_are_not_finite_stay_out_when_pruned():
    params = {"kernel": jnp.array([[1.0, 2.0, 3.0]])}
    tx = transform.sparse(optax.adamw(0.1), {"kernel": jnp.array([[True, False, False]])})
    updates, state = tx.update({"kernel": jnp.array([[1.0, jnp.nan, jnp.inf]])}, tx.init(params), params)
    after = optax.apply_updates(params, updates)["kernel"]
    np.testing.assert_array_equal(after[0, 1:], [0, 0])
    assert np.isfinite(after[0, 0]) and float(after[0, 0]) != 1.0
    np.testing.assert_array_equal(state[0].nu["kernel"][0, 1:], [0, 0])


def test_adafactors_factored_statistics_are_those_of_the_masked_gradient():
    """No entry of a row or column mean belongs to one weight, so zero is not the claim: the gradient's share is."""
    params = {"kernel": jnp.ones((8, 8))}
    mask = {"kernel": jnp.arange(64).reshape(8, 8) % 3 == 0}
    tx = transform.sparse(optax.scale_by_factored_rms(min_dim_size_to_factor=4, epsilon=0.0), mask)
    grads = {"kernel": jnp.arange(64.0).reshape(8, 8)}
    _, state = tx.update(grads, tx.init(params), params)
    squares = np.where(mask["kernel"], np.arange(64.0).reshape(8, 8), 0) ** 2
    np.testing.assert_allclose(state.v_row["kernel"], squares.mean(1), rtol=1e-6)
    np.testing.assert_allclose(state.v_col["kernel"], squares.mean(0), rtol=1e-6)


def test_sams_inner_step_neither_moves_nor_measures_pruned_weights():
    params = {"kernel": jnp.array([[1.0, 5.0]])}
    mask = {"kernel": jnp.array([[True, False]])}
    seen = []

    def grad_fn(p, i):
        seen.append(p["kernel"])
        return {"kernel": jnp.array([[2.0, 7.0]])}

    adversary = optax.chain(optax.add_noise(1.0, 0.0, key=0), contrib.normalize(), optax.sgd(0.5))
    tx = transform.sparse(contrib.sam(optax.sgd(0.1), adversary, opaque_mode=True), mask)
    updates, _ = tx.update({"kernel": jnp.array([[1.0, 1.0]])}, tx.init(params), params, grad_fn=grad_fn)
    assert float(seen[0][0, 1]) == 0.0 and float(seen[0][0, 0]) != 1.0
    np.testing.assert_allclose(optax.apply_updates(params, updates)["kernel"], [[0.8, 0.0]])


def test_a_stack_of_masks_under_vmap_is_each_mask_alone():
    stack = jax.vmap(init_params)(jax.random.split(jax.random.key(0), 3))
    mask = jax.jit(jax.vmap(lambda params, key: random_masks(params, 0.5, key)))(
        stack, jax.random.split(jax.random.key(1), 3)
    )
    keys = jax.random.split(jax.random.key(2), 3)
    together = jax.device_get(jax.jit(jax.vmap(functools.partial(train, "adam")))(stack, mask, keys))
    stack, mask = jax.device_get((stack, mask))
    for i in range(3):
        at = lambda tree: jax.tree.map(lambda x: x[i], tree)  # noqa: E731, B023
        alone = train("adam", at(stack), at(mask), keys[i])
        for a, b in zip(jax.tree.leaves(at(together)), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        masks.check_zeros(jax.tree.map(lambda x: x[-1], at(together)[0]), at(mask))


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "schedule_free", "MultiSteps", "partition"])
def test_a_state_from_before_pruning_is_masked_where_it_mirrors_parameters(name):
    params, inner = init_params(jax.random.key(0)), OPTIMIZERS[name]()
    state = jax.tree.map(lambda x: jnp.ones_like(x) if x is not None else None, inner.init(params))
    mask = random_masks(params, 0.5, jax.random.key(1))
    out = transform.mask_state(state, mask)
    assert jax.tree.structure(out) == jax.tree.structure(state)
    hits = 0
    for path, leaf in masks.flatten(out).items():
        for param, m in masks.flatten(mask).items():
            if path.endswith(param) and leaf.shape == m.shape:
                np.testing.assert_array_equal(leaf, np.asarray(m, leaf.dtype), err_msg=path)
                hits += 1
                break
        else:
            np.testing.assert_array_equal(leaf, 1, err_msg=path)
    assert hits >= 4


def test_the_longest_path_decides():
    params = {"a": {"kernel": jnp.zeros(2)}, "b": {"a": {"kernel": jnp.zeros(2)}}}
    mask = {"a": {"kernel": jnp.array([True, False])}, "b": {"a": {"kernel": jnp.array([False, True])}}}
    state = transform.mask_state(optax.adam(1.0).init(jax.tree.map(jnp.ones_like, params)), mask)
    state = transform.mask_state(jax.tree.map(jnp.ones_like, state), mask)
    np.testing.assert_array_equal(state[0].mu["a"]["kernel"], [1, 0])
    np.testing.assert_array_equal(state[0].mu["b"]["a"]["kernel"], [0, 1])


def test_masks_that_do_not_fit_are_refused_by_name():
    params = init_params(jax.random.key(0))
    mask = masks.ones(params)
    mask["output"]["kernel"] = mask["output"]["kernel"].T
    with pytest.raises(ValueError, match=r"output/kernel has shape \(4, 8\)"):
        transform.sparse(optax.adam(1.0), mask).init(params)


@pytest.mark.parametrize("name", ["value_fn", "obj_fn"])
def test_a_line_search_sees_the_loss_of_the_sparse_network(name):
    """Parameters tried on the way may have anything under the mask's zeros: |w|^2 of (3, 5) is 9 there."""

    def update(updates, state, params=None, **extra):
        return {"kernel": jnp.full(2, extra[name]({"kernel": jnp.array([3.0, 5.0])}))}, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    mask, params = {"kernel": jnp.array([True, False])}, {"kernel": jnp.array([1.0, 0.0])}
    tx = transform.sparse(inner, mask)
    asked = {name: lambda p: jnp.square(p["kernel"]).sum()}
    assert tx.update(params, tx.init(params), params, **asked)[0]["kernel"].tolist() == [9, 0]
