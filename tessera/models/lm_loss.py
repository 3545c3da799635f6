"""The loss of a decoder: next-token cross-entropy, auxiliary losses and metrics of routers, and their bias updates."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, PyTree

from moe.route import update_bias, update_penalty
from moe.specialization import joint_counts
from tessera.losses import next_token_loss, padding_share, with_mean_weights
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.step import LossFn, Metrics


def router_paths(config: TransformerConfig) -> list[tuple[str, ...]]:
    """Paths of the routed layers in the parameter tree, in order of depth; one path for all layers of a scan."""
    routed = [stack for stack in config.stacks if "routed" in stack.pattern]
    return [(one.name, *(f"layer_{len(one.pattern) - 1}",) * (len(one.pattern) > 1), "mlp") for one in routed]


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
    """Make `loss(params, batch, key)`, the next-token loss of a decoder, for batches {"tokens": int32 [B, T + 1]}.

    With documents packed into rows a batch also has "positions" int32 [B, T], which restart in every document and are
    -1 for padding, and "weights" float32 [B, T] of the targets: the loss is sum(w nll) / sum(w), and 0 without weight.

    The metrics are cross_entropy (nats per token) and accuracy. With routed layers the auxiliary losses of all layers
    are added, a key (given in training) switches noise, capacity and expert dropout on, and the metrics have aux_loss
    and, for L routed layers, router/load [L, E] (shares of the choices), router/max_violation, router/entropy,
    router/load_entropy, router/confidence, router/choices and router/drop_fraction [L].

    Args:
      model: the decoder.
      z_loss: coefficient of the z-loss, see `tessera.losses.cross_entropy`.
    """
    config = model.config
    if not router_paths(config):

        def dense_loss(params: PyTree, batch: Mapping[str, Any], key: Any = None) -> tuple[jax.Array, Metrics]:
            del key
            batch = with_mean_weights(batch)
            logits_BTV: Any = model.apply({"params": params}, batch["tokens"][:, :-1], batch.get("positions"))
            loss, metrics = next_token_loss(logits_BTV, batch["tokens"], z_loss, batch.get("mean_weights"))
            return loss, metrics | padding_share(batch)

        return dense_loss

    def routed_loss(params: PyTree, batch: Mapping[str, Any], key: Any = None) -> tuple[jax.Array, Metrics]:
        batch = with_mean_weights(batch)
        tokens_BT = batch["tokens"]
        how: Any = {"rngs": {} if key is None else {"router": key}, "mutable": ["intermediates"]}
        logits_BTV, state = model.apply({"params": params}, tokens_BT[:, :-1], batch.get("positions"), **how)
        loss, metrics = next_token_loss(logits_BTV, tokens_BT, z_loss, batch.get("mean_weights"))
        auxiliary = per_layer(state["intermediates"], "aux_loss", config).sum()
        routing = per_layer(state["intermediates"], "routing", config)
        # Of a part of a batch: its share of the tokens that are not padding.
        share = batch["mean_live"].mean() if "mean_live" in batch else 1.0
        metrics |= {f"router/{name}": value * share for name, value in routing.items()}
        return loss + auxiliary, metrics | padding_share(batch) | {"aux_loss": auxiliary}

    return routed_loss


def make_eval(loss_fn: LossFn) -> Callable[[PyTree, Mapping[str, Any]], dict[str, jax.Array]]:
    """Make the jitted `eval(params, batch) -> {"loss", "accuracy"}`; its loss is the cross-entropy without z-loss.

    Of a batch with weights there is also "weight", their sum, by which `tessera.loop.evaluate` weighs batches.
    """

    @jax.jit
    def eval_fn(params: PyTree, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        metrics = loss_fn(params, batch, None)[1]
        found = {"loss": metrics["cross_entropy"], "accuracy": metrics["accuracy"]}
        return found | ({"weight": batch["weights"].sum()} if "weights" in batch else {})

    return eval_fn


def make_adjust(config: TransformerConfig) -> Callable[[PyTree, Metrics], PyTree] | None:
    """`adjust(params, metrics)` for `make_train_step`: moves the routers' biases by the loads of the step's batch.

    Of ReLU routers it moves the penalty, by the choices of all layers. None where nothing moves outside the gradient
    (another router and moe.bias_rate 0, or no routed layers).
    """
    paths = router_paths(config)
    router = config.moe.router
    if not paths or not (config.moe.bias_rate or router.name == "relu"):
        return None

    def adjust(params: PyTree, metrics: Metrics) -> PyTree:
        load_LE = metrics["router/load"]
        for i, path in enumerate(paths):
            if router.name == "relu":
                name, choices = (*path, "router", "penalty"), metrics["router/choices"].mean()
                penalty = at(params, name)
                choices = jnp.broadcast_to(choices, penalty.shape)
                params = replaced(params, name, update_penalty(penalty, choices, router.k, router.penalty_rate))
                continue
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
    model: Decoder,
    params: PyTree,
    tokens_BT: Int[Array, "B T"],
    classes_BT: Int[Array, "B T"],
    classes: int,
    positions_BT: Int[Array, "B T"] | None = None,
) -> Float32[Array, "L C E"]:
    """Choices by routed layer, class of the token read and expert, routed as in evaluation; none of padding."""
    _, state = model.apply({"params": params}, tokens_BT, positions_BT, mutable=["routings"])
    routing = per_layer(state["routings"], "routing", model.config)
    return jax.vmap(lambda one: joint_counts(one, classes_BT.reshape(-1), classes))(routing)
