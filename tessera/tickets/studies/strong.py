"""Strong tickets: how many subnetworks of random networks are as good as the trained one, over width and depth.

For every width and depth, several networks are drawn. Each is trained whole; then its untrained subnetworks are counted
that have at most one point less of accuracy on images that no training saw (`lottery.strong`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from lottery import masks as masks_lib
from lottery import prune, strong, summary
from tessera.data.images import Images, ImageSplits
from tessera.infra.config import ConfigError, build
from tessera.infra.memo import Memo
from tessera.models.registry import Network, make_network
from tessera.reports.html import Table
from tessera.reports.style import MUTED, Figure, canvas, deferred, ramp, titles
from tessera.tickets.setup import Setup, init_stack, load_data, make_setup, starts_of
from tessera.tickets.studies.study import Study

LOG10 = np.log(10)


@dataclass(frozen=True)
class StrongConfig:
    """A grid of fully connected networks, and how their subnetworks are counted.

    Attributes:
      widths: of the grid.
      depths: of the grid.
      classes: digits that are told apart.
      less: accuracy below the trained dense network's that a strong ticket may have.
      fixed: an accuracy that is the same for all networks, for a second count.
      population: masks annealed together.
      populations: independent ones a network, the pilot apart.
      steps: Metropolis steps of every mask at every temperature.
    """

    widths: tuple[int, ...] = (4, 8, 12, 20)
    depths: tuple[int, ...] = (1, 2, 3)
    classes: tuple[int, ...] = (0, 1, 2)
    less: float = 0.01
    fixed: float = 0.9
    population: int = 64
    populations: int = 3
    steps: int = 400

    def __post_init__(self):
        if min(*self.widths, *self.depths, self.populations - 1, self.steps) < 1:
            raise ValueError(f"{self}: widths, depths and steps from 1 and two populations are needed")
        if len(set(self.widths)) < 3 or len(set(self.classes)) < 2:
            raise ValueError(f"{self}: three widths, to tell laws of growth apart, and two classes are needed")
        if not (0 <= self.less < 1 and 0 < self.fixed < 1):
            raise ValueError(f"{self}: less must lie in [0, 1), fixed in (0, 1)")


def run(config: Any, memo: Memo) -> Study:
    """Draw, train and count, cell by cell."""
    study = build(StrongConfig, config.study, "config.study")
    if config.model.get("name", "lenet") != "lenet":
        raise ConfigError("config.model.name: the grid is one of fully connected networks, 'lenet'")
    setup = make_setup(config, only(load_data(config.data), study.classes))
    rows = []
    for depth in study.depths:
        for width in study.widths:
            rows += memo.rows(f"depth{depth}_width{width}", _cell, setup, study, width, depth)
    return _study(rows, study, setup)


def only(splits: ImageSplits, classes: Sequence[int]) -> ImageSplits:
    """The images of some classes, whose labels become 0, 1, ..."""

    def chosen(part: Images) -> Images:
        keep = np.isin(part.labels, classes)
        return Images(part.images[keep], np.searchsorted(np.sort(classes), part.labels[keep]).astype(np.int32))

    return ImageSplits(chosen(splits.train), chosen(splits.validation), chosen(splits.test), len(classes))


def errors_of(network: Network, params: PyTree, which: PyTree, images: Array, labels: Array) -> jax.tree_util.Partial:
    """Masks [P, N] over the prunable weights of `params`, leaf by leaf -> errors of each subnetwork [P]."""
    leaves, structure = jax.tree.flatten(params)
    flags = jax.tree.leaves(which)

    def one(leaves: list[Array], images: Array, labels: Array, mask: Array) -> Array:
        parts, begin = [], 0
        for leaf, prunable in zip(leaves, flags, strict=True):
            part = mask[begin : begin + leaf.size].reshape(leaf.shape)
            parts.append(leaf * part if prunable else leaf)
            begin += leaf.size * bool(prunable)
        logits = network.apply(jax.tree.unflatten(structure, parts), images)
        return jnp.sum(jnp.argmax(logits, -1) != labels).astype(jnp.float32)

    return jax.tree_util.Partial(jax.vmap(one, in_axes=(None, None, None, 0)), leaves, images, labels)


def _cell(setup: Setup, study: StrongConfig, width: int, depth: int) -> list[dict[str, Any]]:
    """Train the networks of one size and count their strong tickets; a row a network."""
    splits, seeds = setup.splits, setup.search.seeds
    network = make_network({"name": "lenet", "hidden": (width,) * depth}, splits.train.images[:1], setup.classes)
    setup = replace(setup, network=network, programs=setup.programs_for(network=network))
    initial = init_stack(setup, seeds, salt=1000 * depth + width)
    trained = setup.train(starts_of(initial, masks_lib.ones(initial), seeds, ["dense"] * len(seeds))).params
    held = [np.concatenate(both) for both in zip(splits.validation, splits.test, strict=True)]
    images, labels = map(jnp.asarray, held)
    which = masks_lib.prunable(jax.tree.map(lambda leaf: leaf[0], initial))
    rows = []
    # One function for all networks of the size, so that it is compiled once.
    count = errors_of(network, jax.tree.map(lambda leaf: leaf[0], initial), which, images, labels).func
    for i, seed in enumerate(seeds):
        mine, whole = (jax.tree.map(lambda leaf: leaf[i], tree) for tree in (initial, trained))  # noqa: B023
        size = sum(prune.sizes(mine, which).values())
        errors = jax.tree_util.Partial(count, jax.tree.leaves(mine), images, labels)
        on = jnp.ones((1, size), bool)
        dense = float(jax.tree_util.Partial(count, jax.tree.leaves(whole), images, labels)(on)[0])
        row = {"width": width, "depth": depth, "seed": seed, "weights": size, "images": len(labels)}
        rows.append(row | _count(errors, size, dense, len(labels), study, seed))
    return rows


def _count(
    errors: jax.tree_util.Partial, size: int, dense: float, images: int, study: StrongConfig, seed: int
) -> dict[str, Any]:
    """Anneal one network's masks; natural logarithms."""
    target = dense + np.floor(study.less * images + 1e-9)
    config = strong.AnnealConfig(population=study.population, steps=study.steps, levels=40)
    pilot_key, key = jax.random.split(jax.random.key(seed))
    pilot = strong.choose_ladder(errors, size, target, config, key=pilot_key)
    runs = [
        strong.anneal(errors, size, target, pilot.betas, config, key=key)
        for key in jax.random.split(key, study.populations)
    ]
    own = strong.log_share(runs, target, target, pilot)
    fixed = np.floor((1 - study.fixed) * images + 1e-9)
    other = strong.log_share(runs, target, fixed, pilot).mean if fixed >= target else None
    curve = []
    for accuracy in (0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5):
        allowed = np.floor((1 - accuracy) * images + 1e-9)
        if allowed >= target:
            curve.append((accuracy, strong.log_share(runs, target, allowed, pilot).mean))
    best = min(float(run.errors.min()) for run in (pilot, *runs))
    return {
        "dense_accuracy": 1 - dense / images,
        "target": int(target),
        "least_errors": int(best),
        "temperatures": len(pilot.betas),
        "log_share": own.mean if np.isfinite(own.mean) else None,
        "half": own.half if np.isfinite(own.mean) else None,
        "log_share_fixed": other if other is not None and np.isfinite(other) else None,
        "curve": [[accuracy, value] for accuracy, value in curve if np.isfinite(value)],
    }


def log_counts(rows: Sequence[Mapping[str, Any]], key: str = "log_share") -> np.ndarray:
    """Natural logarithms of numbers of subnetworks, of the rows that have an estimate."""
    return np.asarray([row["weights"] * np.log(2) + row[key] for row in rows if row[key] is not None])


HEAD = (
    "depth",
    "width",
    "weights",
    "dense (%)",
    "log10 share of all masks",
    "log10 number",
    "of log10 2^n",
    "estimate ± (one network)",
    "estimated in",
)


def _study(rows: list[dict[str, Any]], study: StrongConfig, setup: Setup) -> Study:
    cells = {
        (depth, width): [row for row in rows if (row["depth"], row["width"]) == (depth, width)]
        for depth in study.depths
        for width in study.widths
    }
    tables = {
        f"Subnetworks within {100 * study.less:g} point of the dense network's accuracy": Table(
            HEAD, [_line(*place, mine, "log_share") for place, mine in cells.items()]
        ),
        f"Subnetworks with {100 * study.fixed:g}% accuracy": Table(
            HEAD, [_line(*place, mine, "log_share_fixed") for place, mine in cells.items()]
        ),
        "Laws of growth, by log likelihood less the best": _laws(rows, study),
    }
    caption = (
        f"{len(setup.search.seeds)} random networks of every size, {rows[0]['images']} images of "
        f"{len(study.classes)} digits that no training saw. Left and middle: subnetworks as accurate as the trained "
        f"network less {100 * study.less:g} point; small marks are networks, large ones means with 95% intervals; "
        "dashed: all masks. Right: the share of masks by the accuracy they reach, mean over networks."
    )
    return Study(
        "Strong tickets: subnetworks of random networks that are as good as the trained one",
        _findings(cells, rows, study),
        tables,
        _figure(cells, study),
        caption,
        rows,
    )


def _line(depth: int, width: int, mine: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    found = [row for row in mine if row[key] is not None]
    total = mine[0]["weights"] * np.log10(2)
    cells: list[Any] = [None] * 4
    if found:
        share, half, _ = summary.interval(row[key] / LOG10 for row in found)
        known = f" ± {half:.1f}" if np.isfinite(half) else ""
        one = np.mean([row["half"] for row in found if row["half"] is not None] or [np.nan]) / LOG10
        own = f"{one:.1f}" if key == "log_share" else None
        cells = [f"{share:.1f}{known}", f"{total + share:.1f}{known}", f"{(total + share) / total:.0%}", own]
    dense = f"{100 * np.mean([row['dense_accuracy'] for row in mine]):.1f}"
    return [depth, width, mine[0]["weights"], dense, *cells, f"{len(found)} of {len(mine)}"]


def _laws(rows: Sequence[Mapping[str, Any]], study: StrongConfig) -> Table:
    """Laws of growth with width at each depth, with depth at each width; likelihoods less the best."""
    body: list[list[Any]] = []
    held = [("depth", depth, ("width", "weights")) for depth in study.depths]
    if len(set(study.depths)) > 2:
        held += [("width", width, ("depth", "weights")) for width in study.widths]
    for fixed, at, sizes in held:
        for key, name in (("log_share", "dense less a point"), ("log_share_fixed", f"{study.fixed:.0%}")):
            mine = [row for row in rows if row[fixed] == at and row[key] is not None]
            for size in sizes:
                if len({row[size] for row in mine}) < 3:
                    continue
                laws = strong.growth(np.asarray([float(row[size]) for row in mine]), log_counts(mine, key))
                by = {law.law: law for law in laws}
                likelihoods = [
                    f"{by[law].log_likelihood - laws[0].log_likelihood:.1f}"
                    for law in ("exponential", "power", "linear")
                ]
                bits = f"{by['exponential'].coefficients[1] / np.log(2):.3g}"
                body.append([f"{fixed} {at}", name, size, len(mine), *likelihoods, laws[0].law, bits])
    head = ("of", "accuracy", "with", "networks", "exponential", "power", "linear", "likeliest", "bits a unit of size")
    return Table(head, body)


def _findings(
    cells: Mapping[tuple[int, int], Sequence[Mapping[str, Any]]], rows: Sequence[Mapping[str, Any]], study: StrongConfig
) -> list[str]:
    found = []
    for depth in study.depths:
        parts = []
        for width in study.widths:
            if len(logs := log_counts(cells[depth, width])):
                mean, half, _ = summary.interval(logs / LOG10)
                total = cells[depth, width][0]["weights"] * np.log10(2)
                known = f" ± {half:.0f}" if np.isfinite(half) else ""
                parts.append(f"width {width}: 10^{mean:.0f}{known} of 10^{total:.0f}")
        found.append(f"Depth {depth}, strong tickets of a network: {'; '.join(parts)}.")
    laws = _laws(rows, study)
    chosen = [row[7] for row in laws.rows if row[2] == "weights"]
    found.append(
        f"Against the number of weights the likeliest law is exponential in {chosen.count('exponential')}, a power in "
        f"{chosen.count('power')} and linear in {chosen.count('linear')} of {len(chosen)} fits."
    )
    missing = [row for row in rows if row["log_share"] is None]
    if missing:
        where = sorted({f"{row['depth']} x {row['width']}" for row in missing})
        none = sum(row["least_errors"] > row["target"] for row in missing)
        found.append(
            f"In {len(missing)} of {len(rows)} networks (depth x width: {', '.join(where)}) not every population found "
            f"a strong ticket, in {none} of them none did. They are left out, so the means of their sizes are too high."
        )
    return found


@deferred
def _figure(cells: Mapping[tuple[int, int], Sequence[Mapping[str, Any]]], study: StrongConfig) -> Figure:
    """Counts and shares over width, a color for every depth; shares over accuracy, a color for every width."""
    figure, axes = canvas(3, width=12.5, height=4.0)
    for depth, color in zip(study.depths, ramp(len(study.depths)), strict=True):
        sizes = [cells[depth, width][0]["weights"] * np.log10(2) for width in study.widths]
        axes[0].plot(study.widths, sizes, color=color, linewidth=1, linestyle=(0, (4, 3)))
        means: dict[int, tuple[float, float, float]] = {}
        for width, total in zip(study.widths, sizes, strict=True):
            logs = log_counts(cells[depth, width]) / LOG10
            if len(logs):
                mean, half, _ = summary.interval(logs)
                means[width] = (mean, float(np.nan_to_num(half)), total)
                for ax, shift in ((axes[0], 0.0), (axes[1], total)):
                    ax.plot([width] * len(logs), logs - shift, "o", color=color, markersize=3, alpha=0.4)
        widths = list(means)
        middle, halves, totals = (np.asarray([means[width][i] for width in widths]) for i in range(3))
        label = f"{depth} hidden layer{'s' * (depth > 1)}"
        look: dict[str, Any] = {"color": color, "marker": "o", "markersize": 5, "capsize": 3, "linewidth": 1.4}
        axes[0].errorbar(widths, middle, halves, label=label, **look)
        axes[1].errorbar(widths, middle - totals, halves, label=label, **look)
    depth = study.depths[len(study.depths) // 2]
    for width, color in zip(study.widths, ramp(len(study.widths)), strict=True):
        points: dict[float, list[float]] = {}
        for row in cells[depth, width]:
            for accuracy, value in row["curve"]:
                points.setdefault(accuracy, []).append(value / LOG10)
        known = sorted(accuracy for accuracy, values in points.items() if len(values) == len(cells[depth, width]))
        means_by_accuracy = [np.mean(points[accuracy]) for accuracy in known]
        axes[2].plot(
            [100 * a for a in known], means_by_accuracy, "o-", color=color, markersize=4, label=f"width {width}"
        )
    for ax in axes[:2]:
        ax.set_xticks(study.widths, [str(width) for width in study.widths])
    axes[1].axhline(0, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    for ax in axes[::2]:
        ax.legend(frameon=False, fontsize=9)
    titles(axes[0], "Number of strong tickets", "width", "log10")
    titles(axes[1], "Share of all masks", "width", "log10")
    titles(axes[2], f"Share by accuracy, {depth} hidden layer{'s' * (depth > 1)}", "accuracy (%)", "log10")
    return figure
