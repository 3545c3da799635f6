"""Sweeps whose runs the planner chooses, with a training function that only works out a loss."""

import itertools

import numpy as np
import pytest
from toy_sweep import FAST, Inside

from scaling.sweeps.adaptive import PlannerConfig, candidates, choose_runs, first_table, interval_reached, spent
from scaling.sweeps.plan import Family, PlanConfig, Rule, plan_runs
from scaling.sweeps.store import Store
from scaling.sweeps.sweep import run_sweep

TARGET = 1e12
PLAN = PlanConfig(
    widths=(8, 12, 16, 24, 32),
    budgets=(1e9, 2e9, 4e9, 8e9),
    batch=Rule(4.0, multiple=1),
    warmup=0,
    least_steps=10,
    tokens_per_parameter=(0.5, 5000.0),
)
RUNS = plan_runs(Family(), PLAN, {"data": "toy"})


def train(run, directory, report):
    """A surface with an inner optimum, and noise that belongs to the readout."""
    for readout in run.readouts:
        noise = np.random.default_rng(readout.steps * run.columns["width"]).standard_normal()
        loss = 1.2 + 40 / run.columns["params"] ** 0.45 + 900 / readout.tokens**0.5
        report(readout.steps - readout.branch)
        yield readout, {"loss": float(loss * np.exp(0.003 * noise))}


def acquired(path, config, *, wanted=0.0, engine=None, train=train):
    return run_sweep(
        first_table(RUNS, config),
        train,
        Store(path / "runs"),
        engine or Inside(),
        path / "runs.csv",
        FAST,
        enough=(lambda rows: interval_reached(rows, target=TARGET, level=0.95, wanted=wanted)) if wanted else None,
        more=lambda rows, table: choose_runs(rows, table, runs=RUNS, config=config, target=TARGET),
    )


def test_the_first_table_is_the_cheapest_budgets():
    table = first_table(RUNS, PlannerConfig(begin=2))
    assert {readout.budget for run in table for readout in run.readouts} == {1e9, 2e9}
    assert {run.key for run in table} <= {run.key for run in RUNS}
    with pytest.raises(ValueError, match="begin=1: 2 readouts to begin with, a first fit needs 6"):
        first_table(RUNS[:4], PlannerConfig(begin=1))
    with pytest.raises(ValueError, match="at_once=0"):
        PlannerConfig(at_once=0)


def test_a_readout_costs_what_is_new_of_it():
    table = first_table(RUNS, PlannerConfig(begin=2))
    assert spent(table) == pytest.approx(sum(run.cost for run in table))
    found = candidates(RUNS, table, PlannerConfig(begin=2))
    assert len(found) == sum(len(r.readouts) for r in RUNS) - sum(len(r.readouts) for r in table)
    for run, cost in found:
        branches = [x.branch for other in table if other.key == run.key for x in other.readouts]
        assert cost == (run.readouts[0].steps - max(branches, default=0)) * run.flops_per_step
    few = candidates(RUNS, table, PlannerConfig(begin=2, flops=spent(table) + sorted(cost for _, cost in found)[2]))
    assert len(few) == 3


@pytest.mark.slow
def test_the_planner_ends_with_the_interval_or_the_flops(tmp_path):
    config = PlannerConfig(begin=2)
    first = len([r for run in first_table(RUNS, config) for r in run.readouts])
    full = acquired(tmp_path / "all", config)
    assert len(full) == sum(len(run.readouts) for run in RUNS)
    seen = [(row["params"], row["steps"]) for row in full]
    assert len(set(seen)) == len(seen)
    found = acquired(tmp_path / "tight", config, wanted=0.2)
    assert first < len(found) < len(full) and found == full[: len(found)]
    assert interval_reached(found, target=TARGET, level=0.95, wanted=0.2)
    capped = PlannerConfig(begin=2, flops=1.5 * spent(first_table(RUNS, config)))
    few = acquired(tmp_path / "few", capped)
    assert first < len(few) < len(full)


@pytest.mark.long
def test_killed_and_continued_the_same_runs_are_chosen(tmp_path):
    full = acquired(tmp_path / "full", PlannerConfig(begin=2), wanted=0.2)
    counter = itertools.count()

    def dies(run, directory, report):
        if next(counter) == 7:
            raise KeyboardInterrupt
        yield from train(run, directory, report)

    with pytest.raises(KeyboardInterrupt):
        acquired(tmp_path / "killed", PlannerConfig(begin=2), wanted=0.2, train=dies)
    assert acquired(tmp_path / "killed", PlannerConfig(begin=2), wanted=0.2, engine=Inside(backwards=True)) == full
    assert (tmp_path / "killed" / "runs.csv").read_bytes() == (tmp_path / "full" / "runs.csv").read_bytes()


def test_a_run_that_failed_is_not_chosen_again():
    config = PlannerConfig(begin=2, at_once=1)
    table = first_table(RUNS, config)
    rows = [
        {"params": r.columns["params"], "tokens": x.tokens, "flops": x.flops, "loss": measured["loss"]}
        for r in table
        for x, measured in train(r, None, lambda steps: None)
    ]
    (choice,) = choose_runs(rows, table, runs=RUNS, config=config, target=TARGET)
    (other,) = choose_runs(rows, [*table, choice], runs=RUNS, config=config, target=TARGET)
    assert (choice.key, choice.readouts) != (other.key, other.readouts)
    pair = choose_runs(rows, table, runs=RUNS, config=PlannerConfig(begin=2), target=TARGET)
    assert pair[0] == choice and len({run.key for run in pair}) == 2
    assert choose_runs(rows[:5], table, runs=RUNS, config=config, target=TARGET) == []


def test_a_second_run_is_chosen_as_if_the_first_were_made(monkeypatch):
    counted = []

    def recorded(fitted, rows, *, made, **options):
        counted.append(made.T.tolist())
        return 0

    monkeypatch.setattr("scaling.sweeps.adaptive.next_run", recorded)
    table = first_table(RUNS, PlannerConfig(begin=2))
    found = [
        {"params": run.columns["params"], "tokens": readout.tokens, "flops": readout.flops}
        | {"loss": 1.2 + 40 / run.columns["params"] ** 0.45 + 900 / readout.tokens**0.5}
        for run in table
        for readout in run.readouts
    ]
    config = PlannerConfig(begin=2, at_once=2)
    first, _ = choose_runs(found, table, runs=RUNS, config=config, target=TARGET)
    assert counted[1] == [*counted[0], [first.columns["params"], first.readouts[0].tokens]]
