"""Curves of one training run: rows of `metrics.jsonl` and `timing.jsonl` in, matplotlib Figures out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tessera.reports.lottery_figures import log_values
from tessera.reports.style import INK, MUTED, PALETTE, canvas, label_lines, titles

Rows = Sequence[Mapping[str, Any]]

# Panels of a training run: (key, title, unit, log scale, file). One is drawn when some row of the kind has the key.
PANELS = (
    ("grad_norm", "Gradient norm", "L2 norm before clipping, log scale", True),
    ("lr", "Learning rate", "", False),
    ("tokens_per_second", "Throughput", "tokens per second", False),
    ("steps_per_second", "Throughput", "steps per second", False),
)


def column(rows: Rows, key: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric in the rows of a kind, float64; rows without it are left out."""
    found = [(row["step"], float(row[key])) for row in rows if row.get("kind") == kind and key in row]
    step, value = zip(*found, strict=True) if found else ((), ())
    return np.array(step, float), np.array(value, float)


def training_loss(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Steps and training loss like the validation loss: the cross-entropy alone where a z-term is recorded apart."""
    step, loss = column(rows, "cross_entropy", "train")
    return (step, loss) if len(step) else column(rows, "loss", "train")


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean of `window` (odd) values; fewer at the ends; values that are not finite do not count."""
    finite = np.isfinite(values)
    middle = slice(window // 2, window // 2 + len(values))
    total = np.convolve(np.where(finite, values, 0.0), np.ones(window))[middle]
    count = np.convolve(finite.astype(float), np.ones(window))[middle]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def loss_figure(rows: Rows) -> Figure:
    """Training and validation loss against step: the whole run, and what comes after its first tenth enlarged."""
    figure, axes = canvas(2, width=9.6, height=3.9)
    train, evaluated = training_loss(rows), column(rows, "loss", "eval")
    window = window_of(len(train[0]))
    lines = [
        (name, step, smooth(loss, window) if name == "training" else loss, colour)
        for name, (step, loss), colour in (("training", train, PALETTE[0]), ("validation", evaluated, PALETTE[1]))
        if len(step)
    ]
    last = max(row["step"] for row in rows)
    for ax, title in zip(axes, ("Whole run", "After the first tenth"), strict=True):
        if window > 1:
            ax.plot(*train, color=PALETTE[0], linewidth=0.7, alpha=0.35)
        for name, step, loss, colour in lines:
            mark: dict[str, Any] = (
                {"marker": "o", "markersize": 4, "markeredgewidth": 0} if name == "validation" else {}
            )
            ax.plot(step, loss, color=colour, linewidth=1.7, **mark)
        _steps_axis(ax, rows)
        titles(ax, title, x="training step", y="loss (nats per token)")
    late = [loss[(step >= last / 10) & np.isfinite(loss)] for _, step, loss, _ in lines]
    late_values = np.concatenate([*late, np.array([])])
    if len(late_values) > 1 and late_values.max() > late_values.min():
        room = 0.08 * (late_values.max() - late_values.min())
        axes[1].set_ylim(late_values.min() - room, late_values.max() + room)
    label_lines(axes[1], [(float(step[-1]), float(loss[-1]), name, colour) for name, step, loss, colour in lines])
    return figure


def window_of(count: int) -> int:
    """How many logged rows are averaged into the thick line of a curve of `count` rows (odd; 1 for short runs)."""
    return max(1, count // 40) | 1 if count >= 80 else 1


def _steps_axis(ax: Axes, rows: Rows) -> None:
    ax.set_xlim(0, max(row["step"] for row in rows) or 1)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def run_figure(rows: Rows) -> Figure | None:
    """Gradient norm, learning rate and throughput against step, those that were recorded; None if none was."""
    shown: list[tuple[str, str, str, bool, str]] = []
    for key, title, unit, log in PANELS:
        kind = next((k for k in ("train", "time") if len(column(rows, key, k)[0])), None)
        if kind and title not in [panel[1] for panel in shown]:
            shown.append((key, title, unit, log, kind))
    if not shown:
        return None
    figure, axes = canvas(len(shown), width=9.6 if len(shown) > 1 else 5.0, height=2.9)
    for ax, (key, title, unit, log, kind) in zip(axes, shown, strict=True):
        step, value = column(rows, key, kind)
        window = window_of(len(step)) if key != "lr" else 1
        if window > 1:
            ax.plot(step, value, color=MUTED, linewidth=0.6, alpha=0.5)
        ax.plot(step, smooth(value, window) if window > 1 else value, color=INK, linewidth=1.5)
        finite = value[np.isfinite(value)]
        if log and len(finite) and finite.min() > 0:
            log_values(ax, finite.tolist())
        else:
            ax.set_ylim(0, 1.08 * max(finite, default=1.0) or 1.0)
            ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            ax.yaxis.set_major_formatter(FuncFormatter(_short))
        _steps_axis(ax, rows)
        ax.xaxis.set_major_locator(MaxNLocator(3, integer=True, steps=[1, 2, 5, 10]))
        titles(ax, title, x="training step", y=unit or " ")
    return figure


def _short(value: float, _: Any = None) -> str:
    """An axis number: 120k, 2.5M, 0.003."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
