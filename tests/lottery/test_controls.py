import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lottery import controls, masks

PARAMS = {
    "a": {"kernel": jax.random.normal(jax.random.key(0), (20, 15))},
    "b": {"kernel": jnp.ones((6, 5)), "bias": jnp.ones(5)},
}
WHICH = masks.prunable(PARAMS)


def random_mask(seed, density=0.3):
    draw = lambda k, p: jax.random.bernoulli(jax.random.fold_in(k, p.size), density, p.shape)  # noqa: E731
    key = jax.random.key(seed)
    return jax.tree.map(lambda p, w: draw(key, p) if w else jnp.ones(p.shape, bool), PARAMS, WHICH)


def test_overlap_against_scipys_hypergeometric_distribution():
    a, b = random_mask(1), random_mask(2, 0.5)
    found = controls.overlap(a, b, WHICH)
    assert set(found) == {"a/kernel", "b/kernel", "*"}
    mean = variance = 0.0
    for path, size in (("a/kernel", 300), ("b/kernel", 30)):
        one, two = (np.asarray(masks.flatten(m)[path]) for m in (a, b))
        chance = stats.hypergeom(size, one.sum(), two.sum())
        assert found[path].shared == (one & two).sum()
        assert found[path].expected == pytest.approx(chance.mean())
        assert found[path].deviation == pytest.approx(chance.std())
        assert found[path].jaccard == pytest.approx((one & two).sum() / (one | two).sum())
        mean, variance = mean + chance.mean(), variance + chance.var()
    assert (found["*"].expected, found["*"].deviation ** 2) == pytest.approx((mean, variance))
    assert abs(found["*"].z) < 4 < controls.overlap(a, a, WHICH)["*"].z
    full = masks.ones(PARAMS)
    assert controls.overlap(full, full, WHICH)["*"].jaccard == 1
    assert math.isnan(controls.overlap(full, full, WHICH)["*"].z)
    with pytest.raises(ValueError, match="b/kernel"):
        controls.overlap(full, full | {"b": {"kernel": jnp.ones((5, 6), bool), "bias": full["b"]["bias"]}}, WHICH)


def test_same_sign_has_the_signs_of_one_and_the_magnitudes_of_the_other():
    fresh = jax.tree.map(lambda p: jax.random.normal(jax.random.key(9), p.shape), PARAMS)
    out = controls.same_sign(PARAMS, fresh, WHICH)
    np.testing.assert_array_equal(jnp.sign(out["a"]["kernel"]), jnp.sign(PARAMS["a"]["kernel"]))
    np.testing.assert_array_equal(jnp.abs(out["a"]["kernel"]), jnp.abs(fresh["a"]["kernel"]))
    np.testing.assert_array_equal(out["b"]["bias"], fresh["b"]["bias"])


def test_magnitude_at_init_and_shuffles_have_the_tickets_counts():
    ticket = random_mask(3)
    want = {path: int(n) for path, n in masks.count(ticket, WHICH).items()}
    top = jax.jit(lambda p, m: controls.magnitude_at_init(p, m, WHICH))(PARAMS, ticket)
    for other in (top, controls.shuffle_masks(ticket, key=jax.random.key(1))):
        assert {path: int(n) for path, n in masks.count(other, WHICH).items()} == want
    kept, weights = np.asarray(top["a"]["kernel"]), np.abs(PARAMS["a"]["kernel"])
    assert weights[kept].min() > weights[~kept].max()
