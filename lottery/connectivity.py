"""Mode connectivity: loss and error on the straight line, or on a Bezier curve, between two networks.

Frankle et al. 2020 (arXiv:1912.05671), section 2: two runs from the same weights, differing in data order only, are
stable if the error along the line rises above the mean of its ends by less than `STABLE`, 2%. Nonlinear mode
connectivity (Garipov et al. 2018, arXiv:1802.10026) bends the path: `fit_bend` trains its one control point.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

__all__ = ["STABLE", "along", "barrier", "bezier", "fit_bend", "instability", "instability_curve", "interpolate"]

STABLE = 0.02


def interpolate(a: PyTree, b: PyTree, alpha: float | Float[Array, ""]) -> PyTree:
    """Interpolate linearly: (1 - alpha) a + alpha b, leaf by leaf; exactly a and b at 0 and 1. Integer leaves are a's.

    Example:
      >>> a, b = {"kernel": jnp.zeros(2)}, {"kernel": jnp.ones(2)}
      >>> lottery.connectivity.interpolate(a, b, 0.25)["kernel"].tolist()
      [0.25, 0.25]
    """

    def between(x: Array, y: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return ((1 - alpha) * x + alpha * y).astype(x.dtype)

    return jax.tree.map(between, a, b)


def bezier(a: PyTree, bend: PyTree, b: PyTree, alpha: float | Float[Array, ""]) -> PyTree:
    """Compute a point of the quadratic Bezier curve from a to b with control point `bend` (Garipov et al. 2018, eq. 5).

    (1 - alpha)^2 a + 2 alpha (1 - alpha) bend + alpha^2 b; exactly a and b at 0 and 1. Integer leaves are a's.

    Example:
      >>> a, bend, b = ({"kernel": jnp.full(2, value)} for value in (0.0, 3.0, 2.0))
      >>> lottery.connectivity.bezier(a, bend, b, 0.5)["kernel"].tolist()
      [2.0, 2.0]
    """
    return interpolate(interpolate(a, bend, alpha), interpolate(bend, b, alpha), alpha)


def fit_bend(
    loss_fn: Callable[[PyTree, PyTree], Float[Array, ""]],
    a: PyTree,
    b: PyTree,
    batches: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    key: Key[Array, ""],
    masks: PyTree | None = None,
) -> tuple[PyTree, Float[Array, " S"]]:
    """Train the control point of the Bezier curve between two networks: the least expected loss at uniform points.

    It begins in the middle of the line; a step takes one batch at one random point of the curve (Garipov et al. 2018,
    eq. 2 and section 3.3).

    Args:
      loss_fn: params, batch -> loss, traceable.
      a: params of one end.
      b: params of the other.
      batches: of each step, stacked [S, ...].
      optimizer: of the control point.
      key: of the points.
      masks: of both ends, where they have one: pruned weights of the control point stay zero.

    Returns:
      The control point, and the loss of each step before its update.

    Example:
      >>> ring = lambda params, _: (jnp.square(params["x"]).sum() - 1) ** 2  # minima: the unit circle
      >>> a, b = {"x": jnp.array([-1.0, 0.0])}, {"x": jnp.array([0.8, 0.6])}
      >>> bend, _ = lottery.connectivity.fit_bend(ring, a, b, jnp.zeros(300), optax.adam(0.03), key=jax.random.key(0))
      >>> barriers = []
      >>> for control in (None, bend):
      ...     alphas, values = lottery.connectivity.along(lambda p: ring(p, None), a, b, 21, bend=control)
      ...     barriers.append(float(lottery.connectivity.barrier(alphas, values)))
      >>> barriers[0] > 0.7, barriers[1] < 0.1
      (True, True)
    """

    middle, treedef = jax.tree.flatten(interpolate(a, b, 0.5))
    trained = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in middle]
    every = trained if masks is None else jax.tree.leaves(masks)
    alive = [None if masks is None else mask for mask, t in zip(every, trained, strict=True) if t]

    def whole(leaves: list[Array]) -> PyTree:
        left = iter(leaves)
        every = [next(left) if t else leaf for t, leaf in zip(trained, middle, strict=True)]
        return jax.tree.unflatten(treedef, every)

    def step(carry: Any, batch: Any) -> tuple[Any, Array]:
        leaves, state, key = carry
        key, own = jax.random.split(key)
        alpha = jax.random.uniform(own)
        loss, gradients = jax.value_and_grad(lambda x: loss_fn(bezier(a, whole(x), b, alpha), batch))(leaves)
        updates, state = optimizer.update(gradients, state, leaves)
        updates = [u if m is None else jnp.where(m, u, 0) for u, m in zip(updates, alive, strict=True)]
        return (optax.apply_updates(leaves, updates), state, key), loss

    start = [leaf for leaf, t in zip(middle, trained, strict=True) if t]
    (leaves, _, _), losses = jax.lax.scan(step, (start, optimizer.init(start), key), batches)
    return whole(leaves), losses


def along(
    metric_fn: Callable[[PyTree], PyTree], a: PyTree, b: PyTree, points: int = 30, *, bend: PyTree | None = None
) -> tuple[Float[Array, " P"], PyTree]:
    """Evaluate a metric along the path: (alphas [P], metric_fn at each of them, stacked [P, ...]), both ends included.

    Evaluated one after the other in one program, so memory is that of one network.

    Args:
      metric_fn: params -> arrays, traceable.
      a: params of one end.
      b: params of the other.
      points: evenly spaced; the paper takes 30.
      bend: control point of a Bezier curve; None is the straight line.

    Raises:
      ValueError: fewer than two points.

    Example:
      >>> a, b = {"kernel": jnp.zeros(2)}, {"kernel": jnp.ones(2)}
      >>> alphas, values = lottery.connectivity.along(lambda params: params["kernel"].sum(), a, b, points=3)
      >>> alphas.tolist(), values.tolist()
      ([0.0, 0.5, 1.0], [0.0, 1.0, 2.0])
    """
    if points < 2:
        raise ValueError(f"along: {points} points; two ends at least are needed")
    alphas = jnp.linspace(0.0, 1.0, points)
    if bend is not None:
        return alphas, jax.lax.map(lambda alpha: metric_fn(bezier(a, bend, b, alpha)), alphas)
    return alphas, jax.lax.map(lambda alpha: metric_fn(interpolate(a, b, alpha)), alphas)


def instability(values: Float[Array, " P"]) -> Float[Array, ""]:
    """Compute the instability: the highest value on the path minus the mean of its ends (Frankle et al. 2020).

    Example:
      >>> float(lottery.connectivity.instability(jnp.array([0.25, 0.5, 0.25])))
      0.25
    """
    return jnp.max(values) - (values[0] + values[-1]) / 2


def barrier(alphas: Float[Array, " P"], values: Float[Array, " P"]) -> Float[Array, ""]:
    """Compute the error barrier: the highest rise over the straight line between the ends' values; at least 0.

    Entezari et al. 2022 (arXiv:2110.06296), equation 1.

    Example:
      >>> float(lottery.connectivity.barrier(jnp.array([0.0, 0.5, 1.0]), jnp.array([0.25, 0.5, 0.25])))
      0.25
    """
    return jnp.max(values - ((1 - alphas) * values[0] + alphas * values[-1]))


def instability_curve(
    start_fn: Callable[[int], PyTree],
    train_fn: Callable[..., PyTree],
    error_fn: Callable[[PyTree], Array],
    steps: Sequence[int],
    orders: Sequence[int] = (0, 1),
    points: int = 30,
) -> list[dict[str, float | int | bool]]:
    """Measure the instability curve: instability over the step k at which two runs part, one row per k and pair.

    Args:
      start_fn: k -> params of the one run after k steps.
      train_fn: train_fn(params, start_step=k, order=seed) -> params at the end of training.
      error_fn: params -> error in [0, 1], traceable.
      steps: the k.
      orders: seeds of the data orders; every pair gives a row.
      points: on every path.

    Returns:
      Rows {step, first, second, instability, barrier, ends (mean error of the two runs), stable (below 2%)}.

    Raises:
      ValueError: fewer than two different orders.

    Example:
      >>> start_fn = lambda k: {"kernel": jnp.zeros(())}
      >>> train_fn = lambda params, start_step, order: {"kernel": jnp.float32(2 * order - 1)}  # ends at -1 and at 1
      >>> error_fn = lambda params: 1 - params["kernel"] ** 2
      >>> rows = lottery.connectivity.instability_curve(start_fn, train_fn, error_fn, steps=[0], points=3)
      >>> rows[0]["instability"], rows[0]["stable"]
      (1.0, False)
    """
    if len(set(orders)) < 2:
        raise ValueError(f"instability_curve: orders {tuple(orders)}; two different ones at least are needed")
    path = jax.jit(lambda a, b: along(error_fn, a, b, points))
    rows: list[dict[str, float | int | bool]] = []
    for k in steps:
        start = start_fn(k)
        ends = [train_fn(start, start_step=k, order=order) for order in orders]
        for i in range(len(orders)):
            for j in range(i + 1, len(orders)):
                alphas, values = path(ends[i], ends[j])
                rise = float(instability(values))
                row = {"step": k, "first": orders[i], "second": orders[j], "instability": rise}
                mean = float(np.mean([float(values[0]), float(values[-1])]))
                rows.append(row | {"barrier": float(barrier(alphas, values)), "ends": mean, "stable": rise < STABLE})
    return rows
