"""Several masks on the weights of every seed: train them all, and put their accuracies side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lottery import controls
from lottery import masks as masks_lib
from tessera.reports.html import Table
from tessera.reports.style import MARKERS, PALETTE, Figure, canvas, deferred, seed_marks, titles
from tessera.tickets.setup import Setup, starts_of
from tessera.tickets.studies.study import Study, with_interval

# The seed's own ticket and random masks, in every comparison.
OWN, RANDOM = "own", "random"


def train_masks(
    setup: Setup, found: Mapping[str, Sequence[PyTree]], reset: PyTree, seeds: Sequence[int], level: int
) -> list[dict[str, Any]]:
    """Train every seed's weights under every mask of its; one row each, by mask and seed.

    Args:
      setup: how. found: name -> a mask for every seed, `OWN` among the names.
      reset: the weights [seeds, ...]. seeds: of the data's order. level: for the rows.
    """
    names = list(found)
    stacks = [jax.tree.map(lambda *leaf: jnp.stack(leaf), *found[name]) for name in names]
    stacked = jax.tree.map(lambda *leaf: jnp.concatenate(leaf), *stacks)
    weights = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * len(names)), reset)
    labels = [name for name in names for _ in seeds]
    starts = starts_of(
        masks_lib.apply(weights, stacked), stacked, list(seeds) * len(names), labels, setup.search.rewind
    )
    which = masks_lib.prunable(jax.tree.map(lambda leaf: leaf[0], reset), setup.search.rules)
    rows = []
    for i, ((name, seed), row) in enumerate(zip(starts.names, setup.train(starts).rows, strict=True)):
        mask = jax.tree.map(lambda leaf: leaf[i], stacked)  # noqa: B023
        both = controls.overlap(mask, found[OWN][i % len(seeds)], which)["*"]
        keep = {k: row[k] for k in ("early_stop_test_accuracy", "final_test_accuracy", "early_stop_step")}
        mine = {"mask": name, "seed": seed, "level": level, "overlap": both.shared / both.expected}
        rows.append({**mine, "density": float(masks_lib.density(mask, which)), **keep})
    return rows


def compare(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], second: str, told: Sequence[str], words: Mapping[str, str]
) -> Study:
    """Accuracy of every mask, its points over `RANDOM` and over `second` by seed, and a picture.

    Args:
      rows: of `train_masks`. names: of the masks, in order. told: masks whose difference to `second` is a finding.
      words: "title" of the study and of its "figure", "caption", and what a finding calls `second` ("second").
    """
    value = "final_test_accuracy"
    levels = sorted({row["level"] for row in rows})
    cell = lambda mask, level: [row for row in rows if row["mask"] == mask and row["level"] == level]  # noqa: E731
    body, findings, densities = [], [], []
    for level in levels:
        at = {base: {row["seed"]: row[value] for row in cell(base, level)} for base in (RANDOM, second)}
        over = lambda name, base: [r[value] - at[base][r["seed"]] for r in cell(name, level)]  # noqa: B023, E731
        densities.append(f"{np.mean([row['density'] for row in cell(OWN, level)]):.1%}")
        for name in names:
            mine = cell(name, level)
            gains = [None if name == base else with_interval(over(name, base)) for base in (RANDOM, second)]
            overlap = None if name == OWN else with_interval([row["overlap"] for row in mine], 1.0)
            body.append([densities[-1], name, with_interval([row[value] for row in mine]), *gains, overlap])
        for name in told:
            findings.append(
                f"At {densities[-1]} of the weights, mask {name} minus mask {words['second']}: "
                f"{with_interval(over(name, second))} points."
            )
    head = ["weights", "mask", "test accuracy (%)", f"points over {RANDOM}", f"points over mask {words['second']}"]
    table = Table([*head, "overlap with own/chance"], body)
    figure = _figure(rows, names, densities, words["figure"])
    return Study(words["title"], findings, table, figure, words["caption"], [dict(row) for row in rows])


@deferred
def _figure(rows: Sequence[Mapping[str, Any]], names: Sequence[str], densities: Sequence[str], title: str) -> Figure:
    """Points over random masks of the same seed, a column for every level, a mark for every mask."""
    value = "final_test_accuracy"
    levels = sorted({row["level"] for row in rows})
    cell = lambda mask, level: [row for row in rows if row["mask"] == mask and row["level"] == level]  # noqa: E731
    figure, (ax,) = canvas(1, width=7.2, height=3.6)
    for i, name in enumerate(names):
        for place, level in enumerate(levels):
            base = {row["seed"]: row[value] for row in cell(RANDOM, level)}
            height = [100 * (row[value] - base[row["seed"]]) for row in cell(name, level)]
            x = place + (i - (len(names) - 1) / 2) * 0.7 / len(names)
            look: dict[str, Any] = {
                "color": PALETTE[i % len(PALETTE)],
                "marker": MARKERS[i % len(MARKERS)],
                "column": True,
            }
            seed_marks(ax, x, height, label="" if place else name, **look)
    ax.set_xticks(range(len(levels)), densities)
    titles(ax, title, "weights remaining", "points over random masks of the same seed")
    ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0), title="mask")
    return figure
