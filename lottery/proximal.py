"""Sparsity by regularization: L1, group lasso and nuclear norm as proximal steps after any optax optimizer.

A penalty that is part of the loss shrinks weights but leaves none at zero; its proximal operator does (Parikh & Boyd
2014, section 6.5). `proximal` takes it after every step of an optimizer, so weights or whole units are exactly zero
during training, and come back where the loss asks for them: no mask, no criterion, no schedule. What is zero at the end
is a mask, `lottery.masks.support`.

Example:
  >>> params = {"dense0": {"kernel": jnp.array([[0.5, -0.02], [0.01, -1.0]])}}
  >>> tx = lottery.proximal.proximal(optax.sgd(0.1), lottery.proximal.l1(1.0), 0.1)
  >>> gradients = jax.tree.map(jnp.zeros_like, params)
  >>> updates, _ = tx.update(gradients, tx.init(params), params)
  >>> optax.apply_updates(params, updates)["dense0"]["kernel"].round(2).tolist()
  [[0.4, 0.0], [0.0, -0.9]]
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from lottery import structures
from lottery.masks import flatten, path_name, prunable

__all__ = ["group_lasso", "l1", "nuclear", "proximal"]

Proximal = Callable[[PyTree, Any], PyTree]
"""(params, step size) -> params."""


def proximal(
    inner: optax.GradientTransformation, operator: Proximal, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """Take a proximal step after every step of an optimizer (proximal gradient: Parikh & Boyd 2014, section 4.2).

    With `inner` plain gradient descent this is ISTA, whose fixed points are the minima of loss + penalty; with momentum
    or Adam the proximal step uses the same step size and the fixed points are not exactly those.

    Args:
      inner: makes the gradient step, decayed weights and all.
      operator: `l1`, `group_lasso`, `nuclear`, or one of your own.
      learning_rate: of `inner`: the size of the proximal step, or a schedule of it.

    Example:
      >>> tx = lottery.proximal.proximal(optax.sgd(0.5), lottery.proximal.l1(0.2), 0.5)
      >>> params, state = {"kernel": jnp.zeros((2, 1))}, None
      >>> for _ in range(50):  # minimize (w - (1, .1))^2 / 2 + .2 |w|
      ...     state = tx.init(params) if state is None else state
      ...     gradients = {"kernel": params["kernel"] - jnp.array([[1.0], [0.1]])}
      ...     updates, state = tx.update(gradients, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> np.float64(params["kernel"]).ravel().round(3).tolist()
      [0.8, 0.0]
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> tuple[Array, Any]:
        return jnp.zeros((), jnp.int32), inner.init(params)

    def update(
        grads: PyTree, state: tuple[Array, Any], params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, tuple[Array, Any]]:
        if params is None:
            raise ValueError("proximal: update needs params")
        count, inner_state = state
        updates, inner_state = inner.update(grads, inner_state, params, **extra)
        size = learning_rate(count) if callable(learning_rate) else learning_rate
        moved = operator(optax.apply_updates(params, updates), size)
        # Exactly -params where a weight becomes zero, so that adding it gives zero.
        change = jax.tree.map(lambda new, old: jnp.where(new == 0, -old, new - old).astype(old.dtype), moved, params)
        return change, (count + 1, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def l1(strength: float, which: PyTree | None = None) -> Proximal:
    """Make the proximal operator of strength * sum |w|: soft thresholding (Tibshirani 1996; Daubechies et al. 2004).

    Args:
      strength: of the penalty.
      which: `masks.prunable`; the leaves that are penalized. None takes its default.

    Example:
      >>> shrink = lottery.proximal.l1(1.0)
      >>> shrink({"kernel": jnp.array([[-2.0, 0.5]])}, 1.0)["kernel"].tolist()
      [[-1.0, 0.0]]
    """
    _check(strength)

    def shrink(path: str, leaf: Array, layout: Any, size: Any) -> Array:
        return jnp.sign(leaf) * jnp.maximum(jnp.abs(leaf) - size * strength, 0)

    return _of_leaves(shrink, which)


def group_lasso(strength: float, structure: str = "neuron", which: PyTree | None = None) -> Proximal:
    """Make the proximal operator of the group lasso: whole units shrink, and those that are small become zero.

    The penalty is strength * sum over units of sqrt(weights of the unit) * Euclidean norm (Yuan & Lin 2006; for neurons
    and channels Wen et al. 2016).

    Args:
      strength: of the penalty.
      structure: what a unit is: "neuron", "channel", "head", "expert" or a block such as "16x16".
      which: `masks.prunable`; the leaves that are penalized. None takes its default.

    Raises:
      ValueError: a structure without units of several weights (n:m, "unstructured"); from the operator, a leaf that it
        does not fit.

    Example:
      >>> shrink = lottery.proximal.group_lasso(0.5)
      >>> kernel = shrink({"kernel": jnp.array([[3.0, 0.1], [4.0, 0.2]])}, 2**0.5)["kernel"]
      >>> np.float64(kernel).round(3).tolist()
      [[2.4, 0.0], [3.2, 0.0]]
    """
    _check(strength)
    if structure == "unstructured" or ":" in structure:
        raise ValueError(f"group_lasso: {structure!r} has no units of several weights; l1 penalizes single ones")
    structures.parse(structure)

    def shrink(path: str, leaf: Array, layout: Any, size: Any) -> Array:
        units = structures.at(path, leaf.shape, structure, layout)
        squares, _ = units.pool(jnp.square(leaf.astype(jnp.float32)), jnp.ones(leaf.shape, bool))  # means over units
        weights = leaf.size // squares.size
        norm = jnp.sqrt(squares * weights)
        factor = jnp.maximum(1 - size * strength * weights**0.5 / jnp.where(norm > 0, norm, 1), 0)
        return (leaf * units.expand(factor, leaf.shape)).astype(leaf.dtype)

    return _of_leaves(shrink, which)


def nuclear(strength: float, which: PyTree | None = None) -> Proximal:
    """Make the proximal operator of strength * sum of singular values: kernels of low rank (Cai et al. 2010).

    Every matrix of a stack (layers, experts) by itself, inputs times outputs. One singular value decomposition a step
    and matrix.

    Args:
      strength: of the penalty.
      which: `masks.prunable`; the leaves that are penalized. None takes its default.

    Example:
      >>> shrink = lottery.proximal.nuclear(1.0)
      >>> shrink({"kernel": jnp.diag(jnp.array([3.0, 0.5]))}, 1.0)["kernel"].round(4).tolist()
      [[2.0, 0.0], [0.0, 0.0]]
    """
    _check(strength)

    def shrink(path: str, leaf: Array, layout: Any, size: Any) -> Array:
        axes = structures.layout(path, leaf.shape, layout)
        order = axes.order(leaf.ndim)
        u, s, v = jnp.linalg.svd(structures.matrices(leaf.astype(jnp.float32), axes), full_matrices=False)
        low = (u * jnp.maximum(s - size * strength, 0)[..., None, :]) @ v
        turned = low.reshape([leaf.shape[axis] for axis in order])
        back = sorted(range(leaf.ndim), key=order.__getitem__)
        return turned.transpose(back).astype(leaf.dtype)

    return _of_leaves(shrink, which)


def _of_leaves(shrink: Callable[[str, Array, Any, Any], Float[Array, "..."]], which: PyTree | None) -> Proximal:
    def operator(params: PyTree, size: Any) -> PyTree:
        chosen = flatten(prunable(params) if which is None else which)

        def one(path: tuple, leaf: Array) -> Array:
            name = path_name(path)
            return shrink(name, leaf, chosen[name], size) if chosen[name] else leaf

        return jax.tree.map_with_path(one, params)

    return operator


def _check(strength: float) -> None:
    if strength < 0:
        raise ValueError(f"strength={strength} must not be negative")
