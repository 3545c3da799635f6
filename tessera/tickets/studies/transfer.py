"""Mask transfer: does a ticket's mask work at another initialization, and does it help to align the networks first?

The hidden units of two networks trained from different seeds are the same only up to a permutation (Ainsworth et al.
2023). Here the mask of one seed's ticket is put on another seed's weights as it is, and after permuting its units to
match that seed's dense network; beside it stand the other seed's own ticket and random masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from lottery import align, controls, transfer
from tessera.infra.config import build
from tessera.infra.memo import Memo
from tessera.tickets.setup import Finished, Setup, make_setup
from tessera.tickets.studies.compared_masks import OWN, RANDOM, compare, train_masks
from tessera.tickets.studies.study import Study, run_search

MASKS = (OWN, "other", "aligned by weights", "aligned by activations", RANDOM)


@dataclass(frozen=True)
class TransferConfig:
    """Masks on the weights of another seed, aligned and not.

    Attributes:
      layers: of the chain of dense layers, first to last.
      levels: pruning levels whose masks are transferred.
      examples: whose activations are compared.
    """

    layers: tuple[str, ...] = ("dense0", "dense1", "output")
    levels: tuple[int, ...] = (1,)
    examples: int = 1000


def run(config: Any, memo: Memo) -> Study:
    """Search with every seed, put each mask on the next seed's weights, train, compare."""
    study = build(TransferConfig, config.study, "config.study")
    setup = make_setup(config)
    if len(setup.search.seeds) < 2 or max(study.levels) > setup.search.levels:
        raise ValueError(f"two seeds are needed, and levels={study.levels} up to {setup.search.levels}")
    search, _ = run_search(setup, memo, config)
    rows = []
    for level in study.levels:
        rows += memo.rows(f"transfer_level{level}", _transfer, setup, study, search, level)
    where = f"step {setup.search.rewind}" if setup.search.rewind else "the initialization"
    caption = (
        f"Every seed's weights at {where} under five masks: its own ticket's, the next seed's as it is and permuted to "
        "match this seed's dense network by weights or by activations, and random ones of the same density in every "
        "layer. Accuracy after the last step over that of the random masks; small marks are seeds, large ones means "
        "with 95% intervals."
    )
    return compare(rows, "other", MASKS[2:4], "A ticket's mask on another seed's initialization", caption, "as it is")


def hidden_activations(params: PyTree, x: Array, layers: Sequence[str]) -> dict[str, np.ndarray]:
    """[N, units] after every hidden layer of a chain of dense layers with ReLU, by layer."""
    found, x = {}, x.reshape(len(x), -1)
    for name in layers[:-1]:
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
        found[name] = np.asarray(x)
    return found


def _transfer(setup: Setup, study: TransferConfig, search: Finished, level: int) -> list[dict[str, Any]]:
    dense, dense_rows = search.level(0)
    tree, rows = search.level(level)
    masks, seeds = transfer.of_arm(tree["masks"], rows, "ticket")
    trained, _ = transfer.of_arm(dense["params"], dense_rows, "dense")
    reset, _ = transfer.of_arm(dense["reset"], dense_rows, "dense")
    spec = align.chain_spec(study.layers)
    x = jnp.asarray(setup.splits.train.images[: study.examples])
    one = lambda stack, i: jax.tree.map(lambda leaf: leaf[i], stack)  # noqa: E731
    found: dict[str, list[PyTree]] = {name: [] for name in MASKS}
    for target, seed in enumerate(seeds):
        source = (target + 1) % len(seeds)
        theirs, here, there = one(masks, source), one(trained, target), one(trained, source)
        acts = [hidden_activations(params, x, study.layers) for params in (here, there)]
        found[OWN].append(one(masks, target))
        found["other"].append(theirs)
        by_weights = align.match_weights(here, there, spec)
        found["aligned by weights"].append(align.permute(theirs, by_weights, spec))
        found["aligned by activations"].append(align.permute(theirs, align.match_activations(*acts), spec))
        found[RANDOM].append(controls.shuffle_masks(theirs, key=jax.random.key(seed)))
    return train_masks(setup, found, reset, seeds, level)
