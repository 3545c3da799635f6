"""Carry out a sweep and fit it: `tessera sweep --config=isoflop:tiny --workdir=runs/isoflop`."""

import errno
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from rich.console import Console

from scaling.sweeps.adaptive import PlannerConfig, choose_runs, first_table
from scaling.sweeps.executors import ExecutorConfig, make_executor
from scaling.sweeps.plan import Family, PlanConfig, PlannedRun, plan_runs
from scaling.sweeps.store import DamagedRow
from scaling.sweeps.sweep import RunFailed, SweepConfig, run_sweep
from tessera.cli.main import Invocation
from tessera.data.download import DataUnavailable
from tessera.data.text import TextConfig, load_text
from tessera.infra.config import ConfigError, build, checked
from tessera.infra.remote import is_mirror
from tessera.infra.schema import differences
from tessera.infra.workdir import WorkdirMismatch, hold, resolve
from tessera.reports.html import print_report
from tessera.sweeps import schema
from tessera.sweeps.programs import TrialConfig
from tessera.sweeps.report import ReportConfig, enough, fit_sweep, sweep_page
from tessera.sweeps.table import SweepTable
from tessera.sweeps.train import TextStore, check_texts, compile_cache, train_run

SCHEMA = schema.SCHEMA
FULL = 2**16  # bytes that a full disk may show as free
ERRORS = (DataUnavailable, WorkdirMismatch, RunFailed, DamagedRow, ImportError)


def target_of(runs: Sequence[PlannedRun]) -> float:
    """Ten times the largest budget of a plan: a target that does not move as larger budgets come in."""
    return 10 * max(readout.budget for run in runs for readout in run.readouts)


def with_target(report: ReportConfig, runs: Sequence[PlannedRun]) -> ReportConfig:
    """A report whose target, where it has none, is that of `target_of`."""
    return replace(report, target=report.target or target_of(runs))


def main(invocation: Invocation) -> None:
    """Config -> plan -> runs -> CSV, fit, report."""
    c = invocation.config
    text = build(TextConfig, c.data, "config.data")
    trial = build(TrialConfig, c.train, "config.train")
    splits = checked("config.data", load_text, text)
    family = build(Family, c.family, "config.family", vocab=splits.vocab_size)
    check_texts(splits, family.length, trial.eval_tokens, text.sources)
    plan = build(PlanConfig, c.plan, "config.plan")
    engine = build(ExecutorConfig, c.engine, "config.engine")
    if is_mirror(invocation.workdir) and engine.name != "local":
        raise ConfigError(
            f"config.engine.name={engine.name!r}: its hosts need a --workdir that all of them see; a URL is for 'local'"
        )
    report = build(ReportConfig, c.report, "config.report")
    planner = build(PlannerConfig, c.planner, "config.planner")
    common = {"training": trial.settings(), "data": differences(text) | {"sha256": splits.content_hash}}
    runs = checked("config.plan", plan_runs, family, plan, resolve(common))
    # Where runs are carried out, and what is read off their rows, is not part of what they are.
    settings = {name: value for name, value in resolve(c).items() if name not in ("engine", "report", "planner")}
    workdir = invocation.prepare(settings | {"data_sha256": splits.content_hash}, whole=True)
    console = Console()
    table, more = runs, None
    if planner.begin:
        report = with_target(report, runs)
        table = checked("config.planner", first_table, runs, planner)
        more = partial(choose_runs, runs=runs, config=planner, target=report.target)
    executor = checked("config.engine", make_executor, engine, workdir / "logs", compile_cache(workdir / "compiled"))
    with hold(workdir), SweepTable() as watch:
        try:
            run_sweep(
                table,
                partial(train_run, text=text, config=trial),
                TextStore(workdir / "runs"),
                executor,
                workdir / "runs.csv",
                SweepConfig(retries=engine.retries),
                enough=partial(enough, config=report) if report.stop_at else None,
                more=more,
                watch=watch,
            )
        except RunFailed as error:
            if shutil.disk_usage(workdir).free < FULL:  # what failed could not even say so in its log
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise
    found = fit_sweep(workdir, report, length=family.length)
    for line in found.lead:
        console.print(line, soft_wrap=True)
    console.print(f"rows: {workdir / 'runs.csv'}", soft_wrap=True)
    print_report(sweep_page, workdir, found)
