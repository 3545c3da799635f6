"""Training a decoder with routed experts: its loss, what its routers did, and biases moved outside the gradient."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, PyTree

from moe.route import update_bias
from moe.specialization import joint_counts
from tessera.losses import cross_entropy
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.next_token import make_loss
from tessera.step import LossFn, Metrics


def router_paths(config: TransformerConfig) -> list[tuple[str, ...]]:
    """Paths of the routed layers in the parameter tree, in order of depth; one path for all layers of a scan."""
    pattern = config.pattern
    if "routed" not in pattern:
        return []
    if not config.scan:
        return [(f"blocks_{i}", "mlp") for i in range(config.layers) if pattern[i % len(pattern)] == "routed"]
    inner = () if len(pattern) == 1 else (f"layer_{len(pattern) - 1}",)
    return [("blocks", *inner, "mlp")]


def at(tree: Any, path: tuple[str, ...]) -> Any:
    """The part of a nested dict at a path."""
    for name in path:
        tree = tree[name]
    return tree


def per_layer(sown: Mapping[str, Any], name: str, config: TransformerConfig) -> PyTree:
    """What the routed layers sowed as `name`, with a leading layer axis."""
    found = [at(sown, path)[name][0] for path in router_paths(config)]
    if config.scan:
        return found[0]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def lm_loss(model: Decoder, z_loss: float = 0.0) -> LossFn:
    """The next-token loss of a decoder, with routed layers or without.

    With them, the auxiliary losses of all layers are added, a key (given in training) switches noise, capacity and
    expert dropout on, and the metrics have aux_loss and, for L routed layers, router/load [L, E] (shares of the
    choices), router/max_violation, router/entropy, router/load_entropy, router/confidence and router/drop_fraction [L].

    Args:
      model: the decoder.
      z_loss: see `tessera.losses.cross_entropy`.
    """
    if not router_paths(model.config):
        return make_loss(lambda params, tokens: model.apply({"params": params}, tokens), z_loss)

    def loss_fn(params: PyTree, batch: Mapping[str, Any], key: Any = None) -> tuple[jax.Array, Metrics]:
        tokens_BT = batch["tokens"]
        rngs = {} if key is None else {"router": key}
        logits_BTV, state = model.apply({"params": params}, tokens_BT[:, :-1], rngs=rngs, mutable=["intermediates"])
        sown = state["intermediates"]
        loss, metrics = cross_entropy(logits_BTV, tokens_BT[:, 1:], z=z_loss)
        auxiliary = per_layer(sown, "aux_loss", model.config).sum()
        found = {f"router/{name}": value for name, value in per_layer(sown, "routing", model.config).items()}
        found |= {name: metrics[name] for name in ("cross_entropy", "accuracy")}
        return loss + auxiliary, found | {"aux_loss": auxiliary}

    return loss_fn


def make_adjust(config: TransformerConfig) -> Callable[[PyTree, Metrics], PyTree] | None:
    """`adjust(params, metrics)` for `make_train_step`: moves the routers' biases by the loads of the step's batch.

    None where nothing moves outside the gradient (moe.bias_rate is 0 or there are no routed layers).
    """
    paths = router_paths(config)
    if not paths or not config.moe.bias_rate:
        return None

    def adjust(params: PyTree, metrics: Metrics) -> PyTree:
        load_LE = metrics["router/load"]
        for i, path in enumerate(paths):
            load = load_LE if config.scan else load_LE[i]
            bias = at(params, (*path, "router", "bias"))
            params = replaced(params, (*path, "router", "bias"), update_bias(bias, load, config.moe.bias_rate))
        return params

    return adjust


def replaced(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    """The nested dict with another part at a path; the parts beside it are shared."""
    if not path:
        return value
    return {**tree, path[0]: replaced(tree[path[0]], path[1:], value)}


def expert_table(
    model: Decoder, params: PyTree, tokens_BT: Int[Array, "B T"], classes_BT: Int[Array, "B T"], classes: int
) -> Float32[Array, "L C E"]:
    """Choices by routed layer, class of the token read and expert, routed as in evaluation."""
    _, state = model.apply({"params": params}, tokens_BT, mutable=["routings"])
    routing = per_layer(state["routings"], "routing", model.config)
    return jax.vmap(lambda one: joint_counts(one, classes_BT.reshape(-1), classes))(routing)
