"""What an experiment gives back, and how it becomes a page and a table in Markdown."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lottery import summary
from tessera.infra.logger import write_text
from tessera.reports.html import Section, Table, config_section, paragraphs, write_number, write_report
from tessera.reports.style import Figure, plus_minus


class Study(NamedTuple):
    """Title, findings in words, the table, the picture with its caption, and all rows for the CSV file."""

    title: str
    findings: Sequence[str]
    table: Table
    figure: Figure | Callable[[], Figure]
    caption: str
    rows: Sequence[Mapping[str, Any]]


def write_study(workdir: Path | str, study: Study) -> Path:
    """Write rows.csv, table.md, report.html and figures/ into the run's directory; returns the page's path.

    Raises:
      MissingMatplotlib: matplotlib is not installed; rows.csv and table.md are written.
    """
    workdir = Path(workdir)
    summary.write_csv(list(study.rows), workdir / "rows.csv")
    write_text(workdir / "table.md", markdown(study))
    sections = [
        Section("", paragraphs(*study.findings)),
        Section("Picture", study.figure, study.caption),
        Section("Numbers", study.table),
        config_section(workdir),
    ]
    return write_report(workdir, study.title, sections)


def markdown(study: Study) -> str:
    """Findings and table as Markdown, for docs/results."""
    lines = [*(f"- {text}" for text in study.findings), "", "| " + " | ".join(study.table.columns) + " |"]
    lines.append("|" + "---|" * len(study.table.columns))
    lines += ["| " + " | ".join(write_number(cell) for cell in row) + " |" for row in study.table.rows]
    return "\n".join(lines) + "\n"


def with_interval(values: Sequence[float], scale: float = 100.0, digits: int = 2) -> str:
    """ "mean ± half-width" of the 95% Student-t interval, in the table's units."""
    mean, half, _ = summary.interval(values)
    return plus_minus(mean, half, scale, digits)
