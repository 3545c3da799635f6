"""Fit a scaling law: `tessera fit --config.runs=RUNS.csv`."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from scaling.plausible import examine_rows
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
    workdir, console = invocation.prepare(), Console()

    def say(finding: Mapping[str, Any]) -> None:
        console.print(f"{finding['verdict']}: {finding['name']}: {finding['text']}", soft_wrap=True, markup=False)

    # What is wrong with the table goes before its answer, and before a fit that may take long.
    first = [finding for finding in examine_rows(rows, config.vocabulary) if finding.verdict != "fine"]
    for finding in first:
        say(finding._asdict())
    with hold(workdir):
        fitted = fit_runs(workdir, rows, config, show=True)
    result = fitted.result
    if "parameters" in result:
        title = f"{result['law']}: {counted(result['rows'], 'run')}, objective {result['value']:.6g}"
        console.print(terminal_table(parameter_table(result), title))
    for line in summary(result):
        console.print(line, soft_wrap=True)
    for finding in result["doctor"]:
        if finding["name"] not in {shown.name for shown in first}:
            say(finding)
    print_report(fit_page, workdir, fitted, rows.source)
