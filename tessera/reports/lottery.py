"""Figures of a lottery search: accuracy against weights remaining, learning curves, layers, the first layer's mask.

Rows are those of `lottery.imp.search`: one dict per (level, arm, seed). Weights remaining run from 100% on the left
down to the sparsest level on a log scale, as in the figures of Frankle & Carbin 2019 (arXiv:1803.03635). Bands are 95%
Student-t intervals of the mean over seeds; with one seed there is none. A first-layer mask is bool [S, N, M]: S seeds,
N inputs (the pixels of an image [H, W] or [H, W, C] in row-major order), M units.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lottery.imp import ARMS
from lottery.summary import DENSE, differences, summarize
from tessera.infra.logger import Rows
from tessera.reports import style
from tessera.reports.style import EVERYTHING, INK, Axes, Figure, canvas, line_with_band, pick, titles, weights_axis

# The look of an arm is the same in every figure. Arms not named here have the colors again, with other markers.
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
Masks = Mapping[int, np.ndarray]
Densities = Mapping[int, float]
TEXT: dict[str, Any] = {"fontsize": 9.5, "color": INK}


class Point(NamedTuple):
    """The mean of a value over seeds at one level.

    `half` is the half-width of its 95% interval, NaN with one seed; `within` holds the values that are possible.
    """

    level: int
    density: float
    mean: float
    half: float
    seeds: int
    within: tuple[float, float] = EVERYTHING

    @property
    def low(self) -> float:
        """Lower end of the interval; the mean with one seed."""
        return max(self.mean - float(np.nan_to_num(self.half)), self.within[0])

    @property
    def high(self) -> float:
        """Upper end of the interval; the mean with one seed."""
        return min(self.mean + float(np.nan_to_num(self.half)), self.within[1])


def arms(rows: Rows) -> list[str]:
    """Arms of the rows apart from DENSE, known ones first in a fixed order."""
    found = {row["arm"] for row in rows if row["arm"] != DENSE}
    return [arm for arm in ARM_ORDER if arm in found] + sorted(found - set(ARM_ORDER))


def main_arm(rows: Rows) -> str:
    """The arm a search is about: the ticket, else the first arm there is; "dense" when nothing was pruned."""
    return next(iter(arms(rows)), DENSE)


def arm_name(arm: str) -> str:
    """The name of an arm in figures and text."""
    return ARM_NAMES.get(arm, arm.replace("_", " "))


def arm_look(arm: str) -> dict[str, Any]:
    """Color, marker and dash of an arm."""
    if arm in ARM_ORDER:
        return style.look(ARM_ORDER.index(arm))
    others = sorted(set(ARMS) - set(ARM_ORDER))
    return style.look(others.index(arm) if arm in others else -1, shift=3)


def possible(value: str, rows: Rows = ()) -> tuple[float, float]:
    """The values that a measurement can have: accuracies in [0, 1], steps up to the last evaluation, losses from 0."""
    last = max((float(row["curve"]["step"][-1]) for row in rows if row.get("curve")), default=math.inf)
    known = {"early_stop_step": (0.0, last), "best_validation_loss": (0.0, math.inf)}
    return (0.0, 1.0) if value.endswith("accuracy") else known.get(value, EVERYTHING)


def _points(cells: Sequence[Mapping[str, Any]], within: tuple[float, float] = EVERYTHING) -> list[Point]:
    found = [Point(c["level"], c["density"], c["mean"], c["half_width"], c["n"], within) for c in cells]
    return sorted((point for point in found if np.isfinite(point.mean)), key=lambda point: -point.density)


def _floats(rows: Rows, value: str) -> list[dict[str, Any]]:
    """The rows with one value as a float, None where it is missing."""
    return [{**row, value: None if row.get(value) is None else float(row[value])} for row in rows]


def series(rows: Rows, value: str) -> dict[str, list[Point]]:
    """Arm -> points by falling density, in the order of `arms`, DENSE last.

    Every arm begins at the dense network, which DENSE holds alone.
    """
    cells = summarize(_floats(rows, value), value)
    dense = [cell for cell in cells if cell["arm"] == DENSE]
    within = possible(value, rows)
    found = {arm: _points(dense + [cell for cell in cells if cell["arm"] == arm], within) for arm in arms(rows)}
    own = {cell["arm"] for cell in cells if np.isfinite(cell["mean"])}
    return {arm: points for arm, points in (found | {DENSE: _points(dense, within)}).items() if arm in own}


def paired_points(rows: Rows, value: str, arm: str, other: str) -> list[Point]:
    """Mean difference arm - other per level, paired by seed, by falling density; none if an arm has no rows."""
    if arm == other or not {arm, other} <= {row["arm"] for row in rows}:
        return []
    return _points(differences(_floats(rows, value), value, arm, other))


def draw_points(ax: Axes, points: Sequence[Point], scale: int, **how: Any) -> None:
    """Draw a line with its interval band against weights remaining, values times `scale`."""
    x, mean, half = (np.array([getattr(p, name) for p in points]) for name in ("density", "mean", "half"))
    within = (scale * points[0].within[0], scale * points[0].within[1]) if points else EVERYTHING
    line_with_band(ax, 100 * x, scale * mean, scale * half, within=within, **how)


def draw_arms(ax: Axes, lines: Mapping[str, Sequence[Point]], scale: int = 1) -> None:
    """Draw every arm against weights remaining, and the dense network's mean across."""
    weights_axis(ax, [point.density for points in lines.values() for point in points])
    for arm, points in lines.items():
        if arm == DENSE:
            style.reference(ax, scale * points[0].mean, arm_name(DENSE))
        else:
            draw_points(ax, points, scale, label=arm_name(arm), **arm_look(arm))


def accuracy_figure(rows: Rows, value: str = "early_stop_test_accuracy") -> Figure:
    """Test accuracy against weights remaining: close to the dense network on the left, the whole range on the right."""
    lines = series(rows, value)
    points = [point for arm in lines.values() for point in arm]
    figure, axes = canvas(2, height=3.9)
    top, bottom = max(p.high for p in points), min(p.low for p in points)
    dense = lines[DENSE][0].mean if DENSE in lines else max(p.mean for p in points)
    # Close: three times as far below the dense network as anything is above it, and never less than two points.
    close = max(dense - max(3 * (top - dense), 0.02), bottom)
    when = {"early_stop_test_accuracy": " at early stopping", "final_test_accuracy": " at the end of training"}
    for ax, low, title in zip(axes, (close, bottom), ("Close to the dense network", "Whole range"), strict=True):
        margin = 0.04 * (top - low) + 1e-4
        ax.set_ylim(100 * (low - margin), min(100 * (top + margin), 100.3))
        ax.yaxis.set_major_formatter("{x:.4g}%")
        titles(ax, title, y=f"test accuracy{when.get(value, '')}")
        draw_arms(ax, lines, 100)
    style.label_lines(axes[1])
    return figure


def speed_figure(rows: Rows) -> Figure:
    """Early-stopping step, and the validation loss there, against weights remaining."""
    figure, (left, right) = canvas(2, height=3.9)
    steps, losses = series(rows, "early_stop_step"), series(rows, "best_validation_loss")
    left.set_ylim(0, 1.08 * max(p.high for points in steps.values() for p in points))
    left.locator_params(axis="y", nbins=6, integer=True, steps=[1, 2, 5, 10])
    titles(left, "How soon it learns", y="training step of the lowest validation loss")
    style.log_values(right, values=[p.mean for points in losses.values() for p in points])
    titles(right, "How well it fits", y="lowest validation loss (nats), log scale")
    draw_arms(left, steps)
    draw_arms(right, losses)
    style.label_lines(right)
    return figure


def difference_figure(rows: Rows, value: str = "early_stop_test_accuracy", arm: str = "ticket") -> Figure:
    """Accuracy of `arm` minus the dense network's (left) and minus each control's (right), points, paired by seed."""
    controls = [other for other in arms(rows) if other != arm]
    panels = [("minus the dense network", [DENSE])] + [("minus its controls", controls)] * bool(controls)
    figure, axes = canvas(len(panels), width=9.6 if controls else 6.5, height=3.6)
    for ax, (title, others) in zip(axes, panels, strict=True):
        for other in others:
            if points := paired_points(rows, value, arm, other):
                name = arm if other == DENSE else other
                draw_points(ax, points, 100, label=f"minus {arm_name(other)}", **arm_look(name))
        style.reference(ax, 0)
        weights_axis(ax, [row["density"] for row in rows])
        titles(ax, f"{arm_name(arm).capitalize()} {title}", y="difference in test accuracy (percentage points)")
    if points := paired_points(rows, value, arm, DENSE):
        high = max(100 * max(p.high for p in points), 0.5)
        # The collapse at the end would hide the rest.
        low = max(100 * min(p.low for p in points), -max(3 * high, 2.0))
        axes[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    for ax in axes[1:]:
        style.label_lines(ax)
    return figure


def layer_figure(rows: Rows, arm: str = "ticket") -> Figure:
    """Weights remaining in each layer against weights remaining in all; both axes are log-scaled."""
    mine = [row for row in rows if row["arm"] in (DENSE, arm)]
    paths = list(mine[0]["layers"])
    figure, (ax,) = canvas(width=7.2, height=3.6 + 0.1 * max(0, len(paths) - 8))
    lines = {path: series([{**row, path: row["layers"][path]} for row in mine], path).get(arm, []) for path in paths}
    style.log_values(ax, values=[100 * point.mean for points in lines.values() for point in points])
    weights_axis(ax, [row["density"] for row in mine])
    for (path, points), color in zip(lines.items(), style.ramp(len(paths)), strict=True):
        draw_points(ax, points, 100, color=color, marker="o", markersize=3, label=path.removesuffix("/kernel"))
    titles(ax, "Weights remaining in each layer", y="weights remaining in the layer (%), log scale")
    style.label_lines(ax, gap=min(0.075, 0.96 / max(1, len(lines))))
    return figure


def mean_curve(rows: Rows, value: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps that every row's curve has, and the mean over rows of `value` there."""
    common = sorted(set.intersection(*(set(row["curve"]["step"]) for row in rows)))
    lookups = [dict(zip(row["curve"]["step"], row["curve"][value], strict=True)) for row in rows]
    return np.array(common), np.array([np.mean([lookup[step] for lookup in lookups]) for step in common])


def curves_figure(rows: Rows, shown: Sequence[str] = (), count: int = 5) -> Figure:
    """Learning curves (means over seeds) at `count` levels: validation accuracy above, loss below, a column per arm.

    `shown` names the arms, by default the first two; the dense network (dashed) is in every column.
    """
    columns = list(shown or arms(rows)[:2]) or [DENSE]
    levels = pick(sorted({row["level"] for row in rows if row["arm"] in (DENSE, columns[0])}), count)
    colors = dict(zip(levels, [INK, *style.ramp(len(levels) - 1)], strict=True))
    figure, axes = canvas(len(columns), 2, width=9.6 if len(columns) > 1 else 6.5, height=6.6)
    panels = {
        "validation_accuracy": (100, "validation accuracy"),
        "validation_loss": (1, "validation loss (nats), log scale"),
    }
    for row, (value, (scale, unit)) in enumerate(panels.items()):
        own = axes[row * len(columns) : (row + 1) * len(columns)]
        for ax, arm in zip(own, columns, strict=True):
            for level in levels:
                if mine := [one for one in rows if one["level"] == level and one["arm"] in (DENSE, arm)]:
                    step, mean = mean_curve(mine, value)
                    how = {"color": colors[level], "linestyle": "-" if level else (0, (4, 2)), "linewidth": 1.6}
                    line_with_band(ax, step, scale * mean, label=f"{100 * mine[0]['density']:.3g}%", **how)
            ax.set_xlim(0, max(np.max(line.get_xdata()) for line in ax.get_lines()))
            style.steps_axis(ax)
            titles(ax, "" if row else arm_name(arm).capitalize(), x="training step" if row else "", y=unit)
        values = np.concatenate([style.finite_points(line)[:, 1] for ax in own for line in ax.get_lines()])
        # The climb from chance takes few steps and would flatten everything that comes after it.
        low, high = np.quantile(values, 0.12), values.max()
        for ax in own:
            if row:
                style.log_values(ax, values=values)
            else:
                ax.set_ylim(low, high + 0.04 * (high - low) + 1e-2)
                ax.yaxis.set_major_formatter("{x:.4g}%")
            style.label_lines(ax)
    return figure


def pixel_use(mask_SNM: np.ndarray, image_shape: Sequence[int]) -> np.ndarray:
    """Surviving weights of each pixel, as a multiple of the average pixel's: float64 [H, W], mean 1.

    Counts are summed over seeds, units and color channels. A layer with nothing left gives zeros.

    Raises:
      ValueError: the mask's inputs are not the image's pixels.
    """
    mask_SNM = np.asarray(mask_SNM, bool)
    if mask_SNM.ndim != 3 or len(image_shape) not in (2, 3) or mask_SNM.shape[1] != np.prod(image_shape):
        raise ValueError(
            f"a first-layer mask [seeds, pixels, units] is needed for images of shape {tuple(image_shape)}, "
            f"i.e. {int(np.prod(image_shape))} pixels in the middle; got shape {mask_SNM.shape}"
        )
    count_HW = mask_SNM.sum((0, 2)).reshape(*image_shape[:2], -1).astype(float).sum(-1)
    return count_HW / count_HW.mean() if count_HW.any() else count_HW


def show_image(ax: Axes, image_HW: np.ndarray, title: str, **how: Any) -> Any:
    """Draw an image without interpolation, ticks or frame."""
    style.bare(ax)
    ax.set_title(title, **TEXT, pad=5)
    return ax.imshow(image_HW, interpolation="nearest", **how)


def pixels_figure(
    masks: Masks, densities: Densities, image_shape: Sequence[int], mean_image: np.ndarray | None = None, count: int = 5
) -> Figure:
    """Surviving first-layer weights by input pixel, at `count` levels, on one color scale.

    Args:
      masks: level -> bool [S, N, M], the first layer's mask of every seed.
      densities: level -> fraction of all weights remaining, for the titles.
      image_shape: (H, W) or (H, W, C).
      mean_image: mean of the training images, [H, W] or [H, W, C], drawn first for comparison.
      count: at most this many levels.
    """
    uses = {level: pixel_use(masks[level], image_shape) for level in pick(sorted(masks), count)}
    extra = int(mean_image is not None)
    columns = len(uses) + extra
    figure, axes = canvas(columns, width=max(4.5, 1.9 * columns), height=2.35)
    if mean_image is not None:
        image_HW = np.asarray(mean_image, float).reshape(*image_shape[:2], -1).mean(-1)
        show_image(axes[0], image_HW, "mean image", cmap="gray")
    # Above the 99.5th percentile a few pixels would take the whole scale.
    top = max(1.5, float(np.quantile(np.stack(list(uses.values())), 0.995)))
    for ax, (level, use) in zip(axes[extra:], uses.items(), strict=True):
        shown = show_image(ax, use, f"{100 * densities[level]:.3g}%", cmap=style.HEAT, vmin=0, vmax=top)
    style.color_bar(
        figure, shown, axes[extra:], "weights of a pixel\n(average pixel = 1)", shrink=0.85, aspect=14, pad=0.015
    )
    return figure


def units_figure(
    masks: Masks, densities: Densities, image_shape: Sequence[int], seed: int = 0, units: int = 10, count: int = 4
) -> Figure:
    """The masks of single hidden units of one seed drawn as images: a row per level, a column per unit.

    The units shown are those with the most weights left at the sparsest level drawn. A filled pixel is a weight that
    survives (in any color channel). Arguments as in `pixels_figure`.
    """
    levels = [level for level in pick(sorted(masks), count + 1) if level > 0] or sorted(masks)
    stack_LNM = np.stack([np.asarray(masks[level][seed], bool) for level in levels])
    busiest = np.argsort(-stack_LNM[-1].sum(0), kind="stable")[:units]
    high, wide = image_shape[:2]
    gap = 1 + wide // 12
    tiles_LUHW = np.moveaxis(stack_LNM[:, :, busiest], 2, 1).reshape(len(levels), len(busiest), high, wide, -1).any(-1)
    figure, (ax,) = canvas(height=0.4 + 9.2 / len(busiest) * len(levels) * high / wide)
    # One image of all tiles, with gaps of NaN that are not drawn: an Axes for each would take seconds to lay out.
    padded = np.pad(tiles_LUHW.astype(float), ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=np.nan)
    mosaic = padded.swapaxes(1, 2).reshape(len(levels) * (high + gap), -1)[:-gap, :-gap]
    from matplotlib.colors import ListedColormap

    show_image(ax, mosaic, "", cmap=ListedColormap(["#e3e7eb", "#0b5c8e"]), vmin=0, vmax=1)
    for row, level in enumerate(levels):
        place = (-1.0 - gap / 2, row * (high + gap) + (high - 1) / 2)
        ax.text(*place, f"{100 * densities[level]:.3g}%", **TEXT, rotation=90, ha="right", va="center")
    for column, unit in enumerate(busiest):
        place = (column * (wide + gap) + (wide - 1) / 2, -1.0 - gap / 2)
        ax.text(*place, f"unit {unit}", **TEXT, ha="center", va="bottom")
    return figure
