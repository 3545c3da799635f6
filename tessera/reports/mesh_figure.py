"""A parameter cut into parts, and which devices of the mesh hold which part: the same colour on both sides."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sharding.analysis.roofline import Placed

INK = "#1f2933"
MUTED = "#66737f"
LABELLED = 64  # devices up to which each is numbered


def placement_figure(sizes: Mapping[str, int], placed: Placed, width: float = 9.6) -> Figure:
    """Draw one parameter and the mesh.

    The array is shown by its two most split dimensions. A part has its hue from its place along the first and its
    lightness from the second, so neighbours look alike; devices of one colour hold copies of one part.

    Args:
      sizes: mesh axis -> size in the mesh's order, outermost first.
      placed: the parameter, see `sharding.analysis.roofline.placements`.
      width: of the figure, inches.
    """
    names = [name for name in sizes if sizes[name] > 1] or list(sizes)[:1]
    shape = [sizes[name] for name in names]
    cuts = [math.prod(sizes.get(axis, 1) for axis in axes) for axes in placed.axes]
    shown = sorted(sorted(range(len(cuts)), key=lambda d: (-cuts[d], -placed.shape[d]))[:2])
    parts = [cuts[d] for d in shown] + [1] * (2 - len(shown))
    where = [_part(placed.axes[d], names, shape) for d in shown]
    where += [np.zeros(shape, int)] * (2 - len(where))
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1, 1.5]})
    _draw_array(left, placed, shown, parts)
    _draw_mesh(right, names, shape, where, parts)
    return figure


def _part(axes: tuple[str, ...], names: list[str], shape: list[int]) -> np.ndarray:
    """Number of the part along one dimension that each device of the mesh holds; the first axis is the slowest."""
    number = np.zeros(shape, int)
    for axis in axes:
        if axis in names:
            i = names.index(axis)
            steps = np.arange(shape[i]).reshape([-1 if j == i else 1 for j in range(len(shape))])
            number = number * shape[i] + steps
    return number


def _colour(row: int, column: int, parts: list[int]) -> tuple[float, float, float]:
    hue = (0.55 + 0.8 * row / max(1, parts[0])) % 1.0
    light = 1.0 - 0.55 * (column / max(1, parts[1] - 1) if parts[1] > 1 else 0.35)
    red, green, blue = hsv_to_rgb((hue, 0.62, light))
    return float(red), float(green), float(blue)


def _draw_array(ax: Axes, placed: Placed, shown: list[int], parts: list[int]) -> None:
    for row in range(parts[0]):
        for column in range(parts[1]):
            box = Rectangle((column / parts[1], row / parts[0]), 1 / parts[1], 1 / parts[0])
            box.set_facecolor(_colour(row, column, parts))
            box.set_edgecolor("white")
            box.set_linewidth(0.8 if max(parts) <= 64 else 0.1)
            ax.add_patch(box)
    ax.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
    words = [_dimension(placed, d) for d in shown]
    ax.set_ylabel(words[0] if words else "", fontsize=9, color=MUTED)
    ax.set_xlabel(words[1] if len(words) > 1 else "", fontsize=9, color=MUTED)
    shape = " x ".join(f"{size}" for size in placed.shape)
    ax.set_title(f"{placed.path}\n[{shape}] {placed.dtype}", fontsize=9.5, loc="left", color=INK)
    _quiet(ax)


def _dimension(placed: Placed, d: int) -> str:
    axes = placed.axes[d]
    parts = placed.shape[d] // placed.local[d] if placed.local[d] else 1
    return f"{placed.shape[d]} in {parts} parts over {' x '.join(axes)}" if axes else f"{placed.shape[d]}, whole"


def _draw_mesh(ax: Axes, names: list[str], shape: list[int], where: list[np.ndarray], parts: list[int]) -> None:
    rows, columns, split = _grid(shape)
    first, second = (np.broadcast_to(part, shape).reshape(rows, columns) for part in where)
    for row in range(rows):
        for column in range(columns):
            box = Rectangle((column + 0.06, row + 0.06), 0.88, 0.88, edgecolor="none")
            colour = _colour(int(first[row, column]), int(second[row, column]), parts)
            box.set_facecolor(colour)
            ax.add_patch(box)
            if rows * columns <= LABELLED:
                number, ink = str(row * columns + column), INK if sum(colour) > 1.4 else "white"
                ax.text(column + 0.5, row + 0.5, number, ha="center", va="center", fontsize=7.5, color=ink)
    ax.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
    down, across = _axis_words(names[:split], shape[:split]), _axis_words(names[split:], shape[split:])
    ax.set_ylabel(down, fontsize=9, color=MUTED)
    ax.set_xlabel(across, fontsize=9, color=MUTED)
    copies = math.prod(shape) // math.prod(len(np.unique(part)) for part in where)
    ax.set_title(
        f"{math.prod(shape)} devices, {' x '.join(f'{n}={s}' for n, s in zip(names, shape, strict=True))}\n"
        f"each part of the array is on {copies} device{'s' if copies > 1 else ''}",
        fontsize=9.5,
        loc="left",
        color=INK,
    )
    _quiet(ax)


def _grid(shape: list[int]) -> tuple[int, int, int]:
    """(rows, columns, number of axes that go down) of a grid near twice as wide as high."""

    def shape_of(split: int) -> tuple[int, int]:
        return math.prod(shape[:split]), math.prod(shape[split:])

    splits = range(1, len(shape)) if len(shape) > 1 else range(1)
    split = min(splits, key=lambda k: abs(math.log(shape_of(k)[1] / shape_of(k)[0] / 2)))
    rows, columns = shape_of(split)
    if rows == 1 and columns > 32:  # one long axis: fold it
        rows = max(d for d in range(1, math.isqrt(columns) + 1) if columns % d == 0)
        columns //= rows
    return rows, columns, split


def _axis_words(names: list[str], shape: list[int]) -> str:
    return ", ".join(f"{name} ({size})" for name, size in zip(names, shape, strict=True))


def _quiet(ax: Axes) -> None:
    for spine in ax.spines.values():
        spine.set_visible(False)
