"""Train under a mask: an optax transformation that keeps pruned weights and their moments at exactly zero."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from lottery import masks as masks_lib

__all__ = ["keep_zeros", "map_moments", "mask_state", "sparse"]


# Extra arguments of optax transformations that are functions of the parameters; sam's also returns gradients.
GRADIENTS = ("grad_fn",)
VALUES = ("value_fn", "obj_fn")


def sparse(
    inner: optax.GradientTransformation, masks: PyTree, *, moments: str = "out"
) -> optax.GradientTransformationExtraArgs:
    """Train a sparse network: `inner` on the weights that `masks` keeps and on those only.

    After `optax.apply_updates` every pruned weight is exactly zero, whatever it was before, whatever the gradient
    (not finite included) and whatever `inner` does with it: weight decay, momentum, orthogonalized or normalized
    updates. Gradients are masked before `inner` sees them, so that global norms and second moments are those of the
    sparse network. State that mirrors the parameters (moments, slow weights) is zero there too. Statistics of another
    shape, adafactor's row and column means, are means over the masked gradient: pruned entries add nothing but
    adafactor's own epsilon. Functions passed to `update` (sam's grad_fn, value_fn, obj_fn) see masked weights and
    return masked gradients.

    The state is `inner`'s own, so a state saved by one can be loaded by the other.

    Args:
      inner: any optax transformation for the parameters, MultiSteps included.
      masks: bool tree like the parameters. May be traced: build the transformation inside jit or vmap for a stack.
      moments: where the state is masked. "out": as update returns it, always. "in": as update receives it, which is as
        good for moments that are sums of gradients (Adam, momentum), but leaves an optimizer's own epsilon or noise in
        the returned state (adabelief, adamax, adafactor unfactored, noise) until the next update; mask the last state
        with `mask_state`. Moments masked on the way out are needed twice, masked and not, which costs XLA its fusions:
        a LeNet-300-100 step on one CPU core is a fifth slower.

    Returns:
      (init, update); update needs `params` for pruned weights that are not zero yet, and passes extra arguments on.

    Raises:
      ValueError: another value of moments; from init and update, naming the path, masks that do not fit the parameters.

    Example:
      >>> params, mask = {"kernel": jnp.array([1.0, 2.0])}, {"kernel": jnp.array([True, False])}
      >>> optimizer = lottery.transform.sparse(optax.sgd(0.5), mask)
      >>> gradient = {"kernel": jnp.array([1.0, 1.0])}
      >>> updates, _ = optimizer.update(gradient, optimizer.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [0.5, 0.0]
    """
    if moments not in ("out", "in"):
        raise ValueError(f"moments={moments!r}: choose 'out' or 'in'")
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> PyTree:
        masks_lib.check(masks, params)
        return mask_state(inner.init(masks_lib.apply(params, masks)), masks)

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, PyTree]:
        masks_lib.check(masks, updates)
        masked = None if params is None else masks_lib.apply(params, masks)
        extra = {name: _masked_function(name, value, masks) for name, value in extra.items()}
        state = mask_state(state, masks) if moments == "in" else state
        new, state = inner.update(masks_lib.apply(updates, masks), state, masked, **extra)
        state = mask_state(state, masks) if moments == "out" else state
        if params is None:
            return masks_lib.apply(new, masks), state
        # p + (-p) is exactly zero, so a weight that was not zero before is zero afterwards.
        return jax.tree.map(lambda m, u, p: jnp.where(m, u, -p), masks, new, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def keep_zeros(
    inner: optax.GradientTransformation, which: PyTree | None = None
) -> optax.GradientTransformationExtraArgs:
    """Train a pruned network without a mask at hand: `sparse` with the mask of the weights that are not zero.

    The mask is read off the parameters in every step; a live weight that becomes exactly zero stays so.

    Args:
      inner: as for `sparse`.
      which: `masks.prunable`; leaves whose zeros stay. None takes its default.

    Example:
      >>> params = {"dense0": {"kernel": jnp.array([[1.0, 0.0]]), "bias": jnp.zeros(2)}}
      >>> optimizer = lottery.transform.keep_zeros(optax.sgd(0.5))
      >>> updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
      >>> jax.tree.map(lambda leaf: leaf.tolist(), optax.apply_updates(params, updates))
      {'dense0': {'bias': [-0.5, -0.5], 'kernel': [[0.5, 0.0]]}}
    """

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError("keep_zeros: update needs params")
        return sparse(inner, masks_lib.support(params, which)).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(
        lambda params: sparse(inner, masks_lib.support(params, which)).init(params), update
    )


def _masked_function(name: str, value: Any, masks: PyTree) -> Any:
    if name in GRADIENTS and callable(value):
        return lambda params, *args: masks_lib.apply(value(masks_lib.apply(params, masks), *args), masks)
    if name in VALUES and callable(value):
        return lambda params, *args: value(masks_lib.apply(params, masks), *args)
    return value


def mask_state(state: PyTree, masks: PyTree) -> PyTree:
    """Mask an optimizer state: everything in it that mirrors the parameters becomes zero where masks is False.

    Needed by itself for a state restored from before pruning (rewinding the optimizer). Works on stacks.

    Example:
      >>> params, mask = {"kernel": jnp.ones(2)}, {"kernel": jnp.array([True, False])}
      >>> state = optax.trace(0.9).init(params)._replace(trace={"kernel": jnp.array([3.0, 4.0])})
      >>> lottery.transform.mask_state(state, mask).trace["kernel"].tolist()
      [3.0, 0.0]
    """
    return map_moments(lambda m, leaf: jnp.where(m, leaf, jnp.zeros((), leaf.dtype)), masks, state)


def map_moments(f: Callable[..., Array], params: PyTree, state: PyTree, *rest: PyTree) -> PyTree:
    """Map f(parameter, leaf, *rest leaves) over the leaves of an optimizer state that mirror a parameter.

    A leaf mirrors the parameter whose path its own path ends with (the longest, if several) if their shapes agree. One
    of all parameters' length, [N] or for a stack [S, N], mirrors them joined in the tree's order (optax.flatten).
    optax.tree_map_params needs the transformation and a state whose structure follows from a single placeholder, which
    partitioned optimizers (muon) and adafactor do not have; paths and shapes are there in all of them.

    Args:
      f: called for mirroring leaves; all other leaves (counts, keys, factored statistics) stay as they are.
      params: parameters, or any tree of arrays with their structure and shapes, such as masks.
      state: optimizer state, of one network or stacked like params.
      rest: further trees with the state's structure.

    Example:
      >>> params = {"kernel": jnp.ones(2)}
      >>> state = optax.trace(0.9).init(params)
      >>> lottery.transform.map_moments(lambda p, m: m + 5 * p, params, state).trace["kernel"].tolist()
      [5.0, 5.0]
    """
    mirrors = {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    size = sum(leaf.size for leaf in mirrors.values())

    def joined(shape: tuple[int, ...]) -> Array | None:
        """The parameters as one vector, or one for each network of a stack."""
        if size < 2 or math.prod(shape) != size or not 1 <= len(shape) <= 2:
            return None
        if len(shape) == 2 and any(jnp.shape(leaf)[:1] != shape[:1] for leaf in mirrors.values()):
            return None
        return jnp.concatenate([jnp.reshape(leaf, (*shape[:-1], -1)) for leaf in mirrors.values()], -1)

    def at(path: tuple, leaf: Any, *others: Any) -> Any:
        for start in range(len(path) + 1):
            param = mirrors.get(path[start:])
            if param is not None and param.shape == jnp.shape(leaf):
                return f(param, leaf, *others)
        vector = joined(jnp.shape(leaf))
        return leaf if vector is None else f(vector, leaf, *others)

    return jax.tree_util.tree_map_with_path(at, state, *rest)
