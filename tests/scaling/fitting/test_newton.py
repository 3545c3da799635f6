import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling.fitting.derivatives import Point, lower
from scaling.fitting.fit import FitConfig, make_problem
from scaling.fitting.newton import State, cholesky_solve, run_queue
from scaling.fitting.solve import solve
from scaling.published import CURVE, KAPLAN
from scaling.rows import make_rows


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_cholesky_against_numpys_solver(xp):
    rng = np.random.default_rng(0)
    half = rng.normal(size=(6, 5, 7))
    full = np.einsum("ris,rjs->ijs", half, half)
    right = rng.normal(size=(5, 7))
    full[:, :, 3] *= -1.0
    with jax.enable_x64(True):
        matrix = {(i, j): xp.asarray(full[i, j]) for i, j in lower(5)}
        found, fine = cholesky_solve(matrix, xp.asarray(right), xp)
    np.testing.assert_array_equal(fine, np.arange(7) != 3)
    for s in np.flatnonzero(np.arange(7) != 3):
        np.testing.assert_allclose(found[:, s], np.linalg.solve(full[:, :, s], right[:, s]), rtol=1e-9)


def test_a_fit_that_cannot_descend_has_not_converged():
    # A slope that no step follows down: damping grows until steps are nothing, which is no optimum.
    def stuck(phi, weights):
        here = np.abs(phi[0]) > 0
        one = np.ones_like(phi)
        return Point(np.where(here, 2.0, 1.0), 0.1 * one, one, one)

    start = State(
        np.zeros((1, 3)), np.full(3, 1e-3), np.full(3, np.inf), np.zeros(3, int), np.zeros(3, bool), np.full(3, np.inf)
    )
    ended = run_queue(start, np.ones((4, 1)), stuck, iterations=200, tol=1e-9, held=(), width=2)
    assert ended.done.all() and (ended.phi == 0).all() and (ended.used < 200).all()
    assert (ended.decrement > 1e-3).all()


@pytest.mark.parametrize("law", [CURVE, KAPLAN], ids=lambda law: law.name)  # by numpy, and compiled
def test_a_fit_that_was_stopped_has_not_converged(law):
    tokens = np.geomspace(1e6, 1e10, 30)
    rows = make_rows({"params": tokens / 20 * np.tile([1.0, 3.0], 15), "tokens": tokens, "loss": 2 + 300 / tokens**0.3})
    config, start = FitConfig(objective="normal"), law.starts()[:, :4]
    problem, weights = make_problem(rows, law, config), np.ones((30, 1))
    for steps in (1, 2):
        stopped = solve(start, weights, problem, law, newton=False, iterations=steps, tol=1e-11)
        assert not stopped.converged.any() and (stopped.iterations == steps).all()
