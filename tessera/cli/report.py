"""One page from any runs: `tessera report runs/a runs/b --output=runs/report.html`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tessera.cli.main import PLAIN
from tessera.infra.checkpoint import CheckpointDamaged
from tessera.infra.errors import ConfigError, DiskFull
from tessera.infra.logger import write_text
from tessera.pages.runs import read_runs, report_sections
from tessera.pages.token_experts import text_section
from tessera.reports.html import page
from tessera.reports.style import MissingMatplotlib

ERRORS = (ValueError, OSError, ConfigError, CheckpointDamaged, DiskFull, MissingMatplotlib)


def main(argv: Sequence[str] = ()) -> int:
    """Read the runs, write the page; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tessera report", description=PLAIN["report"][1])
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="directories (--workdir) of any commands, or their URLs")
    add("--output", default="runs/report.html", help="the page to write; runs/report.html by default")
    add("--title", default="", help="of the page; the names of the runs by default")
    text = "draw so many tokens of held-out text, colored by the experts they take, for each run with experts"
    add("--tokens", type=int, default=0, help=text)
    options = parser.parse_args(list(argv))
    try:
        runs = read_runs(options.runs)
        sections = report_sections(runs)
        for run in runs if options.tokens else ():
            if run.kind == "training" and run.settings.get("model", {}).get("mlp") == "routed":
                title = f"Which tokens take which experts: {run.name}"
                sections.insert(-len(runs), text_section(run.path, options.tokens, title))
        names = [run.name for run in runs]
        title = options.title or " and ".join([", ".join(names[:-1])] * (len(names) > 1) + names[-1:])
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page(title, sections))
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Console().print(f"report: {path}", soft_wrap=True, markup=False)
    return 0
