"""Pruning criteria: a score for each weight, a tree of float32 arrays like the parameters; the lowest are pruned.

Losses are functions loss_fn(params, batch) -> float32 []; `batches` is a pytree whose arrays have a leading axis of
batches, scanned, so any number of them costs the memory of one.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from lottery import structures
from lottery.masks import path_name

LossFn = Callable[[PyTree, PyTree], Array]


def magnitude(params: PyTree) -> PyTree:
    """Absolute values in float32 (Frankle & Carbin 2019, section 2)."""
    return jax.tree.map(lambda p: jnp.abs(_f32(p)), params)


def random(params: PyTree, *, key: Array) -> PyTree:
    """Uniform scores in [0, 1), float32: random pruning as a control. Each leaf's draw depends on key and its path."""

    def draw(path: tuple, leaf: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, zlib.crc32(path_name(path).encode())), leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, params)


def magnitude_increase(params: PyTree, initial: PyTree) -> PyTree:
    """|w_final| - |w_initial| (Zhou et al. 2019, arXiv:1905.01067, section 3)."""
    return jax.tree.map(lambda w, i: _f32(jnp.abs(w)) - _f32(jnp.abs(i)), params, initial)


def snip(loss_fn: LossFn, params: PyTree, batches: PyTree) -> PyTree:
    """|w * mean gradient| (Lee et al. 2019, arXiv:1810.02340, equation 6, not normalised by its sum)."""
    return jax.tree.map(lambda w, g: jnp.abs(_f32(w) * g), params, mean_gradient(loss_fn, params, batches))


def taylor(loss_fn: LossFn, params: PyTree, batches: PyTree) -> PyTree:
    """(w g)^2 averaged over batches: first-order change of the loss, squared (Molchanov et al. 2019, equation 8)."""
    return _mean(lambda batch: _products(params, jax.grad(loss_fn)(params, batch)), batches)


def fisher(loss_fn: LossFn, params: PyTree, batches: PyTree) -> PyTree:
    """w^2 / 2 times the mean squared gradient (Theis et al. 2018, arXiv:1801.05787, equation 9).

    With batches of one example the mean is the empirical Fisher information's diagonal; larger ones understate it.
    """
    squares = _mean(lambda batch: jax.tree.map(lambda g: _f32(g) ** 2, jax.grad(loss_fn)(params, batch)), batches)
    return jax.tree.map(lambda w, f: 0.5 * _f32(w) ** 2 * f, params, squares)


def grasp(loss_fn: LossFn, params: PyTree, batches: PyTree) -> PyTree:
    """w * (H g), H the Hessian and g the gradient of the mean loss (Wang et al. 2020, arXiv:2002.07376, equation 8).

    The paper removes the highest -w * (H g), so that the gradient's norm falls least; the lowest here are the same.
    Their loss divides logits by a temperature of 200; that belongs into loss_fn.
    """
    gradient = jax.tree.map(lambda g, w: g.astype(w.dtype), mean_gradient(loss_fn, params, batches), params)

    def product(batch: PyTree) -> PyTree:
        return jax.jvp(lambda p: jax.grad(loss_fn)(p, batch), (params,), (gradient,))[1]

    return jax.tree.map(lambda w, hg: _f32(w) * hg, params, _mean(product, batches))


def synflow(
    apply_fn: Callable[[PyTree, Array], Array], params: PyTree, inputs: Array, normalise: bool = True
) -> PyTree:
    """|w| dR/d|w| with R the sum of the outputs at absolute weights and all-one inputs (Tanaka et al. 2020, 4).

    No data: of `inputs` only shape and dtype count. Score masked params; prune in many rounds (`prune.iterate`, the
    paper takes 100).

    Args:
      normalise: first rescale every matrix (`structures.LAYOUTS` tells stacks of them) so that a hundred layers stay
        within float32 and R is near 1. Where R is homogeneous in each matrix (ReLU without biases or skips, what the
        paper assumes) this multiplies all scores by one common factor; for networks with skips switch it off.
    """
    ones = jnp.ones_like(inputs)
    absolute = jax.tree.map(lambda leaf: jnp.abs(_f32(leaf)), params)

    def total(p: PyTree) -> Array:
        return jnp.sum(apply_fn(p, ones).astype(jnp.float32))

    if normalise:
        absolute = jax.tree_util.tree_map_with_path(_by_gain, absolute)
        stacks = [_matrices(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(absolute)]
        flow = total(absolute)
        # What is left after the mean gains, spread evenly over the matrices.
        rest = jnp.where((flow > 0) & jnp.isfinite(flow), flow, 1.0) ** (-1 / max(sum(stacks), 1))
        absolute = jax.tree_util.tree_map_with_path(lambda p, w: w * rest if _matrices(p, w) else w, absolute)
    return jax.tree.map(jnp.multiply, absolute, jax.grad(total)(absolute))


def _matrices(path: tuple, leaf: Array) -> int:
    """How many matrices a leaf stacks; 0 for vectors."""
    layout = structures.layout(path_name(path))
    return layout.matrices(leaf.shape)[0] if leaf.ndim > layout.batch + layout.outputs else 0


def _by_gain(path: tuple, leaf: Array) -> Array:
    """Nonnegative matrices divided by their mean column sum over columns that are not empty."""
    if not _matrices(path, leaf):
        return leaf
    layout = structures.layout(path_name(path))
    columns = leaf.reshape(layout.matrices(leaf.shape)).sum(1)
    gain = columns.sum(-1) / jnp.maximum((columns > 0).sum(-1), 1)
    gain = gain.reshape(leaf.shape[: layout.batch] + (1,) * (leaf.ndim - layout.batch))
    return leaf / jnp.where(gain > 0, gain, 1)


class MovementState(NamedTuple):
    """Scores so far, float32, like the parameters."""

    scores: PyTree


def track_movement() -> optax.GradientTransformation:
    """Leave updates alone and add up -w * g, movement pruning's score (Sanh et al. 2020, arXiv:2005.07683, equation 5).

    Put it first in a chain, where updates still are gradients; read the scores with `movement`.
    """

    def init(params: PyTree) -> MovementState:
        return MovementState(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))

    def update(updates: PyTree, state: MovementState, params: PyTree | None = None) -> tuple[PyTree, MovementState]:
        if params is None:
            raise ValueError("track_movement: update needs params, the score is a product with them")
        added = jax.tree.map(lambda s, w, g: s - _f32(w) * _f32(g), state.scores, params, updates)
        return updates, MovementState(added)

    return optax.GradientTransformation(init, update)


def movement(opt_state: PyTree) -> PyTree:
    """The scores of the `track_movement` in an optimizer state.

    Raises:
      ValueError: there is none.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, MovementState))
    found = [leaf for leaf in leaves if isinstance(leaf, MovementState)]
    if not found:
        raise ValueError("this optimizer state has no movement scores: chain track_movement() before the optimizer")
    return found[0].scores


@dataclass(frozen=True)
class Evidence:
    """What criteria may look at beside the weights; each takes what it needs.

    Attributes:
      key: for random scores.
      initial: weights before training.
      loss_fn, batches: see the module.
      apply_fn: (params, inputs) -> outputs.
      inputs: an array with the shape and dtype of one batch of inputs.
      opt_state: of an optimizer with `track_movement`.
    """

    key: Array | None = None
    initial: PyTree | None = None
    loss_fn: LossFn | None = None
    batches: PyTree | None = None
    apply_fn: Callable[[PyTree, Array], Array] | None = None
    inputs: Array | None = None
    opt_state: PyTree | None = None


CRITERIA: dict[str, tuple[Callable[[PyTree, Any], PyTree], tuple[str, ...]]] = {
    "magnitude": (lambda params, e: magnitude(params), ()),
    "random": (lambda params, e: random(params, key=e.key), ("key",)),
    "magnitude_increase": (lambda params, e: magnitude_increase(params, e.initial), ("initial",)),
    "snip": (lambda params, e: snip(e.loss_fn, params, e.batches), ("loss_fn", "batches")),
    "taylor": (lambda params, e: taylor(e.loss_fn, params, e.batches), ("loss_fn", "batches")),
    "fisher": (lambda params, e: fisher(e.loss_fn, params, e.batches), ("loss_fn", "batches")),
    "grasp": (lambda params, e: grasp(e.loss_fn, params, e.batches), ("loss_fn", "batches")),
    "synflow": (lambda params, e: synflow(e.apply_fn, params, e.inputs), ("apply_fn", "inputs")),
    "movement": (lambda params, e: movement(e.opt_state), ("opt_state",)),
}


def score(name: str, params: PyTree, evidence: Evidence = Evidence()) -> PyTree:
    """Scores by the criterion of a name in CRITERIA, which also lists what it needs of the evidence.

    Raises:
      ValueError: unknown name, or evidence that is missing.
    """
    if name not in CRITERIA:
        raise ValueError(f"criterion {name!r} is not one of {', '.join(CRITERIA)}")
    function, needs = CRITERIA[name]
    missing = [field for field in needs if getattr(evidence, field) is None]
    if missing:
        raise ValueError(f"criterion {name!r} needs Evidence({', '.join(missing)})")
    return function(params, evidence)


def mean_gradient(loss_fn: LossFn, params: PyTree, batches: PyTree) -> PyTree:
    """The loss's gradient averaged over batches, float32."""
    return _mean(lambda batch: jax.grad(loss_fn)(params, batch), batches)


def _f32(x: Array) -> Array:
    return x.astype(jnp.float32)


def _products(params: PyTree, grads: PyTree) -> PyTree:
    return jax.tree.map(lambda w, g: (_f32(w) * _f32(g)) ** 2, params, grads)


def _mean(function: Callable[[PyTree], PyTree], batches: PyTree) -> PyTree:
    """Mean of function(batch) over the leading axis, summed in float32."""
    n = len(jax.tree.leaves(batches)[0])
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], batches))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)

    def step(total: PyTree, batch: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(lambda t, x: t + _f32(x), total, function(batch)), None

    return jax.tree.map(lambda total: total / n, jax.lax.scan(step, zero, batches)[0])
