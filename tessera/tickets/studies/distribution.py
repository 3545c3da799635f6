"""The distribution of tickets: many tickets for every width and depth, the spread and the tail of their quality.

Do bigger networks hold more good tickets, or better ones? Measured: the spread, and the tail index with its interval
(`lottery.summary.tail_index`).
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from lottery import masks as masks_lib
from lottery import summary
from tessera.infra.config import ConfigError, build
from tessera.infra.memo import Memo
from tessera.models.registry import make_network
from tessera.reports.html import Table
from tessera.reports.style import MUTED, Figure, canvas, deferred, ramp, titles
from tessera.tickets.setup import Setup, init_stack, make_setup, starts_of
from tessera.tickets.studies.study import Study, magnitude_masks


@dataclass(frozen=True)
class DistributionConfig:
    """A grid of fully connected networks and how many tickets are drawn of each.

    Attributes:
      widths: of the grid.
      depths: of the grid.
      tickets: of each network.
      density: of their weights, by magnitude, once, all layers alike.
      tail: share of the tickets that make the upper tail.
    """

    widths: tuple[int, ...] = (16, 64)
    depths: tuple[int, ...] = (1, 2)
    tickets: int = 60
    density: float = 0.2
    tail: float = 0.25

    def __post_init__(self):
        if min(*self.widths, *self.depths) < 1 or not 0 < self.density < 1 or not 0 < self.tail < 1:
            raise ValueError(f"{self}: widths and depths from 1, density and tail in (0, 1) are needed")
        if round(self.tail * self.tickets) < 2:
            raise ValueError(f"tail={self.tail} of tickets={self.tickets} is less than two tickets")


def run(config: Any, memo: Memo) -> Study:
    """Train the tickets of every cell of the grid, describe their quality."""
    study = build(DistributionConfig, config.study, "config.study")
    if config.model.get("name", "lenet") != "lenet":
        raise ConfigError("config.model.name: the grid is one of fully connected networks, 'lenet'")
    setup = make_setup(config)
    rows = []
    for depth in study.depths:
        for width in study.widths:
            rows += memo.rows(f"depth{depth}_width{width}", _cell, setup, study, width, depth)
    return _study(rows, study, setup)


def _cell(setup: Setup, study: DistributionConfig, width: int, depth: int) -> list[dict[str, Any]]:
    """Train `tickets` dense networks of one size, prune them, rewind them, train again."""
    model = {"name": "lenet", "hidden": (width,) * depth}
    network = make_network(model, setup.splits.train.images[:1], setup.classes)
    setup = replace(setup, network=network, programs=setup.programs_for(network=network))
    seeds = range(study.tickets)
    names = ["ticket"] * study.tickets
    initial = init_stack(setup, seeds, salt=1000 * depth + width)
    dense = setup.train(starts_of(initial, masks_lib.ones(initial), seeds, names))
    masks, counts = magnitude_masks(dense.params, study.density)
    tickets = setup.train(starts_of(masks_lib.apply(initial, masks), masks, seeds, names))
    return [
        {
            "width": width,
            "depth": depth,
            "ticket": seed,
            "weights": sum(counts.values()),
            "prunable": sum(leaf[0].size for path, leaf in masks_lib.flatten(initial).items() if path in counts),
            "dense_accuracy": before["final_test_accuracy"],
            "accuracy": after["final_test_accuracy"],
            "loss": after["final_test_loss"],
        }
        for seed, before, after in zip(seeds, dense.rows, tickets.rows, strict=True)
    ]


class Cell(NamedTuple):
    """One size: tickets' accuracies in percent, test losses, and the tail of 1 / loss."""

    depth: int
    width: int
    weights: int
    accuracy: np.ndarray
    loss: np.ndarray
    tail: summary.Tail

    @property
    def quantiles(self) -> tuple[float, float, float]:
        """Of the accuracy: 5%, median, 95%."""
        low, middle, high = np.quantile(self.accuracy, [0.05, 0.5, 0.95])
        return float(low), float(middle), float(high)

    def row(self) -> list[Any]:
        """In the table."""
        low, middle, high = self.quantiles
        spread = [f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{self.accuracy.max():.2f}"]
        losses = [f"{self.accuracy.std(ddof=1):.2f}", f"{np.median(self.loss):.4f}", f"{self.loss.min():.4f}"]
        interval = f"{self.tail.index:.2f} ({self.tail.low:.2f} to {self.tail.high:.2f})"
        return [self.depth, self.width, self.weights, *spread, *losses, interval]


HEAD = ("depth", "width", "weights", "median (%)", "5% to 95%", "best", "sd", "median loss", "least loss", "tail index")


def _study(rows: list[dict[str, Any]], study: DistributionConfig, setup: Setup) -> Study:
    count = round(study.tail * study.tickets)
    cells = []
    for depth in study.depths:
        for width in study.widths:
            mine = [row for row in rows if row["depth"] == depth and row["width"] == width]
            loss = np.asarray([row["loss"] for row in mine])
            accuracy = 100 * np.asarray([row["accuracy"] for row in mine])
            # Quality is the inverse loss: positive, and large for good tickets.
            tail = summary.tail_index(1 / loss, count)
            cells.append(Cell(depth, width, mine[0]["weights"], accuracy, loss, tail))
    body = [cell.row() for cell in cells]
    smallest, largest = body[0], body[-1]
    findings = [
        f"From {smallest[2]:,} weights (depth {smallest[0]}, width {smallest[1]}) to {largest[2]:,} (depth "
        f"{largest[0]}, width {largest[1]}) the median accuracy of {study.tickets} tickets goes from {smallest[3]}% to "
        f"{largest[3]}%, their standard deviation from {smallest[6]} to {largest[6]} points.",
        f"The tail index of 1 / test loss over the best {count} of {study.tickets} is {smallest[-1]} in the smallest "
        f"cell and {largest[-1]} in the largest; below 0 means that the tail has an end.",
    ]
    caption = (
        f"Every cell: {study.tickets} networks of that width and depth, trained {setup.ticket.steps} steps, pruned "
        f"once to {study.density:.0%} of each layer, rewound to the initialization, trained again. Test set."
    )
    title = "The distribution of tickets over width and depth"
    return Study(title, findings, Table(HEAD, body), _figure(cells, study), caption, rows)


@deferred
def _figure(cells: list[Cell], study: DistributionConfig) -> Figure:
    """Left the spread of accuracy over size, right the tail index with its interval; a color for every depth."""
    figure, axes = canvas(2, width=9.6, height=3.8)
    for depth, color in zip(study.depths, ramp(len(study.depths)), strict=True):
        mine = [cell for cell in cells if cell.depth == depth]
        for cell in mine:
            low, middle, high = cell.quantiles
            axes[0].plot([cell.weights] * 2, [low, high], color=color, linewidth=1.6, solid_capstyle="round")
            axes[0].plot([cell.weights], [middle], "o", color=color, markersize=4.5)
            axes[0].plot([cell.weights], [cell.accuracy.max()], "_", color=color, markersize=8)
        index = np.asarray([cell.tail.index for cell in mine])
        bars = np.asarray([[c.tail.index - c.tail.low for c in mine], [c.tail.high - c.tail.index for c in mine]])
        look: dict[str, Any] = {"marker": "o", "markersize": 4, "capsize": 3, "linestyle": "none"}
        label = f"{depth} hidden layer{'s' * (depth > 1)}"
        axes[1].errorbar([cell.weights for cell in mine], index, np.maximum(bars, 0), color=color, label=label, **look)
    ticks = [cell.weights for cell in cells if cell.depth == study.depths[0]]
    for ax in axes:
        ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{weights:,}" for weights in ticks])
        ax.set_xticks([], minor=True)
    axes[1].axhline(0, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    axes[1].legend(frameon=False, fontsize=9)
    titles(axes[0], "Test accuracy of tickets", "weights of the ticket", "%: median, 5% to 95%, best (dash)")
    titles(axes[1], "Upper tail of 1 / test loss", "weights of the ticket", "extreme value index, 95% interval")
    return figure
