"""Calibration, corruptions and attacks against numpy, scipy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, special

from lottery import reliability

RNG = np.random.default_rng(0)
IMAGES = RNG.random((7, 9, 8, 2)).astype(np.float32)
KEY = jax.random.key(1)


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error_is_equation_3(bins):
    logits, labels = RNG.normal(size=(200, 5)).astype(np.float32) * 2, RNG.integers(0, 5, 200)
    probability = special.softmax(logits.astype(np.float64), axis=1)
    confidence, right = probability.max(1), probability.argmax(1) == labels
    expected = 0.0
    for k in range(1, bins + 1):
        inside = (confidence > (k - 1) / bins) & (confidence <= k / bins)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    found = reliability.calibration_error(jnp.asarray(logits), jnp.asarray(labels), bins=bins)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("sigma", [0.4, 1.3])
def test_blur_is_scipys(sigma):
    expected = ndimage.gaussian_filter(IMAGES, (0, sigma, sigma, 0), mode="constant", truncate=3.0)
    np.testing.assert_allclose(reliability.blur(jnp.asarray(IMAGES), sigma), expected, atol=1e-5)


@pytest.mark.parametrize("by", [(2, 0), (-1, 3), (0, -8)])
def test_shift_is_scipys(by):
    expected = ndimage.shift(IMAGES, (0, *by, 0), order=0, mode="constant")
    np.testing.assert_array_equal(reliability.shift(jnp.asarray(IMAGES), *by), expected)


@pytest.mark.parametrize("columns", [4, 5])
def test_occlusion_hides_one_square_of_each_image_wherever_it_fits(columns):
    ones = jnp.ones((300, 4, columns, 1))
    hidden = np.asarray(reliability.occlude(ones, 2, key=KEY))[..., 0] == 0
    assert (hidden.sum((1, 2)) == 4).all()
    corners = {tuple(np.argwhere(image)[0].tolist()) for image in hidden}
    assert corners == {(row, column) for row in range(3) for column in range(columns - 1)}
    assert all((np.ptp(np.argwhere(image), axis=0) == 1).all() for image in hidden)


def test_noise_has_its_deviation_and_stays_in_range():
    middle = np.asarray(reliability.noise(jnp.full((10, 20, 20, 1), 0.5), 0.1, key=KEY))
    assert middle.std() == pytest.approx(0.1, rel=0.03) and middle.mean() == pytest.approx(0.5, abs=0.005)
    wide = np.asarray(reliability.noise(jnp.asarray(IMAGES), 2.0, key=KEY))
    assert wide.min() == 0 and wide.max() == 1


def test_attacks_on_a_linear_model_end_in_the_corner_of_the_ball():
    """The loss of a linear score is largest where every pixel moves by the radius along the sign of its weight."""
    weight = RNG.normal(size=IMAGES.shape[1:]).astype(np.float32)
    weight[0, 0] = 0.0
    loss = lambda x: jnp.sum(jax.nn.softplus(jnp.einsum("nhwc,hwc->n", x, weight)))  # noqa: E731
    corner = np.clip(IMAGES + 0.1 * np.sign(weight), 0, 1)
    np.testing.assert_allclose(reliability.fgsm(loss, jnp.asarray(IMAGES), 0.1), corner, atol=1e-6)
    found = np.asarray(reliability.pgd(loss, jnp.asarray(IMAGES), 0.1, steps=5, key=KEY))
    np.testing.assert_allclose(found[:, weight != 0], corner[:, weight != 0], atol=1e-6)
    # A pixel without weight stays where the start put it: somewhere in the ball.
    idle = np.abs(found[:, 0, 0] - IMAGES[:, 0, 0])
    assert (idle <= 0.1 + 1e-6).all() and len(np.unique(idle)) == idle.size
