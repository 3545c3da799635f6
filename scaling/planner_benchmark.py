"""Benchmark of the planner on simulated loss surfaces: the share of an IsoFLOP grid's FLOPs for the grid's interval.

The true parameters are hidden from both: every run's loss has noise, the law is fitted again after every run, noise is
estimated from residuals, and the interval that ends a search is the one that the planner itself would report.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from scaling.coverage import isoflop_design, simulate_losses
from scaling.fitting.fit import FitConfig, fit
from scaling.optimum import chinchilla_optimum
from scaling.planner import acquire_runs, half_width
from scaling.published import CHINCHILLA
from scaling.rows import Rows, make_rows

LOWEST, HIGHEST = 1e17, 1e19


class PlannerBenchmark(NamedTuple):
    """Planner against grid on one surface.

    Attributes:
      share: the planner's FLOPs over the grid's.
      runs: number of the planner's runs, the initial ones included.
      width, grid_width: half the 95% interval of log N* at the end.
      error, grid_error: error of log N* against the true value.
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
    """Draw parameters of Chinchilla's law: exponents 0.25 to 0.45, coefficients e^5 to e^8, a floor of 1 to 2 nats."""
    alpha, beta = rng.uniform(0.25, 0.45, 2)
    return {
        "A": float(np.exp(rng.uniform(5, 7))),
        "B": float(np.exp(rng.uniform(5, 8))),
        "E": float(rng.uniform(1, 2)),
        "alpha": float(alpha),
        "beta": float(beta),
    }


def candidate_runs(grid: Rows, *, budgets: int = 9, sizes: int = 25) -> Rows:
    """Make candidate runs: sizes of a range four times wider than the grid's, at budgets of the grid's range."""
    params = np.geomspace(grid["params"].min() / 4, grid["params"].max() * 4, sizes)
    flops = np.geomspace(grid["flops"].min(), grid["flops"].max(), budgets)
    n, c = (x.ravel() for x in np.meshgrid(params, flops))
    rows = make_rows({"params": n, "flops": c, "loss": np.ones(n.size)}, "candidates")
    # Here the law holds everywhere; real runs far off the grid's tokens per parameter would test it.
    ratio, known = rows["tokens"] / rows["params"], grid["tokens"] / grid["params"]
    return rows.take((ratio > known.min() / 4) & (ratio < known.max() * 4))


def benchmark_planner(
    seed: int, *, noise: float = 0.005, target: float = 1e21, begin: int = 2, most: int = 150
) -> PlannerBenchmark:
    """Run the planner against an IsoFLOP grid (5 budgets of 7 sizes about the true optima) on a random surface.

    Args:
      seed: of the surface and the noise.
      noise: standard deviation of log loss.
      target: FLOPs whose N* is wanted.
      begin: the planner starts from the grid's cheapest budgets, their losses drawn anew.
      most: runs it may acquire.
    """
    rng = np.random.default_rng(seed)
    truth = random_truth(rng)
    # A fit that has not converged in 60 steps is in a flat valley; the next run adds curvature.
    config = FitConfig(objective="normal", polish_steps=60)
    grid = simulate_losses(isoflop_design(truth, budgets=5, sizes=7, lowest=LOWEST, highest=HIGHEST), truth, noise, rng)
    # A coarse grid of starts: exponents of a loss curve are not 0 or 2.
    starts = np.array(list(itertools.product((4.0, 7.0), (4.0, 8.0), (0.0, 0.5), (0.25, 0.45), (0.25, 0.45)))).T
    grid_fit = fit(grid, CHINCHILLA, config, starts=starts)
    wanted = half_width(grid_fit, target)
    order = np.argsort(grid["flops"], kind="stable")
    first = simulate_losses(grid.take(order[: 7 * begin]), truth, noise, rng)
    found = acquire_runs(
        first,
        CHINCHILLA,
        simulate_losses(candidate_runs(grid), truth, noise, rng),
        budget=target,
        wanted=wanted,
        most=most,
        config=config,
        starts=starts,
    )
    exact = np.log(chinchilla_optimum(truth, [target]).params[0, 0])

    def error(parameters: Mapping[str, float]) -> float:
        return float(np.log(chinchilla_optimum(parameters, [target]).params[0, 0]) - exact)

    return PlannerBenchmark(
        share=found.flops / float(grid["flops"].sum()),
        runs=len(found.rows),
        width=found.widths[-1],
        grid_width=wanted,
        error=error(found.fitted.parameters),
        grid_error=error(grid_fit.parameters),
        reached=found.widths[-1] <= wanted,
    )
