"""Image networks: against PyTorch's and Flax's own layers, published parameter counts, and with batch statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tessera.infra.config import ConfigError
from tessera.models import convolution
from tessera.models.registry import STATISTICS, make_network
from tessera.models.vision import LeNet, MLPConfig, Norm


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(3, 3, 5, 4), (1, 1, 5, 2), (2, 4, 5, 3)], ids=str)
def test_patches_and_xla_agree_with_torch(shape, stride, golden):
    case = golden("convolutions")[f"{'x'.join(map(str, shape))}-{stride}"]
    x, kernel = jnp.asarray(case["x"]), jnp.asarray(case["kernel"])
    patches, plain = (convolution.conv(x, kernel, stride, name) for name in ("patches", "conv"))
    np.testing.assert_allclose(patches, plain, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(patches, case["y"], rtol=1e-4, atol=1e-4)


def test_pooling_and_norms_agree_with_flax():
    x = jax.random.normal(jax.random.key(0), (3, 7, 6, 8))
    np.testing.assert_array_equal(convolution.max_pool(x), nn.max_pool(x, (2, 2), (2, 2)))
    scale, bias = jnp.linspace(0.5, 2, 8), jnp.linspace(-1, 1, 8)
    flax = nn.GroupNorm(num_groups=4, epsilon=1e-5).apply({"params": {"scale": scale, "bias": bias}}, x)
    np.testing.assert_allclose(convolution.group_norm(x, scale, bias, 4), flax, rtol=1e-4, atol=1e-5)
    module = nn.BatchNorm(use_running_average=False, epsilon=1e-5)
    stats = {"mean": jnp.zeros(8), "var": jnp.ones(8)}
    flax, _ = module.apply({"params": {"scale": scale, "bias": bias}, "batch_stats": stats}, x, mutable=["batch_stats"])
    ours = convolution.normalise(x, *convolution.batch_statistics(x), scale, bias)
    np.testing.assert_allclose(ours, flax, rtol=1e-4, atol=1e-5)
    # Two batches move the running statistics as flax's with the momentum of the papers, 0.9.
    ours, theirs = Norm("batch", True), nn.BatchNorm(use_running_average=False, epsilon=1e-5, momentum=0.9)
    states = [{"params": {"scale": scale, "bias": bias}, "batch_stats": stats}] * 2
    for batch in (3 * x, x - 1):
        moved = [
            module.apply(state, batch, mutable=["batch_stats"])[1]
            for module, state in zip((ours, theirs), states, strict=True)
        ]
        states = [state | new for state, new in zip(states, moved, strict=True)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *states)


# Weights as papers count them: Frankle & Carbin 2019, figure 2 (Conv-2 4.3M, Conv-4 2.4M; the layers it lists for
# Conv-6 add up to 2.26M, not to the 1.7M it states); He et al. 2016, table 6 (ResNet-20 0.27M); VGG-16's 14.7M
# convolutional weights and VGG-19's 20.0M are sums over the authors' tables.
SIZES = [("conv2", 4.3e6), ("conv4", 2.4e6), ("conv6", 2.26e6), ("resnet20", 0.27e6), ("vgg16", 14.7e6)]
SIZES += [("vgg19", 20.0e6)]


@pytest.mark.parametrize(("name", "size"), SIZES, ids=[name for name, _ in SIZES])
def test_networks_have_the_published_number_of_weights(name, size):
    network = make_network({"name": name}, jnp.zeros((1, 32, 32, 3)), 10)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    weights = sum(leaf.size for key, part in shapes.items() if key != STATISTICS for leaf in jax.tree.leaves(part))
    assert weights == pytest.approx(size, rel=0.03)


TINY = {
    "conv2": {"blocks": ((4, 4),), "dense": (8,)},
    "vgg16": {"blocks": ((4,), (8,))},
    "resnet20": {"blocks": 1, "widths": (4, 8)},
    "resnet20 group": {"blocks": 1, "widths": (4, 8), "norm": "group", "groups": 2},
    "vit": {"layers": 1, "width": 8, "heads": 2, "ff": 16},
}


@pytest.mark.parametrize("name", TINY)
def test_they_learn_and_statistics_move_only_in_training(name):
    network = make_network({"name": name.split()[0], **TINY[name]}, jnp.zeros((1, 8, 8, 3)), 3)
    y = np.arange(12) % 3
    x = np.random.default_rng(0).normal(size=(12, 8, 8, 3)).astype(np.float32) + 2
    x = jnp.asarray(x + np.eye(3, dtype=np.float32)[y][:, None, None])
    params = jax.jit(network.init)(jax.random.key(1))

    def loss(params):
        logits, new = network.train(params, x)
        return -jax.nn.log_softmax(logits)[jnp.arange(12), y].mean(), new

    @jax.jit
    def step(params):
        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return {**jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), **new}, value, grads

    first, values = params, []
    for _ in range(12):
        params, value, grads = step(params)
        values.append(float(value))
    assert values[-1] < values[0]
    assert jax.eval_shape(network.apply, params, x).shape == (12, 3)
    has = "vgg" in name or name == "resnet20"
    assert (STATISTICS in params) == has
    if has:
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads[STATISTICS])), "no gradient reaches statistics"
        stem = "stem_norm" if name == "resnet20" else "norm0"
        before, after = first[STATISTICS][stem], params[STATISTICS][stem]
        assert not np.allclose(before["mean"], after["mean"]) and np.all(np.asarray(after["var"]) > 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnet21"}, "config.model.name: no such setting; did you mean 'resnet20'"),
        ({"name": "vit", "patch": 3}, "patches of 3 pixels do not divide"),
        ({"name": "conv2", "norm": "layer"}, "norm='layer'"),
        ({"name": "vit", "width": 10, "heads": 4}, "width=10 is not a multiple"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        jax.eval_shape(make_network(settings, jnp.zeros((1, 8, 8, 3)), 3).init, jax.random.key(0))


LENET = MLPConfig()


def make_lenet(config=LENET, shape=(2, 28, 28, 1), seed=0):
    model, images = LeNet(config), jax.random.uniform(jax.random.key(1), shape)
    return model, jax.jit(model.init)(jax.random.key(seed), images)["params"], images


def test_the_papers_network_has_266610_parameters():
    _, params, _ = make_lenet()
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 266_610
    assert jax.tree.map(jnp.shape, params) == {
        "dense0": {"kernel": (784, 300), "bias": (300,)},
        "dense1": {"kernel": (300, 100), "bias": (100,)},
        "output": {"kernel": (100, 10), "bias": (10,)},
    }


def test_initial_kernels_are_untruncated_glorot_normals_and_biases_zero():
    _, params, _ = make_lenet()
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
    model, params, _ = make_lenet(MLPConfig(hidden=(9, 5), classes=3), case["images"].shape)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, case["params"])
    np.testing.assert_allclose(model.apply({"params": case["params"]}, case["images"]), case["out"], 1e-5, 1e-6)
    grads = jax.jit(jax.grad(lambda p: (model.apply({"params": p}, case["images"]) ** 2).sum()))(case["params"])
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, 1e-5, 1e-6), grads, case["gradients"])


def test_images_and_flat_features_are_the_same():
    model, params, images = make_lenet(MLPConfig((8,)), (3, 4, 4, 2))
    flat = model.apply({"params": params}, images.reshape(3, -1))
    assert (model.apply({"params": params}, images) == flat).all() and flat.shape == (3, 10)


def test_no_hidden_layer_is_a_linear_classifier():
    _, params, _ = make_lenet(MLPConfig(hidden=(), classes=4), (1, 6))
    assert jax.tree.map(jnp.shape, params) == {"output": {"kernel": (6, 4), "bias": (4,)}}


@pytest.mark.parametrize("bad", [{"hidden": (3, 0)}, {"classes": 0}])
def test_sizes_below_one_are_refused(bad):
    with pytest.raises(ValueError, match="at least 1"):
        MLPConfig(**bad)
