"""Training curves: rows of `metrics.jsonl` and `timing.jsonl` as figures of loss, gradient norm, throughput."""

import numpy as np

from tessera.infra.logger import Rows
from tessera.reports import style
from tessera.reports.style import INK, PALETTE, Axes, Figure, line_with_band, steps_axis, titles

# Panels of a training run: (key, title, unit, log scale). One is drawn when some row has the key.
PANELS = (
    ("grad_norm", "Gradient norm", "L2 norm before clipping, log scale", True),
    ("lr", "Learning rate", " ", False),
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
    """Centered moving mean of `window` (odd) values; fewer at the ends; values that are not finite do not count."""
    finite = np.isfinite(values)
    middle = slice(window // 2, window // 2 + len(values))
    total = np.convolve(np.where(finite, values, 0.0), np.ones(window))[middle]
    count = np.convolve(finite.astype(float), np.ones(window))[middle]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def window_of(count: int) -> int:
    """How many logged rows are averaged into the thick line of a curve of `count` rows (odd; 1 for short runs)."""
    return max(1, count // 40) | 1 if count >= 80 else 1


def draw_smooth(ax: Axes, step: np.ndarray, value: np.ndarray, color: str, window: int, label: str = "") -> None:
    """Draw the moving mean of a curve, and thin the values as they were logged if that is something else."""
    if window > 1:
        ax.plot(step, value, color=color, linewidth=0.7, alpha=0.35)
    if len(step):
        line_with_band(ax, step, smooth(value, window), color=color, linewidth=1.6, label=label)


def loss_figure(rows: Rows) -> Figure:
    """Training and validation loss against step: the whole run, and what comes after its first tenth enlarged."""
    figure, axes = style.canvas(2, height=3.9)
    train, evaluated = training_loss(rows), column(rows, "loss", "eval")
    last = max(row["step"] for row in rows) or 1
    for ax, title in zip(axes, ("Whole run", "After the first tenth"), strict=True):
        draw_smooth(ax, *train, PALETTE[0], window_of(len(train[0])), "training")
        line_with_band(ax, *evaluated, color=PALETTE[1], marker="o", label="validation")
        ax.set_xlim(0, last)
        steps_axis(ax, 6)
        titles(ax, title, x="training step", y="loss (nats per token)")
    style.zoom(axes[1], style.named_lines(axes[1]), last / 10)
    style.label_lines(axes[1])
    return figure


def run_figure(rows: Rows) -> Figure | None:
    """Gradient norm, learning rate and throughput against step, those that were recorded; None if none was."""
    shown: dict[str, tuple] = {}
    for key, title, unit, log in PANELS:
        found = [curve for kind in ("train", "time") if len((curve := column(rows, key, kind))[0])]
        if found:
            shown.setdefault(title, (key, unit, log, *found[0]))
    if not shown:
        return None
    figure, axes = style.canvas(len(shown), width=9.6 if len(shown) > 1 else 5.0, height=2.9)
    for ax, (title, (key, unit, log, step, value)) in zip(axes, shown.items(), strict=True):
        draw_smooth(ax, step, value, INK, 1 if key == "lr" else window_of(len(step)))
        finite = value[np.isfinite(value)]
        if log and len(finite) and finite.min() > 0:
            style.log_values(ax, values=finite)
        else:
            ax.set_ylim(0, 1.08 * max(finite, default=1.0) or 1.0)
            ax.locator_params(axis="y", nbins=5, steps=[1, 2, 5, 10])
            ax.yaxis.set_major_formatter("{x:,g}")
        ax.set_xlim(0, max(row["step"] for row in rows) or 1)
        steps_axis(ax, 3)
        titles(ax, title, x="training step", y=unit)
    return figure
