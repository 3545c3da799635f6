"""Pruning masks: pytrees of bool arrays with exactly the parameters' structure and shapes; True keeps a weight.

Leaves that are not prunable (biases, norms, embeddings by `DEFAULT_RULES`) have masks too, always all True, so that a
mask tree can be used in `jax.tree.map` with the parameters, gradients or moments without special cases.
"""

import re
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

__all__ = [
    "DEFAULT_RULES",
    "apply",
    "check",
    "check_zeros",
    "count",
    "density",
    "distance",
    "flatten",
    "match_paths",
    "ones",
    "path_name",
    "prunable",
    "random_like",
]


Rules = Sequence[tuple[str, bool]]
# First match wins; what no rule matches is not prunable. Matched against '/'-joined paths.
DEFAULT_RULES: Rules = ((r"(^|/)[^/]*embed[^/]*/", False), (r"(^|/)kernel$", True))


def path_name(path: tuple) -> str:
    """Write a JAX key path as text.

    Example:
      >>> lottery.masks.path_name((jax.tree_util.DictKey("dense0"), jax.tree_util.DictKey("kernel")))
      'dense0/kernel'
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: PyTree) -> dict[str, Any]:
    """List the leaves of a tree by '/'-joined path, in the tree's order.

    Example:
      >>> lottery.masks.flatten({"dense0": {"kernel": 1, "bias": 2}})
      {'dense0/bias': 2, 'dense0/kernel': 1}
    """
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def prunable(params: PyTree, rules: Rules = ()) -> PyTree:
    """Choose the leaves that may be pruned: a tree of Python bools with the structure of params.

    Args:
      params: one network's parameters (not a stack), arrays or jax.ShapeDtypeStruct.
      rules: (regular expression, prunable?) pairs searched in each leaf's '/'-joined path; the first match wins, then
        the default: leaves called "kernel" with two or more dimensions, except under an embedding. An explicit rule
        holds for leaves of any rank.

    Raises:
      ValueError: a rule that matches no leaf (a typing error otherwise prunes nothing, silently), or nothing prunable.

    Example:
      >>> params = {"dense0": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
      >>> lottery.masks.prunable(params)
      {'dense0': {'bias': False, 'kernel': True}}
      >>> lottery.masks.prunable(params, (("bias", True),))
      {'dense0': {'bias': True, 'kernel': True}}
    """
    paths = list(flatten(params))
    for pattern, _ in rules:
        match_paths(pattern, paths, "rule")

    def decide(path: tuple, leaf: Any) -> bool:
        name = path_name(path)
        for pattern, keep in rules:
            if re.search(pattern, name):
                return bool(keep)
        default = next((keep for pattern, keep in DEFAULT_RULES if re.search(pattern, name)), False)
        return default and leaf.ndim >= 2

    which = jax.tree_util.tree_map_with_path(decide, params)
    if not any(jax.tree.leaves(which)):
        raise ValueError(f"no parameter is prunable under the rules {tuple(rules)}; parameters: {', '.join(paths)}")
    return which


def match_paths(pattern: str, paths: Sequence[str], what: str) -> list[str]:
    """Find the paths that a regular expression matches.

    Args:
      pattern: searched in every path.
      paths: '/'-joined.
      what: name of the pattern in the message.

    Raises:
      ValueError: there are none, naming the expression.

    Example:
      >>> lottery.masks.match_paths("^dense", ["dense0/kernel", "output/kernel"], "rule")
      ['dense0/kernel']
    """
    found = [path for path in paths if re.search(pattern, path)]
    if not found:
        raise ValueError(f"{what} {pattern!r} matches no parameter; parameters: {', '.join(paths)}")
    return found


def ones(params: PyTree) -> PyTree:
    """Make masks that keep everything: bool leaves of the shapes of params.

    Example:
      >>> lottery.masks.ones({"bias": jnp.zeros(2)})["bias"].tolist()
      [True, True]
    """
    return jax.tree.map(lambda p: jnp.ones(p.shape, jnp.bool_), params)


def apply(params: PyTree, masks: PyTree) -> PyTree:
    """Mask parameters: exactly (positive) zero where the mask is False, even where params is not finite.

    Example:
      >>> params, mask = {"kernel": jnp.array([1.0, jnp.nan])}, {"kernel": jnp.array([True, False])}
      >>> lottery.masks.apply(params, mask)["kernel"].tolist()
      [1.0, 0.0]
    """
    return jax.tree.map(lambda p, m: jnp.where(m, p, jnp.zeros((), p.dtype)), params, masks)


def count(masks: PyTree, which: PyTree) -> dict[str, Array]:
    """Count the unpruned weights of every prunable leaf by path, int32 [] each.

    Works under jit and vmap (`which` is static).

    Example:
      >>> lottery.masks.count({"kernel": jnp.array([True, False, True])}, {"kernel": True})
      {'kernel': Array(2, dtype=int32)}
    """
    chosen = flatten(which)
    return {path: jnp.sum(mask, dtype=jnp.int32) for path, mask in flatten(masks).items() if chosen[path]}


def density(masks: PyTree, which: PyTree) -> Float[Array, ""]:
    """Compute the density, the fraction of prunable weights that are not pruned, float32 []; sparsity is 1 - density.

    Example:
      >>> float(lottery.masks.density({"kernel": jnp.array([True, False, True, False])}, {"kernel": True}))
      0.5
    """
    alive = sum(count(masks, which).values())
    total = sum(mask.size for path, mask in flatten(masks).items() if flatten(which)[path])
    return jnp.asarray(alive, jnp.float32) / total


def check(masks: PyTree, params: PyTree, which: PyTree | None = None) -> None:
    """Check that masks fit params: same paths, same shapes, bool leaves.

    Args:
      masks: bool tree.
      params: parameters, arrays or shapes.
      which: `prunable`; then leaves that are not prunable must be all True (this looks at values, so it cannot run
        under jit).

    Raises:
      ValueError: they do not fit, naming the path.

    Example:
      >>> lottery.masks.check({"kernel": jnp.ones(3, bool)}, {"kernel": jnp.zeros(4)})
      Traceback (most recent call last):
      ValueError: masks: kernel has shape (3,), the parameter has (4,)
    """
    mine, theirs = flatten(masks), flatten(params)
    for path in [*theirs, *mine]:
        if path not in mine:
            raise ValueError(f"masks: no mask for parameter {path}; masks: {', '.join(mine)}")
        if path not in theirs:
            raise ValueError(f"masks: {path} is not a parameter; parameters: {', '.join(theirs)}")
        if mine[path].shape != theirs[path].shape:
            raise ValueError(f"masks: {path} has shape {mine[path].shape}, the parameter has {theirs[path].shape}")
        if mine[path].dtype != jnp.bool_:
            raise ValueError(f"masks: {path} has dtype {mine[path].dtype}, masks are bool")
    for path, chosen in flatten(which).items() if which is not None else ():
        if not chosen and not bool(jnp.all(mine[path])):
            raise ValueError(f"masks: {path} is not prunable, but its mask has zeros")


def check_zeros(params: PyTree, masks: PyTree) -> None:
    """Check that params is exactly zero wherever masks is False.

    Raises:
      ValueError: it is not, naming the path and how many weights.

    Example:
      >>> lottery.masks.check_zeros({"kernel": jnp.ones(3)}, {"kernel": jnp.array([True, False, False])})
      Traceback (most recent call last):
      ValueError: kernel: 2 pruned weights are not zero
    """
    check(masks, params)
    for path, wrong in flatten(jax.device_get(_violations(params, masks))).items():
        if wrong:
            raise ValueError(f"{path}: {int(wrong)} pruned weights are not zero")


@jax.jit
def _violations(params: PyTree, masks: PyTree) -> PyTree:
    return jax.tree.map(lambda p, m: jnp.sum((p != 0) & ~m, dtype=jnp.int32), params, masks)


def distance(a: PyTree, b: PyTree, which: PyTree | None = None) -> Float[Array, ""]:
    """Compute the normalized Hamming distance of two mask trees, float32 []: the fraction of entries that differ.

    Args:
      a: masks.
      b: masks.
      which: `prunable`: count these leaves only; None counts all.

    Example:
      >>> one, two = {"kernel": jnp.array([True, True])}, {"kernel": jnp.array([True, False])}
      >>> float(lottery.masks.distance(one, two))
      0.5
    """
    chosen = [True] * len(jax.tree.leaves(a)) if which is None else jax.tree.leaves(which)
    triples = zip(jax.tree.leaves(a), jax.tree.leaves(b), chosen, strict=True)
    pairs = [(x, y) for x, y, keep in triples if keep]
    differing = sum(jnp.sum(x != y, dtype=jnp.int32) for x, y in pairs)
    return jnp.asarray(differing, jnp.float32) / sum(x.size for x, _ in pairs)


def random_like(masks: PyTree, *, key: Array) -> PyTree:
    """Draw random masks with exactly the same number of True in every leaf: each leaf's entries permuted uniformly.

    A leaf's permutation depends on the key and its own path only, not on which other leaves there are.

    Example:
      >>> masks = {"kernel": jnp.array([True, True, False, False, False])}
      >>> int(lottery.masks.random_like(masks, key=jax.random.key(0))["kernel"].sum())
      2
    """

    def permute(path: tuple, mask: Bool[Array, "..."]) -> Bool[Array, "..."]:
        leaf_key = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
        return jax.random.permutation(leaf_key, mask.ravel()).reshape(mask.shape)

    return jax.tree_util.tree_map_with_path(permute, masks)
