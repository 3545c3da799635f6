"""One page from the directories of any runs, side by side: what differs in their settings, curves, tables.

What a run was is told by the files that its command left: tickets.csv by `tessera find-ticket`, runs.csv by `tessera
compare`, with fit.json by `tessera sweep`, and so on.
"""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lottery.summary import interval
from tessera.infra.logger import METRICS, TIMING, Rows, read_rows
from tessera.infra.remote import local
from tessera.infra.workdir import WorkdirMismatch, flatten, read_settings
from tessera.reports import curves, lottery, style
from tessera.reports.html import Cell, Section, Table, config_section, paragraphs, read_json, table_of
from tessera.reports.style import Figure, plus_minus, short, titles
from tessera.tickets.report import EARLY, findings, level_table


@dataclass(frozen=True)
class RunFiles:
    """The directory of a run.

    Attributes:
      name: what the page calls it.
      path: where it is.
      kind: a key of `KINDS`.
      settings: its `config.json`.
      made: its `run.json`: command, revision, devices.
    """

    name: str
    path: Path
    kind: str
    settings: Mapping[str, Any]
    made: Mapping[str, Any]


class Kind(NamedTuple):
    """What a command leaves: its name, that of several, the files that tell it, the sections that its runs get."""

    name: str
    names: str
    files: tuple[str, ...]
    sections: Callable[[Sequence[RunFiles]], list[Section]]


def read_runs(paths: Sequence[str]) -> list[RunFiles]:
    """Look at the directories of runs (or their URLs).

    Raises:
      ValueError: a directory is no run, or is given twice.
    """
    names = _names(paths)
    return [_read(text, name) for text, name in zip(paths, names, strict=True)]


def _names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that differ."""
    parts = [text.rstrip("/").split("/") for text in paths]
    if len({tuple(words) for words in parts}) < len(parts):
        twice = next(text for i, text in enumerate(paths) if parts[i] in parts[:i])
        raise ValueError(f"{twice} is given twice: every run once")
    count = 1
    while len({tuple(words[-count:]) for words in parts}) < len(parts):
        count += 1
    return ["/".join(words[-count:]) or "." for words in parts]


def _read(text: str, name: str) -> RunFiles:
    path = local(text)
    needed = "the --workdir of a command such as tessera train, find-ticket or sweep is needed"
    if not path.is_dir():
        raise ValueError(f"{text}: no such directory; {needed}")
    if not (path / "run.json").exists():
        raise ValueError(f"{text} is no run, it has no run.json; {needed}")
    try:
        settings = read_settings(path)
    except (FileNotFoundError, WorkdirMismatch) as error:
        raise ValueError(f"{text} is no run that can be read: {error}") from error
    has = [kind for kind, what in KINDS.items() if all((path / file).exists() for file in what.files)]
    return RunFiles(name, path, has[0], settings, read_json(path / "run.json"))


def report_sections(runs: Sequence[RunFiles]) -> list[Section]:
    """The sections of a page on runs: which they are, what differs, what came out, every setting."""
    by_kind = {kind: [run for run in runs if run.kind == kind] for kind in KINDS}
    found = {kind: mine for kind, mine in by_kind.items() if mine}
    counted = [f"{len(m)} {KINDS[kind].names if len(m) > 1 else KINDS[kind].name}" for kind, m in found.items()]
    sections = [Section("", paragraphs(f"{', '.join(counted)}: {', '.join(run.name for run in runs)}."))]
    sections.append(_made_section(runs))
    for kind, mine in found.items():
        if len(mine) > 1:
            sections.append(_differences_section(mine, f"Settings that differ: {KINDS[kind].names}"))
        sections += KINDS[kind].sections(mine)
    return sections + [config_section(run.path, f"Settings of {run.name}") for run in runs]


def _made_section(runs: Sequence[RunFiles]) -> Section:
    body = []
    for run in runs:
        devices = f"{run.made.get('devices', '?')} {run.made.get('device_kind', '')}".strip()
        revision = str(run.made.get("revision", "unknown"))[:10] + ", changed" * bool(run.made.get("changed"))
        body.append([run.name, KINDS[run.kind].name, devices, revision, run.made.get("command", "unknown")])
    caption = "Revision: of the code, and whether files were changed since."
    return Section("Runs", Table(("run", "what", "devices", "revision", "command"), body), caption)


def settings_that_differ(runs: Sequence[RunFiles]) -> dict[str, list[Any]]:
    """Dotted name of every setting that is not the same in all runs -> its value in each, None where it is absent."""
    flat = [flatten(run.settings) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    values = {key: [one.get(key) for one in flat] for key in keys}
    return {key: found for key, found in values.items() if any(each != found[0] for each in found)}


def _differences_section(runs: Sequence[RunFiles], title: str) -> Section:
    body = [
        [key, *(None if value is None else _text(value) for value in values)]
        for key, values in settings_that_differ(runs).items()
    ]
    if not body:
        return Section(
            title, paragraphs("None of those in config.json, which a plan is not part of: see the commands.")
        )
    return Section(title, Table(("setting", *(run.name for run in runs)), body), "A dash: the run has no such setting.")


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file, numbers as numbers, empty cells as None."""

    def cell(text: str) -> Any:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
        return text or None

    with path.open(newline="", encoding="utf-8") as file:
        return [{key: cell(text) for key, text in row.items()} for row in csv.DictReader(file)]


def read_tickets(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a search's tickets.csv, without learning curves; `layers` is a dict as the search has it."""
    rows = []
    for row in read_table(workdir / "tickets.csv"):
        layers = {key.removeprefix("layers/"): row.pop(key) for key in list(row) if key.startswith("layers/")}
        rows.append(row | {"arm": str(row["arm"]), "layers": layers})
    return rows


def _colored(number: int) -> dict[str, Any]:
    how = style.look(number)
    return {"color": how["color"], "linestyle": how["linestyle"]}


# Training runs


def _training_sections(runs: Sequence[RunFiles]) -> list[Section]:
    rows = {run.name: read_rows(run.path / METRICS) for run in runs}
    drawn = {name: mine for name, mine in rows.items() if mine}
    texts = {json.dumps(run.settings.get("data"), sort_keys=True) for run in runs}
    caption = "Cross-entropy. Left: the batch of each logged step, averaged over some rows; right: held-out data."
    if len(texts) > 1:
        caption += " The runs differ in config.data, so their losses may be of different texts or units."
    table = table_of([_training_row(run, rows[run.name]) for run in runs])
    pictures = [partial(training_figure, drawn)] * bool(drawn)
    return [Section("Training runs", [*pictures, table], caption)]


def training_figure(rows: Mapping[str, Rows]) -> Figure:
    """Training loss (a moving mean) and validation loss against step, a line per run."""
    figure, axes = style.canvas(2, height=3.9)
    last = max(row["step"] for mine in rows.values() for row in mine) or 1
    for number, (name, mine) in enumerate(rows.items()):
        step, loss = curves.training_loss(mine)
        curves.draw_smooth(axes[0], step, loss, _colored(number)["color"], curves.window_of(len(step)))
        step, loss = curves.column(mine, "loss", "eval")
        style.line_with_band(axes[1], step, loss, label=name, **style.look(number))
    for ax, title in zip(axes, ("Training loss", "Validation loss"), strict=True):
        ax.set_xlim(0, last)
        style.steps_axis(ax)
        titles(ax, title, x="training step", y="nats per token")
    style.zoom(axes[0], axes[0].get_lines(), last / 20)
    style.label_lines(axes[1])
    return figure


def _training_row(run: RunFiles, rows: Rows) -> dict[str, Any]:
    evaluated = [row for row in rows if row["kind"] == "eval"]
    speed = [row["steps_per_second"] for row in read_rows(run.path / TIMING) if "steps_per_second" in row]
    last: Mapping[str, Any] = evaluated[-1] if evaluated else {}
    settings, done = run.settings, max((row["step"] for row in rows), default=0)
    tokens = done * settings.get("batch_size", 0) * settings.get("length", 0)
    found: dict[str, Any] = {"run": run.name, "steps done": f"{done:,} of {settings.get('steps', done):,}"}
    found |= {"tokens": f"{tokens:,}"} if tokens and not settings.get("rampup_batch_size") else {}
    found |= {"validation loss": last.get("loss"), "lowest": min((row["loss"] for row in evaluated), default=None)}
    found |= {"bits per byte": last["bits_per_byte"]} if "bits_per_byte" in last else {}
    return found | {"accuracy": last.get("accuracy"), "steps per second": float(np.median(speed)) if speed else None}


# Searches for tickets


def _search_sections(runs: Sequence[RunFiles]) -> list[Section]:
    rows = {run.name: read_tickets(run.path) for run in runs}
    told = [f"{name}: {findings(mine)}" if len(rows) > 1 else findings(mine) for name, mine in rows.items()]
    caption = "Bands are 95% Student-t intervals of the mean over seeds. Dotted: the dense network."
    parts: list[Any] = [paragraphs(*told), partial(tickets_figure, rows)]
    sections = [Section("Searches", parts, caption)]
    for name, mine in rows.items():
        title = f"Test accuracy at early stopping (%): {name}"
        sections.append(Section(title, level_table(mine, EARLY), "Mean over seeds ± half-width of the 95% interval."))
    return sections


def tickets_figure(rows: Mapping[str, Rows], value: str = "early_stop_test_accuracy") -> Figure:
    """Test accuracy against weights remaining: all arms of one search, or the main arm of each of several."""
    figure, (ax,) = style.canvas(width=8.0, height=4.2)
    if len(rows) == 1:
        (lines,) = (lottery.series(mine, value) for mine in rows.values())
        lottery.draw_arms(ax, lines, 100)
        low = [point.low for points in lines.values() for point in points]
    else:
        style.weights_axis(ax, [row["density"] for mine in rows.values() for row in mine])
        low = []
        for number, (name, mine) in enumerate(rows.items()):
            arm = lottery.main_arm(mine)
            points = lottery.series(mine, value)[arm]
            low += [point.low for point in points]
            lottery.draw_points(ax, points, 100, label=f"{name}: {lottery.arm_name(arm)}", **style.look(number))
    ax.set_ylim(max(0.0, 100 * min(low) - 1), 100.5)
    ax.yaxis.set_major_formatter("{x:.4g}%")
    titles(ax, "Test accuracy at early stopping", y="percent of the test images")
    style.label_lines(ax)
    return figure


# Sweeps and fits


def _fit_sections(runs: Sequence[RunFiles]) -> list[Section]:
    found = {run.name: read_json(run.path / "fit.json") for run in runs}
    body = [row for name, fit in found.items() for row in _fit_rows(name, fit)]
    caption = "a: optimal parameters grow as C^a. Refused: what the fit says of rows that do not determine it."
    parts: list[Any] = [table_of(body)] if body else [paragraphs("No fit was recorded.")]
    minima = {name: mine for name, fit in found.items() if (mine := _minima(fit))}
    if minima:
        parts.insert(0, partial(minima_figure, minima))
        caption += " Dots: the minimum of each budget; lines: the power law through those of a run."
    return [Section("Scaling fits", parts, caption)]


def _parts(fit: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The fits of a fit.json by name: a sweep has several."""
    inside: dict[str, Mapping[str, Any]] = {
        name: one for name in ("isoflop", "parametric") if isinstance(one := fit.get(name), dict)
    }
    return inside or {f"approach {fit['approach']}" if "approach" in fit else "fit": fit}


def _fit_rows(name: str, fit: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for part, one in _parts(fit).items():
        a = one.get("exponents", {}).get("a", {})
        span = " to ".join(short(end) for end in a["interval"]) if a.get("interval") else None
        refused = one.get("refused") or one.get("undetermined") or ""
        found = {"run": name, "fit": part, "rows": one.get("rows"), "a": a.get("value"), "interval of a": span}
        rows.append(found | {"refused": refused or None})
    return rows


def _minima(fit: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = _parts(fit).get("isoflop", fit).get("minima", [])
    return [one for one in found if not one.get("refused")]


def minima_figure(minima: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Parameters of the lowest loss against the budget, a color per run, with a power law through two and more."""
    figure, (ax,) = style.canvas(width=7.2, height=4.0)
    for number, (name, mine) in enumerate(minima.items()):
        budget, params = (np.array([one[key] for one in mine], float) for key in ("budget", "params"))
        how = style.look(number)
        style.dots(ax, budget, params, how["color"], 5, 1.0, how["marker"])
        slope, offset = np.polyfit(np.log(budget), np.log(params), 1) if len(mine) > 1 else (0.0, np.log(params[0]))
        line = np.exp(offset + slope * np.log(budget))
        style.line_with_band(ax, budget, line, label=name, color=how["color"], linestyle=how["linestyle"])
    every = [one for mine in minima.values() for one in mine]
    style.log_values(ax, "x", values=[one["budget"] for one in every])
    style.log_values(ax, "y", values=[one["params"] for one in every])
    titles(ax, "Best size by budget", x="budget (FLOPs)", y="parameters")
    style.label_lines(ax)
    return figure


# Comparisons, pruned models, studies


def _comparison_sections(runs: Sequence[RunFiles]) -> list[Section]:
    rows = [row | {"run": run.name} for run in runs for row in read_table(run.path / "runs.csv")]
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(f"{row['run']}: {row['arm']}" if len(runs) > 1 else str(row["arm"]), []).append(
            row["validation_loss"]
        )
    body: list[list[Cell]] = []
    for name, losses in groups.items():
        mean, half, n = interval(losses)
        body.append([name, plus_minus(mean, half, 1, 4), f"{min(losses):.4f} to {max(losses):.4f}", n])
    table = Table(("arm", "validation loss (nats per token)", "range", "seeds"), body)
    caption = "Small: every seed; large: their mean. ±: half-width of the 95% Student-t interval, from two seeds on."
    return [Section("Comparisons", [partial(arms_figure, groups), table], caption)]


def arms_figure(groups: Mapping[str, Sequence[float]]) -> Figure:
    """A row of marks per arm: validation loss of its seeds, and their mean."""
    figure, (ax,) = style.canvas(width=7.2, height=1.3 + 0.36 * len(groups))
    for number, (name, losses) in enumerate(groups.items()):
        style.seed_marks(ax, -number, losses, style.PALETTE[number % 7], style.MARKERS[number % 7], name)
    ax.set_yticks([-number for number in range(len(groups))], list(groups))
    ax.set_ylim(0.6 - len(groups), 0.6)
    titles(ax, "Validation loss by arm", x="nats per token")
    return figure


def _pruned_sections(runs: Sequence[RunFiles]) -> list[Section]:
    body = []
    for run in runs:
        found = read_json(run.path / "result.json")
        more = {"density": found.get("density"), "parameters": f"{found.get('pruned_parameters', 0):,}"}
        body += [{"run": run.name} | row | more for row in found.get("texts", [])]
    caption = "Perplexity of each text before and after pruning; density: share of the kernels' weights that are left."
    figures = [partial(pruned_figure, body)] * bool(body)
    return [Section("Pruned models", [*figures, table_of(body)], caption)]


def pruned_figure(rows: Rows) -> Figure:
    """Perplexity before (hollow) and after pruning, a row per run and text."""
    figure, (ax,) = style.canvas(width=7.2, height=1.4 + 0.36 * len(rows))
    for number, row in enumerate(rows):
        color = style.PALETTE[0]
        ax.plot([row["perplexity"], row["pruned"]], [-number] * 2, color=style.GRID, linewidth=1.5, zorder=1)
        ax.plot(row["perplexity"], -number, "o", color=color, markerfacecolor="none", markersize=6)
        style.dots(ax, [row["pruned"]], [-number], color, 6, 1.0)
    ax.set_ylim(0.6 - len(rows), 0.6)
    ax.set_yticks([-number for number in range(len(rows))], [f"{row['run']}: {row['text']}" for row in rows])
    style.log_values(ax, "x", values=[row[key] for row in rows for key in ("perplexity", "pruned")])
    titles(ax, "Perplexity before (hollow) and after", x="perplexity, log scale")
    return figure


def _study_sections(runs: Sequence[RunFiles]) -> list[Section]:
    return [Section(f"Study: {run.name}", markdown_parts((run.path / "table.md").read_text("utf-8"))) for run in runs]


def markdown_parts(text: str) -> list[Any]:
    """Findings (lines that begin with a dash) as paragraphs and tables as tables, of a study's table.md."""
    parts: list[Any] = []
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
            continue
        if rows:
            parts.append(Table(rows[0], rows[2:]))
            rows = []
        if line.startswith("- "):
            parts.append(paragraphs(line.removeprefix("- ")))
        elif line.strip("*# "):
            parts.append(f"<h3>{paragraphs(line.strip('*# ')).removeprefix('<p>').removesuffix('</p>')}</h3>")
    return parts


def _other_sections(runs: Sequence[RunFiles]) -> list[Section]:
    told = [f"{run.name} has no table yet, or none that this page shows: {run.path}/report.html." for run in runs]
    return [Section("Other runs", paragraphs(*told))]


# By the files that tell them, the first that fits.
KINDS: dict[str, Kind] = {
    "search": Kind("search", "searches", ("tickets.csv",), _search_sections),
    "fit": Kind("scaling fit", "scaling fits", ("fit.json",), _fit_sections),
    "comparison": Kind("comparison", "comparisons", ("runs.csv",), _comparison_sections),
    "training": Kind("training run", "training runs", (METRICS,), _training_sections),
    "pruned": Kind("pruned model", "pruned models", ("result.json",), _pruned_sections),
    "study": Kind("study", "studies", ("table.md",), _study_sections),
    "other": Kind("other run", "other runs", (), _other_sections),
}
