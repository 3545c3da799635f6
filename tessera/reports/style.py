"""The one look of every figure: colors on light and dark pages, quiet axes, lines that carry their names.

matplotlib (extra `reports`) is imported when a figure is drawn, not when this module is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any

P = ParamSpec("P")
EVERYTHING = (-math.inf, math.inf)  # the values of a quantity without limits

INK = "#1f2933"  # text and the dense reference
MUTED = "#66737f"  # axis titles and notes
GRID = "#d8dee4"  # grid lines and spines
PAPER, CARD, MARK = "#ffffff", "#f6f8fa", "#dcefe8"  # backgrounds: of a page, of a box on it, of a highlighted cell

# Okabe & Ito's colors, which stay apart under the common color blindnesses; yellow and orange darkened until they can
# be read as text on white. Marker and dash differ too, so a figure survives a black-and-white printer.
PALETTE = ("#0072b2", "#d55e00", "#008a67", "#b4559a", "#a87400", "#2f86bd", "#6f6a75")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1.5)), (0, (8, 2)), (0, (1, 3)))
# For things with an order (levels): dark to light through hues that also differ in lightness.
RAMP = ("#46327e", "#365c8d", "#277f8e", "#1fa187", "#4d9c33", "#968800")

HEAT = "cividis"  # of every heat map

# The same colors on a dark page.
DARK = {
    **{INK: "#e3e8ed", MUTED: "#9aa7b3", GRID: "#38424c", PAPER: "#14191e", CARD: "#1c2329", MARK: "#1d3f35"},
    **dict(zip(PALETTE, ("#5cb3ea", "#f28b4b", "#3cc79e", "#dd8fc6", "#e0b34a", "#8cc9ee", "#b5b0bc"), strict=True)),
    **dict(zip(RAMP, ("#a08be0", "#7ea4dd", "#55bccb", "#4fd0a6", "#9be07c", "#e9dc55"), strict=True)),
}


class MissingMatplotlib(ImportError):
    """A figure was asked for, and matplotlib is not installed."""


def require_matplotlib() -> None:
    """Import matplotlib.

    Raises:
      MissingMatplotlib: it is not installed; the message names the extra.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingMatplotlib(
            "no report: its figures need the extra `reports` (pip install -e '.[reports]'); all results are saved"
        ) from error


def canvas(
    columns: int = 1, rows: int = 1, *, width: float = 9.6, height: float = 3.7, **grid: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` x `columns` axes in reading order, `width` and `height` in inches for all of it.

    Made with the object API: nothing is put into matplotlib's global state, so it is safe in threads and needs no
    close. `grid` are further arguments of `Figure.subplots`, such as sharex.

    Raises:
      MissingMatplotlib: it is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [ax for row in figure.subplots(rows, columns, squeeze=False, **grid) for ax in row]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GRID)
        ax.grid(axis="y", color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(colors=INK, labelsize=9, length=3, width=0.8)
        ax.tick_params(axis="y", length=0)
        for label in (ax.xaxis.label, ax.yaxis.label):
            label.set(fontsize=9, color=MUTED)
    return figure, axes


def deferred(draw: Callable[P, Figure]) -> Callable[P, Callable[[], Figure]]:
    """Decorate a function that draws: called, it gives a function that draws when the page is written."""
    return lambda *arguments, **named: partial(draw, *arguments, **named)


def bare(ax: Axes) -> None:
    """Take away grid, ticks and frame: for images and drawings."""
    ax.grid(False)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def titles(ax: Axes, title: str, x: str = "", y: str = "") -> None:
    """Left-aligned title saying what is drawn, and axis titles; `y` is put above the axis where it reads level."""
    ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=20 if y else 8)
    ax.text(0, 1.025, y, transform=ax.transAxes, fontsize=9, color=MUTED, va="bottom", ha="left")
    if x:
        ax.set_xlabel(x)


def short(value: float) -> str:
    """A number on an axis or in a sentence: 0.005, 20, 1.2e21."""
    mantissa, _, power = (f"{value:.4g}" if 1 <= abs(value) < 1e4 else f"{value:.3g}").partition("e")
    return f"{mantissa}e{int(power)}" if power else mantissa


def plus_minus(
    mean: float,
    half: float,
    scale: float | int = 1,
    digits: int = 2,
    within: tuple[float, float] = EVERYTHING,
) -> str:
    """A mean and the half-width of its interval in text, the mean alone where there is none.

    An interval that passes what is possible, `within` (unscaled), is written by its ends: 98.67 (97.24 to 100.00).
    """
    text = f"{scale * mean:.{digits}f}"
    if not math.isfinite(half):
        return text
    low, high = max(mean - half, within[0]), min(mean + half, within[1])
    if (low, high) != (mean - half, mean + half):
        return f"{text} ({scale * low:.{digits}f} to {scale * high:.{digits}f})"
    return f"{text} ± {scale * half:.{digits}f}"


def log_values(ax: Axes, axis: str = "y", limits: Sequence[float] = (), values: Any = ()) -> None:
    """Logarithmic axis with plain numbers at 1, 2, 5 times powers of ten, at the powers alone when it spans many.

    Call it after drawing, or give the limits, or the values around which they are put.
    """
    if len(values):
        limits = (min(v for v in values if v > 0) / 1.15, max(values) * 1.15)
    ax.set(**{f"{axis}scale": "log"} | ({f"{axis}lim": limits} if len(limits) else {}))
    low, high = sorted(getattr(ax, f"get_{axis}lim")())
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**e for e in powers for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    if len(ticks) > 9:
        powers_of_ten = [10.0**e for e in powers if low <= 10.0**e <= high]
        ticks = powers_of_ten[:: 1 + len(powers_of_ten) // 9]
    if len(ticks) < 3:  # a narrow range, in which 1, 2 and 5 hardly occur
        from matplotlib.ticker import MaxNLocator

        ticks = [float(tick) for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    ax.set(**{f"{axis}ticks": ticks, f"{axis}ticklabels": [short(tick) for tick in ticks]})
    ax.minorticks_off()


def steps_axis(ax: Axes, count: int = 5) -> None:
    """Horizontal axis of training steps: at most `count` whole numbers, thousands apart."""
    ax.locator_params(axis="x", nbins=count, integer=True, steps=[1, 2, 5, 10])
    ax.xaxis.set_major_formatter("{x:,.0f}")


def weights_axis(ax: Axes, densities: Sequence[float]) -> None:
    """Log-scaled percentage of weights remaining that runs from 100% on the left down to the sparsest level."""
    low = 100 * min(densities)
    log_values(ax, "x", (112.0, low / 1.12 if low < 100 else 50.0))
    ax.set_xlabel("weights remaining (%), log scale")


def ramp(count: int) -> list[str]:
    """`count` colors in order along `RAMP`; neighbors repeat when there are more than it has."""
    return [RAMP[round(i)] for i in np.linspace(0, len(RAMP) - 1, count)] if count > 1 else [RAMP[0]][:count]


def pick(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread, the first and the last among them."""
    return [
        items[i] for i in sorted({round(place) for place in np.linspace(0, len(items) - 1, min(count, len(items)))})
    ]


def look(index: int, shift: int = 0) -> dict[str, Any]:
    """Color, marker and dash of the line of a number; `shift` gives the colors again with other markers."""
    return {
        "color": PALETTE[index % 7],
        "marker": MARKERS[(index + shift) % 7],
        "linestyle": DASHES[(index + shift) % 7],
    }


def line_with_band(
    ax: Axes,
    x: Any,
    y: Any,
    half: Any = None,
    *,
    label: str = "",
    within: tuple[float, float] = EVERYTHING,
    **style: Any,
) -> None:
    """Draw a line, y ± half around it where a half-width is given, and leave its name to `label_lines`.

    The band ends where values are not possible any more: `within`.
    """
    style = {"linewidth": 1.8, "markersize": 4, "markeredgewidth": 0} | style
    ax.plot(x, y, label=label or None, **style)
    if half is not None:
        low, high = (np.clip(edge, *within) for edge in (np.subtract(y, half), np.add(y, half)))
        ax.fill_between(x, low, high, color=style["color"], alpha=0.17, linewidth=0)


def dots(
    ax: Axes, x: Any, y: Any, color: str, size: float | int = 3, alpha: float | int = 0.7, marker: str = "o"
) -> None:
    """Draw points without lines."""
    ax.plot(x, y, marker, color=color, markersize=size, alpha=alpha, markeredgewidth=0)


def named_lines(ax: Axes) -> list[Any]:
    """The lines that have a label."""
    return [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]


def finite_points(line: Any) -> np.ndarray:
    """The points [N, 2] of a line that are finite."""
    xy = np.asarray(line.get_xydata(), float)
    return xy[np.isfinite(xy).all(1)]


def zoom(ax: Axes, lines: Sequence[Any], left: float | int) -> None:
    """Set the vertical limits to where the lines are from `left` on."""
    values = np.concatenate([np.array([])] + [xy[xy[:, 0] >= left, 1] for xy in map(finite_points, lines)])
    if len(values) > 1 and np.ptp(values) > 0:
        margin = 0.08 * np.ptp(values)
        ax.set_ylim(values.min() - margin, values.max() + margin)


def seed_marks(
    ax: Axes, place: float | int, values: Any, color: str, marker: str = "o", label: str = "", column: bool = False
) -> None:
    """Draw a row of small pale marks for seeds and a large one for their mean, or a column of them, at a place."""
    for x, size, alpha, name in ((list(values), 4.5, 0.35, None), ([np.mean(values)], 7.5, 1.0, label or None)):
        xy = (x, [place] * len(x))
        ax.plot(*(xy[::-1] if column else xy), marker, color=color, markersize=size, alpha=alpha, label=name)


def reference(ax: Axes, y: float | int, label: str = "", color: str = INK) -> None:
    """Draw a dashed line across at a height to compare with."""
    ax.axhline(y, color=color, linewidth=1, linestyle=(0, (2, 2)), zorder=1.5, label=label or None)


def note(ax: Axes, x: float, y: float, text: str, offset: tuple[int, int] = (6, 0), **style: Any) -> None:
    """Write beside a point, `offset` in points of print."""
    how: Any = {"fontsize": 8, "color": INK, "va": "center"} | style
    ax.annotate(text, (x, y), xytext=offset, textcoords="offset points", annotation_clip=False, **how)


def heat_maps(
    images: Mapping[str, np.ndarray], *, label: str, height: float, top: float, **show: Any
) -> tuple[Figure, list[Axes]]:
    """Images under each other on one color scale from 0 to `top`, each under its title.

    `label` names the scale, `show` are further arguments of `Axes.imshow`.
    """
    figure, axes = canvas(1, len(images), height=height, sharex=True)
    how: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest", "cmap": HEAT, "vmin": 0, "vmax": top} | show
    for ax, (title, image) in zip(axes, images.items(), strict=True):
        shown = ax.imshow(image, **how)
        ax.grid(False)
        titles(ax, title)
    color_bar(figure, shown, axes, label)
    return figure, axes


def color_bar(figure: Figure, shown: Any, axes: Sequence[Axes], label: str, **shape: Any) -> None:
    """The scale of an image's colors beside the axes."""
    bar = figure.colorbar(shown, ax=axes, **shape)
    bar.outline.set_visible(False)
    bar.set_label(label, fontsize=9, color=MUTED)
    bar.ax.tick_params(labelsize=8, colors=INK, length=2)


def spread(positions: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Move positions apart until neighbors are `gap` from each other, in their order and inside [low, high].

    Clusters are centered on the mean of what they label. Too many for the space: spread evenly over it.
    """
    count = len(positions)
    if count and gap * (count - 1) > high - low:
        even = np.linspace(low, high, count)
        return [float(even[rank]) for rank in np.argsort(np.argsort(positions))]
    order = np.argsort(positions, kind="stable")
    # Labels that touch: the sum of the places each wants for the first, and their number.
    blocks: list[tuple[float, int]] = []

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


def label_lines(ax: Axes, *, gap: float = 0.075) -> None:
    """Write the name of every labelled line right of the axes at the height of its end, instead of a legend.

    Call it last: limits and scales are fixed. Names do not overlap, in the axes' own coordinates. A hairline leads to a
    name that had to move.
    """
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())  # names stay where the lines end
    ends = []
    for line in named_lines(ax):
        if len(xy := finite_points(line)):
            x, y = ax.transAxes.inverted().transform(line.get_transform().transform(xy[-1]))
            ends += [(float(x), float(y), line)] if np.isfinite([x, y]).all() else []
    for (x, y, line), height in zip(ends, spread([y for _, y, _ in ends], gap, 0.02, 0.98), strict=True):
        moved = abs(y - height) > gap / 3 and 0 <= y <= 1
        hairline = {"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 1}
        where: Any = {"xy": (x, y), "xytext": (1.035, height), "xycoords": "axes fraction"}
        how: Any = {
            "textcoords": "axes fraction",
            "color": line.get_color(),
            "fontsize": 9,
            "va": "center",
            "annotation_clip": False,
        }
        ax.annotate(line.get_label(), **where, **how, arrowprops=hairline if moved else None)
