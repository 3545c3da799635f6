"""Many robust fits of one law side by side: damped Newton on the Huber loss, the fits in the minor axis.

A fit minimises sum_r w_r huber(log L(theta, x_r) - log loss_r), the objective of Hoffmann et al. (2022), section D.3,
with a sum and not a mean over rows. With psi the Huber loss's derivative, two curvatures of it are kept:

- IRLS: J' diag(w psi(r) / r) J, which majorises, so its step descends from anywhere;
- Newton: J' diag(w [|r| <= delta]) J + sum_r w psi(r) Hessian(log L), exact, so the end is reached quadratically.

The step solves (base + damping (IRLS + diag IRLS)) step = gradient by a Cholesky factorisation written out element by
element: for five parameters and many fits that is vector code over the minor axis, where a batched LAPACK call is a
loop over tiny matrices.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

LogLoss = Callable[[Mapping[str, Array], Mapping[str, Array]], Array]
Pair = tuple[int, int]


class Solved(NamedTuple):
    """End points of fits.

    Attributes:
      theta: float64 [P, S], raw parameters.
      value: float64 [S], the objective (sum over rows).
      decrement: float64 [S], Newton's predicted relative decrease of the objective at the end, 0 at an optimum.
      converged: bool [S], the decrement went below the tolerance.
      iterations: int32 [S].
    """

    theta: Float[np.ndarray, "P S"]
    value: Float[np.ndarray, "S"]
    decrement: Float[np.ndarray, "S"]
    converged: Bool[np.ndarray, "S"]
    iterations: Int[np.ndarray, "S"]


class Problem(NamedTuple):
    """What is fitted, weights apart: features [R, 1], log losses [R, 1], mixing [P, P], Huber's delta."""

    features: Mapping[str, Any]
    target_R1: Any
    mixing_PP: Any
    delta: Any


def huber(r: Float[Array, "..."], delta: Float[Array, ""]) -> Float[Array, "..."]:
    """Huber's loss: r^2 / 2 up to |r| = delta, delta (|r| - delta / 2) beyond."""
    size = jnp.abs(r)
    return jnp.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta))


def cholesky_solve(
    matrix: Mapping[Pair, Float[Array, "S"]], right_PS: Float[Array, "P S"]
) -> tuple[Float[Array, "P S"], Bool[Array, "S"]]:
    """Solve S symmetric systems of P unknowns; `matrix[i, j]` for i >= j.

    Returns:
      The solutions, and whether each matrix was positive definite (if not, its solution means nothing).
    """
    size = right_PS.shape[0]
    factor: dict[Pair, Array] = {}
    fine = jnp.ones(right_PS.shape[1], bool)
    for i in range(size):
        for j in range(i + 1):
            s = matrix[i, j] - sum(factor[i, k] * factor[j, k] for k in range(j))
            if i == j:
                fine &= s > 0
                factor[i, i] = jnp.sqrt(jnp.where(s > 0, s, 1.0))
            else:
                factor[i, j] = s / factor[j, j]
    half: list[Array] = []
    for i in range(size):
        half.append((right_PS[i] - sum(factor[i, k] * half[k] for k in range(i))) / factor[i, i])
    solution: dict[int, Array] = {}
    for i in reversed(range(size)):
        rest = sum(factor[k, i] * solution[k] for k in range(i + 1, size))
        solution[i] = (half[i] - rest) / factor[i, i]
    return jnp.stack([solution[i] for i in range(size)]), fine


def _mix(mixing_PP: Array, phi_PS: Array) -> Array:
    # Written out: a matrix product with the batch in the minor axis would be transposed there and back.
    return jnp.stack([sum(row[j] * phi_PS[j : j + 1][0] for j in range(len(phi_PS))) for row in mixing_PP])


def _evaluate(phi_PS: Array, weights_RS: Array, problem: Problem, predict: Callable, newton: bool):
    """Objective [S], gradient [P, S], base curvature and IRLS curvature (lower triangles, stacked) at phi."""
    size, count = phi_PS.shape
    columns = tuple(phi_PS[i : i + 1] for i in range(size))
    basis = [tuple(jnp.full((1, count), float(i == j)) for j in range(size)) for i in range(size)]
    value_RS, push = jax.linearize(lambda *q: predict(q, problem), *columns)
    slopes = [push(*direction) for direction in basis]
    residual = value_RS - problem.target_R1
    large = jnp.abs(residual)
    inside = large <= problem.delta
    pull = weights_RS * jnp.clip(residual, -problem.delta, problem.delta)
    irls_weight = weights_RS * jnp.where(inside, 1.0, problem.delta / jnp.maximum(large, problem.delta))
    objective = jnp.sum(weights_RS * huber(residual, problem.delta), 0)
    gradient = jnp.stack([jnp.sum(slope * pull, 0) for slope in slopes])
    lower = [(i, j) for i in range(size) for j in range(i + 1)]
    irls = jnp.stack([jnp.sum(slopes[i] * slopes[j] * irls_weight, 0) for i, j in lower])
    if not newton:
        return objective, gradient, irls, irls

    def pulled(*q):
        _, back = jax.vjp(lambda *p: predict(p, problem), *q)
        return back(pull)

    _, push_twice = jax.linearize(pulled, *columns)
    bends = [push_twice(*direction) for direction in basis]
    inner = jnp.where(inside, weights_RS, 0.0)
    base = jnp.stack([jnp.sum(slopes[i] * slopes[j] * inner, 0) + bends[i][j][0] for i, j in lower])
    return objective, gradient, base, irls


def _solve_chunk(phi_PS, weights_RS, problem: Problem, predict: Callable, newton: bool, iterations: Array, tol: Array):
    size, count = phi_PS.shape
    lower = [(i, j) for i in range(size) for j in range(i + 1)]

    def propose(point, damping):
        """The step at a point: (step, whether it exists, predicted relative decrease)."""
        objective, gradient, base, irls = point
        diagonal = jnp.stack([irls[k] for k, (i, j) in enumerate(lower) if i == j])
        # A direction that no row feels has zero curvature; the tiny last term leaves it where it is.
        floor = 1e-14 * jnp.max(diagonal, 0) + 1e-300
        matrix = {}
        for k, (i, j) in enumerate(lower):
            matrix[i, j] = base[k] + damping * irls[k] + (damping * irls[k] + floor if i == j else 0.0)
        step, fine = cholesky_solve(matrix, gradient)
        # Residuals of 1e-9 count as none: below, a relative decrease would measure rounding.
        reference = jnp.maximum(objective, 1e-18 * jnp.sum(weights_RS, 0))
        return step, fine, jnp.abs(jnp.sum(gradient * step, 0)) / jnp.maximum(reference, 1e-300)

    def body(state):
        i, phi, trial, tried, point, damping, done, used, decrement = state
        reached = _evaluate(trial, weights_RS, problem, predict, newton)
        better = tried & (reached[0] <= point[0])
        move = better & ~done
        phi = jnp.where(move, trial, phi)
        point = tuple(jnp.where(move, new, old) for new, old in zip(reached, point, strict=True))
        damping = jnp.where(done, damping, jnp.where(better, jnp.maximum(damping / 8, 1e-14), damping * 6))
        step, fine, predicted = propose(point, damping)
        measured = fine & (damping < 1.0) & ~done
        decrement = jnp.where(measured, predicted, decrement)
        used = used + ~done
        # The start itself may be hopeless (overflow); a fit whose damping exploded cannot go down any further.
        done = done | (measured & (predicted <= tol)) | (damping > 1e12) | ~jnp.isfinite(point[0])
        return i + 1, phi, phi - jnp.where(fine, step, 0.0), fine, point, damping, done, used, decrement

    nothing = jnp.zeros((len(lower), count))
    state = (
        jnp.int32(0),
        phi_PS,
        phi_PS,
        jnp.ones(count, bool),
        (jnp.full(count, jnp.inf), jnp.zeros((size, count)), nothing, nothing),
        jnp.full(count, 1e-2),
        jnp.zeros(count, bool),
        jnp.zeros(count, jnp.int32),
        jnp.full(count, jnp.inf),
    )
    state = jax.lax.while_loop(lambda s: (s[0] < iterations) & ~jnp.all(s[6]), body, state)
    _, phi, _, _, (objective, *_), _, _, used, decrement = state
    return phi, objective, decrement, decrement <= tol, used


@partial(jax.jit, static_argnames=("log_loss", "names", "newton"))
def _solve(phi_PS, weights_RS, problem, iterations, tol, *, log_loss, names, newton):
    def predict(columns, problem):
        mixed = _mix(problem.mixing_PP, jnp.concatenate(columns))
        return log_loss({name: mixed[i : i + 1] for i, name in enumerate(names)}, problem.features)

    return _solve_chunk(phi_PS, weights_RS, problem, predict, newton, iterations, tol)


@partial(jax.jit, static_argnames=("log_loss", "names"))
def _predict(theta_PS, features, *, log_loss, names):
    return log_loss({name: theta_PS[i : i + 1] for i, name in enumerate(names)}, features)


def chunks(x: np.ndarray, size: int) -> list[np.ndarray]:
    """Pieces of `size` columns; the last repeats its last column: one shape, so one compiled program."""
    wide = np.concatenate([x, np.repeat(x[:, -1:], -x.shape[1] % size, 1)], 1)
    return np.split(np.ascontiguousarray(wide), wide.shape[1] // size, axis=1)


def predict(
    theta_PS: Float[np.ndarray, "P S"],
    features: Mapping[str, Float[np.ndarray, "R 1"]],
    *,
    log_loss: LogLoss,
    names: tuple[str, ...],
) -> Float[np.ndarray, "R S"]:
    """Log losses of rows under raw parameters, float64."""
    with jax.enable_x64(True):
        inputs = {name: jnp.asarray(values, jnp.float64) for name, values in features.items()}
        pieces = chunks(np.asarray(theta_PS, np.float64), 32)
        out = [np.asarray(_predict(piece, inputs, log_loss=log_loss, names=names)) for piece in pieces]
    return np.concatenate(out, 1)[:, : theta_PS.shape[1]]


def solve(
    theta_PS: Float[np.ndarray, "P S"],
    weights_RS: Float[np.ndarray, "R S"] | Float[np.ndarray, "R 1"],
    problem: Problem,
    *,
    log_loss: LogLoss,
    names: tuple[str, ...],
    newton: bool,
    iterations: int,
    tol: float,
    chunk: int = 32,
) -> Solved:
    """Minimise from every start, each with its own row weights.

    Args:
      theta_PS: raw parameters to start from.
      weights_RS: weight of every row in every fit (bootstrap counts), or one column for all.
      problem: features, targets, mixing and delta. Fits move in phi with theta = mixing phi, so that a coefficient
        and its exponent are nearly uncorrelated; theta goes in and comes out.
      log_loss: the law, of parameters by name [1, S] and features by name [R, 1], giving log loss [R, S].
      names: the parameters' names in the order of theta.
      newton: exact curvature; False takes the IRLS majoriser alone (a third of the cost, slow at the end).
      iterations: most steps.
      tol: relative predicted decrease below which a fit has converged.
      chunk: fits in one vectorised piece; small enough that its arrays stay in cache. A piece ends when all its fits
        have.
    """
    count = theta_PS.shape[1]
    mixing = np.asarray(problem.mixing_PP, np.float64)
    phi_PS = np.linalg.solve(mixing, np.asarray(theta_PS, np.float64))
    weights = np.broadcast_to(np.asarray(weights_RS, np.float64), (len(weights_RS), count))
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), problem)
        limit, small = jnp.int32(iterations), jnp.float64(tol)
        out = [
            _solve(phi, w, double, limit, small, log_loss=log_loss, names=names, newton=newton)
            for phi, w in zip(chunks(phi_PS, chunk), chunks(weights, chunk), strict=True)
        ]
        parts = [[np.asarray(x) for x in piece] for piece in out]
    phi, value, decrement, converged, used = (np.concatenate(x, -1)[..., :count] for x in zip(*parts, strict=True))
    return Solved(mixing @ phi, value, decrement, converged, used)
