"""Fit a scaling law: `tessera fit --config.runs=RUNS.csv`."""

from rich.console import Console

from scaling.rows import counted
from tessera.cli.main import Invocation
from tessera.infra.config import build
from tessera.infra.schema import Schema
from tessera.infra.workdir import WorkdirMismatch, hold
from tessera.reports.html import print_report, terminal_table
from tessera.sweeps.fit_page import fit_page, parameter_table, summary
from tessera.sweeps.fit_report import ScalingConfig, fit_runs, load_runs

SCHEMA = Schema(ScalingConfig)
ERRORS = (ValueError, FileNotFoundError, ImportError, WorkdirMismatch)


def main(invocation: Invocation) -> None:
    """Config -> rows -> fit -> fit.json, report."""
    config = build(ScalingConfig, invocation.config)
    rows = load_runs(config)
    workdir = invocation.prepare()
    with hold(workdir):
        fitted = fit_runs(workdir, rows, config, show=True)
    result, console = fitted.result, Console()
    if "parameters" in result:
        title = f"{result['law']}: {counted(result['rows'], 'run')}, objective {result['value']:.6g}"
        console.print(terminal_table(parameter_table(result), title))
    for line in summary(result):
        console.print(line, soft_wrap=True)
    for finding in result["doctor"]:
        console.print(f"{finding['verdict']}: {finding['name']}: {finding['text']}", soft_wrap=True, markup=False)
    print_report(fit_page, workdir, fitted, rows.source)
