"""Races on simulated surfaces: how much of an IsoFLOP grid's FLOPs the planner needs for the grid's interval.

Nobody is told the truth: every run's loss has noise, the law is fitted again after every purchase, noise is estimated
from residuals, and the interval that ends a race is the one the planner itself would report.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from scaling.coverage import isoflop_design
from scaling.fitting.fit import FitConfig, fit
from scaling.optimum import chinchilla_optimum
from scaling.planner import buy, half_width
from scaling.published import CHINCHILLA
from scaling.rows import Rows, make_rows

LOWEST, HIGHEST = 1e17, 1e19


class Race(NamedTuple):
    """One surface.

    Attributes:
      share: the planner's FLOPs over the grid's.
      runs: how many runs it bought, with those it began with.
      width, grid_width: half the 95% interval of log N* that each ended with.
      error, grid_error: how far each one's log N* is from the truth.
      reached: whether the planner's interval became as narrow as the grid's.
    """

    share: float
    runs: int
    width: float
    grid_width: float
    error: float
    grid_error: float
    reached: bool


def random_truth(rng: np.random.Generator) -> dict[str, float]:
    """Chinchilla's law with exponents of 0.25 to 0.45, coefficients e^5 to e^8 and a floor of 1 to 2 nats."""
    alpha, beta = rng.uniform(0.25, 0.45, 2)
    return {
        "A": float(np.exp(rng.uniform(5, 7))),
        "B": float(np.exp(rng.uniform(5, 8))),
        "E": float(rng.uniform(1, 2)),
        "alpha": float(alpha),
        "beta": float(beta),
    }


def measured(rows: Rows, truth: Mapping[str, float], noise: float, rng: np.random.Generator) -> Rows:
    """The rows with losses of the truth and normal noise of log loss."""
    theta = CHINCHILLA.raw(truth)[:, None]
    mean = CHINCHILLA.predict(theta, CHINCHILLA.gather(rows))[:, 0]
    return Rows({**rows.columns, "loss": np.exp(mean + noise * rng.standard_normal(len(rows)))}, rows.source)


def shop(grid: Rows, *, budgets: int = 9, sizes: int = 25) -> Rows:
    """Runs that can be bought, each once: sizes four times wider than the grid's, at budgets of the grid's range."""
    params = np.geomspace(grid["params"].min() / 4, grid["params"].max() * 4, sizes)
    flops = np.geomspace(grid["flops"].min(), grid["flops"].max(), budgets)
    n, c = (x.ravel() for x in np.meshgrid(params, flops))
    rows = make_rows({"params": n, "flops": c, "loss": np.ones(n.size)}, "candidates")
    # The law is the truth everywhere here; in life, runs far off the grid's tokens per parameter would test it too.
    ratio, known = rows["tokens"] / rows["params"], grid["tokens"] / grid["params"]
    return rows.take((ratio > known.min() / 4) & (ratio < known.max() * 4))


def race(
    seed: int, *, noise: float = 0.005, target: float = 1e21, begin: int = 2, most: int = 150, patience: int = 1
) -> Race:
    """A surface, its grid (5 budgets of 7 sizes about the true optima), and the planner.

    The planner begins with the grid's `begin` cheapest budgets, its losses drawn anew, and buys at most `most` runs.
    """
    rng = np.random.default_rng(seed)
    truth = random_truth(rng)
    # A fit that has not converged in 60 steps is in a flat valley, which the next run will end.
    config = FitConfig(objective="normal", polish_steps=60)
    grid = measured(isoflop_design(truth, budgets=5, sizes=7, lowest=LOWEST, highest=HIGHEST), truth, noise, rng)
    # A coarse grid of starts: exponents of a loss curve are not 0 or 2.
    starts = np.array(list(itertools.product((4.0, 7.0), (4.0, 8.0), (0.0, 0.5), (0.25, 0.45), (0.25, 0.45)))).T
    whole = fit(grid, CHINCHILLA, config, starts=starts)
    wanted = half_width(whole, target)
    order = np.argsort(grid["flops"], kind="stable")
    first = measured(grid.take(order[: 7 * begin]), truth, noise, rng)
    found = buy(
        first,
        CHINCHILLA,
        measured(shop(grid), truth, noise, rng),
        budget=target,
        wanted=wanted,
        most=most,
        config=config,
        starts=starts,
    )
    exact = np.log(chinchilla_optimum(truth, [target]).params[0, 0])

    def error(parameters: Mapping[str, float]) -> float:
        return float(np.log(chinchilla_optimum(parameters, [target]).params[0, 0]) - exact)

    return Race(
        share=found.flops / float(grid["flops"].sum()),
        runs=len(found.rows),
        width=found.widths[-1],
        grid_width=wanted,
        error=error(found.fitted.parameters),
        grid_error=error(whole.parameters),
        reached=found.widths[-1] <= wanted,
    )
