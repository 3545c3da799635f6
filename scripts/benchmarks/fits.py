"""Fits of Chinchilla's law beside scipy's, on one core.

scipy's L-BFGS-B gets the same objective with its analytic gradient in numpy, from the same starts, with tolerances that
reach the same optimum. It is timed on evenly chosen starts; rates are fits per second.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize

from scaling.coverage import EPOCH, isoflop_design
from scaling.fitting.bootstrap import bootstrap, resamples
from scaling.fitting.fit import fit
from scaling.published import CHINCHILLA
from scaling.tables import read_csv
from scripts.benchmarks.timing import Contest, Row
from tessera.infra.schema import Schema

OPTIONS = {"ftol": 1e-15, "gtol": 1e-12, "maxiter": 5000, "maxfun": 20000}


@dataclass(frozen=True)
class FitBenchmark:
    """The grid of starts and the bootstrap of a table.

    Attributes:
      suite: the benchmark's name.
      cores: that the process may use; 0 is all.
      runs: CSV of runs; "" makes as many from the published law with noise.
      drop_highest: rows with the highest losses to leave out.
      resamples: bootstrap resamples.
      scipy_starts: starts, and resamples, that scipy is timed on.
      rounds: that are counted.
    """

    suite: str = "fits"
    cores: int = 1
    runs: str = ""
    drop_highest: int = 0
    resamples: int = 1000
    scipy_starts: int = 30
    rounds: int = 3


SCHEMA = Schema(FitBenchmark)


def rows(config) -> Iterator[Row]:
    """The grid of starts, and the bootstrap, each in fits per second."""
    table = read_csv(config.runs) if config.runs else isoflop_design(EPOCH, budgets=7, sizes=35, noise=0.005)
    table = table.without_highest_losses(config.drop_highest)
    starts = CHINCHILLA.starts()
    few = config.scipy_starts
    chosen = starts[:, np.linspace(0, starts.shape[1] - 1, few).astype(int)]
    ours: dict[str, Any] = {"fitted": fit(table, CHINCHILLA)}

    def grid():
        ours["fitted"] = fit(table, CHINCHILLA)

    def resampled():
        ours["boot"] = bootstrap(ours["fitted"], config.resamples)

    counts = resamples(few, len(table))
    reached: dict[str, Any] = {}

    def refit():
        reached["values"] = scipy_fits(np.repeat(ours["fitted"].theta[:, None], few, 1), table, counts)

    name, scipy = "tessera", "scipy L-BFGS-B"
    cases = {
        f"{len(table)} runs, {starts.shape[1]} starts": (
            grid,
            lambda: scipy_fits(chosen, table, np.ones((len(table), few))),
        ),
        f"{len(table)} runs, {config.resamples} resamples; scipy from the full fit's optimum": (resampled, refit),
    }
    work = [{name: float(starts.shape[1]), scipy: float(few)}, {name: float(config.resamples), scipy: float(few)}]
    for (case, (mine, theirs)), units in zip(cases.items(), work, strict=True):
        found = Contest(case, {name: mine, scipy: theirs}, scipy, units, config.rounds).rows()
        if "values" in reached and few <= config.resamples:
            # Equal resamples: how much worse the worst of ours ends.
            excess = float(np.max(ours["boot"].value_B[:few] / reached["values"] - 1))
            found = [row if row.name != name else _with(row, excess) for row in found]
        yield from found


def _with(row: Row, excess: float) -> Row:
    return Row(
        row.case, row.name, row.seconds, row.rate, row.ratio, row.baseline, {"largest excess of objective": excess}
    )


def objective(theta, n, d, y, counts, delta=1e-3):
    """Huber loss of log loss under Chinchilla's law with its gradient."""
    parts = np.stack([theta[0] - theta[3] * n, theta[1] - theta[4] * d, np.full(len(n), theta[2])])
    top = parts.max(0)
    share = np.exp(parts - top)
    total = share.sum(0)
    residual = top + np.log(total) - y
    share /= total
    size = np.abs(residual)
    value = counts @ np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
    pull = share * (counts * np.clip(residual, -delta, delta))
    return value, np.array([pull[0].sum(), pull[1].sum(), pull[2].sum(), -pull[0] @ n, -pull[1] @ d])


def scipy_fits(starts, table, counts) -> np.ndarray:
    """Objectives that scipy reaches from columns of `starts` under columns of `counts`."""
    n, d, y = np.log(table["params"]), np.log(table["tokens"]), np.log(table["loss"])
    return np.array(
        [
            minimize(objective, s, args=(n, d, y, c), jac=True, method="L-BFGS-B", options=OPTIONS).fun
            for s, c in zip(starts.T, counts.T, strict=True)
        ]
    )
