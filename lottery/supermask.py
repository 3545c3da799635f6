"""Supermasks: subnetworks of random weights, found by training scores (edge-popup), and the ablations of masks.

Edge-popup: Ramanujan et al. 2020 (arXiv:1911.13299). Mask criteria (`MASK_CRITERIA`), mask-1 and mask-0 actions
(`MASK_ONE`, `MASK_ZERO`): Zhou et al. 2019 (arXiv:1905.01067).
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from lottery import criteria, prune, structures
from lottery import masks as masks_lib

__all__ = [
    "MASK_CRITERIA",
    "MASK_ONE",
    "MASK_ZERO",
    "ablate_weights",
    "initial_scores",
    "popup",
    "popup_masks",
    "shuffle_alive",
    "signed_constant",
]


def initial_scores(params: PyTree, which: PyTree | None = None, *, key: Array) -> PyTree:
    """Draw random edge-popup scores to train, float32: uniform in +-1 / sqrt(fan-in) of every layer.

    The paper's code uses Kaiming's uniform distribution with a = sqrt(5), which is this one. The fan-in is the number
    of inputs of the leaf's `structures.Layout`.

    Example:
      >>> scores = lottery.supermask.initial_scores({"kernel": jnp.zeros((4, 3))}, key=jax.random.key(0))
      >>> scores["kernel"].shape, bool(jnp.abs(scores["kernel"]).max() <= 0.5)
      ((4, 3), True)
    """
    chosen = {} if which is None else masks_lib.flatten(which)

    def bound(path: tuple, leaf: Array) -> Array:
        name = masks_lib.path_name(path)
        layout = structures.layout(name, leaf.shape, chosen.get(name) or True)
        inputs = layout.matrices(leaf.shape)[1] if leaf.ndim > layout.batch + layout.outputs else 1
        return jnp.full(leaf.shape, inputs**-0.5)

    draw = lambda key, bound: jax.random.uniform(key, bound.shape, minval=-bound, maxval=bound)  # noqa: E731
    bounds = jax.tree_util.tree_map_with_path(bound, params)
    return masks_lib.map_layers(draw, bounds, which=which, key=key)


def signed_constant(params: PyTree, which: PyTree) -> PyTree:
    """Make signed constants: prunable weights become their sign times their layer's standard deviation.

    Zhou et al. 2019, section 4.2. Edge-popup calls it the signed (Kaiming) constant when the weights are Kaiming
    normal, and finds it works best.

    Example:
      >>> lottery.supermask.signed_constant({"kernel": jnp.array([3.0, -1.0])}, {"kernel": True})["kernel"].tolist()
      [2.0, -2.0]
    """
    constant = masks_lib.map_layers(lambda w: jnp.sign(w) * jnp.std(w), params, which=which)
    return jax.tree.map(lambda w, c, p: c if p else w, params, constant, which)


def popup(params: PyTree, popups: PyTree, which: PyTree, counts: Mapping[str, int]) -> PyTree:
    """Apply edge-popup: the subnetwork of highest scores, with a straight-through estimator for the scores.

    The gradient of a score is the gradient of the effective weight times the weight (Ramanujan et al. 2020, equation
    7), for weights that are out of the subnetwork too, which is how they come back; weights get none. (The paper's code
    ranks |score| and multiplies its gradient by the score's sign; here, as in the paper's text, the score itself is
    ranked.) Train the scores with any optimizer:

        loss = lambda popups, batch: loss_fn(popup(params, popups, which, counts), batch)

    Args:
      params: the weights, never trained. Leaves that are not prunable are used as they are, without gradients.
      popups: float scores like the parameters, `initial_scores`.
      which: `masks.prunable`, static.
      counts: weights that stay, `allocation.counts`.

    Returns:
      Parameters with exact zeros outside the mask.

    Example:
      >>> params, popups = {"kernel": jnp.array([2.0, 3.0])}, {"kernel": jnp.array([0.1, 0.2])}
      >>> popup = lambda popups: lottery.supermask.popup(params, popups, {"kernel": True}, {"kernel": 1})
      >>> popup(popups)["kernel"].tolist(), jax.grad(lambda s: popup(s)["kernel"].sum())(popups)["kernel"].tolist()
      ([0.0, 3.0], [2.0, 3.0])
    """
    chosen = popup_masks(popups, which, counts)
    return jax.tree.map(
        lambda w, s, m, p: _through(jax.lax.stop_gradient(w), s, m) if p else jax.lax.stop_gradient(w),
        params,
        popups,
        chosen,
        which,
    )


def popup_masks(popups: PyTree, which: PyTree, counts: Mapping[str, int]) -> PyTree:
    """Compute the masks of `popup`: the highest scores of every group.

    Example:
      >>> popups = {"kernel": jnp.array([0.1, 0.2])}
      >>> lottery.supermask.popup_masks(popups, {"kernel": True}, {"kernel": 1})["kernel"].tolist()
      [False, True]
    """
    popups = jax.lax.stop_gradient(popups)
    return prune.keep(popups, masks_lib.ones(popups), which, counts)


@jax.custom_vjp
def _through(weight: Float[Array, "..."], score: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    del score
    return jnp.where(mask, weight, jnp.zeros((), weight.dtype))


def _through_forward(weight: Array, score: Array, mask: Array) -> tuple[Array, tuple[Array, Array]]:
    return _through(weight, score, mask), (weight, score)


def _through_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[None, Array, None]:
    weight, score = saved
    return None, (gradient * weight).astype(score.dtype), None


_through.defvjp(_through_forward, _through_backward)


def _minus(a: PyTree) -> PyTree:
    return jax.tree.map(jnp.negative, a)


def _least(*trees: PyTree) -> PyTree:
    return jax.tree.map(lambda *x: jnp.minimum(x[0], x[1]), *trees)


def _movement(initial: PyTree, final: PyTree) -> PyTree:
    return jax.tree.map(lambda i, f: jnp.abs(f.astype(jnp.float32) - i.astype(jnp.float32)), initial, final)


# The mask criteria of Zhou et al. 2019, figure 2: (initial, final weights) -> scores, the lowest go first. Their
# "large init large final" is min(alpha |w_f|, |w_i|); alpha = 1 here.
MASK_CRITERIA: dict[str, Callable[[PyTree, PyTree], PyTree]] = {
    "large_final": lambda initial, final: criteria.magnitude(final),
    "small_final": lambda initial, final: _minus(criteria.magnitude(final)),
    "large_init": lambda initial, final: criteria.magnitude(initial),
    "small_init": lambda initial, final: _minus(criteria.magnitude(initial)),
    "large_init_large_final": lambda initial, final: _least(criteria.magnitude(initial), criteria.magnitude(final)),
    "small_init_small_final": lambda initial, final: _least(
        _minus(criteria.magnitude(initial)), _minus(criteria.magnitude(final))
    ),
    "magnitude_increase": lambda initial, final: criteria.magnitude_increase(final, initial),
    "movement": _movement,
}

# Actions on weights under the mask before they are trained again, and on the others.
MASK_ONE = ("rewind", "reinit", "shuffle", "constant")
MASK_ZERO = ("zero", "initial")


def ablate_weights(
    initial: PyTree,
    masks: PyTree,
    which: PyTree,
    one: str = "rewind",
    keep_sign: bool = False,
    zero: str = "zero",
    *,
    key: Array,
    fresh: PyTree | None = None,
) -> PyTree:
    """Ablate the weights under a mask before they are trained again (Zhou et al. 2019, sections 3 and 4).

    Args:
      initial: weights before training.
      masks: the ticket.
      which: `masks.prunable`, static.
      one: the mask-1 action: "rewind" to initial values, "reinit" (values of `fresh`), "shuffle" (initial values of the
        alive weights permuted within the layer), "constant" (the standard deviation of the layer's initial weights).
      keep_sign: give alive weights their initial sign; otherwise "constant" gets random signs.
      zero: the mask-0 action: "zero", or "initial" (frozen at the initial value; such weights are not pruned at all).
      key: for shuffles and random signs.
      fresh: another initialization, needed for "reinit".

    Returns:
      Parameters; leaves that are not prunable are as in initial.

    Raises:
      ValueError: unknown actions, or "reinit" without fresh.

    Example:
      >>> initial, mask = {"kernel": jnp.array([3.0, -1.0])}, {"kernel": jnp.array([True, False])}
      >>> ablate = lambda **how: lottery.supermask.ablate_weights(initial, mask, {"kernel": True}, **how)["kernel"]
      >>> ablate(one="constant", keep_sign=True, key=jax.random.key(0)).tolist()
      [2.0, 0.0]
      >>> ablate(zero="initial", key=jax.random.key(0)).tolist()
      [3.0, -1.0]
    """
    if one not in MASK_ONE or zero not in MASK_ZERO:
        raise ValueError(f"one={one!r}, zero={zero!r}: choose from {', '.join(MASK_ONE)} and {', '.join(MASK_ZERO)}")
    if one == "reinit" and fresh is None:
        raise ValueError("one='reinit' needs fresh, another initialization")

    def ablated(key: Array, w: Array, mask: Array, other: Array) -> Array:
        shuffle_key, sign_key = jax.random.split(key)
        value = other if one == "reinit" else w
        if one == "shuffle":
            value = shuffle_alive(w, mask, key=shuffle_key)
        if one == "constant":
            value = jnp.std(w) * jax.random.rademacher(sign_key, w.shape, w.dtype)
        if keep_sign:
            value = jnp.abs(value) * jnp.sign(w)
        return jnp.where(mask, value, w if zero == "initial" else jnp.zeros((), w.dtype))

    fresh = initial if fresh is None else fresh
    changed = masks_lib.map_layers(ablated, initial, masks, fresh, which=which, key=key)
    return jax.tree.map(lambda w, new, p: new if p else w, initial, changed, which)


def shuffle_alive(weights: Float[Array, "..."], mask: Bool[Array, "..."], *, key: Array) -> Float[Array, "..."]:
    """Permute the weights under the mask among themselves; the others stay where they are.

    Example:
      >>> weights, mask = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([True, False, True, True])
      >>> shuffled = lottery.supermask.shuffle_alive(weights, mask, key=jax.random.key(0))
      >>> float(shuffled[1]), sorted(shuffled.tolist())
      (2.0, [1.0, 2.0, 3.0, 4.0])
    """
    flat, alive = weights.ravel(), mask.ravel()
    order = jax.random.permutation(key, flat.size)
    # Alive positions in order, and alive positions in random order, pair up.
    places = jnp.argsort(~alive, stable=True)
    source = order[jnp.argsort(~alive[order], stable=True)]
    shuffled = flat.at[places].set(flat[source])
    return jnp.where(alive, shuffled, flat).reshape(weights.shape)
