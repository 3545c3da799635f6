"""Several masks on the weights of every seed: train them all, and compare their accuracies."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lottery import controls
from lottery import masks as masks_lib
from tessera.tickets.setup import Setup, starts_of
from tessera.tickets.studies.study import Comparison, Rows, Study, column, same, with_interval

# The seed's own ticket and random masks, in every comparison.
OWN, RANDOM = "own", "random"


def train_masks(
    setup: Setup, found: Mapping[str, Sequence[PyTree]], reset: PyTree, seeds: Sequence[int], level: int
) -> list[dict[str, Any]]:
    """Train every seed's weights under every mask of its; one row each, by mask and seed.

    Args:
      setup: data, network, schedule.
      found: name -> a mask for every seed, `OWN` among the names.
      reset: the weights [seeds, ...].
      seeds: of the data's order.
      level: for the rows.
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
        measured = {k: row[k] for k in ("early_stop_test_accuracy", "final_test_accuracy", "early_stop_step")}
        mine = {"mask": name, "seed": seed, "level": level, "overlap": both.shared / both.expected}
        rows.append({**mine, "density": float(masks_lib.density(mask, which)), **measured})
    return rows


def compare(rows: Rows, second: str, told: Sequence[str], title: str, caption: str, shown: str = "") -> Study:
    """Accuracy of every mask, and its points over `RANDOM` and over the mask `second`, seed by seed.

    Args:
      rows: of `train_masks`.
      second: a mask of the rows.
      told: masks whose difference to `second` is a finding.
      title: of the study.
      caption: of the picture.
      shown: what to call `second`.
    """
    arms, shown = Comparison(rows, "mask"), shown or second
    findings = [
        f"At {arms.density(level)} of the weights, mask {name} minus mask {shown}: {arms.gain(name, second, level)} "
        "points."
        for level in arms.levels
        for name in told
    ]
    overlap = {"overlap with own/chance": lambda mine: with_interval(column(mine, "overlap"), 1.0)}
    table = arms.table({RANDOM: RANDOM, second: f"mask {shown}"}, overlap)
    return Study(title, findings, table, arms.figure({title: same(arms.arms)}, over=RANDOM), caption, rows)
