"""Reports: one self-contained page per run, and its figures as PNG files beside it.

`report.html` holds everything and is readable without a network; `figures/<name>.png` is each figure by itself.
"""

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tessera.infra.logger import METRICS, TIMING, read_rows, write_text
from tessera.infra.workdir import flatten
from tessera.reports.curves import column, loss_figure, run_figure, training_loss, window_of
from tessera.reports.html import Cell, Section, Table, page, paragraphs
from tessera.reports.router import router_sections

__all__ = [
    "Section",
    "Table",
    "config_section",
    "curves_section",
    "lm_report",
    "page",
    "paragraphs",
    "table_section",
    "write_report",
]

Rows = Sequence[Mapping[str, Any]]


def write_report(
    workdir: Path | str, title: str, sections: Sequence[Section], *, subtitle: str = "", name: str = "report"
) -> Path:
    """Write `<name>.html` and `figures/*.png` in `workdir`, each file in one step; returns the page's path."""
    workdir = Path(workdir)
    for section in sections:
        figures = [part for part in section.parts() if isinstance(part, Figure)]
        for index, figure in enumerate(figures):
            stem = section.slug + (f"-{index + 1}" if len(figures) > 1 else "")
            _write_png(workdir / "figures" / f"{stem}.png", figure)
    path = workdir / f"{name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page(title, sections, subtitle=subtitle))
    return path


def _write_png(path: Path, figure: Figure) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """What a run wrote about itself; empty if the file is absent."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def config_section(workdir: Path | str, title: str = "Settings") -> Section:
    """Every setting of the run with its dotted name, the versions it ran on and the command, folded away."""
    workdir = Path(workdir)
    tables: list[Table] = []
    for name, columns in (
        ("config.json", ("setting", "value")),
        ("run.json", ("run", "")),
        ("versions.json", ("package", "version")),
    ):
        found = flatten(read_json(workdir / name))
        if found:
            tables.append(Table(columns, [(key, _plain(value)) for key, value in sorted(found.items())]))
    if not tables:
        return Section(title, paragraphs(f"No config.json in {workdir.name}."))
    return Section(title, tables, fold="Every setting, the command, the machine and the versions")


def _plain(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    return json.dumps(value)


def table_section(rows: Rows, title: str = "Numbers", caption: str = "") -> Section:
    """Rows (dicts) as a table: a column per key in order of appearance, a dash where a row lacks it."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    body = [[_cell(row.get(column)) for column in columns] for row in rows]
    return Section(title, Table([name.replace("_", " ") for name in columns], body), caption)


def _cell(value: Any) -> Cell:
    if isinstance(value, np.generic):
        value = value.item()
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value)


def curves_section(rows: Rows, title: str = "Learning curves") -> Section:
    """Loss, gradient norm, learning rate and throughput of a run from its rows (kinds "train", "eval", "time")."""
    if not rows:
        return Section(title, paragraphs("Nothing was recorded."))
    run = run_figure(rows)
    smoothed = window_of(len(training_loss(rows)[0]))
    caption = (
        "Cross-entropy: training is the one batch of each logged step, validation is held-out text. The first "
        "throughput after a start includes compilation."
    )
    if smoothed > 1:
        caption += f" Thin lines are the rows as logged, thick ones their centred mean over {smoothed} rows."
    return Section(title, [loss_figure(rows), *([run] if run else [])], caption)


def lm_report(
    workdir: Path | str, test: Mapping[str, float] | None = None, plan: Sequence[Section] = (), links: str = ""
) -> Path:
    """Write the report of a language-model run from its `metrics.jsonl`, `timing.jsonl` and `config.json`.

    `test` are metrics of the final weights on the test split; their "loss" (nats per token) is told if given. `plan`
    are sections on how the work was split, `links` HTML for the opening statement.
    """
    workdir = Path(workdir)
    rows = read_rows(workdir / METRICS)
    config = read_json(workdir / "config.json")
    timing = read_rows(workdir / TIMING)
    tokens = config.get("batch_size", 0) * config.get("length", 0)
    if tokens:
        timing = [{"tokens_per_second": tokens * row["steps_per_second"]} | row for row in timing]
    texts = lm_findings(rows, timing, config)
    if test and "loss" in test:
        texts.insert(
            2, f"On the test split the final weights reach {_loss_words(test['loss'], config.get('data', {}))}."
        )
    sections = [
        Section("", paragraphs(*texts) + links),
        curves_section([*rows, *timing] if rows else []),
        *router_sections(rows, workdir),
        *plan,
        table_section(_milestones(rows), "Numbers", "Loss in nats per token at the steps where it was evaluated."),
        config_section(workdir),
    ]
    name = config.get("data", {}).get("name", "text")
    return write_report(workdir, f"Language model on {name}", sections, subtitle=workdir.resolve().name)


def lm_findings(rows: Rows, timing: Rows, config: Mapping[str, Any]) -> list[str]:
    """What was run and what came out, as plain sentences computed from the rows: one string per paragraph."""
    model, data = config.get("model", {}), config.get("data", {})
    steps = int(max((row["step"] for row in rows), default=0))
    batch, length = config.get("batch_size", 0), config.get("length", 0)
    words = {"layers": "layers", "width": "wide", "heads": "heads"}
    shape = [f"{model[key]} {word}" for key, word in words.items() if key in model]
    run = f"A decoder-only transformer{' (' + ', '.join(shape) + ')' if shape else ''} was trained for {steps:,} steps"
    if batch and length:
        run += f" of {batch} x {length} tokens, {steps * batch * length:,} tokens in all"
    if config.get("optimizer", {}).get("name"):
        run += f", with {config['optimizer']['name']} at a peak learning rate of {config.get('lr', '?')}"
    step, speed = column(timing, "tokens_per_second", "time")
    run += f", at a median of {np.median(speed):,.0f} tokens per second." if len(speed) else "."
    step, loss = column(rows, "loss", "eval")
    if not len(loss) or not np.isfinite(loss).any():
        found = "No validation loss was recorded."
    else:
        best = int(np.nanargmin(loss))
        found = f"Validation loss ended at {_loss_words(loss[-1], data)}."
        if best != len(loss) - 1:
            found += f" It was lowest at step {step[best]:,.0f}: {loss[best]:.4f}."
        if len(loss) > 1:
            found += f" At the first evaluation (step {step[0]:,.0f}) it was {loss[0]:.4f}."
        if model.get("vocab_size") or data.get("vocab_size"):
            size = model.get("vocab_size") or data["vocab_size"]
            found += f" A uniform guess over {size} symbols costs {math.log(size):.4f}."
    train_step, train_loss = training_loss(rows)
    if len(train_loss):
        found += f" The last logged training loss is {train_loss[-1]:.4f} (step {train_step[-1]:,.0f}, one batch)."
    texts = [run, found]
    failed = [row for row in rows if row.get("kind") == "failed"]
    if failed:
        texts.append(f"The run stopped at step {failed[-1]['step']:,}: the loss or its gradient was not finite.")
    return [*texts, "One run, one seed: there is no interval, and small differences from another run mean nothing."]


def _loss_words(loss: float, data: Mapping[str, Any]) -> str:
    words = f"{loss:.4f} nats per token (perplexity {math.exp(min(loss, 700)):.2f}"
    return words + (f", {loss / math.log(2):.3f} bits per byte)" if data.get("tokenizer") == "bytes" else ")")


def _milestones(rows: Rows, count: int = 20) -> list[dict[str, Any]]:
    evals = [row for row in rows if row.get("kind") == "eval"]
    if not evals:
        return []
    train = {row["step"]: row for row in rows if row.get("kind") == "train"}
    # At most `count` lines, the first and the last among them.
    chosen = sorted({round(i) for i in np.linspace(0, len(evals) - 1, min(count, len(evals)))})
    return [_milestone(evals[i], train.get(evals[i]["step"], {})) for i in chosen]


def _milestone(row: Mapping[str, Any], train: Mapping[str, Any]) -> dict[str, Any]:
    shown = {
        "step": row["step"],
        "training loss": train.get("cross_entropy", train.get("loss")),
        "validation loss": row.get("loss"),
    }
    return shown | {f"validation {key}": row[key] for key in row if key not in ("step", "kind", "loss")}
