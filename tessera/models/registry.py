"""Networks a ticket search can train, by name: each as three pure functions on one tree of parameters."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from tessera.infra.config import ConfigError, build, unknown
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.models.vision import ConvConfig, ConvNet, LeNet, MLPConfig, ResNet, ResNetConfig, ViT, ViTConfig

# Name of the running means and variances of batch normalization in the tree of parameters.
STATISTICS = "batch_stats"


class Network(NamedTuple):
    """A network as functions of one tree, which holds parameters and, under `STATISTICS`, batch statistics.

    init(key) -> tree; apply(tree, inputs) -> logits, in evaluation; train(tree, inputs) -> (logits, {} or
    {STATISTICS: the statistics after this batch}).
    """

    init: Callable[[Array], PyTree]
    apply: Callable[[PyTree, Array], Array]
    train: Callable[[PyTree, Array], tuple[Array, dict[str, PyTree]]]


def plain(module: nn.Module, example: Array) -> Network:
    """A Linen module without state."""

    def apply(params: PyTree, x: Array) -> Any:
        return module.apply({"params": params}, x)

    return Network(lambda key: module.init(key, example)["params"], apply, lambda params, x: (apply(params, x), {}))


def with_statistics(make: Callable[[bool], nn.Module], example: Array) -> Network:
    """A Linen module with a collection `STATISTICS` (or none); `make(training)` gives its two forms."""
    training, evaluating = make(True), make(False)

    def variables(tree: PyTree) -> dict[str, PyTree]:
        params = {name: leaf for name, leaf in tree.items() if name != STATISTICS}
        return {"params": params} | ({STATISTICS: tree[STATISTICS]} if STATISTICS in tree else {})

    def init(key: Array) -> PyTree:
        found = evaluating.init(key, example)
        return {**found["params"], **({STATISTICS: found[STATISTICS]} if STATISTICS in found else {})}

    def train(tree: PyTree, x: Array) -> tuple[Any, dict[str, PyTree]]:
        if STATISTICS not in tree:
            return training.apply(variables(tree), x), {}
        logits, changed = training.apply(variables(tree), x, mutable=[STATISTICS])
        return logits, {STATISTICS: jax.lax.stop_gradient(changed[STATISTICS])}

    def apply(tree: PyTree, x: Array) -> Any:
        return evaluating.apply(variables(tree), x)

    return Network(init, apply, train)


def lenet(config: MLPConfig, example: Array) -> Network:
    """LeNet-300-100 and its like."""
    return plain(LeNet(config), example)


def decoder(config: TransformerConfig, example: Array) -> Network:
    """The decoder transformer."""
    return plain(Decoder(config), example)


def conv_net(config: ConvConfig, example: Array) -> Network:
    """A chain of convolutions."""
    return with_statistics(lambda training: ConvNet(config, training), example)


def resnet(config: ResNetConfig, example: Array) -> Network:
    """A residual network."""
    return with_statistics(lambda training: ResNet(config, training), example)


def vit(config: ViTConfig, example: Array) -> Network:
    """A vision transformer."""
    return plain(ViT(config), example)


# Settings that a name stands for; a config may change any of them. VGG as its authors' tables have it, with one dense
# layer, as is usual on CIFAR (and in Frankle & Carbin 2019).
CONV: dict[str, dict[str, Any]] = {
    "conv2": {"blocks": ((64, 64),)},
    "conv4": {"blocks": ((64, 64), (128, 128))},
    "conv6": {"blocks": ((64, 64), (128, 128), (256, 256))},
    "vgg16": {
        "blocks": ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
        "dense": (),
        "norm": "batch",
    },
    "vgg19": {
        "blocks": ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
        "dense": (),
        "norm": "batch",
    },
}

# Name -> (its config's dataclass, what the program sets from the data, maker).
NETWORKS: dict[str, tuple[type, str, Callable[[Any, Array], Network]]] = {
    "lenet": (MLPConfig, "classes", lenet),
    "decoder": (TransformerConfig, "vocab_size", decoder),
    "resnet20": (ResNetConfig, "classes", resnet),
    "vit": (ViTConfig, "classes", vit),
    **{name: (ConvConfig, "classes", conv_net) for name in CONV},
}


def make_network(
    settings: Mapping[str, Any] | ConfigDict, example: Array | np.ndarray, classes: int, path: str = "config.model"
) -> Network:
    """The network of a config group: "name" (default "lenet") and the fields of its dataclass.

    Args:
      settings: see `NETWORKS`.
      example: a batch of inputs, for shapes.
      classes: logits per example (or token).
      path: where the settings stand, for messages.

    Raises:
      ConfigError: an unknown name or setting.
    """
    options = dict(settings)
    name = options.pop("name", "lenet")
    if name not in NETWORKS:
        raise ConfigError(unknown(f"{path}.name", str(name), NETWORKS))
    kind, size, make = NETWORKS[name]
    return make(build(kind, CONV.get(name, {}) | options, path, **{size: classes}), jnp.asarray(example))
