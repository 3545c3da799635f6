"""Check that fits can be trusted.

coverage: sweeps simulated from Chinchilla's law, and how often 95% intervals hold the truth.
planner: surfaces on which the planner races an IsoFLOP grid for the grid's interval.
conventions: the published runs counted under every convention, fitted again.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from scaling.conventions import CHINCHILLA_SHAPES, effects, nearest_shapes
from scaling.coverage import CHINCHILLA_QUANTITIES, EPOCH, Tail, isoflop_design, simulate_coverage
from scaling.fitting.fit import FitConfig, Objective
from scaling.isoflop import nearest_budgets
from scaling.planner_benchmark import benchmark_planner
from scaling.published import CHINCHILLA
from scaling.tables import read_csv
from scripts.benchmarks.timing import Row
from tessera.infra.errors import ConfigError
from tessera.infra.schema import Schema


@dataclass(frozen=True)
class Audit:
    """What to audit and how much of it.

    Attributes:
      suite: the benchmark's name.
      cores: that the process may use; 0 is all.
      what: "coverage", "planner" or "conventions".
      sweeps: simulated sweeps of each kind, or surfaces.
      resamples: bootstrap resamples of each fit.
      runs: CSV of runs, for conventions.
      drop_highest: rows with the highest losses to leave out, for conventions.
    """

    suite: str = "audit"
    cores: int = 0
    what: Literal["coverage", "planner", "conventions"] = "coverage"
    sweeps: int = 500
    resamples: int = 400
    runs: str = ""
    drop_highest: int = 5


SCHEMA = Schema(Audit)
# (budgets, sizes, objective, tail of the noise, its standard deviation in log loss)
KINDS: tuple[tuple[int, int, Objective, Tail, float], ...] = (
    (5, 9, "normal", "normal", 0.005),
    (5, 9, "huber", "normal", 0.005),
    (5, 9, "huber", "student", 0.005),
    (9, 15, "normal", "normal", 0.01),
    (9, 15, "huber", "normal", 0.01),
)
# Budgets of Hoffmann et al. (2022), figure 3.
BUDGETS = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on the terminal, cells as they are written elsewhere: three decimals for numbers."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=160).print(table)


def coverage(config: Any) -> None:
    """Shares of sweeps whose intervals hold the truth."""
    rows = []
    for budgets, sizes, objective, tail, noise in KINDS:
        found = simulate_coverage(
            isoflop_design(EPOCH, budgets=budgets, sizes=sizes),
            CHINCHILLA,
            EPOCH,
            CHINCHILLA_QUANTITIES,
            noise=noise,
            sweeps=config.sweeps,
            resampled=config.resamples,
            config=FitConfig(objective=objective),
            tail=tail,
            profiled=("alpha", "beta"),
        )
        name = f"{budgets * sizes} runs, {tail} noise {noise:.1%}, {objective}"
        rows.append([name, *found.share.values(), *found.profiled.values(), found.new_run])
    columns = ["sweep and fit", *CHINCHILLA_QUANTITIES, "alpha (profile)", "beta (profile)", "a new run"]
    show(f"Share of {config.sweeps} simulated sweeps whose 95% interval holds the truth", columns, rows)


def planner(config: Any) -> None:
    """Races, summed up."""
    races = [benchmark_planner(seed) for seed in range(config.sweeps)]
    share = np.array([r.share for r in races])
    low, middle, high = (float(x) for x in np.percentile(share, [5, 50, 95]))
    error, width, grid_error, grid_width = np.array([[r.error, r.width, r.grid_error, r.grid_width] for r in races]).T
    reached = float(np.mean([r.reached for r in races]))
    rows = [
        ("surfaces on which the planner's interval became as narrow as the grid's", reached),
        ("its FLOPs over the grid's: median", middle),
        ("5th and 95th percentile", f"{low:.3f}, {high:.3f}"),
        ("largest", float(share.max())),
        ("share of surfaces at 0.5 or less", float(np.mean(share <= 0.5))),
        ("root mean square error of log N*, planner", float(np.sqrt(np.mean(error**2)))),
        ("the same, grid", float(np.sqrt(np.mean(grid_error**2)))),
        ("planner's 95% intervals that hold the truth", float(np.mean(np.abs(error) <= width))),
        ("the grid's", float(np.mean(np.abs(grid_error) <= grid_width))),
    ]
    show(f"{len(races)} simulated surfaces, noise 0.5% of loss", ("what", "value"), rows)


def conventions(config: Any) -> None:
    """Fitted exponents by convention."""
    rows = read_csv(config.runs).without_highest_losses(config.drop_highest)
    which = nearest_shapes(rows["params"], CHINCHILLA_SHAPES)
    groups = nearest_budgets(rows["flops"], BUDGETS)
    found = effects(rows, groups=groups, resampled=config.resamples)
    table = [
        (
            e.convention,
            *(e.parameters[name] for name in ("alpha", "beta", "E")),
            e.a,
            f"{e.a_interval[0]:.3f} to {e.a_interval[1]:.3f}" if e.a_interval else "not measured",
            e.a_counted,
            e.a_isoflop,
        )
        for e in found
    ]
    columns = ("convention", "alpha", "beta", "E", "a, C = 6ND", "95% interval", "a, C as counted", "a, approach 2")
    show(f"{len(rows)} runs, {len(np.unique(which))} shapes of table A9, counted and fitted again", columns, table)


def rows(config: Any) -> Iterator[Row]:
    """Print the audit that was asked for; the row says what it took.

    Raises:
      ConfigError: conventions without a table of runs.
    """
    if config.what == "conventions" and not config.runs:
        raise ConfigError("config.runs: the audit of conventions needs a CSV of runs")
    began, processor = time.perf_counter(), time.process_time()
    {"coverage": coverage, "planner": planner, "conventions": conventions}[config.what](config)
    seconds = time.perf_counter() - began
    yield Row(config.what, "audit", seconds, 1 / seconds, more={"processor s": time.process_time() - processor})
