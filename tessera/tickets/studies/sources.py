"""Mask transfer: tickets found with other data, another optimizer or another width, on the same weights.

Morcos et al. 2019 (arXiv:1906.02773) transfer a ticket (mask and initialization) across data sets and optimizers. Here
every source is one more search, the config with some settings changed; it has the same seeds, so where the network is
the same its initializations are the same too. Masks of other widths are fitted by `lottery.transfer.resize`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from lottery import controls, transfer
from tessera.infra.config import ConfigError, build
from tessera.infra.memo import Memo
from tessera.tickets.setup import Finished, Setup, make_setup
from tessera.tickets.studies.compared_masks import OWN, RANDOM, compare, train_masks
from tessera.tickets.studies.study import Study, run_search

SEED = "of another seed"


@dataclass(frozen=True)
class SourcesConfig:
    """Where masks of other searches are transferred.

    Attributes:
      levels: pruning levels whose masks are transferred.
    """

    levels: tuple[int, ...] = (1,)


def run(config: Any, memo: Memo) -> Study:
    """Search with the config and with every one of `config.sources`, train the config's weights under all masks."""
    study = build(SourcesConfig, config.study, "config.study")
    setup = make_setup(config)
    if len(setup.search.seeds) < 2 or not 0 < max(study.levels) <= setup.search.levels:
        raise ConfigError(f"config: two seeds are needed, and config.study.levels from 1 to {setup.search.levels}")
    others = {f"of {name}": changed(config, name) for name in sorted(config.sources)}
    # All settings are read before anything is trained.
    setups = {name: make_setup(other) for name, other in others.items()}
    searches = {OWN: run_search(setup, memo, config)[0]}
    for name, other in others.items():
        searches[name], _ = run_search(setups[name], memo, other, f"levels {name}".replace(" ", "_"))
    rows = []
    for level in study.levels:
        rows += memo.rows(f"sources_level{level}", _transfer, setup, searches, level)
    where = f"step {setup.search.rewind}" if setup.search.rewind else "the initialization"
    caption = (
        f"Every seed's weights at {where} under its own ticket's mask, under those of tickets found otherwise from the "
        "same seed, under the next seed's, and under random ones with as many weights in every layer as the own. "
        "Accuracy after the last step over that of the random masks; small marks are seeds, large ones means with 95% "
        "intervals."
    )
    return compare(rows, SEED, list(others), "Masks found with other data, another optimizer, another width", caption)


def changed(config: Any, name: str) -> ConfigDict:
    """The config with the settings of the source `name`, a mapping of groups like the config itself.

    Raises:
      ConfigError: a source that changes what the searches must have in common, or names a group that is not there.
    """
    changes = config.sources[name]
    for group in changes:
        if group not in ("data", "lr", "model", "optimizer", "train"):
            raise ConfigError(f"config.sources.{name}.{group}: a source may change data, lr, model, optimizer, train")
    settings = {key: value for key, value in config.to_dict().items() if key != "sources"}
    for group, new in changes.items():
        settings[group] = {**settings[group], **new} if isinstance(settings[group], Mapping) else new
    return ConfigDict(settings)


def _transfer(setup: Setup, searches: Mapping[str, Finished], level: int) -> list[dict[str, Any]]:
    dense, dense_rows = searches[OWN].level(0)
    reset, seeds = transfer.of_arm(dense["reset"], dense_rows, "dense")
    like = jax.eval_shape(setup.network.init, jax.random.key(0))

    def masks(name: str, shift: int = 0) -> list[PyTree]:
        tree, rows = searches[name].level(level)
        stack = transfer.by_seed(transfer.of_arm(tree["masks"], rows, "ticket"), seeds, shift)
        stack = jax.vmap(lambda mask: transfer.resize(mask, like))(stack)
        return [jax.tree.map(lambda leaf: leaf[i], stack) for i in range(len(seeds))]  # noqa: B023

    found = {name: masks(name) for name in searches} | {SEED: masks(OWN, 1)}
    random = [
        controls.shuffle_masks(mask, key=jax.random.key(seed)) for mask, seed in zip(found[OWN], seeds, strict=True)
    ]
    return train_masks(setup, found | {RANDOM: random}, reset, seeds, level)
