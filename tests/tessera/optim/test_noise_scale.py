"""The noise scale against gradients whose statistics are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from tessera.optim.noise_scale import noise_scale


def test_exact_on_expected_norms():
    # E|G_B|^2 = |G|^2 + tr(Sigma) / B inverted by hand: |G|^2 = 4, tr(Sigma) = 60.
    found = noise_scale(jnp.float32(4 + 60 / 5), jnp.float32(4 + 60 / 20), 5, 20)
    np.testing.assert_allclose([found.signal, found.noise, found.ratio], [4, 60, 15], rtol=1e-6)


def test_unbiased_on_random_gradients():
    random = np.random.default_rng(0)
    mean, deviation, trials, big, parts = random.normal(size=20), 2.0, 4000, 32, 8
    grads = mean + deviation * random.normal(size=(trials, parts, big // parts, 20))
    small = (grads.mean(2) ** 2).sum(-1).mean(1)
    large = (grads.mean((1, 2)) ** 2).sum(-1)
    found = noise_scale(jnp.asarray(small, jnp.float32), jnp.asarray(large, jnp.float32), big // parts, big)
    np.testing.assert_allclose(found.signal.mean(), (mean**2).sum(), rtol=0.03)
    np.testing.assert_allclose(found.noise.mean(), deviation**2 * 20, rtol=0.03)


@pytest.mark.parametrize(("small", "big"), [(4, 4), (8, 4), (0, 4)])
def test_batch_sizes_must_differ(small, big):
    with pytest.raises(ValueError, match=f"small={small} and big={big}"):
        noise_scale(jnp.float32(1), jnp.float32(1), small, big)
