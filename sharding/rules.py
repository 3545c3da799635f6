"""Where every array goes: logical axis names read off parameter paths, and rules that send names to mesh axes.

Rules for parameters (how they are stored) and for computing (how activations lie) are separate tables. That makes fully
sharded data parallelism two lines: parameters store `width` over fsdp, and computing splits `batch` over it.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from sharding.errors import PlanError, nearest_divisor

MeshAxes = str | tuple[str, ...]
Logical = tuple[str | None, ...]

# First match wins, on the path with its names joined by "/". Names count from the last dimension, so that what is
# stacked in front (layers, experts) needs no patterns of its own.
PATHS: tuple[tuple[str, Logical], ...] = (
    (r"(^|/)embed/table$", ("vocab", "width")),
    (r"(^|/)head/kernel$", ("width", "vocab")),
    (r"(^|/)attention/query/kernel$", ("width", "heads", "head_dim")),
    (r"(^|/)attention/(key|value)/kernel$", ("width", "kv_heads", "head_dim")),
    (r"(^|/)attention/output/kernel$", ("heads", "head_dim", "width")),
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
    """The three tables; replace one to place a model of your own.

    `paths`: regular expression on a parameter's path -> logical axes of its last dimensions; a parameter no pattern
    matches is split by layers at most. `params`, `compute`: logical axis -> mesh axis or axes.
    """

    paths: tuple[tuple[str, Logical], ...] = PATHS
    params: tuple[tuple[str, MeshAxes], ...] = PARAMS
    compute: tuple[tuple[str, MeshAxes], ...] = COMPUTE


path_name = partial(jax.tree_util.keystr, simple=True, separator="/")
"""A leaf's path as JAX's tree functions give it, as one text: "blocks/mlp/gate/kernel"."""


def logical_axes(path: str, ndim: int, rules: Rules = Rules()) -> Logical:
    """Logical axes of the parameter at `path`, one per dimension, None for a dimension nothing splits."""
    # "blocks" stacks layers, "blocks_3" is one of them; a second stack in front of a matrix is one of experts.
    layers = ("layers",) if re.search(r"(^|/)blocks/", path) else ()
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
    """Partition of one array.

    Mesh axes that the mesh lacks or that have size 1 are dropped, so that one set of rules serves every plan.

    Args:
      axes: logical axis of every dimension.
      shape: its global size.
      table: logical axis -> mesh axes.
      sizes: mesh axis -> size.
      path: what the array is, for messages.

    Raises:
      PlanError: a dimension that does not divide, or a mesh axis that would split two dimensions.
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
            raise PlanError(
                f"{path} {shape}: dimension {dimension} ({name}) of {shape[dimension]} does not divide by {product}; "
                f"nearest valid size: {nearest_divisor(shape[dimension], ways)}"
            )
        entries.append(present[0] if len(present) == 1 else present or None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def param_specs(params: PyTree, sizes: Mapping[str, int], rules: Rules = Rules(), *, zero: int = 3) -> PyTree:
    """Partition of every parameter, and with zero=3 of what mirrors parameters: gradients, moments, averages, masks.

    Args:
      params: tree of arrays or shapes.
      sizes: mesh axis -> size, such as `Plan.sizes` or `Mesh.shape`.
      rules: the tables.
      zero: 3 stores parameters over fsdp; 1 keeps them whole over it.

    Raises:
      PlanError: a parameter that does not divide, by its path.
    """
    sizes = {axis: size for axis, size in sizes.items() if axis != "fsdp" or zero == 3}

    def spec(path: tuple, leaf: Any) -> PartitionSpec:
        name = path_name(path)
        return resolve(logical_axes(name, leaf.ndim, rules), leaf.shape, rules.params, sizes, name)

    return jax.tree_util.tree_map_with_path(spec, params)


def mirrored_specs(tree: PyTree, params: PyTree, specs: PyTree) -> PyTree:
    """Partition of a tree that has copies of the parameter tree inside: optimizer states, averages, masks.

    A leaf whose path ends in a parameter's path and that has its shape lies as `specs` says; any other (counters,
    factored moments) lies whole on every device.
    """
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    known = {path_name(path): spec for path, spec in jax.tree.leaves_with_path(specs, is_leaf=is_spec)}

    def spec(path: tuple, leaf: Any) -> PartitionSpec:
        words = path_name(path).split("/")
        tails = ("/".join(words[i:]) for i in range(len(words)))
        name = next((tail for tail in tails if tail in known), None)
        return known[name] if name is not None and leaf.shape == shapes[name] else PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(mesh: Mesh, specs: PyTree) -> PyTree:
    """The partitions as shardings on a mesh."""
    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def constrainer(mesh: Mesh | AbstractMesh, rules: Rules = Rules()) -> Callable[[jax.Array, Logical], jax.Array]:
    """`constrain(x, logical_axes)` that tells the compiler where an activation lies (inside jit, outside shard_map).

    Given to a model's block edges, it leaves the choice of collectives to the compiler: any model trains under a plan
    this way. The decoder's own way is explicit, see `sharding.tensor_parallel`.
    """

    def constrain(x: jax.Array, axes: Logical) -> jax.Array:
        spec = resolve(axes, x.shape, rules.compute, mesh.shape, f"activation {axes}")
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return constrain
