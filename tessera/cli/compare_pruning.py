"""Prune a model in several ways, over draws of calibration text: `tessera compare-pruning --config.model.dir=DIR`."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from rich.console import Console

from lottery import masks
from tessera.cli import prune
from tessera.cli.main import Invocation
from tessera.cli.prune import DATA, MODEL_SOURCE, check_lengths, cut_tokens, read_documents, score
from tessera.compress.pruning import PruneConfig, check_fits, prune_decoder
from tessera.compress.text import CalibrationConfig, draw_windows, refuse_shared
from tessera.infra.artifacts import ArtifactStore
from tessera.infra.config import ConfigError, build, checked
from tessera.infra.logger import Progress
from tessera.infra.memo import Memo
from tessera.infra.schema import Changes, Group, Schema
from tessera.infra.workdir import hold
from tessera.reports.html import print_report
from tessera.reports.style import Figure, canvas, deferred
from tessera.serving.load import Loaded, SourceConfig, load
from tessera.tickets.studies.study import DENSE, Comparison, Study, same, verdict, write_study

BLOCKS = "blocks"  # folder of the arm that is being pruned

ERRORS = prune.ERRORS


@dataclass(frozen=True)
class ComparePruningSettings:
    """What stands at the top of the config.

    Attributes:
      draws: seeds of the calibration text. All arms of a draw score the same part of every text, no other draw does.
      texts: what is scored: names, files or globs as `data.name` of a training has them; no document of it may be
        calibration text.
      length: tokens of a window that is scored, the first of them context only.
      tokens: of each text, scored in a draw.
      against: the arm that the others are compared with, draw by draw.
    """

    draws: tuple[int, ...] = (0, 1, 2, 3, 4)
    texts: tuple[str, ...] = ("tinyshakespeare",)
    length: int = 256
    tokens: int = 10_000
    against: str = "magnitude"


SCHEMA = Schema(
    ComparePruningSettings,
    model=MODEL_SOURCE,
    prune=PruneConfig,
    calibration=Group(CalibrationConfig, without=("seed",)),
    data=DATA,
    arms=Changes(Schema(PruneConfig), "what an arm changes in `prune`."),
)


def main(invocation: Invocation) -> int:
    """Prune what is not pruned yet, then a table with intervals, a picture and a page. Returns the exit status."""
    c, console = invocation.config, Console()
    calibration = build(CalibrationConfig, c.calibration, "config.calibration")
    if not c.texts or c.length < 2 or c.tokens < 1 or not c.draws or len(set(c.draws)) < len(c.draws):
        raise ConfigError(
            f"config.texts={tuple(c.texts)}, config.length={c.length}, config.tokens={c.tokens}, config.draws="
            f"{tuple(c.draws)}: at least one text, windows of at least 2 tokens, at least one token, and draws that "
            "differ are needed"
        )
    arms = {
        name: build(PruneConfig, {**c.prune.to_dict(), **changed}, f"config.arms.{name}")
        for name, changed in c.arms.to_dict().items()
    }
    if c.against not in arms:
        raise ConfigError(f"config.against={c.against!r}: one of the arms is needed: {', '.join(arms) or 'none'}")
    evaluated = {name: read_documents(c, name, "config.texts") for name in c.texts}
    learned = {
        name: read_documents(c, name, "config.calibration.texts", calibration.max_bytes) for name in calibration.texts
    }
    checked("config.texts", refuse_shared, learned, evaluated)
    loaded = checked("config.model", load, build(SourceConfig, c.model, "config.model"))
    for name, how in arms.items():
        checked(f"config.arms.{name}", check_fits, how, loaded.params, loaded.config)
    check_lengths(loaded, c)
    windows = {
        draw: checked("config.calibration", draw_windows, learned, loaded.tokenizer, replace(calibration, seed=draw))
        for draw in c.draws
    }
    parts = {text: _parts(text, documents, loaded, c) for text, documents in evaluated.items()}
    workdir, begun = invocation.prepare(whole=True), time.monotonic()
    with hold(workdir):
        memo = Memo(workdir / "memo", lambda part: console.log(f"{time.monotonic() - begun:6.0f} s  {part}"))
        store = ArtifactStore(workdir / BLOCKS)
        rows = []
        for number, draw in enumerate(c.draws):
            mine = {text: cut[number] for text, cut in parts.items()}
            rows += memo.rows(f"{DENSE}-{draw}", lambda: _score(DENSE, draw, loaded, mine, c.length))  # noqa: B023
            for name, how in arms.items():
                rows += memo.rows(
                    f"{name}-{draw}", _prune, name, draw, loaded, how, windows[draw], mine, c.length, store
                )
                store.clear()
    study = compare(rows, c.against, {name: f"{how.method}, {how.structure}" for name, how in arms.items()})
    for finding in study.findings:
        console.print(finding)
    print_report(write_study, workdir, study)
    return 0


def _parts(text: str, documents: Sequence[str], loaded: Loaded, c: Any) -> list[list[list[int]]]:
    cut = cut_tokens(documents, loaded.tokenizer, c.tokens, len(c.draws))
    found = sum(len(tokens) for part in cut for tokens in part)
    if found < c.tokens * len(c.draws):
        raise ConfigError(
            f"config.texts: {text} has {found:,} tokens; {len(c.draws)} draws that score {c.tokens:,} each need "
            f"{c.tokens * len(c.draws):,}. Lower config.tokens, or give more text"
        )
    return cut


def _prune(
    name: str,
    draw: int,
    loaded: Loaded,
    how: PruneConfig,
    windows_NT: np.ndarray,
    texts: Mapping[str, list[list[int]]],
    length: int,
    store: ArtifactStore,
) -> list[dict[str, Any]]:
    began = time.process_time()
    with Progress(loaded.config.layers, "blocks", begins="compiling") as progress:
        options: dict[str, Any] = {"store": store, "done": progress.advance}
        pruned = checked(f"config.arms.{name}", prune_decoder, loaded.params, loaded.config, how, windows_NT, **options)
    seconds = time.process_time() - began
    small = loaded._replace(params=pruned.params, config=pruned.config)
    errors = [row["error"] for row in pruned.rows if "error" in row]
    more = {"error": float(np.mean(errors)) if errors else None, "seconds": seconds}
    return [row | more for row in _score(name, draw, small, texts, length)]


def _score(
    name: str, draw: int, loaded: Loaded, texts: Mapping[str, list[list[int]]], length: int
) -> list[dict[str, Any]]:
    which = masks.prunable(loaded.params)
    live = sum(
        jax.tree.leaves(jax.tree.map(lambda leaf, chosen: chosen and np.count_nonzero(leaf), loaded.params, which))
    )
    rows = []
    for text, tokens in texts.items():
        found = score(loaded, f"{name}: {text}", tokens, length)
        rows.append(
            {"arm": name, "draw": draw, "text": text, "tokens": found.tokens, "nats": found.loss, "live": int(live)}
        )
    return rows


def compare(rows: Sequence[Mapping[str, Any]], against: str, says: Mapping[str, str]) -> Study:
    """Tables, findings and a picture of pruned models, paired draw by draw.

    Args:
      rows: one an arm, draw and text; those of the arm "dense" are the reference.
      against: an arm that the others are compared with, beside the dense model.
      says: arm -> its method and structure.
    """
    dense = {row["text"]: row["live"] for row in rows if row["arm"] == DENSE}
    texts = {
        text: Comparison(
            [{**row, "density": row["live"] / dense[text]} for row in rows if row["text"] == text],
            *("arm", "nats"),
            heading="nats per token",
            unit="nats",
            scale=1.0,
            digits=3,
            pair="draw",
        )
        for text in dense
    }
    columns: dict[str, Callable[[list[Mapping[str, Any]]], Any]] = {
        "method, structure": lambda rows: says.get(rows[0]["arm"], ""),
        "perplexity": lambda rows: math.exp(np.mean([row["nats"] for row in rows])),
        "layer error": lambda rows: _mean(rows, "error"),
        "CPU s": lambda rows: _mean(rows, "seconds"),
    }
    findings = []
    for text, one in texts.items():
        scored = sum(row["tokens"] for row in one.cell(DENSE, 0))
        findings.append(f"{text}: {scored:,} tokens scored in {len(one.cell(DENSE, 0))} draws of calibration text.")
        for arm in sorted(set(one.arms) - {against}, key=lambda arm: one.mean(arm, 0)):
            told = verdict(
                one.gains(arm, against, 0), against, "nats per token", scale=1.0, digits=3, more="worse", less="better"
            )
            findings.append(f"{text}: {arm} is {told}.")
    tables = {text: one.table({DENSE: DENSE, against: against}, columns) for text, one in texts.items()}
    caption = (
        "Nats per token more than the dense model on the same text; small: draws of calibration text, large: means "
        "with 95% intervals. In the tables, layer error is the mean over layers of the squares that outputs lost "
        "over their own, on the calibration text; CPU s is the processor time of pruning."
    )
    return Study("Pruned without training, compared", findings, tables, _figure(texts), caption, rows)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    found = [row[key] for row in rows if row.get(key) is not None]
    return float(np.mean(found)) if found else None


@deferred
def _figure(texts: Mapping[str, Comparison]) -> Figure:
    count = max(len(one.arms) for one in texts.values())
    figure, axes = canvas(len(texts), width=5.2 * len(texts), height=1.3 + 0.36 * count)
    for ax, (text, one) in zip(axes, texts.items(), strict=True):
        one.draw(ax, text, same(one.arms), DENSE)
    return figure
