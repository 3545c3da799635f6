import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from lottery import sharpness

PARAMS = {
    "one": jax.random.normal(jax.random.key(0), (3, 5)),
    "two": jax.random.normal(jax.random.key(1), (5, 2)),
}
X = jax.random.normal(jax.random.key(2), (20, 3))


def loss(params):
    return jnp.mean((jnp.tanh(X @ params["one"]) @ params["two"] - X[:, :2]) ** 2)


FLAT, UNRAVEL = ravel_pytree(PARAMS)
HESSIAN = np.asarray(jax.jit(jax.hessian(lambda v: loss(UNRAVEL(v))))(FLAT), np.float64)


@pytest.mark.parametrize("masked", [False, True])
def test_lanczos_finds_what_numpy_finds_in_the_whole_hessian(masked):
    keep = np.asarray(jax.random.bernoulli(jax.random.key(3), 0.6, FLAT.shape)) if masked else np.ones(FLAT.size, bool)
    masks = jax.tree.map(lambda x: x.astype(bool), UNRAVEL(jnp.asarray(keep, jnp.float32))) if masked else None
    config = sharpness.LanczosConfig(steps=30, count=3)
    found, residual = jax.jit(lambda p: sharpness.top_eigenvalues(loss, p, masks, config, key=jax.random.key(4)))(
        PARAMS
    )
    want = np.linalg.eigvalsh(HESSIAN[np.ix_(keep, keep)])[::-1][:3]
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-4)
    assert np.all(np.asarray(residual) < 1e-2)


def test_a_quadratic_of_two_eigenvalues_is_done_in_two_steps_and_invents_none():
    diagonal = jnp.where(jnp.arange(10) < 3, -5.0, -2.0)
    quadratic = lambda p: 0.5 * jnp.sum(diagonal * p["x"] ** 2)  # noqa: E731
    config = sharpness.LanczosConfig(steps=6, count=2)
    found, residual = sharpness.top_eigenvalues(quadratic, {"x": jnp.ones(10)}, None, config, key=jax.random.key(0))
    np.testing.assert_allclose(found, [-2, -5], rtol=1e-4)
    assert np.all(np.asarray(residual) < 1e-3)


def test_sharpness():
    slope = jnp.array([3.0, 4.0])
    linear = lambda p: jnp.sum(slope * p["x"])  # noqa: E731
    assert float(sharpness.sharpness(linear, {"x": jnp.zeros(2)}, rho=0.1)) == pytest.approx(0.5)
    only = {"x": jnp.array([True, False])}
    assert float(sharpness.sharpness(linear, {"x": jnp.zeros(2)}, only, rho=0.1)) == pytest.approx(0.3)
    flat = lambda p: jnp.sum(p["x"] ** 2)  # noqa: E731
    assert float(sharpness.sharpness(flat, {"x": jnp.zeros(2)})) == 0.0
    with pytest.raises(ValueError, match="count <= steps"):
        sharpness.LanczosConfig(steps=1, count=2)
