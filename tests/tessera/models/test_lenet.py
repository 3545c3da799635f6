import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tessera.models.lenet import LeNet, MLPConfig

PAPER = MLPConfig()


def make(config=PAPER, shape=(2, 28, 28, 1), seed=0):
    model, images = LeNet(config), jax.random.uniform(jax.random.key(1), shape)
    return model, model.init(jax.random.key(seed), images)["params"], images


def test_the_papers_network_has_266610_parameters():
    _, params, _ = make()
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 266_610
    assert jax.tree.map(jnp.shape, params) == {
        "dense0": {"kernel": (784, 300), "bias": (300,)},
        "dense1": {"kernel": (300, 100), "bias": (100,)},
        "output": {"kernel": (100, 10), "bias": (10,)},
    }


def test_initial_kernels_are_untruncated_glorot_normals_and_biases_zero():
    _, params, _ = make()
    for layer in params.values():
        z = np.asarray(layer["kernel"]) / np.sqrt(2 / sum(layer["kernel"].shape))
        tolerance = 4 / np.sqrt(2 * z.size)
        assert z.std() == pytest.approx(1, abs=tolerance)
        assert (layer["bias"] == 0).all()
    # A normal cut at two standard deviations and rescaled ends at 2.28.
    z = np.asarray(params["dense0"]["kernel"]) / np.sqrt(2 / 1084)
    assert np.abs(z).max() > 3.5
    assert (np.abs(z) < 1).mean() == pytest.approx(0.6827, abs=0.005)


def test_forward_and_gradients_are_torchs(golden):
    case = jax.tree.map(jnp.asarray, golden("lenet"))
    model, params, _ = make(MLPConfig(hidden=(9, 5), classes=3), case["images"].shape)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, case["params"])
    np.testing.assert_allclose(model.apply({"params": case["params"]}, case["images"]), case["out"], 1e-5, 1e-6)
    grads = jax.grad(lambda p: (model.apply({"params": p}, case["images"]) ** 2).sum())(case["params"])
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, 1e-5, 1e-6), grads, case["gradients"])


def test_images_and_flat_features_are_the_same():
    model, params, images = make(MLPConfig((8,)), (3, 4, 4, 2))
    flat = model.apply({"params": params}, images.reshape(3, -1))
    assert (model.apply({"params": params}, images) == flat).all() and flat.shape == (3, 10)


def test_no_hidden_layer_is_a_linear_classifier():
    _, params, _ = make(MLPConfig(hidden=(), classes=4), (1, 6))
    assert jax.tree.map(jnp.shape, params) == {"output": {"kernel": (6, 4), "bias": (4,)}}


@pytest.mark.parametrize("bad", [{"hidden": (3, 0)}, {"classes": 0}])
def test_sizes_below_one_are_refused(bad):
    with pytest.raises(ValueError, match="at least 1"):
        MLPConfig(**bad)
