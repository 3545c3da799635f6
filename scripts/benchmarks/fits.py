"""Fits beside scipy's, in one run on one core: `python scripts/benchmarks/fits.py --runs=RUNS.csv --drop_highest=5`.

scipy's L-BFGS-B gets the same objective with its analytic gradient in numpy, from the same starts, with tolerances that
reach the same optimum. Its time for a grid is the mean over `rival_starts` evenly chosen starts times their number.
"""

import os
import time

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize

_RUNS = flags.DEFINE_string("runs", None, "CSV of runs.", required=True)
_DROP = flags.DEFINE_integer("drop_highest", 5, "Rows with the highest losses to leave out.")
_RESAMPLES = flags.DEFINE_integer("resamples", 4000, "Bootstrap resamples.")
_RIVAL = flags.DEFINE_integer("rival_starts", 90, "Starts, and resamples, that scipy is timed on.")
_OPTIONS = {"ftol": 1e-15, "gtol": 1e-12, "maxiter": 5000, "maxfun": 20000}


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


def rival(starts, rows, counts) -> tuple[float, np.ndarray]:
    """Seconds per fit, and objectives reached, of scipy from columns of `starts` under columns of `counts`."""
    n, d, y = np.log(rows["params"]), np.log(rows["tokens"]), np.log(rows["loss"])
    began = time.perf_counter()
    found = [
        minimize(objective, s, args=(n, d, y, c), jac=True, method="L-BFGS-B", options=_OPTIONS).fun
        for s, c in zip(starts.T, counts.T, strict=True)
    ]
    return (time.perf_counter() - began) / len(found), np.array(found)


def main(argv) -> None:
    """Pin to one core before any array exists, time both, print."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}: give --runs=FILE")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from scaling.fitting.bootstrap import bootstrap, resamples
    from scaling.fitting.fit import fit
    from scaling.published import CHINCHILLA
    from scaling.rows import read_csv

    imported = time.process_time()
    rows = read_csv(_RUNS.value).without_highest_losses(_DROP.value)
    clock, cpu = time.perf_counter, time.process_time
    t0, c0 = clock(), cpu()
    fitted = fit(rows, CHINCHILLA)
    t1 = clock()
    boot = bootstrap(fitted, _RESAMPLES.value)
    t2, c2 = clock(), cpu()
    few = _RIVAL.value
    starts = CHINCHILLA.starts()
    chosen = starts[:, np.linspace(0, starts.shape[1] - 1, few).astype(int)]
    per_start, _ = rival(chosen, rows, np.ones((len(rows), few)))
    counts = resamples(few, len(rows))
    per_refit, reached = rival(np.repeat(fitted.theta[:, None], few, 1), rows, counts)
    worse = np.max(boot.value_B[:few] / reached - 1) if few <= _RESAMPLES.value else np.nan
    total, refit = starts.shape[1], (t2 - t1) / _RESAMPLES.value
    table = Table(title=f"{len(rows)} runs, {total} starts, {_RESAMPLES.value} resamples, one core")
    for heading in ("what", "tessera", "scipy L-BFGS-B", "ratio"):
        table.add_column(heading)

    def row(what, ours, theirs):
        table.add_row(what, f"{ours:.4g} s", f"{theirs:.4g} s", f"{theirs / ours:.1f}")

    row("one start of the grid", (t1 - t0) / total, per_start)
    row("the grid", t1 - t0, per_start * total)
    row("one resample; scipy from the full fit's optimum alone", refit, per_refit)
    row("one resample; scipy from every start of the grid, as equal work asks", refit, per_start * total)
    row("grid and bootstrap; scipy from every start", t2 - t0, per_start * total * (1 + _RESAMPLES.value))
    console = Console(width=140)
    console.print(table)
    console.print(f"grid and bootstrap, from the first call: {t2 - t0:.2f} s ({c2 - c0:.2f} s of processor time)")
    console.print(f"processor time of the imports before: {imported:.2f} s")
    console.print(f"scipy's time for many starts is its mean over {few}, times their number")
    console.print(f"largest relative excess of a resample's objective over scipy's: {worse:.1e}")


if __name__ == "__main__":
    app.run(main)
