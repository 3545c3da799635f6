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


def test_forward_and_gradients_are_torchs():
    torch = pytest.importorskip("torch")
    model, params, images = make(MLPConfig(hidden=(9, 5), classes=3), (4, 3, 3, 1))
    grads = jax.grad(lambda p: (model.apply({"params": p}, images) ** 2).sum())(params)
    layers = []
    for name in ("dense0", "dense1", "output"):
        linear = torch.nn.Linear(*params[name]["kernel"].shape)
        linear.weight.data = torch.tensor(np.asarray(params[name]["kernel"]).T.copy())
        linear.bias.data = torch.tensor(np.asarray(params[name]["bias"]))
        layers += [linear, torch.nn.ReLU()]
    net = torch.nn.Sequential(torch.nn.Flatten(), *layers[:-1])
    theirs = net(torch.tensor(np.asarray(images)))
    np.testing.assert_allclose(model.apply({"params": params}, images), theirs.detach(), rtol=1e-5, atol=1e-6)
    (theirs**2).sum().backward()
    for name, linear in zip(grads, (net[1], net[3], net[5]), strict=True):
        np.testing.assert_allclose(grads[name]["kernel"], linear.weight.grad.T, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(grads[name]["bias"], linear.bias.grad, rtol=1e-5, atol=1e-6)


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
