"""Pruning experts by load: an expert is a lottery structure, its kernels and its column of the router one unit.

    masks = prune_experts(params, load_LE, keep=4, config=config)      # masks like any others in `lottery`
    params, config = drop_experts(params, masks, config)               # the smaller decoder, to be trained on

A mask alone does not stop a router from choosing an expert, and an expert of zeros adds nothing: cut it out with
`drop_experts` before the model is used. Axes: L routed layers, E experts.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PyTree

from lottery import masks as masks_lib
from lottery.coupled import Groups, Member, keep_units, unit_counts
from moe.activations import kernel_names
from tessera.models.lm_loss import at, replaced, router_paths
from tessera.models.transformer import TransformerConfig

# Axis of the experts from the end, by name of the router's parameter.
ROUTER_AXES = {"kernel": -1, "noise": -1, "bias": -1, "logit_bias": -1}


def expert_groups(config: TransformerConfig) -> Groups:
    """Units of `lottery.coupled`: (layer, expert) of a scanned decoder, (expert,) of every layer of another.

    Raises:
      ValueError: a router whose kernel has no column per expert.
    """
    if config.moe.router.name in ("hierarchical", "soft", "hash"):
        raise ValueError(f"the router {config.moe.router.name!r} has no column per expert to be pruned")
    lead = (0,) if config.scan else ()
    if config.moe.stack < config.moe.router.experts:
        raise ValueError("experts without parameters (moe.identity, moe.null) cannot be pruned")
    names = kernel_names(config.moe.mixture.activation)
    groups = {}
    for path in router_paths(config):
        name = "/".join(path)
        members = [Member(f"{name}/experts/{kernel}/kernel", (*lead, len(lead))) for kernel in names]
        groups[name] = (*members, Member(f"{name}/router/kernel", (*lead, len(lead) + 1)))
    return groups


def load_scores(params: PyTree, load_LE: Float[Array, "L E"], config: TransformerConfig) -> PyTree:
    """Scores like the parameters: every weight of an expert has the load of the expert, others 0."""
    scores = jax.tree.map(jnp.zeros_like, params)
    for i, path in enumerate(router_paths(config)):
        load = load_LE if config.scan else load_LE[i]
        mlp = at(params, path)
        experts = jax.tree.map(lambda leaf, load=load: _along(load, leaf, load.ndim), mlp["experts"])
        router = {name: _along(load, leaf, leaf.ndim) for name, leaf in mlp["router"].items() if name in ROUTER_AXES}
        scores = replaced(scores, path, {**mlp, "experts": experts, "router": router})
    return scores


def _along(load: Array, leaf: Array, end: int) -> Array:
    """Loads [*L, E] in the shape of a leaf [*L, ..., E, ...] whose axis of experts ends at `end`."""
    middle = (1,) * (end - load.ndim)
    tail = (1,) * (leaf.ndim - end)
    return jnp.broadcast_to(load.reshape(*load.shape[:-1], *middle, load.shape[-1], *tail), leaf.shape)


def prune_experts(
    params: PyTree,
    load_LE: Num[Array, "L E"] | Num[np.ndarray, "L E"],
    keep: int,
    config: TransformerConfig,
) -> PyTree:
    """Masks in which every routed layer keeps its `keep` busiest experts.

    Args:
      params: of the decoder.
      load_LE: choices, or shares of them, by routed layer and expert, on data that matter (`router/load` in the
        metrics, or `tessera.models.lm_loss.expert_table` summed over classes).
      keep: experts that stay, at least the router's k.
      config: the model.

    Raises:
      ValueError: no routed layers, loads of another shape, or a number of experts that cannot stay.
    """
    router, groups = config.moe.router, expert_groups(config)
    if not groups or not router.k <= keep <= router.experts:
        raise ValueError(
            f"keep={keep} of {router.experts} experts in {len(groups)} group(s) of layers: from k={router.k} up to all"
        )
    layers = config.mlps.count("routed")
    if load_LE.shape != (layers, router.experts):
        raise ValueError(f"load of shape {load_LE.shape}: {(layers, router.experts)} is needed")
    which = masks_lib.prunable(params, rules=((r"/(experts|router)/.*kernel$", True), (r".*", False)))
    counts = dict.fromkeys(unit_counts(params, groups), keep)
    scores = load_scores(params, jnp.asarray(load_LE, jnp.float32), config)
    return keep_units(scores, masks_lib.ones(params), which, groups, counts)


def drop_experts(
    params: Mapping[str, Any], masks: PyTree, config: TransformerConfig
) -> tuple[dict[str, Any], TransformerConfig]:
    """Cut experts that a mask has removed, and their columns of the router, out of the decoder.

    Returns:
      The smaller parameters and their model. It computes what the larger one does with a router that never chooses the
      experts cut out.

    Raises:
      ValueError: layers that keep different numbers of experts.
    """
    result: Any = params
    left = set()
    for path in router_paths(config):
        mlp = at(params, path)
        up = np.asarray(at(masks, path)["experts"]["up"]["kernel"])
        alive = up.any((-2, -1))
        numbers = set(alive.sum(-1).ravel().tolist())
        left |= numbers
        if len(left) != 1:
            raise ValueError(f"layers keep different numbers of experts {sorted(left)}: prune as many in each")
        index = np.nonzero(alive)[-1].reshape(*alive.shape[:-1], -1)
        experts = jax.tree.map(lambda leaf, i=index: _take(leaf, i, i.ndim - 1), mlp["experts"])
        result = replaced(result, path, {**mlp, "experts": experts, "router": take_columns(mlp["router"], index)})
    (count,) = left
    return result, with_experts(config, count)


def with_experts(config: TransformerConfig, experts: int) -> TransformerConfig:
    """The model with another number of routed experts."""
    return replace(config, moe=replace(config.moe, router=replace(config.moe.router, experts=experts)))


def take_columns(router: Mapping[str, Any], index: np.ndarray) -> dict[str, Any]:
    """Take the experts `index` [*L, K] of a router's parameters [*L, ..., E]."""
    return {
        name: _take(leaf, index, leaf.ndim + ROUTER_AXES[name]) if name in ROUTER_AXES else leaf
        for name, leaf in router.items()
    }


def _take(leaf: Any, index: np.ndarray, axis: int) -> Array:
    shape = [1] * leaf.ndim
    shape[: index.ndim - 1], shape[axis] = index.shape[:-1], index.shape[-1]
    return jnp.take_along_axis(jnp.asarray(leaf), jnp.asarray(index.reshape(shape)), axis)
