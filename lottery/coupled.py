"""Coupled structured pruning: one neuron or head is a slice of several kernels at once, pruned together.

`lottery.structures` prunes the slices of one leaf; here a unit's score is its mean over all its members' weights, and a
removed unit is zero in all of them, so that `lottery.compact` can cut it out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from lottery import structures
from lottery.masks import flatten
from lottery.prune import drop_lowest

__all__ = ["Member", "decoder_heads", "decoder_neurons", "keep_units", "mlp_neurons", "unit_counts"]


@dataclass(frozen=True)
class Member:
    """A leaf's part in a group of units.

    Attributes:
      path: '/'-joined path of the leaf.
      axes: the axes along which the leaf's slices are counted; their sizes are the group's grid of units. The first
        ones stack layers, if the path is one of a stack: each layer then has a group of its own.
      repeat: that many neighbors along the last of `axes` belong to one unit (query heads that share a key head).

    Example:
      >>> groups = {"hidden": (lottery.coupled.Member("one/kernel", (1,)), lottery.coupled.Member("two/kernel", (0,)))}
      >>> params = {"one": {"kernel": jnp.zeros((4, 3))}, "two": {"kernel": jnp.zeros((3, 2))}}
      >>> lottery.coupled.unit_counts(params, groups)
      {'hidden': 3}
    """

    path: str
    axes: tuple[int, ...]
    repeat: int = 1


Groups = Mapping[str, tuple[Member, ...]]


def mlp_neurons(layers: Sequence[str]) -> dict[str, tuple[Member, ...]]:
    """List the hidden neurons of a chain of dense layers, by layer: their incoming column and the next layer's row.

    Args:
      layers: names from first to last, ("dense0", "dense1", "output") for LeNet-300-100.

    Example:
      >>> [member.path for member in lottery.coupled.mlp_neurons(("dense0", "output"))["dense0"]]
      ['dense0/kernel', 'output/kernel']
    """
    pairs = zip(layers, layers[1:], strict=False)
    return {one: (Member(f"{one}/kernel", (1,)), Member(f"{two}/kernel", (0,))) for one, two in pairs}


def decoder_neurons(prefix: str = "blocks") -> dict[str, tuple[Member, ...]]:
    """List the feed-forward neurons of a decoder with scanned SwiGLU blocks, a group in every block.

    Example:
      >>> list(lottery.coupled.decoder_neurons())
      ['blocks/mlp']
    """
    mlp = f"{prefix}/mlp"
    members = (
        Member(f"{mlp}/gate/kernel", (0, 2)),
        Member(f"{mlp}/up/kernel", (0, 2)),
        Member(f"{mlp}/down/kernel", (0, 1)),
    )
    return {mlp: members}


def decoder_heads(heads: int, kv_heads: int, prefix: str = "blocks") -> dict[str, tuple[Member, ...]]:
    """List the attention heads of a decoder with scanned blocks: a unit is a key/value head and its query heads.

    Raises:
      ValueError: kv_heads does not divide heads.

    Example:
      >>> members = lottery.coupled.decoder_heads(4, 2)["blocks/attention"]
      >>> {member.path.split("/")[2]: member.repeat for member in members}
      {'key': 1, 'value': 1, 'query': 2, 'output': 2}
    """
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key/value heads evenly")
    repeat, at = heads // kv_heads, f"{prefix}/attention"
    members = [Member(f"{at}/{name}/kernel", (0, 2)) for name in ("key", "value")]
    members += [Member(f"{at}/query/kernel", (0, 2), repeat), Member(f"{at}/output/kernel", (0, 1), repeat)]
    return {at: tuple(members)}


def keep_units(
    scores: PyTree, masks: PyTree, which: PyTree, groups: Groups, counts: Mapping[str, int | Array]
) -> PyTree:
    """Prune coupled units until counts[group] of every group stay, those with the highest mean score.

    Groups of a scanned model are those of its blocks, "blocks_0/mlp", "blocks_1/mlp", ..., as `unit_counts` lists them.

    A unit is alive if any of its weights is. Ties go by index; counts above the number alive change nothing. Runs under
    jit and vmap.

    Args:
      scores: like the parameters.
      masks: like the parameters.
      which: `masks.prunable`, static.
      groups: by name, e.g. `mlp_neurons`. A leaf may be in several groups.
      counts: units that stay, by group.

    Returns:
      The new masks.

    Raises:
      ValueError: a member that is not a prunable leaf or whose axes do not fit, or a count for an unknown group.

    Example:
      >>> params = {"dense0": {"kernel": jnp.array([[1.0, 2.0]])}, "output": {"kernel": jnp.array([[5.0], [1.0]])}}
      >>> which, groups = lottery.masks.prunable(params), lottery.coupled.mlp_neurons(("dense0", "output"))
      >>> masks = lottery.coupled.keep_units(params, lottery.masks.ones(params), which, groups, {"dense0": 1})
      >>> masks["dense0"]["kernel"].tolist(), masks["output"]["kernel"].tolist()
      ([[True, False]], [[True], [False]])
    """
    mask, score, chosen = flatten(masks), flatten(scores), flatten(which)
    shapes = {path: leaf.shape for path, leaf in mask.items()}
    layers = {name: _layers(name, members, shapes, chosen) for name, members in groups.items()}
    known = [layer for names in layers.values() for layer in names]
    if set(counts) - set(known):
        raise ValueError(f"counts for {sorted(set(counts) - set(known))}; groups: {', '.join(known)}")
    result = dict(mask)
    for name, names in layers.items():
        if not set(names) & set(counts):
            continue
        grids = []
        for member in groups[name]:
            if not chosen.get(member.path):
                able = ", ".join(path for path, keep in chosen.items() if keep)
                raise ValueError(f"group {name}: {member.path} is not a prunable parameter; prunable: {able}")
            grids.append(_grid(member, mask[member.path].shape, name))
        if len(set(grids)) != 1:
            raise ValueError(
                f"group {name}: its members count different units: {dict(zip(groups[name], grids, strict=True))}"
            )
        total, size = jnp.zeros(grids[0]), 0
        alive = jnp.zeros(grids[0], jnp.bool_)
        for member in groups[name]:
            m = mask[member.path]
            total += _pool(member, jnp.where(m, score[member.path].astype(jnp.float32), 0)).sum(-1)
            alive |= _pool(member, m).any(-1)
            size += m.size // int(np.prod(grids[0]))
        rows, flags = ((total / size).reshape(len(names), -1), alive.reshape(len(names), -1))
        now = jnp.sum(flags, axis=1, dtype=jnp.int32)
        left = jnp.stack([jnp.asarray(counts.get(layer, now[i]), jnp.int32) for i, layer in enumerate(names)])
        stays = jax.vmap(drop_lowest)(rows, flags, now - left).reshape(grids[0])
        for member in groups[name]:
            result[member.path] = result[member.path] & _expand(member, stays, mask[member.path].shape)
    return jax.tree.unflatten(jax.tree.structure(masks), list(result.values()))


def unit_counts(params: PyTree, groups: Groups) -> dict[str, int]:
    """Count the units of every group, those of each block of a scanned model, in parameters or shapes of one network.

    Example:
      >>> params = {"dense0": {"kernel": jnp.zeros((4, 3))}, "output": {"kernel": jnp.zeros((3, 2))}}
      >>> lottery.coupled.unit_counts(params, lottery.coupled.mlp_neurons(("dense0", "output")))
      {'dense0': 3}
    """
    shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
    found: dict[str, int] = {}
    for name, members in groups.items():
        layers = _layers(name, members, shapes, {})
        size = int(np.prod(_grid(members[0], shapes[members[0].path], name)))
        found |= dict.fromkeys(layers, size // len(layers))
    return found


def _layers(
    name: str, members: tuple[Member, ...], shapes: Mapping[str, tuple[int, ...]], chosen: Mapping[str, Any]
) -> tuple[str, ...]:
    """The names of a group's layers; the last axis of a grid is of units, however many the leaf stacks."""
    if not members or members[0].path not in shapes:
        return (name,)
    path, axes = members[0].path, members[0].axes
    found = structures.layout(path, shapes[path], chosen.get(path) or True)
    batch = min(found.batch, len(axes) - 1)
    return structures.numbered(name, tuple(shapes[path][axis] for axis in axes[:batch]), found.parts[:batch])


def _grid(member: Member, shape: tuple[int, ...], group: str) -> tuple[int, ...]:
    if max(member.axes) >= len(shape) or shape[member.axes[-1]] % member.repeat:
        raise ValueError(f"group {group}: {member.path} of shape {shape} does not fit {member}")
    grid = [shape[axis] for axis in member.axes]
    return (*grid[:-1], grid[-1] // member.repeat)


def _pool(member: Member, leaf: Array) -> Array:
    """[*grid, weights of a unit]."""
    grid = _grid(member, leaf.shape, "")
    return jnp.moveaxis(leaf, member.axes, range(len(member.axes))).reshape(*grid, -1)


def _expand(member: Member, stays: Array, shape: tuple[int, ...]) -> Array:
    stays = jnp.repeat(stays, member.repeat, axis=-1)
    return jnp.broadcast_to(jnp.expand_dims(stays, tuple(a for a in range(len(shape)) if a not in member.axes)), shape)
