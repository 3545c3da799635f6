"""The distribution of tickets: many tickets for every width and depth, the spread and the tail of their quality.

Do bigger networks hold more good tickets, or better ones? Measured: how many tickets are as accurate as their own dense
network, by density; the spread; and the tail index of the quality, the negative test loss, at several thresholds
(`lottery.summary.tail_index`), with the coverage and power that its interval has at this number of tickets.
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
      densities: of their weights, by magnitude, once, all layers alike; the tail is that of the first.
      tails: shares of the tickets that make the upper tail.
      trials: samples of each known law that measure coverage and power of the tail's interval.
    """

    widths: tuple[int, ...] = (16, 64)
    depths: tuple[int, ...] = (1, 2)
    tickets: int = 60
    densities: tuple[float, ...] = (0.8, 0.5, 0.2)
    tails: tuple[float, ...] = (0.1, 0.25, 0.5)
    trials: int = 200

    def __post_init__(self):
        shares = [*self.densities, *self.tails]
        if min(*self.widths, *self.depths, self.trials) < 1 or not all(0 < share < 1 for share in shares):
            raise ValueError(f"{self}: widths, depths and trials from 1, densities and tails in (0, 1) are needed")
        if not self.densities or not self.tails or min(round(tail * self.tickets) for tail in self.tails) < 2:
            raise ValueError(f"{self}: a density, and tails of two tickets at least are needed")


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
    """Train `tickets` dense networks of one size, prune them to every density, rewind them, train again."""
    model = {"name": "lenet", "hidden": (width,) * depth}
    network = make_network(model, setup.splits.train.images[:1], setup.classes)
    setup = replace(setup, network=network, programs=setup.programs_for(network=network))
    seeds = range(study.tickets)
    names = ["ticket"] * study.tickets
    initial = init_stack(setup, seeds, salt=1000 * depth + width)
    dense = setup.train(starts_of(initial, masks_lib.ones(initial), seeds, names))
    rows = []
    for density in study.densities:
        masks, counts = magnitude_masks(dense.params, density)
        tickets = setup.train(starts_of(masks_lib.apply(initial, masks), masks, seeds, names))
        rows += [
            {
                "width": width,
                "depth": depth,
                "density": density,
                "ticket": seed,
                "weights": sum(counts.values()),
                "prunable": sum(leaf[0].size for path, leaf in masks_lib.flatten(initial).items() if path in counts),
                "dense_accuracy": before["final_test_accuracy"],
                "dense_loss": before["final_test_loss"],
                "accuracy": after["final_test_accuracy"],
                "loss": after["final_test_loss"],
            }
            for seed, before, after in zip(seeds, dense.rows, tickets.rows, strict=True)
        ]
    return rows


class Cell(NamedTuple):
    """One size and density: accuracies in percent of tickets and of their dense networks, tails of minus the loss."""

    depth: int
    width: int
    density: float
    weights: int
    accuracy: np.ndarray
    dense: np.ndarray
    tails: tuple[summary.Tail, ...]

    @property
    def quantiles(self) -> tuple[float, float, float]:
        """Of the accuracy: 5%, median, 95%."""
        low, middle, high = np.quantile(self.accuracy, [0.05, 0.5, 0.95])
        return float(low), float(middle), float(high)

    @property
    def winners(self) -> tuple[float, float]:
        """The share of tickets at least as accurate as their dense network, and its standard error."""
        share = float(np.mean(self.accuracy >= self.dense))
        return share, float(np.sqrt(share * (1 - share) / len(self.dense)))

    def row(self) -> list[Any]:
        """In the table."""
        low, middle, high = self.quantiles
        mean, half, _ = summary.interval(self.accuracy - self.dense)
        return [
            self.depth,
            self.width,
            f"{self.density:.0%}",
            self.weights,
            f"{np.median(self.dense):.2f}",
            f"{middle:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{self.accuracy.max():.2f}",
            f"{self.accuracy.std(ddof=1):.2f}",
            f"{mean:.2f} ± {half:.2f}",
            f"{self.winners[0]:.0%}",
        ]


HEAD = (
    "depth",
    "width",
    "density",
    "weights",
    "dense median (%)",
    "median (%)",
    "5% to 95%",
    "best",
    "sd",
    "points over own dense network",
    "at least as accurate",
)


def _study(rows: list[dict[str, Any]], study: DistributionConfig, setup: Setup) -> Study:
    counts = [round(tail * study.tickets) for tail in study.tails]
    cells = []
    for density in study.densities:
        for depth in study.depths:
            for width in study.widths:
                mine = [row for row in rows if (row["depth"], row["width"], row["density"]) == (depth, width, density)]
                loss, *accuracies = (
                    np.asarray([row[name] for row in mine]) for name in ("loss", "accuracy", "dense_accuracy")
                )
                tails = tuple(summary.tail_index(-loss, count) for count in counts)
                accuracy, dense = (100 * values for values in accuracies)
                cells.append(Cell(depth, width, density, mine[0]["weights"], accuracy, dense, tails))
    first = [cell for cell in cells if cell.density == study.densities[0]]
    show = lambda tail: f"{tail.index:.2f} ({tail.low:.2f} to {tail.high:.2f})"  # noqa: E731
    best = [f"best {count} of {study.tickets}" for count in counts]
    tables = {
        "Accuracy": Table(HEAD, [cell.row() for cell in cells]),
        f"Tail index of minus the test loss, at {study.densities[0]:.0%} of the weights": Table(
            ("depth", "width", *best),
            [[cell.depth, cell.width, *map(show, cell.tails)] for cell in first],
        ),
        "Coverage of the interval, and its power to tell the index from 0, on known laws": _power(study, counts),
    }
    caption = (
        f"Every cell: {study.tickets} networks of that width and depth, trained {setup.ticket.steps} steps, pruned "
        "once by magnitude in each layer, rewound to the initialization, trained again. Test set. Left: at "
        f"{study.densities[0]:.0%} of the weights; grey marks are the dense networks' medians."
    )
    title = "The distribution of tickets over width and depth"
    return Study(title, _findings(cells, first, study, counts), tables, _figure(first, cells, study), caption, rows)


def _power(study: DistributionConfig, counts: list[int]) -> Table:
    """Simulated coverage, and share of intervals on the true side of 0, by index and threshold."""
    body: list[list[Any]] = []
    for index in (-0.5, -0.25, 0.0, 0.25, 0.5):
        found = [summary.tail_power(study.tickets, count, index, study.trials) for count in counts]
        body.append([f"{index:g}", *(f"{one.covers:.0%}, {max(one.above, one.below):.0%}" for one in found)])
    return Table(("true index", *(f"best {count}: covers, excludes 0" for count in counts)), body)


def _findings(cells: list[Cell], first: list[Cell], study: DistributionConfig, counts: list[int]) -> list[str]:
    small, large = first[0], first[-1]
    found = [
        f"From {small.weights:,} weights (depth {small.depth}, width {small.width}) to {large.weights:,} (depth "
        f"{large.depth}, width {large.width}) the median accuracy of {study.tickets} tickets at {small.density:.0%} "
        f"goes from {small.quantiles[1]:.2f}% to {large.quantiles[1]:.2f}%, their standard deviation from "
        f"{small.accuracy.std(ddof=1):.2f} to {large.accuracy.std(ddof=1):.2f} points."
    ]
    for density in study.densities:
        shares = [cell.winners[0] for cell in cells if cell.density == density]
        range_ = f"{min(shares):.0%} to {max(shares):.0%}" if max(shares) else "none"
        found.append(
            f"At {density:.0%} of the weights {range_} of the tickets of a cell are at least as accurate as their own "
            "dense network."
        )
    for i, count in enumerate(counts):
        tails = [cell.tails[i] for cell in first]
        found.append(
            f"Tail of the best {count}: of {len(tails)} intervals {sum(t.high < 0 for t in tails)} lie below 0 (the "
            f"tail has an end), {sum(t.low > 0 for t in tails)} above (a power law)."
        )
    return found


@deferred
def _figure(first: list[Cell], cells: list[Cell], study: DistributionConfig) -> Figure:
    """Spread over size, share of winners over size by density, tail index by size; a color for every depth."""
    figure, axes = canvas(3, width=12.5, height=3.9)
    marks = ("o", "s", "^", "v", "D")
    for depth, color in zip(study.depths, ramp(len(study.depths)), strict=True):
        mine = [cell for cell in first if cell.depth == depth]
        for cell in mine:
            low, middle, high = cell.quantiles
            axes[0].plot([cell.weights] * 2, [low, high], color=color, linewidth=1.6, solid_capstyle="round")
            axes[0].plot([cell.weights], [middle], "o", color=color, markersize=4.5)
            axes[0].plot([cell.weights], [cell.accuracy.max()], "_", color=color, markersize=8)
            axes[0].plot([cell.weights], [np.median(cell.dense)], "x", color=MUTED, markersize=5)
        for density, marker in zip(study.densities, marks, strict=False):
            those = [cell for cell in cells if cell.depth == depth and cell.density == density]
            shares, errors = zip(*(cell.winners for cell in those), strict=True)
            look: dict[str, Any] = {"marker": marker, "markersize": 4, "capsize": 2, "linewidth": 1.2, "color": color}
            label = f"{density:.0%}" if depth == study.depths[0] else None
            axes[1].errorbar(
                [cell.width for cell in those], 100 * np.asarray(shares), 196 * np.asarray(errors), label=label, **look
            )
        index = np.asarray([cell.tails[-1].index for cell in mine])
        bars = [
            [c.tails[-1].index - c.tails[-1].low for c in mine],
            [c.tails[-1].high - c.tails[-1].index for c in mine],
        ]
        label = f"{depth} hidden layer{'s' * (depth > 1)}"
        look = {"marker": "o", "markersize": 4, "capsize": 3, "linestyle": "none", "color": color}
        axes[2].errorbar([cell.weights for cell in mine], index, np.maximum(bars, 0), label=label, **look)
    ticks = [cell.weights for cell in first if cell.depth == study.depths[0]]
    for ax in axes[::2]:
        ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{weights:,}" for weights in ticks])
        ax.set_xticks([], minor=True)
    axes[1].set_xscale("log")
    axes[1].set_xticks(study.widths, [str(width) for width in study.widths])
    axes[1].set_xticks([], minor=True)
    axes[2].axhline(0, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    for ax in axes[1:]:
        ax.legend(frameon=False, fontsize=9)
    titles(axes[0], "Test accuracy of tickets", "weights of the ticket", "%: median, 5% to 95%, best (dash)")
    titles(axes[1], "As accurate as their dense network", "width", "% of tickets, by density")
    titles(
        axes[2], f"Upper tail, best {study.tails[-1]:.0%}", "weights of the ticket", "extreme value index, 95% interval"
    )
    return figure
