"""Adaptive sweeps: a first table of cheap readouts, then the readouts that shrink the interval of log N* most per FLOP.

Candidates are the readouts of a plan. A size that was trained before continues from its trunk, so a readout costs only
its new steps. Every choice is a function of the rows so far, so a sweep that is killed and started again chooses the
same runs in the same order.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from scaling.fitting.fit import Fit, FitConfig, fit
from scaling.laws import Law
from scaling.planner import half_width, next_run
from scaling.published import CHINCHILLA
from scaling.rows import Rows, make_rows
from scaling.sweeps.plan import PlannedRun, Readout
from scaling.sweeps.store import Row

LAW: Law = CHINCHILLA
# Exponents of a loss curve are not 0 or 2: a coarse grid of starts does. A fit that has not converged in 60 steps is in
# a flat valley; the next run adds curvature.
STARTS = np.array(list(itertools.product((3.0, 6.0), (5.0, 8.0), (-0.3, 0.5), (0.3, 0.5), (0.3, 0.5)))).T
CONFIG = FitConfig(objective="normal", polish_steps=60)


@dataclass(frozen=True)
class PlannerConfig:
    """Options of an adaptive sweep.

    Attributes:
      begin: number of the cheapest budgets that are read out before the planner chooses; 0: the full plan is run.
      at_once: runs chosen at a time and carried out side by side. It decides what is chosen, so it does not follow the
        number of cores.
      flops: most FLOPs of the sweep, those of the first table included; 0 for no limit.

    Example:
      >>> from scaling.sweeps import PlannerConfig
      >>> PlannerConfig(begin=2, flops=1e15).at_once
      2
    """

    begin: int = 0
    at_once: int = 2
    flops: float = 0.0

    def __post_init__(self):
        if self.begin < 0 or self.at_once < 1 or self.flops < 0:
            raise ValueError(
                f"begin={self.begin} and flops={self.flops} must not be negative, at_once={self.at_once} at least 1"
            )


class Candidate(NamedTuple):
    """A possible next run of one readout, and the FLOPs of its new steps."""

    run: PlannedRun
    cost: float


def first_table(runs: Sequence[PlannedRun], config: PlannerConfig) -> list[PlannedRun]:
    """Restrict a plan to the readouts at its cheapest budgets.

    Raises:
      ValueError: fewer readouts than a fit needs.

    Example:
      >>> from scaling.sweeps import Family, PlanConfig, PlannerConfig, first_table, plan_runs
      >>> plan = PlanConfig(widths=(16, 32, 64), budgets=(1e12, 2e12, 4e12))
      >>> runs = plan_runs(Family(), plan, {"data": "bytes"})
      >>> sorted({readout.budget for run in first_table(runs, PlannerConfig(begin=2)) for readout in run.readouts})
      [1000000000000.0, 2000000000000.0]
    """
    budgets = sorted({readout.budget for run in runs for readout in run.readouts})[: config.begin]
    table = [replace(r, readouts=tuple(x for x in r.readouts if x.budget in budgets)) for r in runs]
    table = [run for run in table if run.readouts]
    count, needed = sum(len(run.readouts) for run in table), len(LAW.parameters) + 1
    if count < needed:
        raise ValueError(f"begin={config.begin}: {count} readouts to begin with, a first fit needs {needed}")
    return table


def cost_after(run: PlannedRun, readout: Readout, table: Sequence[PlannedRun]) -> float:
    """Count the FLOPs of one more readout: from the nearest branch point before its own to its end."""
    branches = [x.branch for other in table if other.key == run.key for x in other.readouts]
    begun = max([b for b in branches if b <= readout.branch], default=0)
    return (readout.steps - begun) * run.flops_per_step


def spent(table: Sequence[PlannedRun]) -> float:
    """Count the FLOPs of a table whose later entries continue the trunks of earlier ones."""
    total = 0.0
    for i, run in enumerate(table):
        for k, readout in enumerate(run.readouts):
            total += cost_after(run, readout, [*table[:i], replace(run, readouts=run.readouts[:k])])
    return total


def candidates(runs: Sequence[PlannedRun], table: Sequence[PlannedRun], config: PlannerConfig) -> list[Candidate]:
    """List the plan's readouts that are not in the table yet and are affordable."""
    made = {(run.key, readout.steps) for run in table for readout in run.readouts}
    left = [
        replace(run, readouts=(readout,))
        for run in runs
        for readout in run.readouts
        if (run.key, readout.steps) not in made
    ]
    rest = config.flops - spent(table) if config.flops else np.inf
    found = [Candidate(run, cost_after(run, run.readouts[0], table)) for run in left]
    return [one for one in found if one.cost <= rest]


def fit_rows(found: Sequence[Row]) -> Fit:
    """Fit a sweep's rows by least squares, the objective that the planner's interval holds for."""
    rows = make_rows(
        {name: [row[name] for row in found] for name in ("params", "tokens", "flops", "loss")}, "the sweep"
    )
    return fit(rows, LAW, CONFIG, starts=STARTS)


def interval_reached(found: Sequence[Row], *, target: float, level: float, wanted: float) -> bool:
    """Whether half the planner's interval of log N*(target) is as narrow as wanted.

    False with fewer rows than twice the law's parameters, or of fewer than three sizes.
    """
    if len(found) < 2 * len(LAW.parameters) or len({row["params"] for row in found}) < 3:
        return False
    fitted = fit_rows(found)
    return fitted.converged and half_width(fitted, target, level=level) <= wanted


def choose_runs(
    found: Sequence[Row],
    table: Sequence[PlannedRun],
    *,
    runs: Sequence[PlannedRun],
    config: PlannerConfig,
    target: float,
) -> list[PlannedRun]:
    """Choose the next runs of a sweep, of different sizes; none when no candidate is left or affordable.

    Args:
      found: rows so far.
      table: runs so far, failed ones included.
      runs: the plan.
      config: how many, and what they may cost.
      target: FLOPs whose N* is wanted.

    Example:
      >>> from scaling.sweeps import Family, PlanConfig, PlannerConfig, choose_runs, first_table, plan_runs
      >>> config = PlannerConfig(begin=2, at_once=1)
      >>> plan = PlanConfig(widths=(16, 32, 64, 96), budgets=(1e12, 2e12, 4e12))
      >>> runs = plan_runs(Family(), plan, {"data": "bytes"})
      >>> table = first_table(runs, config)
      >>> rows = [  # a real sweep trains these
      ...     {"params": n, "tokens": d, "flops": 6 * n * d, "loss": 1.7 + 20 / n**0.4 + 100 / d**0.5}
      ...     for n, d in ((run.columns["params"], readout.tokens) for run in table for readout in run.readouts)
      ... ]
      >>> [run.readouts[0].budget for run in choose_runs(rows, table, runs=runs, config=config, target=1e14)]
      [4000000000000.0]
    """
    chosen: list[PlannedRun] = []
    if len(found) <= len(LAW.parameters):
        return chosen
    fitted = fit_rows(found)
    made = [(row["params"], row["tokens"]) for row in found]
    for _ in range(config.at_once):
        keys = {run.key for run in chosen}
        free = [one for one in candidates(runs, [*table, *chosen], config) if one.run.key not in keys]
        if not free:
            break
        rows, cost = _as_rows([one.run for one in free]), np.array([one.cost for one in free])
        chosen.append(free[next_run(fitted, rows, budget=target, made=np.array(made, float).T, cost=cost)].run)
        # The next choice of this round assumes this run, whose loss is not known yet.
        made.append((chosen[-1].columns["params"], chosen[-1].readouts[0].tokens))
    return chosen


def _as_rows(runs: Sequence[PlannedRun]) -> Rows:
    columns: dict[str, Any] = {"params": [run.columns["params"] for run in runs]}
    for name in ("tokens", "flops"):
        columns[name] = [getattr(run.readouts[0], name) for run in runs]
    return make_rows(columns | {"loss": [1.0] * len(runs)}, "the plan")
