"""What training a decoder takes: next-token and auxiliary losses, metrics of routers, bias updates, model FLOPs."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float32, Int, PyTree

from moe.metrics import of_token_means, token_means
from moe.route import update_bias, update_penalty
from moe.specialization import joint_counts
from sharding.rules import path_name
from sharding.vocab_parallel import Sums, linear_cross_entropy
from tessera.models.transformer import Decoder, TransformerConfig, param_shapes
from tessera.step import LossFn, Metrics, padding_share, with_mean_weights


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


def at_routers(values_L: jax.Array, config: TransformerConfig) -> PyTree:
    """One value for every routed layer, as the variables "sums" of the layers."""
    tree: dict[str, Any] = {}
    for i, path in enumerate(router_paths(config)):
        tree = replaced(tree, (*path, "sums"), values_L if config.scan else values_L[i])
    return tree


def lm_loss(model: Decoder, z_loss: float = 0.0, loss_chunk_size: int = 0, mesh: Mesh | None = None) -> LossFn:
    """Make `loss(params, batch, key)`, the next-token loss of a decoder, for batches {"tokens": int32 [B, T + 1]}.

    With documents packed into rows a batch also has "positions" int32 [B, T], which restart in every document and are
    -1 for padding, and "weights" float32 [B, T] of the targets: the loss is sum(w nll) / sum(w), and 0 without weight.

    The metrics are cross_entropy (nats per token) and accuracy. With routed layers the auxiliary losses of all layers
    are added, a key (given in training) switches noise, capacity and expert dropout on, and the metrics have aux_loss
    and, for L routed layers, router/load [L, E] (shares of the choices), router/max_violation, router/entropy,
    router/load_entropy, router/confidence, router/choices and router/drop_fraction [L].

    Of a part of a batch, losses of routers over the whole batch (`MoEConfig.whole_batch`) need what all parts add up
    to: with "router_sums" None in the batch the metrics also have router/sums [L, 6, E], `moe.losses.batch_sums` of the
    part; with the mean of the parts' in its place the losses are the batch's, see `moe.losses.linearized`.

    Args:
      model: the decoder.
      z_loss: coefficient of the z-loss, see `tessera.losses.cross_entropy`.
      loss_chunk_size: tokens of a device whose logits are computed at a time, see `sharding.linear_cross_entropy`; 0
        takes all at once.
      mesh: of one axis, over which the rows of a batch are split; see `mean_over_tokens`.
    """
    config = model.config
    routed = bool(router_paths(config))

    def sums(head_DV: jax.Array, x_ND: jax.Array, rest: tuple[jax.Array, jax.Array], _: None) -> Sums:
        how: Any = {"z": z_loss, "softcap": config.logit_softcap, "chunk": loss_chunk_size}
        return linear_cross_entropy(x_ND, head_DV, *rest, **how)

    mean = mean_over_tokens(sums, mesh)

    def loss_fn(params: PyTree, batch: Mapping[str, Any], key: Any = None) -> tuple[jax.Array, Metrics]:
        batch = with_mean_weights(batch)
        whole = routed and config.moe.whole_batch and "router_sums" in batch
        sums_LSE = batch["router_sums"] if whole else None
        mutable = ["intermediates"] * routed + ["balance"] * (whole and sums_LSE is None)
        how: Any = {"rngs": {"router": key}} if routed and key is not None else {}
        variables = {"params": params}
        if sums_LSE is not None:
            variables["balance"] = at_routers(sums_LSE, config)
        inputs = batch["tokens"][:, :-1], batch.get("positions"), False
        (x_BTD, head_DV), state = model.apply(variables, *inputs, mutable=mutable, **how)
        loss, metrics = mean(head_DV, x_BTD, targets(batch))
        metrics |= padding_share(batch)
        if not routed:
            return loss, metrics
        auxiliary = per_layer(state["intermediates"], "aux_loss", config).sum()
        routing = per_layer(state["intermediates"], "routing", config)
        if "mean_live" in batch:  # of a part of a batch: its share of the tokens that are not padding
            share = batch["mean_live"].mean()
            routing = of_token_means({name: value * share for name, value in token_means(routing).items()})
        metrics |= {f"router/{name}": value for name, value in routing.items()}
        if "balance" in mutable:
            metrics["router/sums"] = per_layer(state["balance"], "sums", config)
        return loss + auxiliary, metrics | {"aux_loss": auxiliary}

    return loss_fn


def targets(batch: Mapping[str, Any]) -> tuple[Int[Array, "B T"], Float32[Array, "B T"]]:
    """The labels of a batch and their weights, of mean one in the batch that its rows are a part of."""
    labels_BT = batch["tokens"][:, 1:]
    return labels_BT, batch.get("mean_weights", jnp.ones(labels_BT.shape, jnp.float32))


def mean_over_tokens(sums: Callable[..., Sums], mesh: Mesh | None = None) -> Callable[..., Sums]:
    """Make `mean(shared, x, rest, constants)` of arrays [B, T, ...] from sums over tokens of arrays [N, ...].

    Args:
      sums: as `fn` of `sharding.chunked_sum`.
      mesh: of one axis, over which the rows B are split: every device then sums over its own, and the gradient of
        `shared` is added up once, where the compiler would do so for every chunk. Rows that do not divide, or None,
        are left to the compiler.
    """

    def summed(axes: tuple[str, ...], shared: PyTree, x: PyTree, rest: PyTree, constants: PyTree) -> Sums:
        flat_x, flat_rest = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (x, rest))
        if not axes:
            return sums(shared, flat_x, flat_rest, constants)
        shared, constants = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axes, to="varying"), (shared, constants))
        return jax.lax.psum(sums(shared, flat_x, flat_rest, constants), axes)

    def mean(shared: PyTree, x: PyTree, rest: PyTree, constants: PyTree = None) -> Sums:
        rows, length = jax.tree.leaves(x)[0].shape[:2]
        total = partial(summed, ())
        if mesh is not None and mesh.size > 1 and rows % mesh.size == 0:
            split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
            specs: Any = {"in_specs": (whole, split, split, whole), "out_specs": whole}
            total = jax.shard_map(partial(summed, mesh.axis_names), mesh=mesh, **specs)
        return jax.tree.map(lambda found: found / (rows * length), total(shared, x, rest, constants))

    return mean


def training_flops(
    config: TransformerConfig, length: int, adapters: PyTree = None, teacher: TransformerConfig | None = None
) -> float:
    """FLOPs that training on one sequence takes by the model's definition: PaLM (Chowdhery et al. 2022), appendix B.

    6 N T + 12 L H h T^2: forward and backward products of all N weights that a token meets (of routed experts the k
    that are chosen; the embedding table as output layer only) and of attention, whose scores of local layers are those
    of the window. What a policy of remat computes again is not counted, nor is it saved what a causal mask hides.

    Of adapters a token meets a and b, 6 FLOPs a weight, and weights that are not trained take 4: their products
    forward, and those of the gradient of their inputs. A teacher takes the forward products, a third of its training.

    Args:
      config: the model.
      length: T, tokens of a sequence.
      adapters: shapes of what is trained in place of the model, see `tessera.lm.lora`.
      teacher: a model that runs on the same tokens.
    """
    weights, scores = met_weights(param_shapes(config), config), _scores(config, length)
    flops = 6.0 * weights if adapters is None else 4.0 * weights + 6.0 * met_weights(adapters, config)
    if teacher is not None:
        flops += 2.0 * (met_weights(param_shapes(teacher), teacher) + _scores(teacher, length))
    return length * (flops + 6.0 * scores)


def met_weights(params: PyTree, config: TransformerConfig) -> float:
    """Weights of matrix products that a token meets: all kernels, of k routed experts, and the output layer.

    Args:
      params: of the model, or adapters of it; shapes are enough.
      config: the model.
    """
    weights = 0.0
    for path, leaf in jax.tree.leaves_with_path(params):
        name = path_name(path)
        if re.search(r"/experts/.*kernel(/[ab])?$", name):
            weights += leaf.size * config.moe.router.k / config.moe.stack
        elif re.search(r"/kernel(/[ab])?$", name) and leaf.ndim >= 2:
            weights += leaf.size
        elif name == "embed/table" and config.tied:
            weights += leaf.size
    return weights


def _scores(config: TransformerConfig, length: int) -> float:
    """Multiply-adds of attention a token: scores of all keys, or of the window, and their sum of values."""
    keys = sum(min(config.window, length) if kind == "L" else length for kind in config.attention_kinds)
    return float(keys * config.heads * (config.head_size + config.value_size))


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
    return {**tree, path[0]: replaced(tree.get(path[0], {}), path[1:], value)}


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
