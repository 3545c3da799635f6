"""Dynamic sparse training: optax transformations whose state carries a mask that changes (SET, RigL, gradual, DPF).

The parameters they update are zero wherever the mask is False after every step, so a loss that uses the parameters
plainly is the sparse network's, and its gradient is dense, as RigL needs. `masks_of` reads the mask from a state.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from lottery import counting, criteria, prune, transform
from lottery import masks as masks_lib

__all__ = [
    "DynamicConfig",
    "DynamicState",
    "EarlyBird",
    "FeedbackState",
    "GradualConfig",
    "cubic_density",
    "dynamic",
    "early_bird",
    "gradual",
    "masks_of",
    "observe",
    "rewire",
    "straight_through",
]


class DynamicState(NamedTuple):
    """The state of `dynamic` and `gradual`.

    Attributes:
      step: int32 [].
      masks: bool, like the parameters.
      key: random bits (SET), else zeros.
      inner: the optimizer's own state.

    Example:
      >>> config = lottery.dynamic.GradualConfig(0.5)
      >>> state = lottery.dynamic.gradual(optax.sgd(0.1), {"kernel": True}, config).init({"kernel": jnp.ones(2)})
      >>> int(state.step), state.masks["kernel"].tolist()
      (0, [True, True])
    """

    step: Array
    masks: PyTree
    key: Array
    inner: PyTree


class FeedbackState(NamedTuple):
    """The state of `straight_through`.

    Attributes:
      step: int32 [].
      masks: bool, like the parameters.
      dense: the weights behind the sparse ones.
      inner: the optimizer's own state.

    Example:
      >>> optimizer = lottery.dynamic.straight_through(optax.sgd(0.1), {"kernel": True}, {"kernel": 1})
      >>> optimizer.init({"kernel": jnp.array([1.0, 2.0])}).masks["kernel"].tolist()
      [False, True]
    """

    step: Array
    masks: PyTree
    dense: PyTree
    inner: PyTree


@dataclass(frozen=True)
class DynamicConfig:
    """When and how many connections move (Evci et al. 2020, section 3).

    Attributes:
      grow: "gradient" (RigL) or "random" (SET, Mocanu et al. 2018).
      every: steps between moves.
      until: no moves at this step and after (the paper: 75% of training).
      fraction: of a layer's alive weights that move at first; falls as a cosine to 0 at `until` (RigL's equation 1).

    Example:
      >>> lottery.dynamic.DynamicConfig(grow="random", every=50, until=1000)
      DynamicConfig(grow='random', every=50, until=1000, fraction=0.3)
    """

    grow: str = "gradient"
    every: int = 100
    until: int = 10_000
    fraction: float = 0.3

    def __post_init__(self):
        if self.grow not in ("gradient", "random"):
            raise ValueError(f"DynamicConfig.grow: {self.grow!r} is not one of gradient, random")
        if self.every < 1 or self.until < 0 or not 0 <= self.fraction <= 1:
            raise ValueError(f"{self}: every >= 1, until >= 0 and 0 <= fraction <= 1 are needed")


def dynamic(
    inner: optax.GradientTransformation, masks: PyTree, which: PyTree, config: DynamicConfig, *, key: Array
) -> optax.GradientTransformationExtraArgs:
    """Train with RigL (Evci et al. 2020, arXiv:1911.11134) or SET (Mocanu et al. 2018) around any optimizer.

    Every layer has exactly as many weights as `masks` gives it. At a move the smallest weights of a layer go and as
    many grow, from zero, at the largest gradients or at random, among all that did not survive. A weight that is
    dropped and grown in one move keeps its value and its moments, as in the published code (google-research/rigl,
    sparse_optimizers_base.py); other grown weights begin with moments of zero. That step moves connections and trains
    nothing. The number that moves is rounded, where the published code cuts it down: at most one more a layer.

    Args:
      inner: the optimizer, without masking of its own. Where a step from moments of zero would be thousands of times
        the usual one (acprop divides by the second moment of the step before), grown weights let one step pass.
      masks: where to begin, e.g. random at ERK densities.
      which: `masks.prunable`, static; other leaves are trained plainly.
      config: schedule.
      key: for random growth.

    Returns:
      (init, update) with a `DynamicState`; update needs params and the gradient at them.

    Example:
      >>> params, gradient = {"kernel": jnp.array([3.0, 1.0, 2.0, 4.0])}, {"kernel": jnp.array([0.0, 1.0, 0.0, 0.0])}
      >>> mask = {"kernel": jnp.array([True, False, True, True])}
      >>> params = lottery.masks.apply(params, mask)
      >>> config = lottery.dynamic.DynamicConfig(every=1, until=4)
      >>> optimizer = lottery.dynamic.dynamic(optax.sgd(0.0), mask, {"kernel": True}, config, key=jax.random.key(0))
      >>> state = optimizer.init(params)
      >>> for _ in range(2):
      ...     updates, state = optimizer.update(gradient, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> lottery.dynamic.masks_of(state)["kernel"].tolist()
      [True, True, False, True]
    """
    inner = optax.with_extra_args_support(inner)
    waits = _bursts(inner)

    def init(params: PyTree) -> DynamicState:
        masks_lib.check(masks, params)
        state = transform.sparse(inner, masks).init(params)
        return DynamicState(jnp.zeros((), jnp.int32), masks, jax.random.key_data(key), state)

    def update(grads: PyTree, state: DynamicState, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("dynamic: update needs params, whose magnitudes decide what goes")
        step = state.step

        def move() -> tuple[PyTree, PyTree, PyTree]:
            fraction = config.fraction / 2 * (1 + jnp.cos(jnp.pi * step / max(config.until, 1)))
            draws = jax.random.wrap_key_data(state.key, impl=jax.random.key_impl(key))
            random = criteria.random(params, key=jax.random.fold_in(draws, step))
            grow = criteria.magnitude(grads) if config.grow == "gradient" else random
            _, moved = rewire(params, grow, state.masks, which, fraction)
            held = jax.tree.map(jnp.logical_and, moved, state.masks)
            updates = jax.tree.map(lambda p, k: jnp.where(k, jnp.zeros((), p.dtype), -p), params, held)
            return updates, transform.mask_state(state.inner, held), moved

        def train() -> tuple[PyTree, PyTree, PyTree]:
            masked = transform.sparse(inner, state.masks)
            updates, new = masked.update(grads, state.inner, params, **extra)
            if waits:
                grown = is_due(step - 1)
                updates = jax.tree.map(
                    lambda u, p, m: jnp.where(grown & m & (p == 0), 0, u), updates, params, state.masks
                )
            updates = jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params)
            return (
                updates,
                jax.tree.map(lambda n, o: jnp.asarray(n, jnp.asarray(o).dtype), new, state.inner),
                state.masks,
            )

        def is_due(step: Array) -> Array:
            return (step > 0) & (step % config.every == 0) & (step < config.until)

        updates, new, moved = jax.lax.cond(is_due(step), move, train)
        return updates, DynamicState(step + 1, moved, state.key, new)

    return optax.GradientTransformationExtraArgs(init, update)


def _bursts(inner: optax.GradientTransformation) -> bool:
    """Whether a step from moments of zero is thousands of times the usual one, tried on two weights."""
    params = gradient = {"kernel": jnp.ones(2)}
    try:
        state = inner.init(params)
        for _ in range(3):
            usual, state = inner.update(gradient, state, params)
        state = transform.mask_state(state, {"kernel": jnp.array([True, False])})
        first, _ = inner.update(gradient, state, params)
        return bool(jnp.abs(first["kernel"][1]) > 1e3 * jnp.abs(usual["kernel"][1]) > 0)
    except Exception:  # needs other parameters or arguments: not for two weights
        return False


def rewire(
    params: PyTree, grow: PyTree, masks: PyTree, which: PyTree, fraction: float | Array
) -> tuple[PyTree, PyTree]:
    """Rewire masks: in every layer round(fraction * alive) of the smallest weights go and as many grow.

    Args:
      params: weights.
      grow: scores of where to grow (the highest), like the parameters.
      masks: before.
      which: static.
      fraction: of each layer's alive weights, may be traced.

    Returns:
      (survivors, new masks).

    Example:
      >>> params, gradient = {"kernel": jnp.array([3.0, 1.0, 2.0, 4.0])}, {"kernel": jnp.array([0.0, 1.0, 0.0, 0.0])}
      >>> mask = {"kernel": jnp.array([True, False, True, True])}
      >>> survivors, new = lottery.dynamic.rewire(params, gradient, mask, {"kernel": True}, 0.4)
      >>> survivors["kernel"].tolist(), new["kernel"].tolist()
      ([True, False, False, True], [True, True, False, True])
    """
    moving = {layer: counting.share(fraction, count) for layer, count in masks_lib.count(masks, which).items()}
    survivors = prune.remove(criteria.magnitude(params), masks, which, moving)
    free = jax.tree.map(jnp.logical_not, survivors)
    grown = prune.keep(grow, free, which, moving)
    return survivors, jax.tree.map(lambda s, g, p: s | g if p else s, survivors, grown, which)


@dataclass(frozen=True)
class GradualConfig:
    """The cubic schedule of gradual pruning: density falls from 1 at `begin` to `density` at `end` (Zhu & Gupta 2017).

    Attributes:
      density: share of the weights left at `end`.
      begin: step of the first pruning.
      end: step of the last one.
      every: steps between prunings.
      scope: "layer" (every layer at that density) or "global".

    Example:
      >>> config = lottery.dynamic.GradualConfig(0.1, begin=0, end=100)
      >>> round(float(lottery.dynamic.cubic_density(50, config)), 4)
      0.2125
    """

    density: float
    begin: int = 0
    end: int = 1000
    every: int = 100
    scope: str = "layer"

    def __post_init__(self):
        if not 0 <= self.density <= 1:
            raise ValueError(f"GradualConfig.density is {self.density}; 0 to 1 is needed")
        if not 0 <= self.begin < self.end or self.every < 1 or self.scope not in ("layer", "global"):
            raise ValueError(f"{self}: 0 <= begin < end, every >= 1 and scope layer or global are needed")


def cubic_density(step: int | Array, config: GradualConfig) -> Array:
    """Compute the density after the pruning at a step, float32 [] (Zhu & Gupta 2017, arXiv:1710.01878, equation 1).

    Example:
      >>> float(lottery.dynamic.cubic_density(0, lottery.dynamic.GradualConfig(0.1)))
      1.0
    """
    part = jnp.clip((jnp.asarray(step, jnp.float32) - config.begin) / (config.end - config.begin), 0, 1)
    return config.density + (1 - config.density) * (1 - part) ** 3


def _ramp(
    sizes: Mapping[str, int], final: Mapping[str, int | float], begin: int, end: int, every: int
) -> dict[str, Array]:
    """Counts that stay after the n-th pruning, pairs [n, 2] by group: the cubic in float64, halves to even."""
    steps = np.minimum(np.arange(begin, end + every, every), end) if end > begin else np.array([begin])
    left = (1 - (steps - begin) / (end - begin)) ** 3 if end > begin else np.zeros(1)
    tables = {
        pair: counting.split(np.rint(pair[1] + (pair[0] - pair[1]) * left).astype(np.int64))
        for pair in {(sizes[group], final[group]) for group in final}
    }
    return {group: tables[sizes[group], final[group]] for group in final}


def _at(table: Mapping[str, Array], step: Array, begin: int, end: int, every: int) -> dict[str, Array]:
    """The counts of `_ramp` at a step that is due, and after the end the last ones."""
    n = jnp.where(step >= end, len(next(iter(table.values()))) - 1, jnp.maximum(step - begin, 0) // every)
    return {group: counts[n] for group, counts in table.items()}


def gradual(
    inner: optax.GradientTransformation, which: PyTree, config: GradualConfig
) -> optax.GradientTransformationExtraArgs:
    """Prune gradually by magnitude during training, along a cubic (Zhu & Gupta 2017, arXiv:1710.01878).

    Masks only ever lose weights. After the update of a step that is due (begin, begin + every, ... and end itself), the
    smallest weights are zero.

    Args:
      inner: the optimizer.
      which: `masks.prunable`, static.
      config: schedule.

    Returns:
      (init, update) with a `DynamicState`; update needs params.

    Example:
      >>> params, gradient = {"kernel": jnp.array([3.0, 1.0, 2.0, 4.0])}, {"kernel": jnp.array([0.0, 1.0, 0.0, 0.0])}
      >>> config = lottery.dynamic.GradualConfig(0.5, begin=0, end=1, every=1)
      >>> optimizer = lottery.dynamic.gradual(optax.sgd(0.0), {"kernel": True}, config)
      >>> state = optimizer.init(params)
      >>> for _ in range(2):
      ...     updates, state = optimizer.update(gradient, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params["kernel"].tolist()
      [3.0, 0.0, 0.0, 4.0]
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> DynamicState:
        return DynamicState(
            jnp.zeros((), jnp.int32), masks_lib.ones(params), jnp.zeros(2, jnp.uint32), inner.init(params)
        )

    def update(grads: PyTree, state: DynamicState, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("gradual: update needs params, whose magnitudes decide what goes")
        step = state.step
        updates, new = transform.sparse(inner, state.masks).update(grads, state.inner, params, **extra)
        after = optax.apply_updates(params, updates)
        sizes = prune.sizes(params, which)
        sizes = {prune.EVERYTHING: sum(sizes.values())} if config.scope == "global" else sizes
        times = config.begin, config.end, config.every
        final = {group: config.density * size for group, size in sizes.items()}
        counts = _at(_ramp(sizes, final, *times), step, *times)
        due = (step >= config.begin) & (step <= config.end)
        due &= ((step - config.begin) % config.every == 0) | (step == config.end)
        masks = jax.lax.cond(
            due, lambda: prune.keep(criteria.magnitude(after), state.masks, which, counts), lambda: state.masks
        )
        updates = jax.tree.map(lambda m, u, p: jnp.where(m, u, -p), masks, updates, params)
        return updates, DynamicState(step + 1, masks, state.key, transform.mask_state(new, masks))

    return optax.GradientTransformationExtraArgs(init, update)


def straight_through(
    inner: optax.GradientTransformation,
    which: PyTree,
    counts: Mapping[str, int],
    every: int = 1,
    *,
    ramp: int = 0,
    until: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Train magnitude masks by a straight-through estimator: dense weights behind sparse ones (DPF, Lin et al. 2020).

    The gradient, taken at the sparse parameters, updates all dense weights; the parameters are the dense weights under
    the mask of the largest, chosen anew every `every` steps, so that pruned weights can come back. Estimator: Bengio et
    al. 2013, arXiv:1308.3432; DPF: arXiv:2006.07253. Here `every` says how often masks are chosen, `ramp` how the
    sparsity grows, and `until` when choosing stops, so that the last mask is trained.

    Args:
      inner: optimizer of the dense weights.
      which: static.
      counts: weights that stay, `allocation.counts`.
      every: steps between choices.
      ramp: step at which `counts` are reached, from the whole network on; 0 begins with them.
      until: no choice after this step; None chooses to the end.

    Returns:
      (init, update) with a `FeedbackState`. Before the first step mask the parameters with `masks_of(init(params))`.

    Example:
      >>> params, gradient = {"kernel": jnp.array([3.0, 1.0, 2.0, 4.0])}, {"kernel": jnp.array([0.0, 1.0, 0.0, 0.0])}
      >>> optimizer = lottery.dynamic.straight_through(optax.sgd(-2.5), {"kernel": True}, {"kernel": 2})
      >>> state = optimizer.init(params)
      >>> params = lottery.masks.apply(params, lottery.dynamic.masks_of(state))
      >>> updates, state = optimizer.update(gradient, state, params)
      >>> params["kernel"].tolist(), optax.apply_updates(params, updates)["kernel"].tolist()
      ([3.0, 0.0, 0.0, 4.0], [0.0, 3.5, 0.0, 4.0])
      >>> state.dense["kernel"].tolist()
      [3.0, 3.5, 2.0, 4.0]
    """
    inner = optax.with_extra_args_support(inner)

    if every < 1 or ramp < 0 or (until is not None and until < ramp):
        raise ValueError(f"straight_through: every={every} >= 1 and 0 <= ramp={ramp} <= until={until} are needed")

    def choose(dense: PyTree, step: Array) -> PyTree:
        sizes = prune.sizes(dense, which)
        sizes |= {prune.EVERYTHING: sum(sizes.values())}
        now = _at(_ramp(sizes, counts, 0, ramp, every), step, 0, ramp, every)
        return prune.keep(criteria.magnitude(dense), masks_lib.ones(dense), which, now)

    def init(params: PyTree) -> FeedbackState:
        step = jnp.zeros((), jnp.int32)
        return FeedbackState(step, choose(params, step), params, inner.init(params))

    def update(grads: PyTree, state: FeedbackState, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("straight_through: update needs params")
        updates, new = inner.update(grads, state.inner, state.dense, **extra)
        dense = optax.apply_updates(state.dense, updates)
        step = state.step + 1
        due = (step % every == 0) | (step == ramp)
        due &= True if until is None else step <= until
        masks = jax.lax.cond(due, lambda: choose(dense, step), lambda: state.masks)
        change = jax.tree.map(lambda d, p: d - p, masks_lib.apply(dense, masks), params)
        return change, FeedbackState(step, masks, dense, new)

    return optax.GradientTransformationExtraArgs(init, update)


def masks_of(opt_state: PyTree) -> PyTree:
    """Read the masks from the state of `dynamic`, `gradual` or `straight_through`, alone or in a chain.

    Raises:
      ValueError: there are none.

    Example:
      >>> lottery.dynamic.masks_of(optax.sgd(0.1).init({"kernel": jnp.ones(2)}))
      Traceback (most recent call last):
      ValueError: this optimizer state carries no masks: it is not of dynamic, gradual or straight_through
    """
    kinds = (DynamicState, FeedbackState)
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds)) if isinstance(s, kinds)]
    if not found:
        raise ValueError("this optimizer state carries no masks: it is not of dynamic, gradual or straight_through")
    return found[0].masks


class EarlyBird(NamedTuple):
    """The state of the early-bird detector.

    Attributes:
      history: the last masks [W, ...] of every leaf.
      seen: how many have come in, int32 [].

    Example:
      >>> lottery.dynamic.early_bird({"kernel": jnp.ones(3)}, window=2).history["kernel"].shape
      (2, 3)
    """

    history: PyTree
    seen: Array


def early_bird(params: PyTree, window: int = 5) -> EarlyBird:
    """Make an empty detector of early-bird tickets (You et al. 2020, arXiv:1909.11957, section 3.2).

    Args:
      params: of one network.
      window: masks that are compared.

    Raises:
      ValueError: window < 1.

    Example:
      >>> int(lottery.dynamic.early_bird({"kernel": jnp.ones(3)}).seen)
      0
    """
    if window < 1:
        raise ValueError(f"early_bird: window is {window}; at least 1 is needed")
    history = jax.tree.map(lambda p: jnp.zeros((window, *p.shape), jnp.bool_), params)
    return EarlyBird(history, jnp.zeros((), jnp.int32))


def observe(bird: EarlyBird, masks: PyTree, which: PyTree, threshold: float = 0.1) -> tuple[EarlyBird, Array, Array]:
    """Observe the mask that pruning now would give, to detect an early-bird ticket; call it once an epoch.

    Args:
      bird: from `early_bird` or the last call.
      masks: of pruning now.
      which: `masks.prunable`, static.
      threshold: fraction of prunable entries that may differ.

    Returns:
      (new state, whether to stop dense training bool [], the largest distance to the masks in the window float32 []).
      Found: the window is full and all its masks are closer to this one than `threshold`.

    Example:
      >>> mask = {"kernel": jnp.array([True, False])}
      >>> bird = lottery.dynamic.early_bird(mask, window=1)
      >>> bird, found, _ = lottery.dynamic.observe(bird, mask, {"kernel": True})
      >>> bool(found), bool(lottery.dynamic.observe(bird, mask, {"kernel": True})[1])
      (False, True)
    """
    window = len(jax.tree.leaves(bird.history)[0])
    compare: Callable[[PyTree], Array] = lambda old: masks_lib.distance(old, masks, which)  # noqa: E731
    distances = jax.vmap(compare)(bird.history)
    farthest = jnp.max(jnp.where(jnp.arange(window) < bird.seen, distances, 0))
    full = bird.seen >= window
    at = bird.seen % window
    history = jax.tree.map(lambda h, m: h.at[at].set(m), bird.history, masks)
    return EarlyBird(history, bird.seen + 1), full & (farthest < threshold), farthest
