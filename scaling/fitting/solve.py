"""Many robust fits of one law side by side: damped Newton on the Huber loss, the fits in the minor axis.

A fit minimizes sum_r w_r huber(log L(theta, x_r) - log loss_r), the objective of Hoffmann et al. (2022), section D.3,
with a sum and not a mean over rows. With the curvatures of `scaling.fitting.derivatives`, a step solves
(curvature + damping diag(IRLS)) step = gradient by a Cholesky factorization written out element by element: for five
parameters and many fits that is vector code over the minor axis, where a batched LAPACK call is a loop over tiny
matrices.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scaling.evaluate import Terms, chunks, pad_rows
from scaling.fitting.derivatives import Evaluate, by_autodiff, by_terms
from scaling.fitting.newton import State, advance, begin, run_queue
from scaling.fitting.newton_fast import NewtonWithFloor, floor_of, last_step
from scaling.laws import Law


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
    value: Float[np.ndarray, " S"]
    decrement: Float[np.ndarray, " S"]
    converged: Bool[np.ndarray, " S"]
    iterations: Int[np.ndarray, " S"]


class SolverOptions(NamedTuple):
    """Options of `solve`."""

    newton: bool
    iterations: int
    tol: float
    held: tuple[int, ...]
    chunk: int


# In single precision relative decreases below SINGLE_TOL are rounding. A second pass pays from MANY fits on.
SINGLE_TOL, MANY, SINGLE_CHUNK = 1e-5, 64, 512
BURST = 8  # steps of the compiled program


class Problem(NamedTuple):
    """A fit but for its weights.

    Attributes:
      features: [R, 1] by name.
      target_R1: log losses, or losses.
      means: of the features.
      mixing_PP: see `solve`.
      delta: Huber's threshold.
      over: factor on the loss of positive residuals (predicted too high).
      linear: whether residuals are of losses.
    """

    features: Mapping[str, Any]
    target_R1: Any
    means: Mapping[str, Any]
    mixing_PP: Any
    delta: Any
    over: Any = 1.0
    linear: bool = False


def _mix(mixing_PP: Array, phi_PS: Array) -> Array:
    # Written out: a matrix product with the batch in the minor axis would be transposed there and back.
    return jnp.stack([sum(row[j] * phi_PS[j : j + 1][0] for j in range(len(phi_PS))) for row in mixing_PP])


@partial(jax.jit, static_argnames=("law", "newton", "held", "linear"))
def _solve_compiled(start, weights_RS, problem, iterations, tol, *, law, newton, held, linear):
    def predict(*columns):
        mixed = _mix(problem.mixing_PP, jnp.concatenate(columns))
        found = law.log_loss({name: mixed[i : i + 1] for i, name in enumerate(law.parameters)}, problem.features)
        return jnp.exp(found) if linear else found

    evaluate = by_autodiff(predict, problem.target_R1, problem.delta, newton=newton, over=problem.over)
    _, ended = jax.lax.while_loop(
        lambda carry: (carry[0] < iterations) & ~jnp.all(carry[1].state.done),
        lambda carry: (carry[0] + 1, advance(carry[1], weights_RS, evaluate, tol, held, jnp)),
        (jnp.int32(0), begin(start, jnp)),
    )
    return ended.state


def solve(
    theta_PS: Float[np.ndarray, "P S"],
    weights_RS: Float[np.ndarray, "R S"] | Float[np.ndarray, "R 1"],
    problem: Problem,
    law: Law,
    *,
    newton: bool,
    iterations: int,
    tol: float,
    held: tuple[int, ...] = (),
    chunk: int = 128,
) -> Solved:
    """Minimize from every start, each with its own row weights.

    Args:
      theta_PS: raw parameters to start from.
      weights_RS: weight of every row in every fit (bootstrap counts), or one column for all.
      problem: features, targets, mixing and delta. Fits move in phi with theta = mixing phi, so that a coefficient
        and its exponent are nearly uncorrelated; theta goes in and comes out.
      law: to fit.
      newton: exact curvature; False is the IRLS majorizer alone (cheaper, slow at the end).
      iterations: most steps.
      tol: relative predicted decrease below which a fit has converged.
      held: parameters that stay where they start; phi must equal theta for them (no mixing).
      chunk: fits side by side; few enough that their arrays stay in cache.
    """
    count = theta_PS.shape[1]
    mixing = np.asarray(problem.mixing_PP, np.float64)
    state = State(
        phi=np.linalg.solve(mixing, np.asarray(theta_PS, np.float64)),
        damping=np.full(count, 1e-3),
        decrement=np.full(count, np.inf),
        used=np.zeros(count, np.int32),
        done=np.zeros(count, bool),
        objective=np.full(count, np.inf),
    )
    weights = np.asarray(weights_RS, np.float64)
    run = _in_numpy if law.terms else _compiled
    state = run(state, weights, problem, law, SolverOptions(newton, iterations, tol, held, chunk))
    converged = state.decrement <= tol
    return Solved(mixing @ state.phi, state.objective, state.decrement, converged, state.used)


def _in_numpy(state: State, weights_RS: np.ndarray, problem: Problem, law: Law, options: SolverOptions) -> State:
    """Fit sums of power-law terms by the closed form; nothing is compiled."""
    target, delta, many = np.asarray(problem.target_R1), float(problem.delta), len(state.done) >= MANY
    linear, over = problem.linear, float(problem.over)

    def terms(dtype: Any) -> Terms:
        return Terms(law.terms, law.parameters, problem.features, problem.means, dtype, law.held)

    def queue(start: State, weights_RS: np.ndarray, evaluate: Evaluate, **rest: Any) -> State:
        return run_queue(start, weights_RS, evaluate, iterations=options.iterations, held=options.held, **rest)

    double = terms(np.float64)
    if linear or over != 1 or not (options.newton and many and delta >= 1e-4 and floor_of(double) is not None):
        evaluate = by_terms(double, target, delta, newton=options.newton, linear=linear, over=over)
        return queue(state, weights_RS, evaluate, tol=options.tol, width=options.chunk)
    # Most steps in single precision, at a third of the cost; one step in double ends them, or as many as needed.
    single = State(*(x.astype(np.float32) if x.dtype == np.float64 else x for x in state))
    evaluate = NewtonWithFloor(terms(np.float32), target, delta)
    near = queue(single, weights_RS.astype(np.float32), evaluate, tol=SINGLE_TOL, width=SINGLE_CHUNK, step=True)
    sound = np.isfinite(near.phi).all(0) & (near.decrement <= SINGLE_TOL)
    begun = state._replace(
        phi=np.where(sound, near.phi, state.phi), damping=np.where(sound, near.damping, state.damping)
    )
    ended = last_step(begun, weights_RS, double, target, delta, tol=options.tol, held=options.held, width=options.chunk)
    rest = np.flatnonzero(~ended.done)
    mine = weights_RS if weights_RS.shape[1] == 1 else weights_RS[:, rest]
    evaluate = by_terms(double, target, delta, newton=True)
    more = queue(State(*(x[..., rest] for x in begun)), mine, evaluate, tol=options.tol, width=options.chunk)
    for every, part in zip(ended, more, strict=True):
        every[..., rest] = part
    return ended._replace(used=ended.used + near.used)


def _compiled(state: State, weights_RS: np.ndarray, problem: Problem, law: Law, options: SolverOptions) -> State:
    """Fit any law by one compiled program of a small shape; fits that have ended leave it after every BURST steps."""
    rows = {name: pad_rows(np.asarray(x, np.float64), repeat=True) for name, x in problem.features.items()}
    target = pad_rows(np.asarray(problem.target_R1, np.float64), repeat=True)
    padded = Problem(
        rows,
        target,
        dict(problem.means),
        np.asarray(problem.mixing_PP, float),
        float(problem.delta),
        float(problem.over),
    )
    static = {"law": law, "newton": options.newton, "held": options.held, "linear": problem.linear}
    padded_RS = pad_rows(weights_RS, repeat=False)
    for begun in range(0, options.iterations, BURST):
        left = np.flatnonzero(~state.done)
        if not len(left):
            break
        for mine in chunks(left, min(options.chunk, 32)):
            chunk = State(*(x[..., mine] for x in state))
            own_RS = padded_RS if padded_RS.shape[1] == 1 else padded_RS[:, mine]
            wide = np.broadcast_to(own_RS, (len(target), len(mine)))
            with jax.enable_x64(True):
                double = jax.tree.map(jnp.asarray, padded)
                limits = jnp.int32(min(BURST, options.iterations - begun)), jnp.float64(options.tol)
                ended = _solve_compiled(chunk, wide, double, *limits, **static)
            for every, part in zip(state, ended, strict=True):
                every[..., mine] = np.asarray(part)
    return state
