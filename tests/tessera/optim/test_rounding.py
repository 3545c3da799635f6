"""Moments in bfloat16: rounding without a bias, and moments that move where rounding to nearest would stop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tessera.optim.rounding import bfloat16_state, stochastic_round


def test_rounding_is_to_a_neighbor_and_right_on_average():
    step = 2.0**-7  # between numbers of bfloat16 from 1 to 2
    x = np.repeat(np.float32([1, 1 + step / 4, -1 - step / 4, 1 + 0.9 * step, 3e-30]), 20_000).reshape(5, -1)
    found = np.asarray(stochastic_round(jnp.asarray(x), key=jax.random.key(0)), np.float64)
    assert set(found[0]) == {1.0} and set(found[1]) == {1.0, 1 + step} and set(found[2]) == {-1.0, -1 - step}
    # A share p of n draws has a deviation of sqrt(p (1 - p) / n).
    for row, share in ((1, 0.25), (2, 0.25), (3, 0.9)):
        assert (np.abs(found[row]) > 1).mean() == pytest.approx(share, abs=5 * np.sqrt(0.25 / 20_000))
    assert found[4].mean() == pytest.approx(3e-30, rel=1e-3)
    odd = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 0.0, -0.0])
    np.testing.assert_array_equal(stochastic_round(odd, key=jax.random.key(1)).astype(jnp.float32), odd)


def test_a_slow_second_moment_moves_where_rounding_to_nearest_would_stop():
    """Adam's v after gradients of 1 and then 3: 9 - 8 b2^n of a long past of ones, in closed form."""
    params = {"w": jnp.zeros(4096)}
    tx = bfloat16_state(optax.scale_by_adam(b2=0.999))
    state = tx.init(params)
    state = state._replace(inner=state.inner._replace(nu={"w": jnp.ones(4096, jnp.bfloat16)}))
    step = lambda state, _: (tx.update({"w": jnp.full(4096, 3.0)}, state)[1], None)  # noqa: E731
    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, length=1500))(state)
    expected = 9 - 8 * 0.999**1500
    nu = np.asarray(state.inner.nu["w"], np.float64)
    assert nu.mean() == pytest.approx(expected, rel=0.01)
    nearest, bfloat16 = np.float32(1), np.dtype(jnp.bfloat16)
    for _ in range(1500):
        nearest = np.float32(0.999 * nearest + 0.001 * 9).astype(bfloat16).astype(np.float32)
    assert abs(float(nearest) - expected) > 1  # what the test would not see
