"""Pruning masks: pytrees of bool arrays with exactly the parameters' structure and shapes; True keeps a weight.

Leaves that are not prunable (biases, norms, embeddings by `DEFAULT_RULES`) have masks too, always all True, so that a
mask tree can be used in `jax.tree.map` with the parameters, gradients or moments without special cases.
"""

import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from lottery import counting, structures

__all__ = [
    "DEFAULT_RULES",
    "apply",
    "check",
    "check_zeros",
    "count",
    "density",
    "distance",
    "flatten",
    "map_layers",
    "match_paths",
    "ones",
    "path_name",
    "prunable",
    "random_like",
    "support",
]


Rules = Sequence[tuple[str, bool]]
# First match wins; what no rule matches is not prunable. Matched against '/'-joined paths. A head that is not the
# embedding's transpose stays whole like the embedding (as in Wanda and SparseGPT). NNX's leaves end in "/value".
DEFAULT_RULES: Rules = (
    (r"(^|/)[^/]*embed[^/]*/", False),
    (r"(^|/)(lm_)?head/", False),
    (r"(^|/)kernel(/value)?$", True),
)


def path_name(path: tuple) -> str:
    """Write a JAX key path as text.

    Example:
      >>> lottery.masks.path_name((jax.tree_util.DictKey("dense0"), jax.tree_util.DictKey("kernel")))
      'dense0/kernel'
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: PyTree) -> dict[str, Any]:
    """List the leaves of a tree by '/'-joined path, in the tree's order.

    Raises:
      ValueError: two leaves have one path, {"a/b": ..., "a": {"b": ...}}.

    Example:
      >>> lottery.masks.flatten({"dense0": {"kernel": 1, "bias": 2}})
      {'dense0/bias': 2, 'dense0/kernel': 1}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = {path_name(path): leaf for path, leaf in leaves}
    if len(found) < len(leaves):
        names = [path_name(path) for path, _ in leaves]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two leaves have the path {twice}: a key with '/' in it; rename one")
    return found


def prunable(params: PyTree, rules: Rules = (), layouts: structures.Layouts = ()) -> PyTree:
    """Choose the leaves that may be pruned: a static tree with the structure of params, False, True or a `Layout`.

    Args:
      params: one network's parameters (not a stack), arrays or jax.ShapeDtypeStruct.
      rules: (regular expression, prunable?) pairs searched in each leaf's '/'-joined path; the first match wins, then
        the default: leaves called "kernel" with two or more dimensions, except embeddings and heads (`DEFAULT_RULES`).
        An explicit rule holds for leaves of any rank.
      layouts: (regular expression, `structures.Layout`) pairs, before those of `structures.LAYOUTS`: what the axes of
        one's own leaves mean. A leaf they match is prunable by default too, whatever its name, except embeddings, heads
        and norms, and carries its layout in the result. `structures.EQUINOX` and `structures.HAIKU` are such tables.

    Raises:
      ValueError: a rule that matches no leaf (a typing error otherwise prunes nothing, silently), or nothing prunable.

    Example:
      >>> params = {"dense0": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
      >>> lottery.masks.prunable(params)
      {'dense0': {'bias': False, 'kernel': True}}
      >>> lottery.masks.prunable(params, (("bias", True),))
      {'dense0': {'bias': True, 'kernel': True}}
      >>> haiku = {"linear": {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}}
      >>> lottery.masks.prunable(haiku, layouts=lottery.structures.HAIKU)["linear"]["w"].matrices((4, 3))
      (1, 4, 3)
    """
    paths = list(flatten(params))
    for pattern, _ in rules:
        match_paths(pattern, paths, "rule")
    for pattern, _ in layouts:
        match_paths(pattern, [path.removesuffix("/value") for path in paths], "layout")

    def decide(path: tuple, leaf: Any) -> bool | structures.Layout:
        name = path_name(path)
        found = next((layout for pattern, layout in layouts if re.search(pattern, name.removesuffix("/value"))), None)
        known = next((keep for pattern, keep in rules if re.search(pattern, name)), None)
        if known is None:
            default = DEFAULT_RULES if found is None else (*DEFAULT_RULES, (r"norm[^/]*/", False), ("", True))
            axes = leaf.ndim - (found.batch if found else 0)
            known = axes >= 2 and next((keep for pattern, keep in default if re.search(pattern, name)), False)
        return (found.fit(leaf.ndim) if found else True) if known else False

    which = jax.tree_util.tree_map_with_path(decide, params)
    if not any(jax.tree.leaves(which)):
        raise ValueError(f"no parameter is prunable under the rules {tuple(rules)}; parameters: {', '.join(paths)}")
    return which


def map_layers(
    f: Callable[..., Array], tree: PyTree, *rest: PyTree, which: PyTree | None = None, key: Array | None = None
) -> PyTree:
    """Map f(layer, *layers of rest) over the layers of every leaf, see `structures.layers`.

    A scanned model's leaves are cut along their stacked axes, and f sees what it would see of a model without scan.

    Args:
      f: of arrays without the stacked axes, to an array of any shape; mapped over a stack by vmap.
      tree: arrays, of one network.
      rest: trees like it.
      which: `prunable`, where its layouts matter.
      key: if given, f is called as f(key of the layer, ...); it depends on this key and the layer's name only.

    Example:
      >>> params = {"blocks": {"up": {"kernel": jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])}}}
      >>> lottery.masks.map_layers(jnp.max, params)["blocks"]["up"]["kernel"].tolist()
      [2.0, 4.0]
    """
    chosen = {} if which is None else flatten(which)

    def at(path: tuple, leaf: Array, *others: Array) -> Array:
        name = path_name(path)
        names = structures.layers(name, leaf.shape, chosen.get(name) or True)
        batch = structures.layout(name, leaf.shape, chosen.get(name) or True).batch
        codes = np.asarray([zlib.crc32(layer.encode()) for layer in names], np.uint32)
        keys = () if key is None else (jax.vmap(lambda code: jax.random.fold_in(key, code))(codes),)
        if not batch:
            return f(*(k[0] for k in keys), leaf, *others)
        stacked = jax.vmap(f)(*keys, *(x.reshape(-1, *x.shape[batch:]) for x in (leaf, *others)))
        return stacked.reshape(*leaf.shape[:batch], *stacked.shape[1:])

    return jax.tree_util.tree_map_with_path(at, tree, *rest)


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
    """Count the unpruned weights of every prunable layer by name (`structures.layers`), int32 [] each.

    Works under jit and vmap (`which` is static).

    Example:
      >>> lottery.masks.count({"kernel": jnp.array([True, False, True])}, {"kernel": True})
      {'kernel': Array(2, dtype=int32)}
    """
    result: dict[str, Array] = {}
    leaves = flatten(masks)
    for path, chosen in flatten(which).items():
        if chosen:
            mask = leaves[path]
            names = structures.layers(path, mask.shape, chosen)
            result |= zip(names, jnp.sum(mask.reshape(len(names), -1), axis=1, dtype=jnp.int32), strict=True)
    return result


def density(masks: PyTree, which: PyTree) -> Float[Array, ""]:
    """Compute the density, the fraction of prunable weights that are not pruned, float32 []; sparsity is 1 - density.

    Example:
      >>> float(lottery.masks.density({"kernel": jnp.array([True, False, True, False])}, {"kernel": True}))
      0.5
    """
    return _share([m for m, keep in zip(jax.tree.leaves(masks), jax.tree.leaves(which), strict=True) if keep])


def _share(flags: Sequence[Array]) -> Array:
    """The fraction that is True, float32 []; the sums along one axis never leave int32."""
    sums = [jnp.sum(jnp.atleast_1d(x), axis=-1, dtype=jnp.int32) for x in flags]
    return counting.as_float(counting.total(sums)) / float(sum(x.size for x in flags))


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
        if wrong.any():
            raise ValueError(f"{path}: {wrong.sum(dtype=np.int64)} pruned weights are not zero")


@jax.jit
def _violations(params: PyTree, masks: PyTree) -> PyTree:
    return jax.tree.map(lambda p, m: jnp.sum(jnp.atleast_1d((p != 0) & ~m), axis=-1, dtype=jnp.int32), params, masks)


def support(params: PyTree, which: PyTree | None = None) -> PyTree:
    """Find the masks of weights that are not zero; leaves that are not prunable are all True.

    Args:
      params: of a pruned network.
      which: `prunable`; None takes its default.

    Example:
      >>> params = {"dense0": {"kernel": jnp.array([[0.0, 2.0]]), "bias": jnp.zeros(2)}}
      >>> jax.tree.map(lambda m: m.tolist(), lottery.masks.support(params))
      {'dense0': {'bias': [True, True], 'kernel': [[False, True]]}}
    """
    which = prunable(params) if which is None else which
    return jax.tree.map(lambda w, leaf: leaf != 0 if w else jnp.ones(leaf.shape, bool), which, params)


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
    return _share([x != y for x, y, keep in triples if keep])


def random_like(masks: PyTree, which: PyTree | None = None, *, key: Array) -> PyTree:
    """Draw random masks with exactly the same number of True in every layer: each layer's entries permuted uniformly.

    A layer's permutation depends on the key and its own name only, not on which other layers there are.

    Args:
      masks: of one network.
      which: `prunable`, where its layouts matter.
      key: of the permutations.

    Example:
      >>> masks = {"kernel": jnp.array([True, True, False, False, False])}
      >>> int(lottery.masks.random_like(masks, key=jax.random.key(0))["kernel"].sum())
      2
    """
    permute = lambda key, mask: jax.random.permutation(key, mask.ravel()).reshape(mask.shape)  # noqa: E731
    return map_layers(permute, masks, which=which, key=key)
