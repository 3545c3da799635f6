"""Variable projection: for given exponents, E + A / N^alpha + B / D^beta is linear in (E, A, B).

Golub & Pereyra (1973). The outer search has two dimensions instead of five and cannot stall in a flat valley between a
coefficient and its exponent; the inner solve is non-negative least squares, so no term comes out negative. The
objective is squares of relative residuals, near those of log loss when residuals are small.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize, nnls

from scaling.fitting.fit import check_count
from scaling.published import CHINCHILLA
from scaling.rows import Rows


class Projected(NamedTuple):
    """Natural parameters by name, the objective, and whether the outer search converged."""

    parameters: dict[str, float]
    value: float
    converged: bool


def project(
    rows: Rows, alpha: float, beta: float, weights: Float[np.ndarray, "R"] | None = None
) -> tuple[Float[np.ndarray, "3"], float]:
    """Best non-negative (E, A, B) at given exponents, and the sum over rows of squared relative residuals."""
    root = np.ones(len(rows)) if weights is None else np.sqrt(weights)
    # About the geometric means, so that columns are near 1 whatever the exponents are.
    n = np.log(rows["params"] / np.exp(np.log(rows["params"]).mean()))
    d = np.log(rows["tokens"] / np.exp(np.log(rows["tokens"]).mean()))
    columns = np.stack([np.ones(len(rows)), np.exp(-alpha * n), np.exp(-beta * d)], 1) / rows["loss"][:, None]
    coefficients, residual = nnls(columns * root[:, None], root)
    scale = np.exp([0.0, alpha * np.log(rows["params"]).mean(), beta * np.log(rows["tokens"]).mean()])
    return coefficients * scale, float(residual**2)


def fit_projected(
    rows: Rows, *, weights: Float[np.ndarray, "R"] | None = None, exponents: tuple[float, ...] = (0.1, 0.3, 0.6, 1.0)
) -> Projected:
    """Fit Chinchilla's law by variable projection: a grid of exponents, then Nelder-Mead from its best.

    Raises:
      ValueError: fewer rows than the law's five parameters.
    """
    check_count(rows, CHINCHILLA)
    grid = [(project(rows, a, b, weights)[1], a, b) for a in exponents for b in exponents]
    _, alpha, beta = min(grid)
    found = minimize(
        lambda logs: project(rows, float(np.exp(logs[0])), float(np.exp(logs[1])), weights)[1],
        np.log([alpha, beta]),
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 2000},
    )
    alpha, beta = np.exp(found.x).tolist()
    (e, a, b), value = project(rows, alpha, beta, weights)
    return Projected(
        {"A": float(a), "B": float(b), "E": float(e), "alpha": alpha, "beta": beta}, value, bool(found.success)
    )
