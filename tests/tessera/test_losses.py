import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.losses import accuracy, cross_entropy, weighted_mean


def problem(*shape, vocab=7, seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=(*shape, vocab))).astype(np.float32)
    return jnp.asarray(logits), jnp.asarray(rng.integers(0, vocab, shape), jnp.int32)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])
def test_loss_and_gradient_are_torchs(shape, scale, golden):
    case = golden("losses")["cross_entropy"][f"{'x'.join(map(str, shape))}-{scale:g}"]
    logits, labels = jnp.asarray(case["logits"]), jnp.asarray(case["labels"])
    assert labels.shape == shape
    (loss, metrics), grad = jax.value_and_grad(cross_entropy, has_aux=True)(logits, labels)
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(grad, case["gradient"], rtol=1e-5, atol=1e-7)
    assert metrics["cross_entropy"] == loss and metrics["z_loss"] == 0 and metrics["weight"] == labels.size


@pytest.mark.parametrize("z", [1e-4, 0.1])
def test_z_loss_is_the_squared_log_normaliser(z):
    logits, labels = problem(4, 5)
    loss, metrics = cross_entropy(logits, labels, z=z)
    exact = np.asarray(logits, np.float64)
    lse = np.log(np.exp(exact).sum(-1))
    nll = lse - np.take_along_axis(exact, np.asarray(labels)[..., None], -1)[..., 0]
    np.testing.assert_allclose(metrics["z_loss"], z * (lse**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, (nll + z * lse**2).mean(), rtol=1e-5)


def test_equal_logits_cost_log_v():
    loss, metrics = cross_entropy(jnp.full((3, 256), 5.0), jnp.arange(3, dtype=jnp.int32))
    assert loss == pytest.approx(np.log(256), rel=1e-6)
    assert metrics["accuracy"] == pytest.approx(1 / 3)  # the first of equal logits


@settings(deadline=None, max_examples=20)
@given(
    shift=st.floats(-50, 50, width=32),
    weights=st.lists(st.floats(0.0, 4.0, width=32), min_size=6, max_size=6),
    seed=st.integers(0, 1000),
)
def test_shift_and_weights(shift, weights, seed):
    logits, labels = problem(6, seed=seed)
    w = np.array(weights, np.float32)
    loss, metrics = cross_entropy(logits, labels, jnp.asarray(w))
    each = np.array([cross_entropy(logits[i : i + 1], labels[i : i + 1])[0] for i in range(6)])
    expected = (each * w).sum() / w.sum() if w.sum() else 0.0
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    shifted, _ = cross_entropy(logits + shift, labels, jnp.asarray(w))
    np.testing.assert_allclose(shifted, loss, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(metrics["weight"], w.sum(), rtol=1e-6)


def test_a_position_without_weight_has_no_gradient():
    logits, labels = problem(4)
    weights = jnp.array([1.0, 0.0, 2.0, 0.0])
    grad = jax.grad(lambda x: cross_entropy(x, labels, weights, z=1e-2)[0])(logits)
    assert (grad[1] == 0).all() and (grad[3] == 0).all() and (grad[0] != 0).any()
    nothing = jax.grad(lambda x: cross_entropy(x, labels, jnp.zeros(4))[0])(logits)
    assert (nothing == 0).all()


def test_bfloat16_logits_are_summed_in_float32():
    logits, labels = problem(64, vocab=512)
    rounded = logits.astype(jnp.bfloat16)
    loss, _ = cross_entropy(rounded, labels)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, cross_entropy(rounded.astype(jnp.float32), labels)[0], rtol=1e-6)


def test_accuracy_and_weighted_mean():
    logits = jnp.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    labels = jnp.array([1, 1, 1], jnp.int32)
    assert accuracy(logits, labels) == pytest.approx(2 / 3)
    assert accuracy(logits, labels, jnp.array([1.0, 3.0, 0.0])) == pytest.approx(0.25)
    assert weighted_mean(jnp.array([1.0, 2.0]), jnp.zeros(2)) == 0
