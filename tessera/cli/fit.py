"""Fit a scaling law: `tessera fit --config.runs=RUNS.csv`."""

from rich.console import Console
from rich.table import Table

from tessera.cli.main import Invocation
from tessera.infra.config import build
from tessera.infra.schema import Schema
from tessera.infra.workdir import WorkdirMismatch, hold
from tessera.reports.html import print_report
from tessera.sweeps.fit_page import fit_page, span, summary
from tessera.sweeps.fit_report import ScalingConfig, fit_runs, load_runs

SCHEMA = Schema(ScalingConfig)
ERRORS = (ValueError, FileNotFoundError, ImportError, WorkdirMismatch)


def main(invocation: Invocation) -> None:
    """Config -> rows -> fit -> fit.json, report."""
    config = build(ScalingConfig, invocation.config)
    rows = load_runs(config)
    workdir = invocation.prepare()
    with hold(workdir):
        fitted = fit_runs(workdir, rows, config)
    result, console = fitted.result, Console()
    if "parameters" in result:
        table = Table(title=f"{result['law']}: {result['rows']} runs, objective {result['value']:.6g}")
        for heading in ("parameter", "value", "standard error", f"{config.level:.0%} interval"):
            table.add_column(heading)
        for name, found in result["parameters"].items():
            error = f"{found['se']:.4g}" if "se" in found else "not measured"
            table.add_row(name, f"{found['value']:.7g}", error, span(found.get("interval")))
        console.print(table)
    for line in summary(result):
        console.print(line, soft_wrap=True)
    for finding in result["doctor"]:
        console.print(f"{finding['verdict']}: {finding['name']}: {finding['text']}", soft_wrap=True, markup=False)
    print_report(fit_page, workdir, fitted, rows.source)
