"""What the studies of explanations and of reliability compute from networks and rows, against sklearn and numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from tessera.data.images import Images
from tessera.models.registry import Network
from tessera.tickets.studies import reasons, reliability


def test_mutual_information_is_sklearns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    inputs = np.clip(np.stack([rng.random(400), labels / 3 + 0.2 * rng.random(400), np.zeros(400)], 1), 0, 1)
    expected = [metrics.mutual_info_score(np.clip((x * 8).astype(int), 0, 7), labels) for x in inputs.T]
    np.testing.assert_allclose(reasons.mutual_information(inputs, labels, 3), expected, atol=1e-12)


def test_gaps_are_those_at_the_loss_that_all_reach():
    curves = {  # (training loss, test loss) at steps 0, 10, 20
        ("ticket", 0): [(2.0, 2.1), (1.0, 1.3), (0.5, 1.0)],
        ("random_mask", 0): [(2.0, 2.2), (1.5, 1.9), (0.8, 1.4)],
    }
    rows = [
        {"arm": arm, "seed": seed, "step": 10 * i, "train_loss": train, "test_loss": test}
        for (arm, seed), curve in curves.items()
        for i, (train, test) in enumerate(curve)
    ]
    target, found = reasons.gaps(rows[::-1], ["ticket", "random_mask"])
    assert target == 0.8
    # The ticket passes 0.8 after 0.2 of 0.5 nats: 1.3 - 0.4 * 0.3 = 1.18.
    assert found["ticket"] == pytest.approx([1.18 - 0.8]) and found["random_mask"] == pytest.approx([0.6])


@pytest.mark.parametrize("weights", [100, 1000, 12_345])
def test_small_networks_have_the_weights_asked_for(weights):
    hidden = reliability.small((300, 100), 196, 10, weights)
    sizes = (196, *hidden, 10)
    count = sum(a * b for a, b in zip(sizes[:-1], sizes[1:], strict=True))
    assert weights <= count <= max(1.05 * weights, weights + 230)


def test_wrong_labels_are_as_many_as_asked_and_wrong():
    data = Images(np.zeros((500, 2, 2, 1), np.float32), np.arange(500, dtype=np.int32) % 7)
    found = reliability.mislabelled(data, 7, 0.3)
    wrong = found.labels != data.labels
    assert wrong.sum() == 150 and found.labels.min() == 0 and found.labels.max() == 6
    shifts = np.bincount((found.labels - data.labels)[wrong] % 7, minlength=7)
    assert shifts[0] == 0 and (shifts[1:] > 10).all()


def test_an_ensemble_is_the_mean_of_probabilities():
    network = Network(lambda key: None, lambda params, x: x @ params, lambda params, x: (x @ params, {}))
    rng = np.random.default_rng(0)
    stack, x = rng.normal(size=(3, 4, 5)), rng.normal(size=(2, 6, 4))
    expected = np.log(np.mean([special.softmax(x.reshape(12, 4) @ one, axis=1) for one in stack], axis=0))
    found = reliability.ensemble_logits(network, jnp.float32(stack), jnp.float32(x))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_measures_are_of_the_changed_images():
    network = Network(lambda key: None, lambda params, x: x @ params, lambda params, x: (x @ params, {}))
    stack, x, y = jnp.eye(3)[None], jnp.eye(3), jnp.arange(3)
    right = reliability.measure(network, stack, x, y, lambda params, x, y: [x])
    half = reliability.measure(network, stack, x, y, lambda params, x, y: [x, jnp.roll(x, 1, 0)])
    assert right[0]["accuracy"] == 1 and half[0]["accuracy"] == 0.5
    np.testing.assert_allclose(right[0]["loss"], np.log(np.e + 2) - 1, rtol=1e-5)
    np.testing.assert_allclose(right[0]["calibration_error"], 2 / (np.e + 2), rtol=1e-5)
    assert jax.tree.leaves(stack)[0].shape == (1, 3, 3)
