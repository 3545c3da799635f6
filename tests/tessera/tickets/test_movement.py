"""Distances from the initialization against numpy's, the picture's moments, and which learning rate counts."""

import jax.numpy as jnp
import numpy as np
import pytest

from tessera.tickets.studies import movement


def test_correlation_and_distance_are_numpys():
    rng = np.random.default_rng(0)
    before = {
        "a": {"kernel": rng.normal(size=(2, 3, 4)), "bias": rng.normal(size=(2, 4))},
        "b": rng.normal(size=(2, 5, 1)),
    }
    after = {
        "a": {"kernel": before["a"]["kernel"] * 2 + 1, "bias": before["a"]["bias"]},
        "b": rng.normal(size=(2, 5, 1)),
    }
    found = movement.moved(before, after)
    assert set(found) == {"a/kernel", "b", "*"}
    np.testing.assert_allclose(found["a/kernel"][0], [1, 1])
    for i in range(2):
        x, y = before["b"][i].ravel(), after["b"][i].ravel()
        assert found["b"][0][i] == pytest.approx(np.corrcoef(x, y)[0, 1])
        assert found["b"][1][i] == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x))
        both = [np.concatenate([t["a"]["kernel"][i].ravel(), t["b"][i].ravel()]) for t in (before, after)]
        assert found["*"][0][i] == pytest.approx(np.corrcoef(*both)[0, 1])


def test_a_picture_has_the_moments_of_the_weights_and_the_images_order():
    image = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4, 1)
    weights = jnp.asarray(np.random.default_rng(0).normal(2.0, 3.0, (8, 12)), jnp.float32)
    drawn = np.asarray(movement.picture(image, weights))
    assert drawn.mean() == pytest.approx(float(weights.mean()), rel=1e-4)
    assert drawn.std() == pytest.approx(float(weights.std()), rel=1e-4)
    assert (np.diff(drawn, axis=0) >= 0).all() and (np.diff(drawn, axis=1) >= 0).all()


def test_the_rate_of_the_lowest_validation_loss_counts_without_the_picture():
    given = [(0.1, 5, False, 0.1), (0.1, 9, False, 0.5), (0.1, 9, False, 0.7), (0.2, 9, False, 0.55)]
    given += [(0.2, 9, True, 0.0), (0.3, 9, False, 0.58), (0.3, 9, True, 0.0)]
    names = ("lr", "step", "picture", "validation_loss")
    rows = [{"optimizer": "adam", "layer": "*", **dict(zip(names, row, strict=True))} for row in given]
    assert movement.best_rates(rows) == {"adam": 0.2}
