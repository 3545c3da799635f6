"""Objective, gradient and curvature of the Huber loss of a law, for many parameter vectors side by side.

Two implementations of the same numbers. Any law can be differentiated by JAX. A sum of power-law terms has a closed
form: with p_k the share of term k in the loss and z_k its row of (1, +-features), the slopes are p_k z_k, and every sum
over rows is a product of a fixed matrix with weights. That needs six arrays of rows x fits where automatic
differentiation needs thirty, and runs in numpy: nothing to compile.

Residuals are of log L, or of L itself ("linear"): there the terms take the place of their shares. A loss that the law
predicts too high may count `over` times. Writing psi for Huber's derivative, there are two curvatures, as lower
triangles:

- IRLS: J' diag(w psi(r) / r) J, which majorizes, so its step descends from anywhere; its diagonal damps both;
- Newton: J' diag(w [|r| <= delta]) J + sum_r w psi(r) Hessian(log L or L), exact, so convergence is quadratic.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scaling.evaluate import ScratchBuffers, Terms

Evaluate = Callable[[Any, Any], "Point"]


class Point(NamedTuple):
    """At S vectors of parameters: objective [S], gradient [P, S], a curvature's triangle [T, S], IRLS diagonal [P, S].

    Where terms share an exponent the diagonal is an upper bound: it only damps.
    """

    objective: Any
    gradient: Any
    curvature: Any
    diagonal: Any


class Weights(NamedTuple):
    """Parts of the Huber loss [R, S] times the rows' weights: loss, psi, and both curvatures by residual."""

    loss: Any
    pull: Any
    inside: Any
    irls: Any


def lower(size: int) -> list[tuple[int, int]]:
    """Indices of a lower triangle in the order in which curvatures are stacked."""
    return [(i, j) for i in range(size) for j in range(i + 1)]


def _weigh(residual_RS: Any, weights_RS: Any, delta: Any, over: Any, xp: Any) -> Weights:
    """With c = clip(r), Huber's loss is c (r - c / 2), and psi / r is min(1, delta / |r|)."""
    large = xp.abs(residual_RS)
    weights_RS = weights_RS * xp.where(residual_RS > 0, over, 1.0)
    clipped = xp.clip(residual_RS, -delta, delta)
    pull = weights_RS * clipped
    return Weights(
        loss=pull * (residual_RS - 0.5 * clipped),
        pull=pull,
        inside=weights_RS * (large <= delta),
        irls=weights_RS * (delta / xp.maximum(large, delta)),
    )


def by_autodiff(
    predict: Callable[..., Array], target_R1: Array, delta: Array, *, newton: bool, over: Array | float = 1.0
) -> Evaluate:
    """Make the evaluation of any law by automatic differentiation.

    Args:
      predict: P arrays [1, S] -> log losses, or losses, [R, S].
      target_R1: the rows'.
      delta: Huber's threshold.
      newton: Newton's curvature, else that of IRLS, at a third of the cost.
      over: factor on the loss of positive residuals.
    """

    def evaluate(phi_PS: Array, weights_RS: Array) -> Point:
        size, count = phi_PS.shape
        columns = tuple(phi_PS[i : i + 1] for i in range(size))
        basis = [tuple(jnp.full((1, count), float(i == j)) for j in range(size)) for i in range(size)]
        value_RS, push = jax.linearize(predict, *columns)
        slopes = [push(*direction) for direction in basis]
        parts = _weigh(value_RS - target_R1, weights_RS, delta, over, jnp)
        objective = jnp.sum(parts.loss, 0)
        gradient = jnp.stack([jnp.sum(slope * parts.pull, 0) for slope in slopes])
        diagonal = jnp.stack([jnp.sum(slope * slope * parts.irls, 0) for slope in slopes])
        if not newton:
            irls = [jnp.sum(slopes[i] * slopes[j] * parts.irls, 0) for i, j in lower(size)]
            return Point(objective, gradient, jnp.stack(irls), diagonal)

        def pulled(*q: Array) -> tuple[Array, ...]:
            _, back = jax.vjp(predict, *q)
            return back(parts.pull)

        _, push_twice = jax.linearize(pulled, *columns)
        bends = [push_twice(*direction) for direction in basis]
        exact = [jnp.sum(slopes[i] * slopes[j] * parts.inside, 0) + bends[i][j][0] for i, j in lower(size)]
        return Point(objective, gradient, jnp.stack(exact), diagonal)

    return evaluate


def by_terms(
    terms: Terms,
    target_R1: Float[np.ndarray, "R 1"],
    delta: float,
    *,
    newton: bool,
    linear: bool = False,
    over: float = 1.0,
) -> Callable[[np.ndarray, np.ndarray], Point]:
    """Make the evaluation of a sum of power-law terms in closed form, in numpy; see `by_autodiff`."""
    buffers, target = ScratchBuffers(terms.dtype), target_R1.astype(terms.dtype)

    def evaluate(phi_PS: np.ndarray, weights_RS: np.ndarray) -> Point:
        rows, count = len(target_R1), phi_PS.shape[1]
        residual, share = terms.shares(phi_PS, buffers)
        if linear:
            np.exp(residual, out=residual)
            for part in share:
                part *= residual
        # Few arrays, each reused: together they stay in the cache.
        clipped, pull, product = (buffers.get(name, rows, count) for name in ("total", "pull", "product"))
        residual -= target
        if over != 1:
            weights_RS = weights_RS * np.where(residual > 0, over, 1.0)
        np.clip(residual, -delta, delta, out=clipped)
        np.multiply(weights_RS, clipped, out=pull)
        # Huber's loss is c (r - c / 2) with c = clip(r), and psi / r is min(1, delta / |r|).
        objective = np.einsum("rs,rs->s", pull, residual) - 0.5 * np.einsum("rs,rs->s", pull, clipped)
        inside = clipped == residual
        irls = np.abs(residual, out=residual)
        np.maximum(irls, delta, out=irls)
        np.divide(delta, irls, out=irls)
        irls *= weights_RS
        if newton:
            weight = np.multiply(weights_RS, inside, out=clipped)
            weight -= 0.0 if linear else pull
        else:
            weight = irls
        gradient, diagonal = np.zeros_like(phi_PS), np.zeros_like(phi_PS)
        curvature: dict[tuple[int, int], Any] = {}
        for k, index in enumerate(terms.where):
            summed = terms.design[k].T @ np.multiply(pull, share[k], out=product)
            if newton:
                terms.gather((k, k), product, curvature)
            np.multiply(share[k], share[k], out=product)
            product *= irls
            squared = terms.squares[k] @ product
            for row, i in enumerate(index):
                gradient[i] += summed[row]
                diagonal[i] += squared[row]
            weighed = np.multiply(weight, share[k], out=buffers.get("weighed", rows, count))
            for n in range(k + 1):
                terms.gather((k, n), np.multiply(weighed, share[n], out=product), curvature)
        return Point(objective, gradient, np.stack([curvature[place] for place in lower(terms.size)]), diagonal)

    return evaluate
