"""Proximal operators against the minima that scipy finds, and proximal training against scikit-learn's Lasso."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

from lottery import masks, proximal, structures

PENALTIES = {
    "l1": (proximal.l1, lambda w: np.abs(w).sum()),
    "neuron": (proximal.group_lasso, lambda w: np.sqrt(len(w)) * np.linalg.norm(w, axis=0).sum()),
    "2x1": (lambda s: proximal.group_lasso(s, "2x1"), lambda w: np.sqrt(2) * np.linalg.norm(w, axis=0).sum()),
    "nuclear": (proximal.nuclear, lambda w: np.linalg.norm(w, "nuc")),
}  # fmt: skip


@pytest.mark.parametrize("name", PENALTIES)
def test_an_operator_is_the_minimum_that_scipy_finds(name):
    make, penalty = PENALTIES[name]
    rng = np.random.default_rng(3)
    v = rng.normal(size=(2, 2)) * [1.0, 0.6]
    for strength, size in ((0.4, 0.5), (0.5, 1.0), (3.0, 1.0)):
        found = np.asarray(make(strength)({"kernel": jnp.asarray(v, jnp.float32)}, size)["kernel"], np.float64)

        def objective(x):
            return 0.5 * np.sum((x.reshape(v.shape) - v) ** 2) + size * strength * penalty(x.reshape(v.shape))  # noqa: B023

        starts = [v.ravel(), np.zeros(4), *rng.normal(size=(6, 4))]
        best = min(minimize(objective, x, method="Powell", options={"xtol": 1e-9, "ftol": 1e-14}).fun for x in starts)
        assert objective(found.ravel()) <= best + 1e-6
    assert not found.any()  # the last strength leaves nothing


@pytest.mark.parametrize("name", ["neuron", "head", "expert"])
def test_units_of_a_stack_are_those_of_the_network_without_one(name):
    """Two layers at once, or each by itself; heads and experts along their axes; biases stay."""
    path, shape = {
        "neuron": ("up", (2, 6, 4)), "head": ("query", (2, 6, 4, 3)), "expert": ("experts/up", (2, 3, 6, 4)),
    }[name]  # fmt: skip
    kernel = jax.random.normal(jax.random.key(0), shape)
    *folders, last = path.split("/")

    def tree(leaf, stacked):
        inner = {last: {"kernel": leaf, "bias": jnp.ones(3)}}
        for folder in folders:
            inner = {folder: inner}
        return {"blocks": inner} if stacked else inner

    strength = 0.95
    shrink = proximal.group_lasso(strength, name)
    together = shrink(tree(kernel, True), 1.0)["blocks"]
    for layer in range(2):
        alone = shrink(tree(kernel[layer], False), 1.0)
        np.testing.assert_allclose(
            masks.flatten(together)[f"{path}/kernel"][layer],
            masks.flatten(alone)[f"{path}/kernel"],
            rtol=1e-5,
            atol=1e-7,
        )
    np.testing.assert_array_equal(masks.flatten(together)[f"{path}/bias"], 1)
    axes = {"neuron": (1,), "head": (1, 3), "expert": (2, 3)}[name]
    norms = np.sqrt(np.square(kernel).sum(axes, keepdims=True))
    weights = kernel.size // norms.size
    expected = kernel * np.maximum(1 - strength * np.sqrt(weights) / norms, 0)
    np.testing.assert_allclose(masks.flatten(together)[f"{path}/kernel"], expected, rtol=1e-4, atol=1e-6)
    assert 0 < (norms < strength * np.sqrt(weights)).mean() < 1


def test_low_rank_is_taken_of_inputs_times_outputs_whatever_the_axes():
    kernel = jax.random.normal(jax.random.key(0), (6, 4, 3))
    found = proximal.nuclear(1.0)({"query": {"kernel": kernel}}, 1.0)["query"]["kernel"]
    u, s, v = np.linalg.svd(np.asarray(kernel).reshape(6, 12), full_matrices=False)
    np.testing.assert_allclose(found, ((u * np.maximum(s - 1, 0)) @ v).reshape(6, 4, 3), rtol=1e-4, atol=1e-5)
    turned = {"layer": {"weight": jnp.asarray(kernel.reshape(6, 12)).T}}  # [O, I], as Equinox has it
    which = masks.prunable(turned, layouts=structures.EQUINOX)
    again = proximal.nuclear(1.0, which)(turned, 1.0)["layer"]["weight"]
    np.testing.assert_allclose(again.T, np.asarray(found).reshape(6, 12), rtol=1e-4, atol=1e-5)


def test_gradient_descent_with_l1_ends_at_scikit_learns_lasso():
    from sklearn.linear_model import Lasso

    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 8))
    y = x @ np.array([2.0, 0, 0, -1.0, 0, 0.3, 0, 0]) + 0.3 * rng.normal(size=40)
    strength = 0.25
    wanted = Lasso(alpha=strength, fit_intercept=False, tol=1e-10).fit(x, y).coef_
    tx = proximal.proximal(optax.sgd(0.2), proximal.l1(strength), optax.constant_schedule(0.2))
    params = {"kernel": jnp.zeros((8, 1)), "bias": jnp.zeros(1)}

    def step(carry, _):
        params, state = carry
        residual = x @ params["kernel"][:, 0] - y
        gradients = {"kernel": (x.T @ residual / len(y))[:, None], "bias": jnp.zeros(1)}
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=400)
    np.testing.assert_allclose(params["kernel"][:, 0], wanted, atol=1e-4)
    alive = masks.support(params)["kernel"][:, 0]
    np.testing.assert_array_equal(alive, wanted != 0)
    assert 1 < alive.sum() < 5


def test_the_step_size_is_that_of_the_schedule_and_leaves_not_chosen_stay():
    tx = proximal.proximal(optax.identity(), proximal.l1(1.0), lambda count: jnp.where(count < 1, 0.25, 0.5))
    params = {"dense0": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([1.0])}}
    state = tx.init(params)
    for wanted in ([[0.75, -1.75]], [[0.25, -1.25]], [[0.0, -0.75]]):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["dense0"]["kernel"], wanted, atol=1e-7)
    assert params["dense0"]["bias"] == 1 and params["dense0"]["kernel"][0, 0] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: proximal.l1(-1.0), "strength=-1.0"),
        (lambda: proximal.group_lasso(1.0, "2:4"), "'2:4' has no units"),
        (lambda: proximal.group_lasso(1.0, "unstructured"), "l1 penalizes single ones"),
        (lambda: proximal.group_lasso(1.0, "row"), "structure 'row' is not one of"),
        (
            lambda: proximal.proximal(optax.sgd(1.0), proximal.l1(1.0), 1.0).update({}, (jnp.array(0), ()), None),
            "needs params",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
