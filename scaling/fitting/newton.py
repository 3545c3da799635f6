"""Damped Newton iteration for many fits side by side: step, acceptance, convergence; batched Cholesky solver.

Everything is written for numpy and JAX; `xp` is the arrays' own module. Fits lie in the minor axis.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from scaling.fitting.derivatives import Evaluate, Point, lower


def cholesky_solve(
    matrix: Mapping[tuple[int, int], Float[Array | np.ndarray, " S"]],
    right_PS: Float[Array | np.ndarray, "P S"],
    xp: Any = jnp,
) -> tuple[Float[Array | np.ndarray, "P S"], Bool[Array | np.ndarray, " S"]]:
    """Solve S symmetric systems of P unknowns; `matrix[i, j]` for i >= j; `xp` is the arrays' numpy.

    Returns:
      The solutions, and whether each matrix was positive definite (if not, its solution means nothing).
    """
    size = right_PS.shape[0]
    columns = [xp.stack([matrix[i, j] for i in range(j, size)]) for j in range(size)]
    fine = xp.ones(right_PS.shape[1], bool)
    below: list[Any] = []
    inverse: list[Any] = []
    half: list[Any] = []
    rest = right_PS
    # Column by column: few operations on several rows, where single elements would be many on one.
    for k in range(size):
        pivot = columns[k][:1]
        fine &= pivot[0] > 0
        inverse.append(1.0 / xp.sqrt(xp.where(pivot > 0, pivot, 1.0)))
        below.append(columns[k][1:] * inverse[k])
        half.append(rest[:1] * inverse[k])
        rest = rest[1:] - below[k] * half[k]
        for j in range(k + 1, size):
            columns[j] = columns[j] - below[k][j - k - 1 :] * below[k][j - k - 1 : j - k]
    for k in reversed(range(size)):
        half[k] = half[k] * inverse[k]
        for j in range(k):
            half[j] = half[j] - below[j][k - j - 1 : k - j] * half[k]
    return xp.concatenate(half), fine


class State(NamedTuple):
    """State of S fits: phi [P, S]; damping, decrement, steps used, done, objective [S]."""

    phi: Any
    damping: Any
    decrement: Any
    used: Any
    done: Any
    objective: Any


class Loop(NamedTuple):
    """Carry of the iteration: state, next trial points, whether they exist, and the evaluation at the state.

    `fresh` fits have not been evaluated yet: their trial is their start.
    """

    state: State
    trial: Any
    tried: Any
    fresh: Any
    point: Point


def begin(start: State, xp: Any = np) -> Loop:
    """Make the carry before the first step."""
    size, count = start.phi.shape
    nothing = xp.zeros_like(start.phi)
    curvature = xp.zeros((len(lower(size)), count), start.phi.dtype)
    point = Point(xp.full_like(start.damping, xp.inf), nothing, curvature, nothing)
    return Loop(start, start.phi, xp.ones(count, bool), xp.ones(count, bool), point)


def propose(point: Point, damping: Any, weight: Any, held: tuple[int, ...], xp: Any) -> tuple[Any, Any, Any]:
    """Compute the damped step, whether it exists, and Newton's predicted relative decrease of the objective."""
    entries = lower(len(point.gradient))
    gradient = point.gradient
    if held:
        gradient = xp.stack([row * 0.0 if i in held else row for i, row in enumerate(gradient)])
    # A direction that no row feels has zero curvature; the tiny last term leaves it where it is.
    damped = damping[None] * point.diagonal + (1e-14 * xp.max(point.diagonal, 0) + 1e-300)[None]
    matrix = {
        (i, j): point.curvature[k] + damped[i] if i == j else point.curvature[k] for k, (i, j) in enumerate(entries)
    }
    for i, j in entries if held else []:
        if i in held or j in held:
            matrix[i, j] = xp.full_like(damping, float(i == j))
    step, fine = cholesky_solve(matrix, gradient, xp)
    # Residuals of 1e-9 count as none: below, a relative decrease would measure rounding.
    reference = xp.maximum(xp.maximum(point.objective, 1e-18 * weight), 1e-300)
    return step, fine, xp.abs(xp.sum(gradient * step, 0)) / reference


def advance(loop: Loop, weights_RS: Any, evaluate: Evaluate, tol: Any, held: tuple[int, ...], xp: Any = np) -> Loop:
    """Run one damped-Newton iteration: evaluate the trial, accept or reject it, propose the next."""
    now, trial, tried, fresh, point = loop
    reached = evaluate(trial, weights_RS)
    better = tried & (reached.objective <= point.objective)
    move = better & ~now.done
    point = Point(*(xp.where(move, new, old) for new, old in zip(reached, point, strict=True)))
    damping = xp.where(better, xp.maximum(now.damping / 8, 1e-14), now.damping * 6)
    damping = xp.where(now.done | fresh, now.damping, damping)
    step, fine, predicted = propose(point, damping, xp.sum(weights_RS, 0), held, xp)
    measured = fine & (damping < 1.0) & ~now.done
    after = State(
        phi=xp.where(move, trial, now.phi),
        damping=damping,
        decrement=xp.where(measured, predicted, now.decrement),
        used=now.used + ~now.done,
        # The start itself may be hopeless (overflow); a fit whose damping exploded cannot go down any further.
        done=now.done | (measured & (predicted <= tol)) | (damping > 1e12) | ~xp.isfinite(point.objective),
        objective=point.objective,
    )
    return Loop(after, after.phi - xp.where(fine, step, 0.0), fine, xp.zeros_like(fresh), point)


def run_queue(
    start: State,
    weights_RS: Float[np.ndarray, "R S"] | Float[np.ndarray, "R 1"],
    evaluate: Evaluate,
    *,
    iterations: int,
    tol: float,
    held: tuple[int, ...],
    width: int,
    step: bool = False,
) -> State:
    """Run all fits to their ends in numpy, `width` at a time: one that ends is replaced by the next of the queue.

    Fits need 5 to 40 steps; a batch that waited for its slowest would idle through half of its evaluations.

    Args:
      start: of all fits.
      weights_RS: of the rows, by fit or one column for all.
      evaluate: objective and derivatives.
      iterations: most steps of a fit.
      tol: see `scaling.fitting.solve.solve`.
      held: see there.
      width: fits side by side.
      step: whether a fit that has converged also makes its last proposed step.
    """
    total, shared = len(start.done), weights_RS.shape[1] == 1
    final = State(*(x.copy() for x in start))
    who = np.arange(min(width, total))
    come = len(who)
    loop = begin(State(*(x[..., who] for x in start)))
    mine = weights_RS if shared else np.take(weights_RS, who, axis=1)
    with np.errstate(all="ignore"):
        while len(who):
            loop = advance(loop, mine, evaluate, tol, held)
            over = np.flatnonzero(loop.state.done | (loop.state.used >= iterations))
            if 8 * len(over) < len(who):
                continue
            for every, part in zip(final, loop.state._replace(phi=loop.trial) if step else loop.state, strict=True):
                every[..., who[over]] = part[..., over]
            new = np.arange(come, min(come + len(over), total))
            come += len(new)
            filled, stay = over[: len(new)], np.delete(np.arange(len(who)), over[len(new) :])
            who[filled] = new
            if not shared:
                mine[:, filled] = np.take(weights_RS, new, axis=1)
            _refill(loop, begin(State(*(x[..., new] for x in start))), filled)
            if len(stay) < len(who):
                who, mine, loop = who[stay], mine if shared else np.take(mine, stay, axis=1), _select(loop, stay)
    return final


def _refill(loop: Loop, new: Loop, where: np.ndarray) -> None:
    for old, fresh in zip(_leaves(loop), _leaves(new), strict=True):
        old[..., where] = fresh


def _select(loop: Loop, which: np.ndarray) -> Loop:
    leaves = [np.take(x, which, axis=-1) for x in _leaves(loop)]
    return Loop(State(*leaves[:6]), leaves[6], leaves[7], leaves[8], Point(*leaves[9:]))


def _leaves(loop: Loop) -> list[np.ndarray]:
    return [*loop.state, loop.trial, loop.tried, loop.fresh, *loop.point]
