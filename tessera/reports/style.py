"""The look of every figure: one palette, quiet axes, lines labelled at their ends instead of in a legend."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

INK = "#1f2933"  # text and the dense reference
MUTED = "#66737f"  # axis titles and notes
GRID = "#d8dee4"  # grid lines and spines

# Okabe & Ito's colours, which stay apart under the common colour blindnesses; yellow and orange darkened until they can
# be read as text on white. Marker and dash differ too, so a figure survives a black-and-white printer.
PALETTE = ("#0072b2", "#d55e00", "#008a67", "#b4559a", "#a87400", "#2f86bd", "#6f6a75")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1.5)), (0, (8, 2)), (0, (1, 3)))
# For things with an order (levels): dark to light through hues that also differ in lightness.
RAMP = ("#46327e", "#365c8d", "#277f8e", "#1fa187", "#4d9c33", "#968800")


def ramp(count: int) -> list[str]:
    """`count` colours in order along `RAMP`; neighbours repeat when there are more than it has."""
    return [RAMP[round(i)] for i in np.linspace(0, len(RAMP) - 1, count)] if count > 1 else [RAMP[0]][:count]


def canvas(columns: int = 1, rows: int = 1, *, width: float = 9.6, height: float = 3.7) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` x `columns` styled axes, `width` and `height` in inches for all of it; axes in reading order.

    Made with the object API: nothing is kept in matplotlib's global state, so it is safe in threads and needs no close.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    # matplotlib types this as an array only when squeeze is off.
    axes = [ax for row in figure.subplots(rows, columns, squeeze=False) for ax in row]
    for ax in axes:
        dress(ax)
    return figure, axes


def dress(ax: Axes) -> None:
    """Quiet spines and a light horizontal grid."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GRID)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(colors=INK, labelsize=9, length=3, width=0.8)
    ax.tick_params(axis="y", length=0)


def titles(ax: Axes, title: str, x: str = "", y: str = "") -> None:
    """Left-aligned title saying what is drawn, and axis titles; `y` is put above the axis where it reads level."""
    ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=20 if y else 8)
    if y:
        ax.text(0, 1.025, y, transform=ax.transAxes, fontsize=9, color=MUTED, va="bottom", ha="left")
    if x:
        ax.set_xlabel(x, fontsize=9, color=MUTED)


def weights_axis(ax: Axes, densities: Sequence[float]) -> None:
    """Log-scaled percentage of weights remaining that runs from 100% on the left down to the sparsest level."""
    low = 100 * min(densities)
    ax.set_xscale("log")
    ax.set_xlim(112, low / 1.12 if low < 100 else 50)
    decades = [m * 10.0**e for e in range(2, -7, -1) for m in (5, 2, 1) if m * 10.0**e <= 100]
    shown = [tick for tick in decades if tick >= low / 1.12] or [100.0]
    if len(shown) > 9:  # over three decades: powers of ten only
        shown = [tick for tick in shown if np.isclose(np.log10(tick) % 1, 0) or np.isclose(np.log10(tick) % 1, 1)]
    ax.xaxis.set_major_locator(FixedLocator(shown))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlabel("weights remaining (%), log scale", fontsize=9, color=MUTED)


def spread(positions: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Move positions apart until neighbours are `gap` from each other, in their order and inside [low, high].

    Clusters are centred on the mean of what they label. Too many for the room: spread evenly over it.
    """
    count = len(positions)
    if count and gap * (count - 1) > high - low:
        even = np.linspace(low, high, count)
        return [float(even[rank]) for rank in np.argsort(np.argsort(positions))]
    order = np.argsort(positions, kind="stable")
    blocks: list[
        tuple[float, int]
    ] = []  # labels that touch: sum of the places each wants for the first, and their number

    def place(total: float, size: int) -> float:
        return float(np.clip(total / size, low, high - gap * (size - 1)))

    for index in order:
        blocks.append((float(np.clip(positions[index], low, high)), 1))
        while len(blocks) > 1 and place(*blocks[-2]) + gap * blocks[-2][1] > place(*blocks[-1]):
            total, size = blocks.pop()
            before, count_before = blocks.pop()
            blocks.append((before + total - gap * count_before * size, count_before + size))
    placed = [place(*block) + gap * i for block in blocks for i in range(block[1])]
    result = [0.0] * count
    for index, value in zip(order, placed, strict=True):
        result[int(index)] = value
    return result


def label_lines(ax: Axes, ends: Sequence[tuple[float, float, str, str]], *, gap: float = 0.075) -> None:
    """Write each line's name right of the axes at the height of its end; `ends` holds (x, y, text, colour).

    Call after limits and scales are set: names are kept apart in the axes' own coordinates. A hairline leads to a name
    that had to move.
    """
    to_axes = ax.transData + ax.transAxes.inverted()
    shown = [(x, y, text, colour) for x, y, text, colour in ends if np.isfinite([x, y]).all()]
    heights = [float(to_axes.transform((x, y))[1]) for x, y, _, _ in shown]
    places = spread(heights, gap, 0.02, 0.98)
    for (x, y, text, colour), height, place in zip(shown, heights, places, strict=True):
        moved = abs(height - place) > gap / 3 and 0 <= height <= 1
        hairline = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 1}
        ax.annotate(
            text,
            xy=(x, y),
            xycoords="data",
            xytext=(1.035, place),
            textcoords=ax.transAxes,
            color=colour,
            fontsize=9,
            va="center",
            arrowprops=hairline if moved else None,
            annotation_clip=False,
        )
