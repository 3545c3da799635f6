"""Merging of models whose parameters have equal shapes: weight averages, task vectors, SLERP, TIES, DARE.

`merge` takes whole trees of parameters; `moe.upcycle.merge` the experts of one layer; both merge leaf by leaf with the
same functions of one stacked array. Models that do not share a start are aligned first (`lottery.align`), or their
units do not correspond and the merged model computes nothing useful.

Axes: M models (or experts), S the axes of one tensor.

Example:
  >>> import jax.numpy as jnp
  >>> from moe import merging
  >>> base, code, prose = ({"kernel": jnp.full((2, 2), value)} for value in (1.0, 2.0, 4.0))
  >>> merging.merge([code, prose])["kernel"][0].tolist()  # a soup
  [3.0, 3.0]
  >>> merging.merge([code, prose], base, method="task", weights=[1.0, -1.0])["kernel"][0].tolist()  # forget the prose
  [-1.0, -1.0]
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

__all__ = ["Method", "dare", "merge", "merge_leaf", "slerp", "ties"]

Method = Literal["mean", "task", "slerp", "ties", "dare"]


def merge(
    trees: Sequence[PyTree],
    base: PyTree | None = None,
    *,
    method: Method = "mean",
    weights: Sequence[float] | Float[Any, " M"] | None = None,
    density: float = 0.2,
    scale: float = 1.0,
    key: Key[Array, ""] | None = None,
    tensor_axes: Callable[[str, Array], int] | None = None,
) -> PyTree:
    """Merge models of equal shapes into one.

    - "mean": weighted mean of the weights (model soup: Wortsman et al. 2022).
    - "task": base + scale * sum of weights * (model - base) (task arithmetic: Ilharco et al. 2023); a negative weight
      takes a task away.
    - "slerp": spherical interpolation, model after model (Shoemake 1985).
    - "ties": base + scale * the differences from it, trimmed to their largest `density`, one sign elected per entry,
      and those of that sign averaged by weight (Yadav et al. 2023).
    - "dare": base + scale * the weighted mean of the differences, of which a random `density` is left and scaled up by
      its inverse (Yu et al. 2024).

    The arithmetic is float32 and the result has the first model's dtypes. Leaves of integers are the first model's.

    Args:
      trees: parameters of at least two models (one is enough for "task").
      base: of the model that all were trained from; for "task", "ties" and "dare".
      method: see above.
      weights: of the models; equal if None. Scaled to sum to one, but for "task", where None means 1 each.
      density: share of entries that "ties" and "dare" leave.
      scale: factor on the merged difference.
      key: for "dare".
      tensor_axes: path, leaf -> how many trailing axes are one tensor for "slerp" and "ties"; the axes in front (layers
        of a scanned stack) are merged each by itself. None takes a leaf as one tensor.

    Raises:
      ValueError: trees that differ in paths or shapes (the first one is named), an unknown method, a missing base or
        key, invalid weights, density outside (0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import merging
      >>> one, two = {"bias": jnp.array([1.0, 0.0])}, {"bias": jnp.array([0.0, 1.0])}
      >>> merging.merge([one, two], method="slerp")["bias"].round(3).tolist()
      [0.707, 0.707]
    """
    trees = list(trees)
    check_method(method, base is not None, key is not None, density)
    if len(trees) < (1 if method == "task" else 2):
        raise ValueError(f"merge: {len(trees)} models; {method} needs at least {1 if method == 'task' else 2}")
    for i, tree in enumerate([*trees[1:], *([] if base is None else [base])]):
        name = "the base" if i == len(trees) - 1 else f"model {i + 1}"
        _check_equal(trees[0], tree, name)
    if method == "task":
        weights_M = _weights(jnp.ones(len(trees)) if weights is None else weights, len(trees), "models")
    else:
        weights_M = unit_weights(weights, len(trees), "models")
    paths, leaves = zip(*jax.tree.leaves_with_path(trees[0]), strict=True)
    others = [jax.tree.leaves(tree) for tree in trees]
    starts = [None] * len(leaves) if base is None else jax.tree.leaves(base)
    merged = []
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            merged.append(leaf)
            continue
        stack = jnp.stack([jnp.asarray(tree[i], jnp.float32) for tree in others])
        start = None if starts[i] is None else jnp.asarray(starts[i], jnp.float32)
        own = None if key is None else jax.random.fold_in(key, i)
        ends = leaf.ndim if tensor_axes is None else tensor_axes(_name(path), leaf)
        settings: dict[str, Any] = {"method": method, "density": density, "scale": scale, "key": own, "ends": ends}
        merged.append(merge_leaf(stack, start, weights_M, **settings).astype(leaf.dtype))
    return jax.tree.unflatten(jax.tree.structure(trees[0]), merged)


def check_method(method: str, has_base: bool, has_key: bool, density: float) -> None:
    """Check what a method needs.

    Raises:
      ValueError: an unknown method, a missing base or key, density outside (0, 1].
    """
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}: choose one of {', '.join(get_args(Method))}")
    if method in ("task", "ties", "dare") and not has_base:
        raise ValueError(f"{method} merges differences from the model that all started from: pass base=")
    if method == "dare" and not has_key:
        raise ValueError("dare drops entries at random: pass key=")
    if not 0 < density <= 1:
        raise ValueError(f"density={density} must be in (0, 1]")


def unit_weights(weights: Any, count: int, what: str) -> Float[Array, " M"]:
    """Scale weights to sum to one; equal ones for None.

    Raises:
      ValueError: another number of weights, a negative one, or all zero.
    """
    weights_M = _weights(jnp.ones(count) if weights is None else weights, count, what)
    if not bool((weights_M >= 0).all() & (weights_M.sum() > 0)):
        raise ValueError(f"weights of the {count} {what} must be {count} numbers, none negative, not all zero")
    return weights_M / weights_M.sum()


def _weights(weights: Any, count: int, what: str) -> Float[Array, " M"]:
    weights_M = jnp.asarray(weights, jnp.float32)
    if weights_M.shape != (count,) or not bool(jnp.isfinite(weights_M).all()):
        raise ValueError(f"weights of the {count} {what} must be {count} numbers")
    return weights_M


def merge_leaf(
    stack: Float[Array, " M *S"],
    base: Float[Array, "*S"] | None,
    weights_M: Float[Array, " M"],
    *,
    method: Method,
    density: float,
    scale: float,
    key: Key[Array, ""] | None,
    ends: int,
) -> Float[Array, "*S"]:
    """Merge one parameter of all models; arguments as for `merge`, weights as they are used.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe.merging import merge_leaf
      >>> how = {"method": "ties", "density": 0.5, "scale": 1.0, "key": None, "ends": 1}
      >>> merge_leaf(jnp.array([[3.0, 1.0], [5.0, 0.0]]), jnp.zeros(2), jnp.array([0.5, 0.5]), **how).tolist()
      [4.0, 0.0]
    """
    if method == "mean":
        return jnp.tensordot(weights_M, stack, 1)
    if method == "slerp":
        return slerp(stack, weights_M, ends)
    assert base is not None
    deltas = stack - base[None]
    if method == "task":
        return base + scale * jnp.tensordot(weights_M, deltas, 1)
    if method == "ties":
        return base + scale * ties(deltas, density, ends, weights_M)
    assert key is not None
    return base + scale * jnp.tensordot(weights_M, dare(deltas, density, key=key), 1)


def slerp(stack: Float[Array, " M *S"], weights_M: Float[Array, " M"], ends: int = 2) -> Float[Array, "*S"]:
    """Interpolate spherically (SLERP: Shoemake 1985), each model towards the next by its share of the weight so far.

    a sin((1 - t) angle) / sin(angle) + b sin(t angle) / sin(angle), the angle that of the directions. The last `ends`
    axes are one vector; vectors with a cosine beyond .9995 are interpolated linearly (both as mergekit).

    Example:
      >>> import jax.numpy as jnp
      >>> from moe.merging import slerp
      >>> slerp(jnp.eye(2), jnp.array([0.5, 0.5]), ends=1).round(3).tolist()
      [0.707, 0.707]
    """
    axes = tuple(range(-ends, 0))

    def unit(x):
        norm = jnp.sqrt(jnp.square(x).sum(axes, keepdims=True))
        return x / jnp.where(norm > 1e-8, norm, 1.0)

    total, merged = weights_M[0], stack[0]
    for i in range(1, stack.shape[0]):
        total = total + weights_M[i]
        t = weights_M[i] / jnp.maximum(total, 1e-20)
        cosine = jnp.clip((unit(merged) * unit(stack[i])).sum(axes, keepdims=True), -1.0, 1.0)
        linear = jnp.abs(cosine) > 0.9995
        angle = jnp.arccos(jnp.where(linear, 0.0, cosine))
        first = jnp.where(linear, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle))
        merged = first * merged + jnp.where(linear, t, jnp.sin(t * angle) / jnp.sin(angle)) * stack[i]
    return merged


def ties(
    deltas: Float[Array, " M *S"], density: float, ends: int = 2, weights_M: Float[Array, " M"] | None = None
) -> Float[Array, "*S"]:
    """Trim, elect signs and merge (TIES: Yadav et al. 2023, algorithm 1, without its scale).

    Each difference is trimmed to the int(density n) largest of its n entries (the last `ends` axes; at least one), and
    ties with these. The sign with the larger weighted sum wins, and the entries of that sign are averaged by weight.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe.merging import ties
      >>> ties(jnp.array([[3.0, -1.0], [-2.0, -4.0]]), 1.0, ends=1).tolist()
      [3.0, -2.5]
    """
    n = math.prod(deltas.shape[deltas.ndim - ends :])
    flat = jnp.abs(deltas).reshape(*deltas.shape[: deltas.ndim - ends], n)
    smallest = jax.lax.top_k(flat, max(1, int(density * n)))[0][..., -1]
    threshold = smallest.reshape(*smallest.shape, *(1,) * ends)
    trimmed = jnp.where(jnp.abs(deltas) >= threshold, deltas, 0)
    weights_M = jnp.ones(len(deltas)) if weights_M is None else weights_M
    weights = weights_M.reshape(-1, *(1,) * (deltas.ndim - 1))
    sign = jnp.sign((weights * trimmed).sum(0))
    agree = (jnp.sign(trimmed) == sign[None]) & (trimmed != 0)
    total = (weights * agree).sum(0)
    return jnp.where(agree, weights * trimmed, 0).sum(0) / jnp.where(total == 0, 1, total)


def dare(deltas: Float[Array, " M *S"], density: float, *, key: Key[Array, ""]) -> Float[Array, " M *S"]:
    """Drop entries at random and scale up the rest (DARE: Yu et al. 2024, eq. 4-5 with drop rate 1 - density).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from moe.merging import dare
      >>> sorted({*dare(jnp.ones((1, 100)), 0.25, key=jax.random.key(0))[0].tolist()})
      [0.0, 4.0]
    """
    return jnp.where(jax.random.bernoulli(key, density, deltas.shape), deltas / density, 0)


def _check_equal(one: PyTree, other: PyTree, name: str) -> None:
    shapes = [{_name(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(tree)} for tree in (one, other)]
    wrong = [path for path in shapes[0] | shapes[1] if shapes[0].get(path) != shapes[1].get(path)]
    if wrong:
        there, here = (found.get(wrong[0], "nothing") for found in shapes)
        raise ValueError(f"{wrong[0]}: {there} in the first model, {here} in {name}; {len(wrong)} leaves differ")


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
