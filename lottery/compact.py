"""Compaction: a structured ticket as a physically smaller model with the same outputs.

What counts are the weights, not the masks: a unit whose outgoing or incoming weights are all zero is cut out. Runs on
the host, once, since shapes follow from values. Outputs agree up to the order of summation (1e-6 in float32).
Convolutions: `lottery.compact_channels`.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from lottery.structures import refuse_biases

__all__ = ["compact_decoder", "compact_experts", "compact_mlp", "renumber"]


def compact_mlp(
    params: Mapping[str, PyTree], layers: Sequence[str], activation: Callable[[Array], Array] = jax.nn.relu
) -> tuple[dict[str, PyTree], tuple[int, ...]]:
    """Cut dead hidden neurons out of a chain of dense layers with biases.

    A neuron without outgoing weights is dropped. One without incoming weights is constant, activation(bias), and what
    it adds to the next layer goes into that layer's bias. Every layer has at least one neuron left.

    Args:
      params: {layer: {"kernel" [K, N], "bias" [N]}}; other entries stay as they are.
      layers: names from first to last, the last one being the output: ("dense0", "dense1", "output").
      activation: between layers, elementwise.

    Returns:
      (smaller params, numpy float32; sizes of the hidden layers).

    Raises:
      ValueError: a layer that is missing or whose sizes do not chain.

    Example:
      >>> params = {
      ...     "dense0": {"kernel": np.array([[1.0, 2.0]]), "bias": np.zeros(2)},
      ...     "output": {"kernel": np.array([[3.0], [0.0]]), "bias": np.zeros(1)},
      ... }
      >>> small, hidden = lottery.compact.compact_mlp(params, ("dense0", "output"))
      >>> hidden, small["dense0"]["kernel"].tolist()
      ((1,), [[1.0]])
    """
    for name in layers:
        if name not in params:
            raise ValueError(f"compact_mlp: no layer {name}; layers: {', '.join(params)}")
    kernels: dict[str, np.ndarray] = {name: np.asarray(params[name]["kernel"], np.float32) for name in layers}
    biases: dict[str, np.ndarray] = {name: np.asarray(params[name]["bias"], np.float32) for name in layers}
    for one, two in zip(layers, layers[1:], strict=False):
        if kernels[one].shape[1] != kernels[two].shape[0]:
            raise ValueError(
                f"compact_mlp: {one} has {kernels[one].shape[1]} outputs, {two} {kernels[two].shape[0]} inputs"
            )
    # Forwards, constants: cutting one may leave the next layer's neuron without inputs.
    for one, two in zip(layers, layers[1:], strict=False):
        idle = np.logical_not(np.any(kernels[one], axis=0))
        constant = np.asarray(activation(jnp.asarray(biases[one])))[idle]
        biases[two] = biases[two] + constant @ kernels[two][idle]
        kernels[two] = np.where(idle[:, None], np.float32(0), kernels[two])
    # Backwards, unused neurons: cutting one may leave those of the layer before unused.
    for one, two in reversed(list(zip(layers, layers[1:], strict=False))):
        read = np.array(np.any(kernels[two], axis=1))
        if not read.any():
            read[0] = True
        kernels[one], biases[one], kernels[two] = kernels[one][:, read], biases[one][read], kernels[two][read]
    small = {name: {**params[name], "kernel": kernels[name], "bias": biases[name]} for name in layers}
    return {**params, **small}, tuple(len(biases[name]) for name in layers[:-1])


def compact_decoder(params: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], dict[str, int]]:
    """Cut dead feed-forward neurons and attention heads out of a decoder with scanned SwiGLU blocks.

    A neuron is dead if its gate, up or down weights are all zero; a key/value head together with its query heads if
    its value weights or its rows of the output kernel are. All layers are one stack, so each group shrinks to what its
    fullest layer needs; layers with fewer have some dead units left, which add nothing.

    Args:
      params: {"blocks": {"attention": ..., "mlp": ...}, ...} with the layer axis first, as `coupled.decoder_heads`
        and `decoder_neurons` prune them. Other entries stay as they are.

    Returns:
      (smaller params, numpy; {"heads", "kv_heads", "head_dim", "ff"}: the sizes of the smaller model).

    Raises:
      ValueError: query heads are no multiple of key/value heads; queries, keys and values have biases.

    Example:
      >>> shapes = {"query": (1, 8, 4, 2), "key": (1, 8, 2, 2), "value": (1, 8, 2, 2), "output": (1, 4, 2, 8)}
      >>> attention = {name: {"kernel": np.ones(shape)} for name, shape in shapes.items()}
      >>> attention["value"]["kernel"][:, :, 1] = 0  # a dead key/value head
      >>> mlp = {name: {"kernel": np.ones((1, 8, 6))} for name in ("gate", "up")}
      >>> mlp["down"] = {"kernel": np.ones((1, 6, 8))}
      >>> lottery.compact.compact_decoder({"blocks": {"attention": attention, "mlp": mlp}})[1]
      {'heads': 2, 'kv_heads': 1, 'head_dim': 2, 'ff': 6}
    """
    blocks = jax.tree.map(np.asarray, dict(params["blocks"]))
    attention, heads = _compact_attention(blocks["attention"])
    mlp = {name: blocks["mlp"][name]["kernel"] for name in ("gate", "up", "down")}
    dead = ~mlp["gate"].any(1) | ~mlp["up"].any(1) | ~mlp["down"].any(2)
    chosen = _fullest(~dead)
    small = {
        "gate": np.take_along_axis(mlp["gate"], chosen[:, None, :], 2),
        "up": np.take_along_axis(mlp["up"], chosen[:, None, :], 2),
        "down": np.take_along_axis(mlp["down"], chosen[:, :, None], 1),
    }
    feed = {**blocks["mlp"], **{name: {"kernel": kernel} for name, kernel in small.items()}}
    sizes = {**heads, "ff": chosen.shape[1]}
    return {**params, "blocks": {**blocks, "attention": attention, "mlp": feed}}, sizes


def _compact_attention(attention: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], dict[str, int]]:
    refuse_biases(attention, "cut")
    q, k, v, o = (attention[name]["kernel"] for name in ("query", "key", "value", "output"))
    layers, width, heads, dim = q.shape
    groups = k.shape[2]
    if heads % groups:
        raise ValueError(f"blocks/attention: {heads} query heads are no multiple of {groups} key/value heads")
    # Query heads by the key/value head they read.
    q = q.reshape(layers, width, groups, heads // groups, dim)
    o = o.reshape(layers, groups, heads // groups, dim, width)
    chosen = _fullest(v.any((1, 3)) & o.any((2, 3, 4)))
    count = chosen.shape[1]
    q = np.take_along_axis(q, chosen[:, None, :, None, None], 2).reshape(layers, width, -1, dim)
    o = np.take_along_axis(o, chosen[:, :, None, None, None], 1).reshape(layers, -1, dim, width)
    k, v = (np.take_along_axis(x, chosen[:, None, :, None], 2) for x in (k, v))
    kernels = {"query": q, "key": k, "value": v, "output": o}
    sizes = {"heads": q.shape[2], "kv_heads": count, "head_dim": dim}
    return {**attention, **{name: {"kernel": kernel} for name, kernel in kernels.items()}}, sizes


def _fullest(alive_LU: np.ndarray) -> np.ndarray:
    """[L, most alive in any layer, at least 1] indices: a layer's alive units in order, then dead ones."""
    count = max(1, int(alive_LU.sum(1).max()))
    return np.sort(np.argsort(~alive_LU, axis=1, kind="stable")[:, :count], axis=1)


def compact_experts(experts: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], Int[np.ndarray, " E"]]:
    """Drop experts that add nothing: those whose "down" kernel (and bias) is all zero, or whose "up" is without bias.

    A router goes on choosing among all experts, so every other token's weights stay as they were; `renumber` turns its
    choices into those of the smaller stack. (Cutting the router's columns too changes what it chooses: that is pruning,
    and wants training afterwards.)

    Args:
      experts: {"gate", "up", "down"} (or without "gate"): arrays [E, inputs, outputs] or {"kernel": that, "bias": ...}.

    Returns:
      (the same with E' >= 1 experts, numpy; [E] the new number of every expert, E' for those that are gone).

    Raises:
      ValueError: kernels that count different experts.

    Example:
      >>> stack = {"up": np.ones((3, 4, 5)), "down": np.ones((3, 5, 4)) * np.array([1, 0, 1])[:, None, None]}
      >>> small, numbers = lottery.compact.compact_experts(stack)
      >>> small["up"].shape, numbers.tolist()
      ((2, 4, 5), [0, 2, 1])
    """
    tree = jax.tree.map(np.asarray, dict(experts))
    counts = {leaf.shape[0] for leaf in jax.tree.leaves(tree)}
    if len(counts) != 1:
        raise ValueError(f"compact_experts: the kernels have {sorted(counts)} experts; one number is needed")
    total = counts.pop()
    alive = np.ones(total, bool)
    for name in ("up", "down") if "gate" not in tree else ("gate", "up", "down"):
        leaves = jax.tree.leaves(tree[name])
        alive &= np.any([leaf.reshape(total, -1).any(1) for leaf in leaves], axis=0)
    if "gate" not in tree:
        # relu or gelu of zeros is zero, but a bias of "down" is still added.
        alive |= _biases(tree["down"], total)
    if not alive.any():
        alive[0] = True
    numbers = np.where(alive, np.cumsum(alive) - 1, alive.sum()).astype(np.int32)
    return jax.tree.map(lambda leaf: leaf[alive], tree), numbers


def _biases(down: PyTree, total: int) -> np.ndarray:
    bias = down.get("bias") if isinstance(down, Mapping) else None
    return np.zeros(total, bool) if bias is None else bias.reshape(total, -1).any(1)


def renumber(
    experts_NK: Int[Array, "N K"], weights_NK: Float[Array, "N K"], numbers: Int[Array, " E"] | np.ndarray, left: int
) -> tuple[Int[Array, "N K"], Float[Array, "N K"]]:
    """Renumber a router's choices for the experts that are left; `left` and factor 0 for a choice that is gone.

    Args:
      experts_NK: expert of every choice, E for one that is dropped already.
      weights_NK: its factor.
      numbers: from `compact_experts`.
      left: E', experts in the smaller stack.

    Example:
      >>> experts, weights = jnp.array([[0, 1]]), jnp.array([[0.5, 0.5]])
      >>> ids, factors = lottery.compact.renumber(experts, weights, np.array([0, 2, 1]), 2)
      >>> ids.tolist(), factors.tolist()
      ([[0, 2]], [[0.5, 0.0]])
    """
    table = jnp.concatenate([jnp.asarray(numbers, experts_NK.dtype), jnp.asarray([left], experts_NK.dtype)])
    new_NK = table[experts_NK]
    return new_NK, jnp.where(new_NK < left, weights_NK, 0)
