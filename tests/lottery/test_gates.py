"""Hard concrete gates against their closed forms, and the Lagrangian that meets a target density."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from lottery import gates

KEY = jax.random.key(0)
PARAMS = {"dense0": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}, "dense1": {"kernel": jnp.ones((4, 2))}}


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
def test_gates_have_the_distribution_of_the_paper(log_alpha):
    """A stretched and clipped binary concrete variable: its logit times beta is logistic about log alpha."""
    z = np.asarray(gates.sample(jnp.full(20_000, log_alpha), KEY), np.float64)
    below = lambda value: stats.logistic.cdf(2 / 3 * np.log((value + 0.1) / (1.1 - value)), loc=log_alpha)  # noqa: E731
    for value in (0.0, 0.25, 0.5, 0.9):
        error = 4 * np.sqrt(below(value) * (1 - below(value)) / len(z))
        assert np.mean(z <= value) == pytest.approx(below(value), abs=error)
    assert np.mean(z == 1) == pytest.approx(1 - below(1.0), abs=0.02) and z.max() <= 1
    assert float(gates.open_probability(jnp.array(log_alpha))) == pytest.approx(1 - below(0.0), rel=1e-5)


def test_units_and_probabilities_at_the_start():
    found = gates.initialize(PARAMS, "neuron", opened=0.7)
    assert {path: leaf.shape for path, leaf in found.items()} == {"dense0/kernel": (4,), "dense1/kernel": (2,)}
    np.testing.assert_allclose(gates.open_probability(found["dense0/kernel"]), 0.7, rtol=1e-5)
    assert float(gates.density(found, PARAMS)) == pytest.approx(0.7, rel=1e-5)
    # Weights count, not gates: 4 gates of 6 weights and 2 of 4.
    found["dense0/kernel"] = jnp.array([30.0, -30.0, -30.0, -30.0])
    found["dense1/kernel"] = jnp.array([30.0, 30.0])
    assert float(gates.density(found, PARAMS)) == pytest.approx((6 + 8) / 32, rel=1e-5)
    alive = gates.masks_of(PARAMS, found, "neuron")
    assert int(alive["dense0"]["kernel"].sum()) == 6 and int(alive["dense1"]["kernel"].sum()) == 8
    opened = gates.apply(PARAMS, found, structure="neuron")
    np.testing.assert_array_equal(opened["dense0"]["kernel"], alive["dense0"]["kernel"].astype(float))
    assert (opened["dense0"]["bias"] == 1).all()


def test_gates_of_different_leaves_and_keys_are_independent():
    params = {name: {"kernel": jnp.ones((50, 40))} for name in ("a", "b")}
    start = gates.initialize(params, opened=0.6)
    one, other = (gates.apply(params, start, key=jax.random.key(i)) for i in range(2))
    for x, y in ((one["a"], one["b"]), (one["a"], other["a"])):
        assert abs(np.corrcoef(x["kernel"].ravel(), y["kernel"].ravel())[0, 1]) < 0.1
    again = gates.apply(params, start, key=jax.random.key(0))
    np.testing.assert_array_equal(again["a"]["kernel"], one["a"]["kernel"])


def test_the_lagrangian_meets_its_density_and_leaves_the_right_weights():
    """Least squares of which 3 of 12 inputs matter: at a density of 1/4 their gates are open and no other."""
    x = jax.random.normal(KEY, (200, 12))
    truth = jnp.zeros((12, 1)).at[jnp.array([1, 4, 9])].set(jnp.array([[2.0], [-3.0], [1.5]]))
    y, target = x @ truth, 0.25
    params = {"kernel": jnp.zeros((12, 1))}
    state = (params, gates.initialize(params), gates.Multipliers(jnp.zeros(()), jnp.zeros(())))
    descend, ascend = optax.adam(0.05), optax.chain(optax.scale(-1), optax.sgd(0.1))

    def loss_fn(state, key):
        params, opened, multipliers = state
        error = jnp.square(x @ gates.apply(params, opened, key=key)["kernel"] - y).mean()
        return error + gates.penalty(gates.density(opened, params), multipliers, target)

    def step(carry, key):
        state, first, second = carry
        down = jax.grad(loss_fn)(state, key)
        updates, first = descend.update(down[:2], first)
        more, second = ascend.update(down[2], second)
        return (optax.apply_updates(state, (*updates, more)), first, second), None

    start = (state, descend.init(state[:2]), ascend.init(state[2]))
    (state, _, _), _ = jax.jit(lambda start: jax.lax.scan(step, start, jax.random.split(KEY, 2000)))(start)
    assert float(gates.density(state[1], state[0])) == pytest.approx(target, abs=0.03)
    alive = gates.masks_of(state[0], state[1])["kernel"][:, 0]
    np.testing.assert_array_equal(np.flatnonzero(alive), [1, 4, 9])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gates.initialize(PARAMS, opened=1.0), "opened=1.0"),
        (lambda: gates.initialize(PARAMS, "2:4"), "n:m has no units"),
        (lambda: gates.initialize(PARAMS, "head"), "no axis of heads"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
