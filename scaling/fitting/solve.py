"""Many robust fits of one law side by side: damped Newton on the Huber loss, the fits in the minor axis.

A fit minimises sum_r w_r huber(log L(theta, x_r) - log loss_r), the objective of Hoffmann et al. (2022), section D.3,
with a sum and not a mean over rows. With the curvatures of `scaling.fitting.derivatives`, a step solves
(curvature + damping diag(IRLS)) step = gradient by a Cholesky factorisation written out element by element: for five
parameters and many fits that is vector code over the minor axis, where a batched LAPACK call is a loop over tiny
matrices.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scaling.fitting.derivatives import Evaluate, Term, Terms, by_autodiff, by_terms
from scaling.fitting.newton import State, advance, begin, run_queue
from scaling.fitting.newton_fast import ByShares, floor_of, last_step

LogLoss = Callable[[Mapping[str, Array], Mapping[str, Array]], Array]


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


class Course(NamedTuple):
    """How fits go on; see `solve`."""

    newton: bool
    iterations: int
    tol: float
    held: tuple[int, ...]
    chunk: int


# In single precision relative decreases below ROUGH are rounding. MANY fits are worth the second pass over them.
ROUGH, MANY, WIDE = 1e-5, 64, 512
BURST = 8  # steps of the compiled program


class Problem(NamedTuple):
    """What is fitted, weights apart: features and log losses [R, 1], features' means, mixing [P, P], Huber's delta."""

    features: Mapping[str, Any]
    target_R1: Any
    means: Mapping[str, Any]
    mixing_PP: Any
    delta: Any


class Model(NamedTuple):
    """A law as the solver needs it.

    Attributes:
      log_loss: of parameters by name [1, S] and features by name [R, 1], giving log loss [R, S].
      names: the parameters' names in the order of theta.
      terms: its power-law terms, if it is a sum of them and nothing else.
    """

    log_loss: LogLoss
    names: tuple[str, ...]
    terms: tuple[Term, ...] = ()


def _mix(mixing_PP: Array, phi_PS: Array) -> Array:
    # Written out: a matrix product with the batch in the minor axis would be transposed there and back.
    return jnp.stack([sum(row[j] * phi_PS[j : j + 1][0] for j in range(len(phi_PS))) for row in mixing_PP])


@partial(jax.jit, static_argnames=("model", "newton", "held"))
def _solve_compiled(start, weights_RS, problem, iterations, tol, *, model, newton, held):
    def log_loss(*columns):
        mixed = _mix(problem.mixing_PP, jnp.concatenate(columns))
        return model.log_loss({name: mixed[i : i + 1] for i, name in enumerate(model.names)}, problem.features)

    evaluate = by_autodiff(log_loss, problem.target_R1, problem.delta, newton=newton)
    _, ended = jax.lax.while_loop(
        lambda carry: (carry[0] < iterations) & ~jnp.all(carry[1].state.done),
        lambda carry: (carry[0] + 1, advance(carry[1], weights_RS, evaluate, tol, held, jnp)),
        (jnp.int32(0), begin(start, jnp)),
    )
    return ended.state


@partial(jax.jit, static_argnames=("model",))
def _predict(theta_PS, features, *, model):
    return model.log_loss({name: theta_PS[i : i + 1] for i, name in enumerate(model.names)}, features)


def chunks(x: np.ndarray, size: int) -> list[np.ndarray]:
    """Pieces of `size` columns; the last repeats its last column: one shape, so one compiled program."""
    wide = np.concatenate([x, np.repeat(x[..., -1:], -x.shape[-1] % size, -1)], -1)
    return [np.ascontiguousarray(piece) for piece in np.split(wide, wide.shape[-1] // size, axis=-1)]


def padded(rows: int) -> int:
    """Rows after padding: few different numbers of rows, so few compiled programs when rows come one by one."""
    return 16 if rows <= 16 else 32 if rows <= 32 else -(-rows // 64) * 64


def pad_rows(x: np.ndarray, *, repeat: bool) -> np.ndarray:
    """Pad the first axis to `padded`, repeating the last row (or with zeros)."""
    missing = padded(len(x)) - len(x)
    return np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), mode="edge" if repeat else "constant")


def predict(
    theta_PS: Float[np.ndarray, "P S"],
    features: Mapping[str, Float[np.ndarray, "R 1"]],
    model: Model,
) -> Float[np.ndarray, "R S"]:
    """Log losses of rows under raw parameters, float64."""
    theta_PS = np.asarray(theta_PS, np.float64)
    if model.terms:
        terms = Terms(model.terms, model.names, features, dict.fromkeys(features, 0.0))
        with np.errstate(all="ignore"):
            return terms.shares(theta_PS)[0]
    rows = len(next(iter(features.values())))
    with jax.enable_x64(True):
        inputs = {name: jnp.asarray(pad_rows(np.asarray(x, np.float64), repeat=True)) for name, x in features.items()}
        out = [np.asarray(_predict(piece, inputs, model=model)) for piece in chunks(theta_PS, 32)]
    return np.concatenate(out, 1)[:rows, : theta_PS.shape[1]]


def solve(
    theta_PS: Float[np.ndarray, "P S"],
    weights_RS: Float[np.ndarray, "R S"] | Float[np.ndarray, "R 1"],
    problem: Problem,
    model: Model,
    *,
    newton: bool,
    iterations: int,
    tol: float,
    held: tuple[int, ...] = (),
    chunk: int = 128,
) -> Solved:
    """Minimise from every start, each with its own row weights.

    Args:
      theta_PS: raw parameters to start from.
      weights_RS: weight of every row in every fit (bootstrap counts), or one column for all.
      problem: features, targets, mixing and delta. Fits move in phi with theta = mixing phi, so that a coefficient
        and its exponent are nearly uncorrelated; theta goes in and comes out.
      model: the law.
      newton: exact curvature; False takes the IRLS majoriser alone (cheaper, slow at the end).
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
    run = _in_numpy if model.terms else _compiled
    state = run(state, weights, problem, model, Course(newton, iterations, tol, held, chunk))
    converged = state.decrement <= tol
    return Solved(mixing @ state.phi, state.objective, state.decrement, converged, state.used)


def _in_numpy(state: State, weights_RS: np.ndarray, problem: Problem, model: Model, how: Course) -> State:
    """Sums of power-law terms: the closed form, nothing to compile."""
    target, delta, many = np.asarray(problem.target_R1), float(problem.delta), len(state.done) >= MANY

    def terms(dtype: Any) -> Terms:
        return Terms(model.terms, model.names, problem.features, problem.means, dtype)

    def queue(start: State, weights_RS: np.ndarray, evaluate: Evaluate, **rest: Any) -> State:
        return run_queue(start, weights_RS, evaluate, iterations=how.iterations, held=how.held, **rest)

    double = terms(np.float64)
    if not (how.newton and many and delta >= 1e-4 and floor_of(double) is not None):
        evaluate = by_terms(double, target, delta, newton=how.newton)
        return queue(state, weights_RS, evaluate, tol=how.tol, width=how.chunk)
    # The way is gone in single precision, at a third of the cost; one step in double ends it, or as many as it takes.
    single = State(*(x.astype(np.float32) if x.dtype == np.float64 else x for x in state))
    evaluate = ByShares(terms(np.float32), target, delta)
    near = queue(single, weights_RS.astype(np.float32), evaluate, tol=ROUGH, width=WIDE, step=True)
    sound = np.isfinite(near.phi).all(0) & (near.decrement <= ROUGH)
    begun = state._replace(
        phi=np.where(sound, near.phi, state.phi), damping=np.where(sound, near.damping, state.damping)
    )
    ended = last_step(begun, weights_RS, double, target, delta, tol=how.tol, held=how.held, width=how.chunk)
    rest = np.flatnonzero(~ended.done)
    mine = weights_RS if weights_RS.shape[1] == 1 else weights_RS[:, rest]
    evaluate = by_terms(double, target, delta, newton=True)
    more = queue(State(*(x[..., rest] for x in begun)), mine, evaluate, tol=how.tol, width=how.chunk)
    for whole, part in zip(ended, more, strict=True):
        whole[..., rest] = part
    return ended._replace(used=ended.used + near.used)


def _compiled(state: State, weights_RS: np.ndarray, problem: Problem, model: Model, how: Course) -> State:
    """Any law: one program of one small shape; after every BURST steps finished fits leave, the rest close ranks."""
    rows = {name: pad_rows(np.asarray(x, np.float64), repeat=True) for name, x in problem.features.items()}
    target = pad_rows(np.asarray(problem.target_R1, np.float64), repeat=True)
    whole = Problem(rows, target, dict(problem.means), np.asarray(problem.mixing_PP, float), float(problem.delta))
    padded_RS = pad_rows(weights_RS, repeat=False)
    for begun in range(0, how.iterations, BURST):
        left = np.flatnonzero(~state.done)
        if not len(left):
            break
        for mine in chunks(left, min(how.chunk, 32)):
            piece = State(*(x[..., mine] for x in state))
            own_RS = padded_RS if padded_RS.shape[1] == 1 else padded_RS[:, mine]
            wide = np.broadcast_to(own_RS, (len(target), len(mine)))
            with jax.enable_x64(True):
                double = jax.tree.map(jnp.asarray, whole)
                limits = jnp.int32(min(BURST, how.iterations - begun)), jnp.float64(how.tol)
                ended = _solve_compiled(piece, wide, double, *limits, model=model, newton=how.newton, held=how.held)
            for every, part in zip(state, ended, strict=True):
                every[..., mine] = np.asarray(part)
    return state
