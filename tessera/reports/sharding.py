"""Figures of a plan: a parameter on the device mesh, and a pipeline schedule as a timeline."""

import colorsys
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sharding.analysis.roofline import Placed
from sharding.pipeline.schedules import Schedule, bubble, peak_live
from tessera.reports import style
from tessera.reports.style import GRID, INK, PALETTE, PAPER, Axes, Figure

# Numbers on tiles, whose colors are the same on light and dark pages.
BLACK, WHITE = "#1a1a1a", "#fdfdfd"
LABELLED = 64  # devices up to which each is numbered
# Blue, green and vermilion; later chunks are lighter.
KINDS = {"F": (PALETTE[0], "forward"), "B": (PALETTE[2], "backward"), "W": (PALETTE[1], "weight gradient")}


def placement_figure(sizes: Mapping[str, int], placed: Placed, width: float = 9.6) -> Figure:
    """Draw how one parameter is sharded over a mesh: the parts of the array, and the devices that store each.

    The array is shown by its two most split dimensions. A part has its hue from its place along the first and its
    lightness from the second, so neighbors look alike; devices of one color hold copies of one part.

    Args:
      sizes: mesh axis -> size in the mesh's order, outermost first.
      placed: the parameter, see `sharding.analysis.roofline.placements`.
      width: of the figure, inches.
    """
    names = [name for name in sizes if sizes[name] > 1] or list(sizes)[:1]
    shape = [sizes[name] for name in names]
    cuts = [math.prod(sizes.get(axis, 1) for axis in axes) for axes in placed.axes]
    shown = sorted(sorted(range(len(cuts)), key=lambda d: (-cuts[d], -placed.shape[d]))[:2])
    parts = ([cuts[d] for d in shown] + [1, 1])[:2]
    where = ([_part(placed.axes[d], names, shape) for d in shown] + [np.zeros(shape, int)] * 2)[:2]
    figure, (left, right) = style.canvas(2, width=width, height=4.2, width_ratios=[1, 1.5])
    cells = list(np.ndindex(*parts))
    _tiles(left, cells, [_color(cell, parts) for cell in cells], parts, gap=0.0)
    for axis, d in zip((left.yaxis, left.xaxis), shown, strict=False):
        axes, count = placed.axes[d], placed.shape[d] // (placed.local[d] or placed.shape[d])
        over = f" in {count} parts over {' x '.join(axes)}" if axes else ", whole"
        axis.set_label_text(f"{placed.shape[d]}{over}")
    _title(left, f"{placed.path}\n[{' x '.join(map(str, placed.shape))}] {placed.dtype}")

    rows, columns, split = _grid(shape)
    held = list(zip(*(np.broadcast_to(part, shape).ravel().tolist() for part in where), strict=True))
    colors = [_color(cell, parts) for cell in held]
    devices = list(np.ndindex(rows, columns))
    _tiles(right, devices, colors, (rows, columns), gap=0.12)
    for number, ((row, column), color) in enumerate(
        zip(devices, colors, strict=True) if len(devices) <= LABELLED else ()
    ):
        ink = BLACK if sum(color) > 1.4 else WHITE
        right.text(column + 0.5, row + 0.5, str(number), ha="center", va="center", fontsize=7.5, color=ink)
    labels = [f"{name} ({size})" for name, size in zip(names, shape, strict=True)]
    right.set_ylabel(", ".join(labels[:split]))
    right.set_xlabel(", ".join(labels[split:]))
    copies = len(devices) // len(set(held))
    mesh = " x ".join(f"{name}={size}" for name, size in zip(names, shape, strict=True))
    on = f"each part of the array is on {copies} device{'s' if copies > 1 else ''}"
    _title(right, f"{len(devices)} devices, {mesh}\n{on}")
    return figure


def _part(axes: tuple[str, ...], names: list[str], shape: list[int]) -> np.ndarray:
    """Number of the part along one dimension that each device of the mesh holds; the first axis is the slowest."""
    number = np.zeros(shape, int)
    places = dict(zip(names, np.indices(shape), strict=True))
    for axis in axes:
        if axis in places:
            number = number * shape[names.index(axis)] + places[axis]
    return number


def _color(cell: Sequence[int], parts: Sequence[int]) -> tuple[float, float, float]:
    hue = (0.55 + 0.8 * cell[0] / max(1, parts[0])) % 1.0
    light = 1.0 - 0.55 * (cell[1] / max(1, parts[1] - 1) if parts[1] > 1 else 0.35)
    return colorsys.hsv_to_rgb(hue, 0.62, light)


def _tiles(ax: Axes, cells: Sequence[Sequence[int]], colors: Sequence, shape: Sequence[int], gap: float) -> None:
    """Draw a tile per (row, column), row 0 on top."""
    style.bare(ax)
    rows, columns = zip(*cells, strict=True)
    edge: Any = {"edgecolor": PAPER, "linewidth": 0 if gap else 0.8 if max(shape) <= 64 else 0.1}
    bottom, left = np.array(rows) + gap / 2, np.array(columns) + gap / 2
    ax.bar(left, 1 - gap, 1 - gap, bottom, align="edge", color=colors, **edge)
    ax.set(xlim=(0, shape[1]), ylim=(shape[0], 0))


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, fontsize=9.5, loc="left", color=INK)


def _grid(shape: list[int]) -> tuple[int, int, int]:
    """(rows, columns, number of axes that go down) of a grid near twice as wide as high."""
    sizes = {k: (math.prod(shape[:k]), math.prod(shape[k:])) for k in (range(1, len(shape)) if len(shape) > 1 else [0])}
    split = min(sizes, key=lambda k: abs(math.log(sizes[k][1] / sizes[k][0] / 2)))
    rows, columns = sizes[split]
    if rows == 1 and columns > 32:  # one long axis: fold it
        rows = max(d for d in range(1, math.isqrt(columns) + 1) if columns % d == 0)
        columns //= rows
    return rows, columns, split


def schedule_figure(schedules: Sequence[Schedule], width: float = 9.6) -> Figure:
    """Draw pipeline schedules as timelines: a lane per stage, a color per kind of work, the microbatch in the box.

    Time is in ticks of a whole stage: a tick of one of v chunks is 1 / v. Lengths compare where the ticks mean the same
    work: beside a schedule that splits B and W, others need B of 2 ticks.

    Args:
      schedules: at least one, drawn under each other on one axis.
      width: of the figure, inches.

    Raises:
      ValueError: no schedules.
    """
    if not schedules:
        raise ValueError("a timeline figure needs at least one schedule")
    heights = [0.28 * schedule.stages + 0.5 for schedule in schedules]
    grid = {"sharex": True, "height_ratios": heights}
    figure, axes = style.canvas(1, len(schedules), width=width, height=sum(heights) + 0.75, **grid)
    time = max(schedule.ticks / schedule.chunks for schedule in schedules)
    for ax, schedule in zip(axes, schedules, strict=True):
        _draw_timeline(ax, schedule, labels=width * 72 / time > 9 * schedule.chunks)
    axes[-1].set_xlim(0, time)
    axes[-1].set_xlabel("time (ticks of a whole stage)")
    used = [KINDS[kind] for kind in KINDS if any(kind in schedule.kinds for schedule in schedules)]
    handles = [axes[0].bar(0, 0, color=color, label=label) for color, label in [*used, (GRID, "idle")]]
    how = {"frameon": False, "fontsize": 9, "labelcolor": INK}
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), **how)
    return figure


def _draw_timeline(ax: Axes, schedule: Schedule, labels: bool) -> None:
    """Draw one schedule, with the number of the microbatch in every box if `labels`."""
    tick = 1 / schedule.chunks
    for stage, found in enumerate(schedule.spans()):
        begin, end = min(span.start for span in found.values()), max(span.end for span in found.values())
        ax.barh(stage, tick * (end - begin), 0.84, tick * begin, color=GRID)
        for work, span in found.items():
            shade = 0.45 + 0.55 * (schedule.chunks - work.chunk) / schedule.chunks
            box: Any = {"color": (KINDS[work.kind][0], shade), "edgecolor": PAPER, "linewidth": 0.5}
            name = f"{work.kind}{work.microbatch}.{work.chunk}@{stage}"
            ax.barh(stage, tick * (span.end - span.start), 0.84, tick * span.start, gid=name, **box)
            if labels:
                where: Any = {"ha": "center", "va": "center", "fontsize": 6.5, "color": PAPER if shade > 0.7 else INK}
                ax.text(tick * (span.start + span.end) / 2, stage, str(work.microbatch), **where)
    ax.set_ylim(schedule.stages - 0.4, -0.6)  # stage 0 on top
    ax.set_yticks(range(schedule.stages), [f"stage {stage}" for stage in range(schedule.stages)])
    ax.tick_params(labelsize=8, length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    chunks = f", {schedule.chunks} chunks" if schedule.chunks > 1 else ""
    # Part of a chunk counts as that part of a stage's layers.
    live = max(peak_live(schedule)) / schedule.chunks
    numbers = f"bubble {100 * bubble(schedule):.1f}%, at most {live:g} microbatches live on a stage"
    ax.set_title(f"{schedule.name}{chunks}: {numbers}", loc="left", fontsize=9.5, fontweight="bold", color=INK, pad=4)
