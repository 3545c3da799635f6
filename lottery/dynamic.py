"""Sparse training with masks that change: optax transformations that carry the mask in their state.

The parameters they update are zero wherever the mask is False after every step, so a loss that uses the parameters
plainly is the sparse network's, and its gradient is dense, as RigL needs. `masks_of` reads the mask from a state.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from lottery import criteria, prune, transform
from lottery import masks as masks_lib


class DynamicState(NamedTuple):
    """step int32 []; masks like the parameters; key (SET only, else zeros); inner: the optimizer's own state."""

    step: Array
    masks: PyTree
    key: Array
    inner: PyTree


class FeedbackState(NamedTuple):
    """step int32 []; masks; dense: the weights behind the sparse ones; inner: the optimizer's own state."""

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
      fraction: of a leaf's alive weights that move at first; falls as a cosine to 0 at `until` (RigL's equation 1).
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
    """RigL or SET around any optimizer: every leaf keeps exactly as many weights as `masks` gives it.

    At a move the smallest weights of a leaf go and as many grow, from zero, at the largest gradients or at random,
    among all that did not survive (those just dropped included, as in the paper). That step moves connections and
    trains nothing; moments of grown weights start at zero.

    Args:
      inner: the optimizer, without masking of its own.
      masks: where to begin, e.g. random at ERK densities.
      which: `masks.prunable`, static; other leaves are trained plainly.
      config: schedule.
      key: for random growth.

    Returns:
      (init, update) with a `DynamicState`; update needs params and the gradient at them.
    """
    inner = optax.with_extra_args_support(inner)

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
            kept, moved = rewire(params, grow, state.masks, which, fraction)
            # Growing back what was just dropped starts from zero too.
            updates = jax.tree.map(lambda p, k: jnp.where(k, jnp.zeros((), p.dtype), -p), params, kept)
            return updates, transform.mask_state(state.inner, kept), moved

        def train() -> tuple[PyTree, PyTree, PyTree]:
            masked = transform.sparse(inner, state.masks)
            updates, new = masked.update(grads, state.inner, params, **extra)
            updates = jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params)
            return (
                updates,
                jax.tree.map(lambda n, o: jnp.asarray(n, jnp.asarray(o).dtype), new, state.inner),
                state.masks,
            )

        due = (step > 0) & (step % config.every == 0) & (step < config.until)
        updates, new, moved = jax.lax.cond(due, move, train)
        return updates, DynamicState(step + 1, moved, state.key, new)

    return optax.GradientTransformationExtraArgs(init, update)


def rewire(
    params: PyTree, grow: PyTree, masks: PyTree, which: PyTree, fraction: float | Array
) -> tuple[PyTree, PyTree]:
    """(survivors, new masks): in every leaf round(fraction * alive) of the smallest weights go and as many grow.

    Args:
      params, grow: weights, and scores of where to grow (the highest), like the parameters.
      masks: before. which: static.
      fraction: of each leaf's alive weights, may be traced.
    """
    alive = masks_lib.count(masks, which)
    quota = {path: jnp.round(fraction * count).astype(jnp.int32) for path, count in alive.items()}
    kept = prune.remove(criteria.magnitude(params), masks, which, quota)
    flat_kept, flat_grow = masks_lib.flatten(kept), masks_lib.flatten(grow)
    grown = dict(flat_kept)
    for path in alive:
        free = ~flat_kept[path].ravel()
        stays_out = jnp.sum(free, dtype=jnp.int32) - quota[path]
        new = prune.keep_highest(flat_grow[path].astype(jnp.float32).ravel(), free, stays_out)
        grown[path] = flat_kept[path] | new.reshape(flat_kept[path].shape)
    return kept, jax.tree.unflatten(jax.tree.structure(masks), list(grown.values()))


@dataclass(frozen=True)
class GradualConfig:
    """Zhu & Gupta 2017 (arXiv:1710.01878), equation 1: density falls from 1 at `begin` to `density` at `end`.

    Attributes:
      density: share of the weights left at `end`.
      begin: step of the first pruning.
      end: step of the last one.
      every: steps between prunings.
      scope: "layer" (every leaf at that density) or "global".
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
    """The density after the pruning at a step, float32 []."""
    part = jnp.clip((jnp.asarray(step, jnp.float32) - config.begin) / (config.end - config.begin), 0, 1)
    return config.density + (1 - config.density) * (1 - part) ** 3


def gradual(
    inner: optax.GradientTransformation, which: PyTree, config: GradualConfig
) -> optax.GradientTransformationExtraArgs:
    """Magnitude pruning during training along the cubic schedule; masks only ever lose weights.

    After the update of a step that is due (begin, begin + every, ... and end itself), the smallest weights are zero.
    State: `DynamicState`; update needs params.
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
        counts = {path: jnp.round(cubic_density(step, config) * size).astype(jnp.int32) for path, size in sizes.items()}
        due = (step >= config.begin) & (step <= config.end)
        due &= ((step - config.begin) % config.every == 0) | (step == config.end)
        masks = jax.lax.cond(
            due, lambda: prune.keep(criteria.magnitude(after), state.masks, which, counts), lambda: state.masks
        )
        updates = jax.tree.map(lambda m, u, p: jnp.where(m, u, -p), masks, updates, params)
        return updates, DynamicState(step + 1, masks, state.key, transform.mask_state(new, masks))

    return optax.GradientTransformationExtraArgs(init, update)


def straight_through(
    inner: optax.GradientTransformation, which: PyTree, counts: Mapping[str, int], every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Magnitude masks with straight-through gradients: dense weights train behind sparse ones (Lin et al. 2020, DPF).

    The gradient, taken at the sparse parameters, updates all dense weights; the parameters are the dense weights under
    the mask of the largest, chosen anew every `every` steps, so that pruned weights can come back.

    Args:
      inner: optimizer of the dense weights.
      which: static. counts: weights that stay, `allocation.counts`.
      every: steps between choices.

    Returns:
      (init, update) with a `FeedbackState`. Before the first step mask the parameters with `masks_of(init(params))`.
    """
    inner = optax.with_extra_args_support(inner)

    def choose(dense: PyTree) -> PyTree:
        return prune.keep(criteria.magnitude(dense), masks_lib.ones(dense), which, counts)

    def init(params: PyTree) -> FeedbackState:
        return FeedbackState(jnp.zeros((), jnp.int32), choose(params), params, inner.init(params))

    def update(grads: PyTree, state: FeedbackState, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("straight_through: update needs params")
        updates, new = inner.update(grads, state.inner, state.dense, **extra)
        dense = optax.apply_updates(state.dense, updates)
        step = state.step + 1
        masks = jax.lax.cond(step % every == 0, lambda: choose(dense), lambda: state.masks)
        change = jax.tree.map(lambda d, p: d - p, masks_lib.apply(dense, masks), params)
        return change, FeedbackState(step, masks, dense, new)

    return optax.GradientTransformationExtraArgs(init, update)


def masks_of(opt_state: PyTree) -> PyTree:
    """The masks in the state of `dynamic`, `gradual` or `straight_through`, alone or in a chain.

    Raises:
      ValueError: there are none.
    """
    kinds = (DynamicState, FeedbackState)
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds)) if isinstance(s, kinds)]
    if not found:
        raise ValueError("this optimizer state carries no masks: it is not of dynamic, gradual or straight_through")
    return found[0].masks


class EarlyBird(NamedTuple):
    """The last masks [W, ...] of every leaf and how many have come in, int32 []."""

    history: PyTree
    seen: Array


def early_bird(params: PyTree, window: int = 5) -> EarlyBird:
    """An empty detector of early-bird tickets (You et al. 2020, arXiv:1909.11957, section 3.2).

    Raises:
      ValueError: window < 1.
    """
    if window < 1:
        raise ValueError(f"early_bird: window is {window}; at least 1 is needed")
    history = jax.tree.map(lambda p: jnp.zeros((window, *p.shape), jnp.bool_), params)
    return EarlyBird(history, jnp.zeros((), jnp.int32))


def observe(bird: EarlyBird, masks: PyTree, which: PyTree, threshold: float = 0.1) -> tuple[EarlyBird, Array, Array]:
    """Show the detector the mask that pruning now would give; call it once an epoch.

    Returns:
      (new state, whether to stop dense training bool [], the largest distance to the masks in the window float32 []).
      Found: the window is full and all its masks are closer to this one than `threshold` (fraction of prunable entries
      that differ).
    """
    window = len(jax.tree.leaves(bird.history)[0])
    compare: Callable[[PyTree], Array] = lambda old: masks_lib.distance(old, masks, which)  # noqa: E731
    distances = jax.vmap(compare)(bird.history)
    farthest = jnp.max(jnp.where(jnp.arange(window) < bird.seen, distances, 0))
    full = bird.seen >= window
    at = bird.seen % window
    history = jax.tree.map(lambda h, m: h.at[at].set(m), bird.history, masks)
    return EarlyBird(history, bird.seen + 1), full & (farthest < threshold), farthest
