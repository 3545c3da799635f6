"""Learning curves of a lottery search: how the networks of some levels train, means over seeds."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lottery.summary import DENSE
from tessera.reports.lottery_figures import PERCENT, Rows, arm_name, arms, log_values
from tessera.reports.style import INK, canvas, label_lines, ramp, titles


def pick(levels: Sequence[int], count: int) -> list[int]:
    """At most `count` of the levels, evenly spread, the first and the last among them."""
    chosen = np.linspace(0, len(levels) - 1, min(count, len(levels)))
    return [sorted(levels)[i] for i in sorted({round(c) for c in chosen})]


def mean_curve(rows: Rows, value: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps that every row's curve has, and the mean over rows of `value` there."""
    common = sorted(set.intersection(*(set(row["curve"]["step"]) for row in rows)))
    lookups = [dict(zip(row["curve"]["step"], row["curve"][value], strict=True)) for row in rows]
    return np.array(common), np.array([np.mean([lookup[step] for lookup in lookups]) for step in common])


class Curve(NamedTuple):
    """One line of a learning-curve panel: the mean over seeds of a value at one level."""

    level: int
    density: float
    step: np.ndarray
    mean: np.ndarray


def curves(rows: Rows, arm: str, levels: Sequence[int], value: str) -> list[Curve]:
    """Mean learning curves of an arm at the levels where it has any; level 0 is the dense network."""
    found = []
    for level in levels:
        mine = [row for row in rows if row["level"] == level and row["arm"] in (DENSE, arm)]
        if mine:
            found.append(Curve(level, mine[0]["density"], *mean_curve(mine, value)))
    return found


def curves_figure(rows: Rows, shown: Sequence[str] = (), count: int = 5) -> Figure:
    """Learning curves (means over seeds) at `count` levels: validation accuracy above, loss below, a column per arm.

    `shown` names the arms, by default the first two; the dense network (dashed) is in every column.
    """
    columns = list(shown or arms(rows)[:2]) or [DENSE]
    levels = pick(sorted({row["level"] for row in rows if row["arm"] in (DENSE, columns[0])}), count)
    colours = dict(zip(levels, [INK, *ramp(len(levels) - 1)], strict=True))
    figure, axes = canvas(len(columns), 2, width=9.6 if len(columns) > 1 else 6.5, height=6.6)
    panels = (("validation_accuracy", "validation accuracy"), ("validation_loss", "validation loss (nats), log scale"))
    for row, (value, unit) in enumerate(panels):
        drawn = [curves(rows, arm, levels, value) for arm in columns]
        values = np.concatenate([curve.mean for lines in drawn for curve in lines])
        values = values[np.isfinite(values)]
        for column, lines in enumerate(drawn):
            ax = axes[row * len(columns) + column]
            if value == "validation_loss":
                log_values(ax, values.tolist())
            else:
                # The climb from chance takes few steps and would flatten everything that comes after it.
                low, high = np.quantile(values, 0.12), values.max()
                ax.set_ylim(low, high + 0.04 * (high - low) + 1e-4)
                ax.yaxis.set_major_formatter(PERCENT)
            draw_curves(ax, lines, colours)
            titles(ax, "" if row else arm_name(columns[column]).capitalize(), x="training step" if row else "", y=unit)
    return figure


def draw_curves(ax: Axes, lines: Sequence[Curve], colours: Mapping[int, str]) -> None:
    """Draw one panel of learning curves, each labelled with its weights remaining."""
    for curve in lines:
        dash = "-" if curve.level else (0, (4, 2))
        ax.plot(curve.step, curve.mean, color=colours[curve.level], linewidth=1.6, linestyle=dash)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    ax.set_xlim(0, max(curve.step[-1] for curve in lines))
    ends = [
        (float(curve.step[-1]), float(curve.mean[-1]), f"{100 * curve.density:.3g}%", colours[curve.level])
        for curve in lines
    ]
    label_lines(ax, ends)
