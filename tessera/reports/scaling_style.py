"""The look of this package's figures: quiet axes, one palette (Okabe & Ito, two shades darkened), no global state."""

import math

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

INK, MUTED, GRID = "#1f2933", "#66737f", "#d8dee4"
PALETTE = ("#0072b2", "#d55e00", "#008a67", "#b4559a", "#a87400", "#2f86bd", "#6f6a75")
RAMP = ("#46327e", "#365c8d", "#277f8e", "#1fa187", "#4d9c33", "#968800")


def canvas(columns: int = 1, *, width: float = 9.6, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A row of styled axes, sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for ax in axes:
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            ax.spines[side].set_color(GRID)
        ax.grid(axis="y", color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(colors=INK, labelsize=9, length=3, width=0.8)
        ax.tick_params(axis="y", length=0)
    return figure, axes


def titles(ax: Axes, title: str, x: str, y: str) -> None:
    """Left-aligned title, the horizontal axis's name below, the vertical one's above its axis."""
    ax.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=20)
    ax.text(0, 1.025, y, transform=ax.transAxes, fontsize=9, color=MUTED, va="bottom", ha="left")
    ax.set_xlabel(x, fontsize=9, color=MUTED)


def decades(ax: Axes, axis: str = "x") -> None:
    """Logarithmic axis with ticks at powers of ten, and at 1, 2, 5 when it spans few; call after drawing."""
    (ax.set_xscale if axis == "x" else ax.set_yscale)("log")
    line = ax.xaxis if axis == "x" else ax.yaxis
    low, high = ax.get_xlim() if axis == "x" else ax.get_ylim()
    line.set_minor_locator(NullLocator())
    if high / low > 200:
        line.set_major_locator(LogLocator(10, numticks=8))
        return
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**e for e in powers for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    line.set_major_locator(FixedLocator(ticks))
    line.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    """0.005, 20, 1e4."""
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    mantissa, power = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(power)}"


def ramp(count: int) -> list[str]:
    """`count` colours along the ramp."""
    return [RAMP[round(i * (len(RAMP) - 1) / max(count - 1, 1))] for i in range(count)]
