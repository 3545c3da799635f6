"""The track on digits: test accuracy of tickets with at most 2,000 live weights, biases and all."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lottery import imp
from scripts.race.run import OverBudget, check_budget, race
from tessera.cli import find_ticket
from tessera.cli.main import Invocation
from tessera.tickets.setup import SCHEMA as SCHEMA
from tessera.tickets.setup import LevelStore, Setup, make_setup, search_tickets

ERRORS = (*find_ticket.ERRORS, OverBudget)
ARM = "ticket"


def main(invocation: Invocation) -> int:
    """Config -> live weights -> a search of all seeds -> row. Returns the exit status."""
    config = invocation.config
    if config.data.kind != "images" or config.data.name != "digits":
        raise OverBudget(f"config.data.name={config.data.get('name')!r}: this track is on digits")
    config.seeds = tuple(int(seed) for seed in invocation.flags["seeds"].split(","))
    setup = make_setup(config)
    cost = live_weights(setup)
    check_budget(invocation.flags["track"], cost, invocation.name)

    def score(seeds: Sequence[int], root: Path) -> list[float]:
        workdir = replace(invocation, workdir=str(root)).prepare()
        rows = search_tickets(setup, LevelStore(workdir / "levels"), train_level(setup), config)
        last = {row["seed"]: row for row in rows if row["arm"] == ARM and row["level"] == rows.levels}
        return [100 * last[seed]["final_test_accuracy"] for seed in seeds]

    return race(invocation, cost, content_hash(setup), score)


def train_level(setup: Setup) -> Any:
    """The training function of a search."""
    return lambda starts, *, level: setup.train(starts)


def live_weights(setup: Setup) -> int:
    """Weights alive at the search's last level and all parameters that are not prunable; nothing is trained.

    Counts do not depend on seeds and weights, so a search whose training does nothing has them.

    Raises:
      OverBudget: the search has no tickets.
    """
    if ARM not in setup.search.arms or not setup.search.levels:
        raise OverBudget(f"config.search: the arm {ARM!r} at a level above 0 is scored")
    search = replace(setup.search, seeds=setup.search.seeds[:1], arms=(ARM,), score="magnitude", teacher="", rewind=0)
    search = replace(search, rewind_optimizer=False)
    untrained = lambda starts, level: imp.Trained(starts.params, rows=[{}])  # noqa: E731
    last = imp.search(setup.network.init, untrained, imp.Memory(), search)[-1]
    params = jax.eval_shape(setup.network.init, jax.random.key(0))
    return last["alive"] + sum(leaf.size for leaf in jax.tree.leaves(params)) - last["prunable"]


def content_hash(setup: Setup) -> str:
    """SHA-256 (hex) of the images and labels as they were split."""
    found = hashlib.sha256()
    for split in (setup.splits.train, setup.splits.validation, setup.splits.test):
        for array in (split.images, split.labels):
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
