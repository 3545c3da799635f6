"""Masks: pytrees of bool arrays with exactly the parameters' structure and shapes; True keeps a weight.

Leaves that are not prunable (biases, norms, embeddings by default) have masks too, always all True, so that a mask tree
can be used in `jax.tree.map` with the parameters, gradients or moments without special cases.
"""

import re
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

Rules = Sequence[tuple[str, bool]]
# First match wins; what no rule matches is not prunable. Matched against '/'-joined paths.
DEFAULT_RULES: Rules = ((r"(^|/)[^/]*embed[^/]*/", False), (r"(^|/)kernel$", True))


def path_name(path: tuple) -> str:
    """A jax key path as text: ('dense0', 'kernel') is "dense0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: PyTree) -> dict[str, Any]:
    """Leaves by '/'-joined path, in the tree's order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def prunable(params: PyTree, rules: Rules = ()) -> PyTree:
    """Which leaves may be pruned: a tree of Python bools with the structure of params.

    Args:
      params: one network's parameters (not a stack), arrays or jax.ShapeDtypeStruct.
      rules: (regular expression, prunable?) pairs searched in each leaf's '/'-joined path; the first match wins, then
        the default: leaves called "kernel" with two or more dimensions, except under an embedding. An explicit rule
        holds for leaves of any rank.

    Raises:
      ValueError: a rule that matches no leaf (a typing error otherwise prunes nothing, silently), or nothing prunable.
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
    """The paths a regular expression is found in. Raises ValueError naming the expression if there is none."""
    found = [path for path in paths if re.search(pattern, path)]
    if not found:
        raise ValueError(f"{what} {pattern!r} matches no parameter; parameters: {', '.join(paths)}")
    return found


def ones(params: PyTree) -> PyTree:
    """Masks that keep everything: bool leaves of the shapes of params."""
    return jax.tree.map(lambda p: jnp.ones(p.shape, jnp.bool_), params)


def apply(params: PyTree, masks: PyTree) -> PyTree:
    """params where the mask is True, exactly (positive) zero elsewhere, even where params is not finite."""
    return jax.tree.map(lambda p, m: jnp.where(m, p, jnp.zeros((), p.dtype)), params, masks)


def count(masks: PyTree, which: PyTree) -> dict[str, Array]:
    """Alive weights of every prunable leaf by path, int32 [] each. Works under jit and vmap (`which` is static)."""
    chosen = flatten(which)
    return {path: jnp.sum(mask, dtype=jnp.int32) for path, mask in flatten(masks).items() if chosen[path]}


def density(masks: PyTree, which: PyTree) -> Float[Array, ""]:
    """Fraction of all prunable weights that are alive, float32 []."""
    alive = sum(count(masks, which).values())
    total = sum(mask.size for path, mask in flatten(masks).items() if flatten(which)[path])
    return jnp.asarray(alive, jnp.float32) / total


def check(masks: PyTree, params: PyTree, which: PyTree | None = None) -> None:
    """Raise ValueError, naming the path, unless masks fits params.

    Same paths, same shapes, bool leaves; with `which` also: leaves that are not prunable are all True (this one looks
    at values, so it cannot run under jit).
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
    """Raise ValueError, naming the path and the count, unless params is exactly zero wherever masks is False."""
    check(masks, params)
    for path, wrong in flatten(jax.device_get(_violations(params, masks))).items():
        if wrong:
            raise ValueError(f"{path}: {int(wrong)} pruned weights are not zero")


@jax.jit
def _violations(params: PyTree, masks: PyTree) -> PyTree:
    return jax.tree.map(lambda p, m: jnp.sum((p != 0) & ~m, dtype=jnp.int32), params, masks)


def distance(a: PyTree, b: PyTree, which: PyTree | None = None) -> Float[Array, ""]:
    """Normalised Hamming distance of two mask trees, float32 []: the fraction of entries that differ.

    Over all leaves, or with `which` over the prunable ones only.
    """
    chosen = [True] * len(jax.tree.leaves(a)) if which is None else jax.tree.leaves(which)
    triples = zip(jax.tree.leaves(a), jax.tree.leaves(b), chosen, strict=True)
    pairs = [(x, y) for x, y, keep in triples if keep]
    differing = sum(jnp.sum(x != y, dtype=jnp.int32) for x, y in pairs)
    return jnp.asarray(differing, jnp.float32) / sum(x.size for x, _ in pairs)


def random_like(masks: PyTree, *, key: Array) -> PyTree:
    """Random masks with exactly the same number of True in every leaf: each leaf's entries permuted uniformly.

    A leaf's permutation depends on the key and its own path only, not on which other leaves there are.
    """

    def permute(path: tuple, mask: Bool[Array, "..."]) -> Bool[Array, "..."]:
        leaf_key = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
        return jax.random.permutation(leaf_key, mask.ravel()).reshape(mask.shape)

    return jax.tree_util.tree_map_with_path(permute, masks)
