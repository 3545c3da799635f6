"""A sweep whose runs the planner chooses: a first table of cheap readouts, then whatever takes most off the interval.

What can be bought is the plan: every size at every budget it can serve. A size that was trained before goes on from its
trunk, so a readout costs what is new of it. Every choice follows from the rows so far and nothing else, so a sweep that
is killed and started again buys the same runs in the same order.
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
from scaling.sweeps.plan import Readout, Run
from scaling.sweeps.store import Row

LAW: Law = CHINCHILLA
# Exponents of a loss curve are not 0 or 2: a coarse grid of starts does. A fit that has not converged in 60 steps is in
# a flat valley, which the next run will end.
STARTS = np.array(list(itertools.product((3.0, 6.0), (5.0, 8.0), (-0.3, 0.5), (0.3, 0.5), (0.3, 0.5)))).T
CONFIG = FitConfig(objective="normal", polish_steps=60)


@dataclass(frozen=True)
class PlannerConfig:
    """What the planner may do.

    Attributes:
      begin: budgets, the cheapest first, that are read out before it chooses; 0: the whole plan is carried out.
      at_once: runs it chooses at a time. They are carried out side by side; it is part of what is chosen, so it does
        not follow the number of cores.
      flops: most FLOPs of the sweep, those of the first table included; 0 for no limit.
    """

    begin: int = 0
    at_once: int = 2
    flops: float = 0.0

    def __post_init__(self):
        if self.begin < 0 or self.at_once < 1 or self.flops < 0:
            raise ValueError(
                f"begin={self.begin} and flops={self.flops} must not be negative, at_once={self.at_once} at least 1"
            )


class Goods(NamedTuple):
    """What can be bought: runs of one readout each, and what is new of them in FLOPs."""

    runs: list[Run]
    cost: np.ndarray


def first_table(runs: Sequence[Run], config: PlannerConfig) -> list[Run]:
    """The runs of a plan at its cheapest budgets only.

    Raises:
      ValueError: fewer readouts than a fit needs.
    """
    budgets = sorted({readout.budget for run in runs for readout in run.readouts})[: config.begin]
    table = [replace(r, readouts=tuple(x for x in r.readouts if x.budget in budgets)) for r in runs]
    table = [run for run in table if run.readouts]
    count, needed = sum(len(run.readouts) for run in table), len(LAW.parameters) + 1
    if count < needed:
        raise ValueError(f"begin={config.begin}: {count} readouts to begin with, a first fit needs {needed}")
    return table


def cost_after(run: Run, readout: Readout, table: Sequence[Run]) -> float:
    """FLOPs of one more readout: from the nearest branch point before its own to its end."""
    branches = [x.branch for other in table if other.key == run.key for x in other.readouts]
    begun = max([b for b in branches if b <= readout.branch], default=0)
    return (readout.steps - begun) * run.flops_per_step


def spent(table: Sequence[Run]) -> float:
    """FLOPs of a table whose later entries go on from the trunks of earlier ones."""
    total = 0.0
    for i, run in enumerate(table):
        for k, readout in enumerate(run.readouts):
            total += cost_after(run, readout, [*table[:i], replace(run, readouts=run.readouts[:k])])
    return total


def on_offer(runs: Sequence[Run], table: Sequence[Run], config: PlannerConfig) -> Goods:
    """The plan's readouts that are not in the table yet and can be afforded."""
    made = {(run.key, readout.steps) for run in table for readout in run.readouts}
    left = [
        replace(run, readouts=(readout,))
        for run in runs
        for readout in run.readouts
        if (run.key, readout.steps) not in made
    ]
    cost = np.array([cost_after(run, run.readouts[0], table) for run in left])
    cheap = cost <= (config.flops - spent(table) if config.flops else np.inf)
    return Goods([run for run, fine in zip(left, cheap, strict=True) if fine], cost[cheap])


def fit_rows(found: Sequence[Row]) -> Fit:
    """Least squares on a sweep's rows, which is what the planner's interval is worked out for."""
    rows = make_rows(
        {name: [row[name] for row in found] for name in ("params", "tokens", "flops", "loss")}, "the sweep"
    )
    return fit(rows, LAW, CONFIG, starts=STARTS)


def tight(found: Sequence[Row], *, target: float, level: float, wanted: float) -> bool:
    """Whether half the planner's interval of log N*(target) is as narrow as wanted.

    Never before there are twice as many rows as the law has parameters, of three sizes or more.
    """
    if len(found) < 2 * len(LAW.parameters) or len({row["params"] for row in found}) < 3:
        return False
    fitted = fit_rows(found)
    return fitted.converged and half_width(fitted, target, level=level) <= wanted


def choose_runs(
    found: Sequence[Row], table: Sequence[Run], *, runs: Sequence[Run], config: PlannerConfig, target: float
) -> list[Run]:
    """The runs to buy next, of different sizes; none when nothing is left or affordable.

    Args:
      found: rows so far.
      table: runs so far, those that failed included.
      runs: the plan.
      config: what may be bought.
      target: FLOPs whose N* is wanted.
    """
    chosen: list[Run] = []
    if len(found) <= len(LAW.parameters):
        return chosen
    fitted = fit_rows(found)
    made = [(row["params"], row["tokens"]) for row in found]
    for _ in range(config.at_once):
        goods = on_offer(runs, [*table, *chosen], config)
        taken = {run.key for run in chosen}
        free = [i for i, run in enumerate(goods.runs) if run.key not in taken]
        if not free:
            break
        rows = _as_rows([goods.runs[i] for i in free])
        best = free[next_run(fitted, rows, budget=target, made=np.array(made, float).T, cost=goods.cost[free])]
        chosen.append(goods.runs[best])
        # The next one of this round counts on this one, whose loss is not known yet.
        made.append((chosen[-1].columns["params"], chosen[-1].readouts[0].tokens))
    return chosen


def _as_rows(runs: Sequence[Run]) -> Rows:
    columns: dict[str, Any] = {"params": [run.columns["params"] for run in runs]}
    for name in ("tokens", "flops"):
        columns[name] = [getattr(run.readouts[0], name) for run in runs]
    return make_rows(columns | {"loss": [1.0] * len(runs)}, "the plan")
