"""Figures of a lottery search: rows and masks in, matplotlib Figures out; nothing is read, written or shown.

Rows are those of `lottery.imp.search`: one dict per (level, arm, seed). Weights remaining run from 100% on the left
down to the sparsest level on a log scale, as in the figures of Frankle & Carbin 2019 (arXiv:1803.03635). Bands are 95%
Student-t intervals of the mean over seeds; with one seed there is none.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from lottery.search_config import ARMS
from lottery.summary import DENSE, differences, summarise
from tessera.reports.style import DASHES, INK, MARKERS, PALETTE, canvas, label_lines, ramp, titles, weights_axis

Rows = Sequence[Mapping[str, Any]]

PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g}%")

# The look of an arm is the same in every figure. Arms not named here take the colours again, with other markers.
ARM_ORDER = ("ticket", "reinit", "random_mask", "oneshot", "continue", "oneshot_reinit", "random_reinit")
ARM_NAMES = {
    DENSE: "dense network",
    "ticket": "winning ticket",
    "reinit": "reinitialized",
    "random_mask": "random mask",
    "random_reinit": "random mask, reinitialized",
    "continue": "no rewinding",
    "finetune": "fine-tuned",
    "strategy2": "continued, reset at the end",
    "same_sign": "reinitialized, same signs",
    "other_seed": "another seed's mask",
    "at_init": "pruned at initialization",
    "large_init": "largest at initialization",
    "transfer": "another run's mask",
    "oneshot": "one-shot",
    "oneshot_reinit": "one-shot, reinitialized",
}


class Point(NamedTuple):
    """The mean of a value over seeds at one level; `half` is the half-width of its 95% interval, NaN with one seed."""

    level: int
    density: float
    mean: float
    half: float
    seeds: int


def arms(rows: Rows) -> list[str]:
    """Arms of the rows apart from DENSE, known ones first in a fixed order."""
    found = {row["arm"] for row in rows if row["arm"] != DENSE}
    return [arm for arm in ARM_ORDER if arm in found] + sorted(found - set(ARM_ORDER))


def main_arm(rows: Rows) -> str:
    """The arm a search is about: the ticket, else the first arm there is; "dense" when nothing was pruned."""
    return next(iter(arms(rows)), DENSE)


def arm_name(arm: str) -> str:
    """What a reader calls the arm."""
    return ARM_NAMES.get(arm, arm.replace("_", " "))


def arm_look(arm: str) -> dict[str, Any]:
    """Colour, marker and dash of an arm."""
    others = sorted(set(ARMS) - set(ARM_ORDER))
    place = ARM_ORDER.index(arm) if arm in ARM_ORDER else others.index(arm) if arm in others else -1
    index = place % len(PALETTE)
    shift = 0 if arm in ARM_ORDER else 3
    return {"color": PALETTE[index], "marker": MARKERS[(index + shift) % 7], "linestyle": DASHES[(index + shift) % 7]}


def numbers(rows: Rows, value: str) -> list[dict[str, Any]]:
    """What it takes to summarise one value: the rows' names and the value as a float, None where it is missing."""
    found = [(row, row.get(value)) for row in rows]
    names = ("arm", "level", "seed", "density")
    return [{**{k: row[k] for k in names}, value: None if v is None else float(v)} for row, v in found]


def series(rows: Rows, value: str) -> dict[str, list[Point]]:
    """Arm -> points by falling density. Every arm begins at the dense network, which DENSE holds alone."""
    points: dict[str, list[Point]] = {}
    for cell in summarise(numbers(rows, value), value):
        point = Point(cell["level"], cell["density"], cell["mean"], cell["half_width"], cell["n"])
        if np.isfinite(point.mean):
            points.setdefault(cell["arm"], []).append(point)
    dense = points.get(DENSE, [])
    return {arm: sorted(dense * (arm != DENSE) + own, key=lambda p: -p.density) for arm, own in points.items()}


def draw_arms(ax: Axes, lines: Mapping[str, Sequence[Point]], *, labels: bool = True) -> None:
    """Draw one line with an interval band per arm against weights remaining, and the dense network's mean across."""
    densities = [point.density for points in lines.values() for point in points]
    weights_axis(ax, densities)
    for arm, points in lines.items():
        if arm == DENSE:
            ax.axhline(points[0].mean, color=INK, linewidth=1, linestyle=(0, (2, 2)), zorder=1.5)
            continue
        look = arm_look(arm)
        x, mean, half = (np.array([getattr(p, name) for p in points]) for name in ("density", "mean", "half"))
        ax.plot(100 * x, mean, **look, linewidth=1.8, markersize=4, markeredgewidth=0)
        ax.fill_between(100 * x, mean - half, mean + half, color=look["color"], alpha=0.17, linewidth=0)
    if labels:
        ends = [
            (100 * points[-1].density, points[-1].mean, arm_name(arm), arm_look(arm)["color"])
            for arm, points in lines.items()
            if arm != DENSE
        ]
        if DENSE in lines:
            ends.append((100 * min(densities), lines[DENSE][0].mean, arm_name(DENSE), INK))
        label_lines(ax, ends)


def ordered(lines: Mapping[str, list[Point]]) -> dict[str, list[Point]]:
    """The lines in the order of `arms`, the dense network last."""
    names = [arm for arm in ARM_ORDER if arm in lines] + sorted(set(lines) - set(ARM_ORDER) - {DENSE})
    return {arm: lines[arm] for arm in [*names, *([DENSE] if DENSE in lines else [])]}


def accuracy_figure(rows: Rows, value: str = "early_stop_test_accuracy") -> Figure:
    """Test accuracy against weights remaining: close to the dense network on the left, the whole range on the right."""
    lines = ordered(series(rows, value))
    points = [point for arm in lines.values() for point in arm]
    figure, (near, whole) = canvas(2, height=3.9)
    top = max(p.mean + np.nan_to_num(p.half) for p in points)
    bottom = min(p.mean - np.nan_to_num(p.half) for p in points)
    reference = lines[DENSE][0].mean if DENSE in lines else max(p.mean for p in points)
    # Close: three times as far below the dense network as anything is above it, and never less than two points.
    close = max(reference - max(3 * (top - reference), 0.02), bottom)
    when = {"early_stop_test_accuracy": " at early stopping", "final_test_accuracy": " at the end of training"}
    for ax, low, title in ((near, close, "Close to the dense network"), (whole, bottom, "Whole range")):
        room = 0.04 * (top - low) + 1e-4
        ax.set_ylim(low - room, top + room)
        ax.yaxis.set_major_formatter(PERCENT)
        titles(ax, title, y=f"test accuracy{when.get(value, '')}")
        draw_arms(ax, lines, labels=ax is whole)
    return figure


def speed_figure(rows: Rows) -> Figure:
    """Early-stopping step, and the validation loss there, against weights remaining."""
    panels = (
        ("early_stop_step", "How soon it learns", "training step of the lowest validation loss"),
        ("best_validation_loss", "How well it fits", "lowest validation loss (nats), log scale"),
    )
    figure, axes = canvas(2, height=3.9)
    for ax, (value, title, unit) in zip(axes, panels, strict=True):
        lines = ordered(series(rows, value))
        if value == "early_stop_step":
            ax.set_ylim(0, 1.08 * max(p.mean + np.nan_to_num(p.half) for arm in lines.values() for p in arm))
            ax.yaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        else:
            log_values(ax, [p.mean for arm in lines.values() for p in arm])
        titles(ax, title, y=unit)
        draw_arms(ax, lines, labels=ax is axes[-1])
    return figure


def log_values(ax: Axes, values: Sequence[float]) -> None:
    """Log-scaled vertical axis around positive values with plain numbers at 1, 2, 5 steps."""
    low, high = min(v for v in values if v > 0) / 1.15, max(values) * 1.15
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ticks = [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    ax.yaxis.set_major_locator(FixedLocator(ticks[:: 1 + len(ticks) // 9] or [low, high]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def difference_figure(rows: Rows, value: str = "early_stop_test_accuracy", arm: str = "ticket") -> Figure:
    """Accuracy of `arm` minus the dense network's (left) and minus each control's (right), points, paired by seed."""
    controls = [other for other in arms(rows) if other != arm]
    figure, axes = canvas(1 + bool(controls), width=9.6 if controls else 6.5, height=3.6)
    panels = (("minus the dense network", [DENSE]), ("minus its controls", controls))
    for ax, (title, others) in zip(axes, panels, strict=False):
        lines = {other: paired_points(rows, value, arm, other) for other in others}
        lines = {other: points for other, points in lines.items() if points}
        ends = []
        for other, points in lines.items():
            look = arm_look(arm if other == DENSE else other)
            x, mean, half = (100 * np.array([getattr(p, k) for p in points]) for k in ("density", "mean", "half"))
            ax.plot(x, mean, **look, linewidth=1.8, markersize=4, markeredgewidth=0)
            ax.fill_between(x, mean - half, mean + half, color=look["color"], alpha=0.17, linewidth=0)
            ends.append((float(x[-1]), float(mean[-1]), f"minus {arm_name(other)}", look["color"]))
        ax.axhline(0, color=INK, linewidth=1, linestyle=(0, (2, 2)))
        if others == [DENSE] and lines:
            high = 100 * max(p.mean + np.nan_to_num(p.half) for p in lines[DENSE])
            low = 100 * min(p.mean - np.nan_to_num(p.half) for p in lines[DENSE])
            high, low = max(high, 0.5), max(low, -max(3 * high, 2.0))  # the collapse at the end would hide the rest
            ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        weights_axis(ax, [row["density"] for row in rows])
        titles(ax, f"{arm_name(arm).capitalize()} {title}", y="difference in test accuracy (percentage points)")
        label_lines(ax, ends if others != [DENSE] else [])
    return figure


def paired_points(rows: Rows, value: str, arm: str, other: str) -> list[Point]:
    """Mean difference arm - other per level, paired by seed, by falling density; none if an arm has no rows."""
    if arm == other or not {arm, other} <= {row["arm"] for row in rows}:
        return []
    cells = [cell for cell in differences(numbers(rows, value), value, arm, other) if np.isfinite(cell["mean"])]
    points = [Point(c["level"], c["density"], c["mean"], c["half_width"], c["n"]) for c in cells]
    return sorted(points, key=lambda point: -point.density)


def layer_figure(rows: Rows, arm: str = "ticket") -> Figure:
    """What is left of each layer against what is left of all; both axes are log-scaled."""
    mine = [row for row in rows if row["arm"] in (DENSE, arm)]
    paths = list(mine[0]["layers"])
    figure, (ax,) = canvas(width=7.2, height=3.6 + 0.1 * max(0, len(paths) - 8))
    lines = {path: series([{**row, path: row["layers"][path]} for row in mine], path).get(arm, []) for path in paths}
    log_values(ax, [100 * point.mean for points in lines.values() for point in points])
    weights_axis(ax, [row["density"] for row in mine])
    ends = []
    for (path, points), colour in zip(lines.items(), ramp(len(paths)), strict=True):
        x, mean, half = (100 * np.array([getattr(p, k) for p in points]) for k in ("density", "mean", "half"))
        ax.plot(x, mean, color=colour, linewidth=1.8, marker="o", markersize=3, markeredgewidth=0)
        ax.fill_between(x, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        ends.append((float(x[-1]), float(mean[-1]), path.removesuffix("/kernel"), colour))
    titles(ax, "What is left of each layer", y="weights remaining in the layer (%), log scale")
    label_lines(ax, ends, gap=min(0.075, 0.96 / max(1, len(ends))))
    return figure
