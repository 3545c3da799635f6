"""The page of a language-model run: findings, training curves, routing, numbers and settings."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaling.flops import parameters
from tessera.infra.logger import METRICS, TIMING, Rows, read_rows
from tessera.reports.comparison import flops_per_token, shape
from tessera.reports.curves import column, loss_figure, run_figure, training_loss, window_of
from tessera.reports.html import Section, config_section, paragraphs, read_json, table_of, write_report
from tessera.reports.router import router_sections
from tessera.reports.sample import sample_section
from tessera.reports.style import pick, short


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
        caption += f" Thin lines are the rows as logged, thick ones their centered mean over {smoothed} rows."
    return Section(title, [loss_figure(rows), *([run] if run else [])], caption)


def lm_report(
    workdir: Path | str, test: Mapping[str, float] | None = None, plan: Sequence[Section] = (), links: str = ""
) -> Path:
    """Write the report of a language-model run from its `metrics.jsonl`, `timing.jsonl` and `config.json`.

    Args:
      workdir: the run's directory.
      test: metrics of the final weights on the test split; their "loss" (nats per token) is told if given.
      plan: sections on how the work was split.
      links: HTML for the opening statement.

    Raises:
      MissingMatplotlib: matplotlib is not installed; nothing is written.
    """
    workdir = Path(workdir)
    rows, timing, config = read_rows(workdir / METRICS), read_rows(workdir / TIMING), read_json(workdir / "config.json")
    tokens = config.get("batch_size", 0) * config.get("length", 0)
    if tokens:
        timing = [{"tokens_per_second": tokens * row["steps_per_second"]} | row for row in timing]
    sections = [
        Section("", paragraphs(*lm_findings(rows, timing, config, test)) + links),
        curves_section([*rows, *timing] if rows else []),
        *sample_section(workdir),
        *router_sections(rows, workdir),
        *plan,
        Section("Numbers", table_of(_milestones(rows)), "Loss in nats per token at the steps where it was evaluated."),
        config_section(workdir),
    ]
    name = config.get("data", {}).get("name", "text")
    return write_report(workdir, f"Language model on {name}", sections)


def lm_findings(
    rows: Rows, timing: Rows, config: Mapping[str, Any], test: Mapping[str, float] | None = None
) -> list[str]:
    """What was run and what came out, as plain sentences computed from the rows: one string per paragraph."""
    model, data, optimizer = (config.get(name, {}) for name in ("model", "data", "optimizer"))
    steps, batch, length = max((row["step"] for row in rows), default=0), config.get("batch_size"), config.get("length")
    sizes = {"layers": "layers", "width": "wide", "heads": "heads"}
    shape = ", ".join(f"{model[key]} {word}" for key, word in sizes.items() if key in model)
    run = [f"A decoder-only transformer{f' ({shape})' if shape else ''} was trained for {steps:,} steps"]
    if batch and length and not config.get("rampup_batch_size"):
        run[0] += f" of {batch} x {length} tokens, {steps * batch * length:,} tokens in all"
    if optimizer.get("name"):
        run.append(f"with {optimizer['name']} at a peak learning rate of {config.get('lr', '?')}")
    speed = column(timing, "tokens_per_second", "time")[1]
    if len(speed):
        run.append(f"at a median of {np.median(speed):,.0f} tokens per second")
    step, loss = column(rows, "loss", "eval")
    found = ["No validation loss was recorded."]
    if np.isfinite(loss).any():
        best = int(np.nanargmin(loss))
        size = config.get("vocab_size") or model.get("vocab_size") or data.get("vocab_size")
        per_byte = column(rows, "bits_per_byte", "eval")[1]
        last = float(per_byte[-1]) if len(per_byte) else None
        found = [f"Validation loss ended at {_describe_loss(loss[-1], config, last)}."]
        if best != len(loss) - 1:
            found.append(f"It was lowest at step {step[best]:,.0f}: {loss[best]:.4f}.")
        if len(loss) > 1:
            found.append(f"At the first evaluation (step {step[0]:,.0f}) it was {loss[0]:.4f}.")
        if size:
            found.append(f"A uniform guess over {size} symbols costs {math.log(size):.4f}.")
    for at, value in zip(*(values[-1:] for values in training_loss(rows)), strict=True):
        found.append(f"The last logged training loss (cross-entropy) is {value:.4f} (step {at:,.0f}, one batch).")
    texts = [", ".join(run) + ".", *size_findings(config, steps * (batch or 0) * (length or 0)), " ".join(found)]
    if test and "loss" in test:
        said = _describe_loss(test["loss"], config, test.get("bits_per_byte"))
        texts.append(f"On the test split the final weights reach {said}.")
    for row in [row for row in rows if row.get("kind") == "failed"][-1:]:
        texts.append(f"The run stopped at step {row['step']:,}: the loss or its gradient was not finite.")
    return [*texts, "One run, one seed: there is no interval, and small differences from another run mean nothing."]


def size_findings(config: Mapping[str, Any], tokens: int) -> list[str]:
    """Parameters, FLOPs, experts and text of the run; nothing where the config is not whole."""
    texts = []
    try:
        sizes = shape(config)
    except (KeyError, ValueError):  # rows of another program, or a model whose weights are not counted
        sizes = None
    if sizes:
        total, used = (parameters(sizes, active=active).total for active in (False, True))
        text = f"It has {total:,} parameters in matrices"
        if sizes.experts > 1:
            router = config["model"]["moe"]["router"]
            routed = sizes.layers - sizes.dense_layers
            text += (
                f", {used:,} of them used by a token: {sizes.experts} experts in {routed} of {sizes.layers} layers, "
                f"{sizes.active_experts} of them for each token, chosen by the router {router['name']!r}"
            )
        if tokens and not config.get("rampup_batch_size"):
            text += f"; training took {short(flops_per_token(config) * tokens)} FLOPs (of matrix products)"
        texts.append(text + ".")
    if config.get("data", {}).get("name") == "stdlib":
        texts.append("The text, stdlib, is the source code of this Python's standard library.")
    return texts


def _describe_loss(loss: float, config: Mapping[str, Any], per_byte: float | None) -> str:
    text = f"{loss:.4f} nats per token (perplexity {math.exp(min(loss, 700)):.2f}"
    if per_byte is None and config.get("data", {}).get("tokenizer") == "bytes" and "vocab_size" not in config:
        per_byte = loss / math.log(2)  # of a run that did not log it
    return text + (f", {per_byte:.3f} bits per byte)" if per_byte is not None else ")")


def _milestones(rows: Rows, count: int = 20) -> list[dict[str, Any]]:
    train = {row["step"]: row for row in rows if row.get("kind") == "train"}
    table = []
    for row in pick([row for row in rows if row.get("kind") == "eval"], count):
        own = train.get(row["step"], {})
        losses = {"training loss": own.get("cross_entropy", own.get("loss")), "validation loss": row.get("loss")}
        rest = {f"validation {key}": row[key] for key in row if key not in ("step", "kind", "loss")}
        table.append({"step": row["step"]} | losses | rest)
    return table
