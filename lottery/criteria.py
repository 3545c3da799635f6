"""Pruning criteria: a score for each weight, a tree of float32 arrays like the parameters; the lowest are pruned.

`CRITERIA` lists them by name with the fields of `ScoreInputs` that each needs. Losses are functions
loss_fn(params, batch) -> float32 []; `batches` is a pytree whose arrays have a leading axis of batches, scanned, so any
number of them costs the memory of one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from lottery import structures
from lottery.masks import flatten, map_layers, path_name

__all__ = [
    "CRITERIA",
    "MovementState",
    "ScoreInputs",
    "fisher",
    "grasp",
    "magnitude",
    "magnitude_increase",
    "mean_gradient",
    "movement",
    "random",
    "score",
    "snip",
    "synflow",
    "taylor",
    "track_movement",
]


LossFn = Callable[[PyTree, PyTree], Array]


def magnitude(params: PyTree) -> PyTree:
    """Score weights by magnitude, |w|, float32 (Han et al. 2015, arXiv:1506.02626).

    Example:
      >>> lottery.criteria.magnitude({"kernel": jnp.array([-2.0, 0.5])})["kernel"].tolist()
      [2.0, 0.5]
    """
    # Of complex weights the modulus, which is lost if they are made real first.
    return jax.tree.map(lambda p: jnp.abs(p if jnp.iscomplexobj(p) else _f32(p)).astype(jnp.float32), params)


def random(params: PyTree, *, key: Array) -> PyTree:
    """Score weights at random, uniformly in [0, 1), float32: random pruning as a control.

    Each layer's draw depends on key and its name (`structures.layers`).

    Example:
      >>> scores = lottery.criteria.random({"kernel": jnp.zeros((2, 3))}, key=jax.random.key(0))
      >>> scores["kernel"].shape, bool((scores["kernel"] < 1).all())
      ((2, 3), True)
    """

    return map_layers(lambda key, leaf: jax.random.uniform(key, leaf.shape), params, key=key)


def magnitude_increase(params: PyTree, initial: PyTree) -> PyTree:
    """Score weights by magnitude increase, |w_final| - |w_initial| (Zhou et al. 2019, arXiv:1905.01067, section 3).

    Example:
      >>> final, initial = {"kernel": jnp.array([-2.0, 0.5])}, {"kernel": jnp.array([1.0, 1.0])}
      >>> lottery.criteria.magnitude_increase(final, initial)["kernel"].tolist()
      [1.0, -0.5]
    """
    return jax.tree.map(lambda w, i: _f32(jnp.abs(w)) - _f32(jnp.abs(i)), params, initial)


def snip(loss_fn: LossFn, params: PyTree, batches: PyTree) -> PyTree:
    """Score weights by SNIP's connection sensitivity, |w * mean gradient| (Lee et al. 2019, arXiv:1810.02340).

    Equation 6, not normalized by its sum.

    Example:
      >>> loss_fn = lambda params, x: jnp.mean((x @ params["kernel"]) ** 2)
      >>> params, batches = {"kernel": jnp.array([[1.0], [2.0]])}, jnp.eye(2)[None]
      >>> lottery.criteria.snip(loss_fn, params, batches)["kernel"].tolist()
      [[1.0], [4.0]]
    """
    return jax.tree.map(lambda w, g: jnp.abs(_f32(w) * g), params, mean_gradient(loss_fn, params, batches))


def taylor(loss_fn: LossFn, params: PyTree, batches: PyTree) -> PyTree:
    """Score weights by the squared first-order Taylor term, the mean of (w g)^2 (Molchanov et al. 2019, equation 8).

    Example:
      >>> loss_fn = lambda params, x: jnp.mean((x @ params["kernel"]) ** 2)
      >>> params, batches = {"kernel": jnp.array([[1.0], [2.0]])}, jnp.eye(2)[None]
      >>> lottery.criteria.taylor(loss_fn, params, batches)["kernel"].tolist()
      [[1.0], [16.0]]
    """
    return _mean(lambda batch: _products(params, jax.grad(loss_fn)(params, batch)), batches)


def fisher(loss_fn: LossFn, params: PyTree, batches: PyTree) -> PyTree:
    """Score weights by Fisher pruning, w^2 / 2 times the mean squared gradient (Theis et al. 2018, arXiv:1801.05787).

    Equation 9. With batches of one example the mean is the empirical Fisher information's diagonal; larger ones
    understate it.

    Example:
      >>> loss_fn = lambda params, x: jnp.mean((x @ params["kernel"]) ** 2)
      >>> params, batches = {"kernel": jnp.array([[1.0], [2.0]])}, jnp.eye(2)[None]
      >>> lottery.criteria.fisher(loss_fn, params, batches)["kernel"].tolist()
      [[0.5], [8.0]]
    """
    squares = _mean(lambda batch: jax.tree.map(lambda g: _f32(g) ** 2, jax.grad(loss_fn)(params, batch)), batches)
    return jax.tree.map(lambda w, f: 0.5 * _f32(w) ** 2 * f, params, squares)


def grasp(loss_fn: LossFn, params: PyTree, batches: PyTree) -> PyTree:
    """Score weights by GraSP, w * (H g): Hessian times gradient of the loss (Wang et al. 2020, arXiv:2002.07376).

    The paper (equation 8) removes the highest -w * (H g), so that the gradient's norm falls least; the lowest here are
    the same. Its loss divides logits by a temperature of 200; that belongs into loss_fn.

    Example:
      >>> loss_fn = lambda params, x: jnp.mean((x @ params["kernel"]) ** 2)
      >>> params, batches = {"kernel": jnp.array([[1.0], [2.0]])}, jnp.eye(2)[None]
      >>> lottery.criteria.grasp(loss_fn, params, batches)["kernel"].tolist()
      [[1.0], [4.0]]
    """
    gradient = jax.tree.map(lambda g, w: g.astype(w.dtype), mean_gradient(loss_fn, params, batches), params)

    def product(batch: PyTree) -> PyTree:
        return jax.jvp(lambda p: jax.grad(loss_fn)(p, batch), (params,), (gradient,))[1]

    return jax.tree.map(lambda w, hg: _f32(w) * hg, params, _mean(product, batches))


def synflow(
    apply_fn: Callable[[PyTree, Array], Array],
    params: PyTree,
    inputs: Array,
    normalize: bool = True,
    which: PyTree | None = None,
) -> PyTree:
    """Score weights by SynFlow, |w| dR/d|w| with R the sum of outputs at absolute weights and all-one inputs.

    Tanaka et al. 2020 (arXiv:2006.05467), section 4. No data: of `inputs` only shape and dtype count. Score masked
    params; prune in many rounds (`lottery.prune.iterate`, the paper takes 100).

    Args:
      apply_fn: (params, inputs) -> outputs.
      params: of one network.
      inputs: an array with the shape and dtype of one batch.
      normalize: first rescale every matrix (of every layer) so that a hundred layers stay
        within float32 and R is near 1. Where R is homogeneous in each matrix (ReLU without biases or skips, what the
        paper assumes) this multiplies all scores by one common factor; for networks with skips switch it off.
      which: `masks.prunable`, where its layouts matter.

    Example:
      >>> apply_fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.array([[1.0], [-2.0]])}
      >>> lottery.criteria.synflow(apply_fn, params, jnp.ones((1, 2)), normalize=False)["kernel"].tolist()
      [[1.0], [2.0]]
    """
    ones = jnp.ones_like(inputs)
    absolute = jax.tree.map(lambda leaf: jnp.abs(_f32(leaf)), params)

    def total(p: PyTree) -> Array:
        return jnp.sum(apply_fn(p, ones).astype(jnp.float32))

    if normalize:
        chosen = {} if which is None else flatten(which)
        by_path = jax.tree_util.tree_map_with_path
        layout = lambda path, w: structures.layout(path_name(path), w.shape, chosen.get(path_name(path)) or True)  # noqa: E731
        absolute = by_path(lambda path, w: _by_gain(w, layout(path, w)), absolute)
        stacks = by_path(lambda path, w: _matrices(w, layout(path, w)), absolute)
        flow = total(absolute)
        # What is left after the mean gains, spread evenly over the matrices.
        rest = jnp.where((flow > 0) & jnp.isfinite(flow), flow, 1.0) ** (-1 / max(sum(jax.tree.leaves(stacks)), 1))
        absolute = jax.tree.map(lambda w, stack: w * rest if stack else w, absolute, stacks)
    return jax.tree.map(jnp.multiply, absolute, jax.grad(total)(absolute))


def _matrices(leaf: Array, layout: structures.Layout) -> int:
    """How many matrices a leaf stacks; 0 for vectors."""
    return layout.matrices(leaf.shape)[0] if leaf.ndim > layout.batch + layout.outputs else 0


def _by_gain(leaf: Array, layout: structures.Layout) -> Array:
    """Nonnegative matrices divided by their mean column sum over columns that are not empty."""
    if not _matrices(leaf, layout):
        return leaf
    columns = structures.matrices(leaf, layout).sum(1)
    gain = columns.sum(-1) / jnp.maximum((columns > 0).sum(-1), 1)
    gain = gain.reshape(leaf.shape[: layout.batch] + (1,) * (leaf.ndim - layout.batch))
    return leaf / jnp.where(gain > 0, gain, 1)


class MovementState(NamedTuple):
    """The state of `track_movement`.

    Attributes:
      scores: so far, float32, like the parameters.

    Example:
      >>> lottery.criteria.track_movement().init({"kernel": jnp.ones(2)})
      MovementState(scores={'kernel': Array([0., 0.], dtype=float32)})
    """

    scores: PyTree


def track_movement() -> optax.GradientTransformation:
    """Track movement pruning's score, the sum of -w * g (Sanh et al. 2020, arXiv:2005.07683, equation 5).

    Updates are left alone. Put it first in a chain, where updates still are gradients; read the scores with `movement`.

    Example:
      >>> optimizer = optax.chain(lottery.criteria.track_movement(), optax.sgd(0.1))
      >>> params, gradient = {"kernel": jnp.array([2.0])}, {"kernel": jnp.array([-1.0])}
      >>> _, state = optimizer.update(gradient, optimizer.init(params), params)
      >>> lottery.criteria.movement(state)["kernel"].tolist()
      [2.0]
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
    """Read the movement scores of `track_movement` from an optimizer state.

    Raises:
      ValueError: there are none.

    Example:
      >>> optimizer = optax.chain(lottery.criteria.track_movement(), optax.adam(0.1))
      >>> lottery.criteria.movement(optimizer.init({"kernel": jnp.ones(2)}))["kernel"].tolist()
      [0.0, 0.0]
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, MovementState))
    found = [leaf for leaf in leaves if isinstance(leaf, MovementState)]
    if not found:
        raise ValueError("this optimizer state has no movement scores: chain track_movement() before the optimizer")
    return found[0].scores


@dataclass(frozen=True)
class ScoreInputs:
    """The inputs of criteria beside the weights; each criterion takes what it needs.

    Attributes:
      key: for random scores.
      initial: weights before training.
      loss_fn: (params, batch) -> loss, see the module.
      batches: of examples, see the module.
      apply_fn: (params, inputs) -> outputs.
      inputs: an array with the shape and dtype of one batch of inputs.
      opt_state: of an optimizer with `track_movement`.
      normalize: as of `synflow`: False for networks with skips.
      which: `masks.prunable`, where its layouts matter.

    Example:
      >>> inputs = lottery.criteria.ScoreInputs(key=jax.random.key(0))
      >>> lottery.criteria.score("random", {"kernel": jnp.zeros(3)}, inputs)["kernel"].shape
      (3,)
    """

    key: Array | None = None
    initial: PyTree | None = None
    loss_fn: LossFn | None = None
    batches: PyTree | None = None
    apply_fn: Callable[[PyTree, Array], Array] | None = None
    inputs: Array | None = None
    opt_state: PyTree | None = None
    normalize: bool = True
    which: PyTree | None = None


CRITERIA: dict[str, tuple[Callable[[PyTree, Any], PyTree], tuple[str, ...]]] = {
    "magnitude": (lambda params, e: magnitude(params), ()),
    "random": (lambda params, e: random(params, key=e.key), ("key",)),
    "magnitude_increase": (lambda params, e: magnitude_increase(params, e.initial), ("initial",)),
    "snip": (lambda params, e: snip(e.loss_fn, params, e.batches), ("loss_fn", "batches")),
    "taylor": (lambda params, e: taylor(e.loss_fn, params, e.batches), ("loss_fn", "batches")),
    "fisher": (lambda params, e: fisher(e.loss_fn, params, e.batches), ("loss_fn", "batches")),
    "grasp": (lambda params, e: grasp(e.loss_fn, params, e.batches), ("loss_fn", "batches")),
    "synflow": (lambda params, e: synflow(e.apply_fn, params, e.inputs, e.normalize, e.which), ("apply_fn", "inputs")),
    "movement": (lambda params, e: movement(e.opt_state), ("opt_state",)),
}


def score(name: str, params: PyTree, inputs: ScoreInputs = ScoreInputs()) -> PyTree:
    """Score weights by the criterion of a name in `CRITERIA`.

    Args:
      name: of the criterion.
      params: of one network.
      inputs: what `CRITERIA` lists for it.

    Raises:
      ValueError: unknown name, or inputs that are missing.

    Example:
      >>> lottery.criteria.score("magnitude", {"kernel": jnp.array([-3.0])})["kernel"].tolist()
      [3.0]
    """
    if name not in CRITERIA:
        raise ValueError(f"criterion {name!r} is not one of {', '.join(CRITERIA)}")
    function, needs = CRITERIA[name]
    missing = [field for field in needs if getattr(inputs, field) is None]
    if missing:
        raise ValueError(f"criterion {name!r} needs ScoreInputs({', '.join(missing)})")
    return function(params, inputs)


def mean_gradient(loss_fn: LossFn, params: PyTree, batches: PyTree) -> PyTree:
    """Average the loss's gradient over batches, float32.

    Example:
      >>> loss_fn = lambda params, x: jnp.mean((x @ params["kernel"]) ** 2)
      >>> params, batches = {"kernel": jnp.array([[1.0], [2.0]])}, jnp.eye(2)[None]
      >>> lottery.criteria.mean_gradient(loss_fn, params, batches)["kernel"].tolist()
      [[1.0], [2.0]]
    """
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
