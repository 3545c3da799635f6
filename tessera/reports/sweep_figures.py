"""Figures of a sweep: loss against learning rate by width, and the critical batch size against loss."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from scaling.batch import Surface
from scaling.isoflop import Minimum
from scaling.rows import Rows
from tessera.reports.scaling_style import INK, MUTED, canvas, decades, ramp, titles


def lr_figure(rows: Rows, minima: Sequence[Minimum]) -> Figure:
    """Loss against learning rate, a line per width; diamonds are the minima of parabolas in log learning rate."""
    figure, (ax,) = canvas(width=7.0, height=4.2)
    widths = np.unique(rows["width"])
    for width, colour in zip(widths, ramp(len(widths)), strict=True):
        mine = rows.take(rows["width"] == width)
        order = np.argsort(mine["lr"], kind="stable")
        ax.plot(mine["lr"][order], mine["loss"][order], "o-", color=colour, markersize=4, linewidth=1.4)
        ax.annotate(
            f"width {width:g}",
            (float(mine["lr"][order][-1]), float(mine["loss"][order][-1])),
            xytext=(6, 0),
            textcoords="offset points",
            fontsize=8.5,
            color=colour,
            va="center",
        )
    good = [m for m in minima if not m.refused]
    ax.plot([m.params for m in good], [m.loss for m in good], "D", color=INK, markersize=5, zorder=4)
    decades(ax)
    ax.margins(x=0.12)
    titles(ax, "Loss by width", "learning rate of the base width", "loss (nats per token); diamonds are minima")
    return figure


def surface_figure(grids: Sequence[tuple[Rows, Surface]]) -> Figure:
    """Loss against learning rate, a panel per size and a line per batch; diamonds: the surfaces' minima.

    Args:
      grids: rows of one size and token count, and the surface through them.
    """
    figure, axes = canvas(width=4.6 * max(len(grids), 1) + 1.0, height=4.2, columns=len(grids))
    for ax, (rows, surface) in zip(axes, grids, strict=True):
        batches = np.unique(rows["batch"])
        for batch, colour in zip(batches, ramp(len(batches)), strict=True):
            mine = rows.take(rows["batch"] == batch)
            order = np.argsort(mine["lr"], kind="stable")
            ax.plot(mine["lr"][order], mine["loss"][order], "o-", color=colour, markersize=4, linewidth=1.4)
            ax.annotate(
                f"{batch:g}",
                (float(mine["lr"][order][0]), float(mine["loss"][order][0])),
                xytext=(-6, 0),
                textcoords="offset points",
                fontsize=8.5,
                color=colour,
                va="center",
                ha="right",
            )
        if not surface.refused:
            ax.plot([surface.lr], [surface.loss], "D", color=INK, markersize=6, zorder=4)
            label = f"lr {surface.lr:.3g}, batch {surface.batch:.3g}"
            ax.annotate(label, (surface.lr, surface.loss), xytext=(0, -14), textcoords="offset points", fontsize=8.5)
        decades(ax)
        ax.margins(x=0.12, y=0.12)
        titles(ax, f"{rows['params'][0]:,.0f} parameters", "learning rate of the base width", "loss (nats), by batch")
    return figure


def noise_figure(rows: Rows, length: int) -> Figure:
    """Noise scale in tokens against the loss at the end of the decay that follows, a colour per width."""
    figure, (ax,) = canvas(width=7.0, height=4.0)
    used = rows["gradient_signal"] > 0
    tokens = length * rows["gradient_noise"] / np.where(used, rows["gradient_signal"], 1.0)
    widths = np.unique(rows["width"])
    for width, colour in zip(widths, ramp(len(widths)), strict=True):
        mine = used & (rows["width"] == width)
        order = np.argsort(-rows["loss"][mine], kind="stable")
        ax.plot(rows["loss"][mine][order], tokens[mine][order], "o-", color=colour, markersize=4, linewidth=1)
        if mine.any():
            end = (float(rows["loss"][mine][order][-1]), float(tokens[mine][order][-1]))
            ax.annotate(f"{width:g}", end, xytext=(5, 0), textcoords="offset points", fontsize=8, color=colour)
    batch = length * np.median(rows["batch"])
    ax.axhline(batch, color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
    ax.annotate("batch used", (float(rows["loss"].max()), batch), fontsize=8, color=MUTED, va="bottom", ha="left")
    decades(ax, "y")
    ax.invert_xaxis()
    titles(ax, "Critical batch size, by width", "loss at the readout (nats per token)", "noise scale (tokens)")
    return figure
