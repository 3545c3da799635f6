"""Sharding rules: logical axis names from parameter paths, and tables from logical to mesh axes.

Rules for parameters (storage) and for activations (compute) are separate tables. That makes fully sharded data
parallelism (FSDP, ZeRO-3) two lines: parameters store `width` over fsdp, and activations split `batch` over it.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from sharding.errors import PlanError, nearest_sizes

MeshAxes = str | tuple[str, ...]
Logical = tuple[str | None, ...]

# First match wins, on the path with its names joined by "/". Names count from the last dimension, so that stacked
# leading dimensions (layers, experts) need no patterns.
PATHS: tuple[tuple[str, Logical], ...] = (
    (r"(^|/)embed/table$", ("vocab", "width")),
    (r"(^|/)head/kernel$", ("width", "vocab")),
    (r"(^|/)attention/query/kernel$", ("width", "heads", "head_dim")),
    (r"(^|/)attention/(key|value)/kernel$", ("width", "kv_heads", "head_dim")),
    (r"(^|/)attention/query/(bias|gain)$", ("heads", "head_dim")),
    (r"(^|/)attention/(key|value)/(bias|gain)$", ("kv_heads", "head_dim")),
    (r"(^|/)attention/output/kernel$", ("heads", "head_dim", "width")),
    (r"(^|/)attention/sinks/logit$", ("heads",)),
    (r"(^|/)attention/(query_down|latent_down|key_rope)/kernel$", ("width", None)),  # latents are no part of a head
    (r"(^|/)attention/(query|key|value)_up/kernel$", (None, "heads", "head_dim")),
    (r"(^|/)experts/(gate|up)/bias$", ("experts", "ff")),
    (r"(^|/)experts/down/bias$", ("experts", None)),
    (r"(^|/)shared/(gate|up)/bias$", ("ff",)),
    (r"(^|/)mlp/(.*/)?(gate|up)(/kernel)?$", ("width", "ff")),
    (r"(^|/)mlp/(.*/)?down(/kernel)?$", ("ff", "width")),
    (r"(^|/)gain$", (None,)),
)

PARAMS: tuple[tuple[str, MeshAxes], ...] = (
    ("layers", "pp"),
    ("experts", "ep"),
    ("vocab", "tp"),
    ("heads", "tp"),
    ("kv_heads", "tp"),
    ("ff", "tp"),
    ("width", "fsdp"),  # fully sharded data parallelism, line one of two
)

COMPUTE: tuple[tuple[str, MeshAxes], ...] = (
    ("batch", ("dp", "fsdp", "ep")),  # line two: fsdp splits the batch
    ("time", "cp"),
    ("sequence", ("cp", "tp")),
    ("vocab", "tp"),
    ("heads", "tp"),
    ("kv_heads", "tp"),
    ("ff", "tp"),
)


@dataclass(frozen=True)
class Rules:
    """The tables of sharding rules; replace one to shard a model of your own.

    Attributes:
      paths: regular expression on a parameter's path -> logical axes of its last dimensions; a parameter that no
        pattern matches is split by layers at most.
      params: logical axis of a parameter -> mesh axis or axes.
      compute: logical axis of an activation -> mesh axis or axes.

    Example:
      >>> import sharding
      >>> rules = sharding.Rules(paths=((r"dense/kernel$", ("width", "ff")),))
      >>> tuple(sharding.resolve(("width", "ff"), (64, 256), rules.params, {"fsdp": 4, "tp": 2}))
      ('fsdp', 'tp')
    """

    paths: tuple[tuple[str, Logical], ...] = PATHS
    params: tuple[tuple[str, MeshAxes], ...] = PARAMS
    compute: tuple[tuple[str, MeshAxes], ...] = COMPUTE


path_name = partial(jax.tree_util.keystr, simple=True, separator="/")
"""Format a leaf's path as "blocks/mlp/gate/kernel"."""


def is_spec(node: Any) -> bool:
    """Whether a node of a tree is a PartitionSpec, which JAX might take for a branch."""
    return isinstance(node, PartitionSpec)


def logical_axes(path: str, ndim: int, rules: Rules = Rules()) -> Logical:
    """Find the logical axes of the parameter at `path`, one per dimension, None for an unsharded dimension."""
    # "blocks" stacks layers, "blocks_3" is one of them; a second stack in front of a matrix is one of experts. A routed
    # model's first dense layers are a stack too, which no pipeline splits: they belong to the first stage.
    stack = re.search(r"(^|/)(dense_)?blocks/", path)
    layers = () if not stack else (None,) if stack[2] else ("layers",)
    names = next((names for pattern, names in rules.paths if re.search(pattern, path)), None)
    if names is None or len(names) > ndim:
        return (layers + (None,) * ndim)[:ndim]
    front = ndim - len(names)
    stacks = (layers + ("experts",) * (len(names) > 1))[:front]
    return (None,) * (front - len(stacks)) + stacks + names


def resolve(
    axes: Logical,
    shape: tuple[int, ...],
    table: tuple[tuple[str, MeshAxes], ...],
    sizes: Mapping[str, int],
    path: str = "array",
) -> PartitionSpec:
    """Resolve the logical axes of one array to a PartitionSpec.

    Mesh axes that are absent or of size 1 are dropped, so that one set of rules serves every plan.

    Args:
      axes: logical axis of every dimension.
      shape: its global size.
      table: logical axis -> mesh axes.
      sizes: mesh axis -> size.
      path: of the array, for messages.

    Raises:
      PlanError: a dimension that does not divide, or a mesh axis that would split two dimensions.

    Example:
      >>> import sharding
      >>> compute = sharding.Rules().compute
      >>> tuple(sharding.resolve(("batch", "time", "width"), (32, 128, 64), compute, {"dp": 2, "fsdp": 4, "cp": 2}))
      (('dp', 'fsdp'), 'cp')
    """
    lookup = dict(table)
    entries: list[MeshAxes | None] = []
    used: dict[str, int] = {}
    for dimension, name in enumerate(axes):
        wanted = lookup.get(name, ()) if name else ()
        present = tuple(axis for axis in ((wanted,) if isinstance(wanted, str) else wanted) if sizes.get(axis, 1) > 1)
        for axis in present:
            if axis in used:
                raise PlanError(
                    f"{path} {shape}: the rules split dimensions {used[axis]} and {dimension} ({name}) both over {axis}"
                )
            used[axis] = dimension
        ways = math.prod(sizes[axis] for axis in present)
        if shape[dimension] % ways:
            product = " x ".join(f"{axis}={sizes[axis]}" for axis in present)
            near = nearest_sizes(shape[dimension], {axis: sizes[axis] for axis in present})
            raise PlanError(
                f"{path} {shape}: dimension {dimension} ({name}) of {shape[dimension]} does not divide by {product}; "
                f"nearest valid: {near}",
                f"{name} of {shape[dimension]} by {' x '.join(present)}",
            )
        entries.append(present[0] if len(present) == 1 else present or None)
    return PartitionSpec(*_without_tail(tuple(entries)))


@dataclass(frozen=True)
class Spread:
    """A dimension of a parameter that has to be enlarged before the axis of its rule divides it.

    Attributes:
      dimension: counted from the end, -1 is the last.
      axis: the mesh axis.
      repeat: how often every index is repeated (key/value heads); 0 pads with zeros to a multiple (the vocabulary).
    """

    dimension: int
    axis: str
    repeat: int

    def enlarge(self, size: int, ways: int) -> int:
        """Size of the dimension once the axis of `ways` devices divides it."""
        return size * self.repeat if self.repeat else -(-size // ways) * ways


def spread_of(axes: Logical, shape: tuple[int, ...], rules: Rules, sizes: Mapping[str, int]) -> Spread | None:
    """Find the dimension of one parameter that its rule's mesh axis does not divide and that can be enlarged.

    The vocabulary is padded to a multiple of tp, as Megatron-LM does; of K key/value heads each is repeated
    tp / gcd(K, tp) times, so that every device of tp has the heads of its queries.
    """
    lookup = dict(rules.params)
    for dimension, name in enumerate(axes):
        axis = lookup.get(name) if name in ("vocab", "kv_heads") else None
        if isinstance(axis, str) and shape[dimension] % (ways := sizes.get(axis, 1)):
            repeat = ways // math.gcd(ways, shape[dimension]) if name == "kv_heads" else 0
            return Spread(dimension - len(shape), axis, repeat)
    return None


def spreads(params: PyTree, sizes: Mapping[str, int], rules: Rules = Rules()) -> PyTree:
    """Find the `Spread` of every parameter, None for most; see `param_specs`."""

    def one(path: tuple, leaf: Any) -> Spread | None:
        return spread_of(logical_axes(path_name(path), leaf.ndim, rules), leaf.shape, rules, sizes)

    return jax.tree_util.tree_map_with_path(one, params)


def param_specs(params: PyTree, sizes: Mapping[str, int], rules: Rules = Rules(), *, zero: int = 3) -> PyTree:
    """Make the PartitionSpec of every parameter.

    A vocabulary or key/value heads that their axis does not divide are stored as they are, and the axis splits the
    width besides what already does, or where that does not divide either nothing. `sharding.gather_params` then
    gives every device its part: so no array that is stored, saved or exported has padding or copies.

    Args:
      params: tree of arrays or shapes.
      sizes: mesh axis -> size, such as `Plan.sizes` or `Mesh.shape`.
      rules: the tables.
      zero: ZeRO stage: 3 shards parameters over fsdp; 1 replicates them over it.

    Raises:
      PlanError: a parameter that does not divide, by its path.

    Example:
      >>> import jax.numpy as jnp, sharding
      >>> params = {"mlp": {"up": {"kernel": jnp.zeros((64, 256))}, "gain": jnp.zeros(64)}}
      >>> tuple(sharding.param_specs(params, {"fsdp": 4, "tp": 2})["mlp"]["up"]["kernel"])
      ('fsdp', 'tp')
    """
    sizes = {axis: size for axis, size in sizes.items() if axis != "fsdp" or zero == 3}

    def spec(path: tuple, leaf: Any) -> PartitionSpec:
        name = path_name(path)
        axes, table = logical_axes(name, leaf.ndim, rules), rules.params
        if (spread := spread_of(axes, leaf.shape, rules, sizes)) is not None:
            at = leaf.ndim + spread.dimension
            axes = (*axes[:at], None, *axes[at + 1 :])
            table = _with_axis(axes, leaf.shape, table, sizes, spread.axis)
        return resolve(axes, leaf.shape, table, sizes, name)

    return jax.tree_util.tree_map_with_path(spec, params)


def _with_axis(
    axes: Logical, shape: tuple[int, ...], table: tuple[tuple[str, MeshAxes], ...], sizes: Mapping[str, int], axis: str
) -> tuple[tuple[str, MeshAxes], ...]:
    """The table with a mesh axis more that splits the width, innermost, if both divide it."""
    if "width" not in axes:
        return table
    before = dict(table).get("width", ())
    both = (*((before,) if isinstance(before, str) else before), axis)
    if shape[axes.index("width")] % math.prod(sizes.get(one, 1) for one in both):
        return table
    return tuple((name, both if name == "width" else mesh) for name, mesh in table)


def mirrored_specs(tree: PyTree, params: PyTree, specs: PyTree) -> PyTree:
    """Make the PartitionSpecs of a tree that contains copies of the parameter tree: optimizer states, averages, masks.

    A leaf whose path ends in a parameter's path and that has its shape is sharded like it. One with a dimension less,
    a row or column statistic of a factored second moment (Adafactor: Shazeer & Stern 2018), is sharded like the rest
    of the parameter; one of a single dimension, whose number ends the path (SM3: Anil et al. 2019), like that
    dimension. Any other (counters) is replicated.

    Args:
      tree: arrays or shapes.
      params: the parameters, or shapes.
      specs: of the parameters.

    Example:
      >>> import jax.numpy as jnp, optax, sharding
      >>> params = {"mlp": {"up": {"kernel": jnp.zeros((64, 256))}}}
      >>> specs = sharding.param_specs(params, {"fsdp": 4, "tp": 2})
      >>> state = optax.adam(1e-3).init(params)
      >>> tuple(sharding.mirrored_specs(state, params, specs)[0].mu["mlp"]["up"]["kernel"])
      ('fsdp', 'tp')
    """
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
    known = {path_name(path): spec for path, spec in jax.tree.leaves_with_path(specs, is_leaf=is_spec)}

    def spec(path: tuple, leaf: Any) -> PartitionSpec:
        names = path_name(path).split("/")
        spans = ((i, j) for i in range(len(names)) for j in range(len(names), i, -1))
        found = next((span for span in spans if "/".join(names[slice(*span)]) in known), None)
        if found is None:
            return PartitionSpec()
        name, statistic = "/".join(names[slice(*found)]), names[found[0] - 1] if found[0] else ""
        shape, spec = shapes[name], known[name]
        entries = (*spec, *[None] * (len(shape) - len(spec)))
        last = names[-1]
        if leaf.shape == shape:
            return spec
        if found[1] < len(names) and last.isdigit() and leaf.shape == shape[int(last) : int(last) + 1]:
            return PartitionSpec(*entries[int(last) : int(last) + 1])
        gone = [i for i in range(len(shape)) if (*shape[:i], *shape[i + 1 :]) == leaf.shape]
        if not gone:
            return PartitionSpec()
        by_size = np.argsort(shape).tolist()  # as optax orders equal sizes
        wanted = by_size[-2 if statistic == "v_col" else -1]
        at = wanted if wanted in gone else gone[0]
        return PartitionSpec(*_without_tail((*entries[:at], *entries[at + 1 :])))

    return jax.tree_util.tree_map_with_path(spec, tree)


def _without_tail(entries: tuple) -> tuple:
    """The entries up to the last that is not None."""
    return entries[: max((i + 1 for i, entry in enumerate(entries) if entry is not None), default=0)]


def shardings(mesh: Mesh, specs: PyTree) -> PyTree:
    """Convert a tree of PartitionSpecs to NamedShardings on a mesh.

    Example:
      >>> import jax, sharding
      >>> mesh = sharding.make_mesh(sharding.Plan(""), jax.devices()[:1])
      >>> tuple(sharding.shardings(mesh, {"w": jax.sharding.PartitionSpec("dp")})["w"].spec)
      ('dp',)
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)
