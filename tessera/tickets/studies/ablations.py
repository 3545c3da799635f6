"""What makes a ticket: which weights stay, their signs, their sizes, or the zeros? The ablations of Zhou et al. 2019.

Arms of arXiv:1905.01067 on the same dense networks: the mask criteria of section 2, the mask-0 and mask-1 actions of
sections 3 and 4, and how well a mask does before anything is trained (the supermasks of section 5). Masks are made in
one shot from the trained dense weights; in the paper pruning is iterative.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from lottery import masks as masks_lib
from lottery import prune, scores, supermask
from lottery.imp import search_keys
from tessera.infra.config import ConfigError, build
from tessera.infra.memo import Pieces
from tessera.models.registry import STATISTICS, Network
from tessera.reports.html import Table
from tessera.reports.style import INK, MARKERS, PALETTE, Figure, canvas, deferred, seed_marks, titles
from tessera.tickets.setup import Setup, init_stack, make_setup
from tessera.tickets.studies.sparse_methods import Ground, SparseConfig, advance, lifted, make_ground, rows_of
from tessera.tickets.studies.study import Study, with_interval

RANDOM = "random"
TICKET = "large_final"


class Treatment(NamedTuple):
    """Arguments of `lottery.supermask.treat`."""

    one: str = "rewind"
    keep_sign: bool = False
    zero: str = "zero"


TREATMENTS: dict[str, Treatment] = {
    "rewind": Treatment(),
    "rewind, rest frozen": Treatment(zero="initial"),
    "reinit": Treatment("reinit"),
    "reinit, signs kept": Treatment("reinit", True),
    "shuffle": Treatment("shuffle"),
    "shuffle, signs kept": Treatment("shuffle", True),
    "constant": Treatment("constant"),
    "constant, signs kept": Treatment("constant", True),
}


@dataclass(frozen=True)
class AblationConfig:
    """criteria: of `lottery.supermask.MASK_CRITERIA`. treatments: names in `TREATMENTS`, under `large_final` masks.

    Both have what the others are compared with, "large_final" and "rewind".
    """

    criteria: tuple[str, ...] = tuple(supermask.MASK_CRITERIA)
    treatments: tuple[str, ...] = tuple(TREATMENTS)

    def __post_init__(self):
        for field, known in (("criteria", supermask.MASK_CRITERIA), ("treatments", TREATMENTS)):
            unknown = [name for name in getattr(self, field) if name not in known]
            if unknown:
                raise ValueError(f"{field}: {', '.join(unknown)} unknown; choose from {', '.join(known)}")
        if TICKET not in self.criteria or "rewind" not in self.treatments:
            raise ValueError(
                f"criteria must have {TICKET!r} and treatments 'rewind': the others are compared with them"
            )


def run(config: Any, pieces: Pieces) -> Study:
    """Train the dense networks, then every mask and every treatment from the same initializations."""
    study = build(AblationConfig, config.study, "config.study")
    setup = make_setup(config)
    if setup.search.rewind or not setup.search.levels:
        raise ConfigError("config.search: rewind 0 and a level are needed")
    if config.optimizer.get("weight_decay", 0):
        raise ConfigError("config.optimizer.weight_decay: frozen weights are not to change; 0 is needed")
    ground, counts = make_ground(setup, SparseConfig(), config)
    if STATISTICS in ground.initial:
        raise ConfigError("config.model.name: a network without batch statistics is needed, such as lenet or conv2")
    programs = ground.programs(setup.optimizer, frozen_network(setup.network))

    def trained(part: str, name: str, level: int, start: Start) -> tuple[list[dict[str, Any]], PyTree]:
        tree = {"trained": start.trained, "frozen": start.frozen}
        masks = {"trained": start.mask, "frozen": masks_lib.ones(start.frozen)}
        before = rows_of(programs, programs.init(tree, masks), ground.seeds)
        _, carry = advance(ground, programs, tree, masks, None, ground.seeds)
        about = {"part": part, "name": name, "level": level, "density": _density(ground, start.mask)}
        rows = [
            {**about, **row, "untrained_test_accuracy": first["final_test_accuracy"]}
            for first, row in zip(before, rows_of(programs, carry, ground.seeds), strict=True)
        ]
        return rows, carry.params["trained"]

    dense = cache(lambda: trained("dense", "dense", 0, Start.of(ground.initial)))
    rows = pieces.rows("dense", lambda: dense()[0])
    final = pieces.tree("dense_weights", ground.initial, lambda: dense()[1])
    for level, kept in enumerate(counts, 1):
        for part, name, start in _starts(ground, final, study, kept, level):
            piece = f"level{level} {part} {name}".replace(",", "").replace(" ", "_")
            rows += pieces.rows(piece, lambda: trained(part, name, level, start())[0])  # noqa: B023
    return _study(rows, setup)


class Start(NamedTuple):
    """Stacks [seeds, ...]: weights that are trained, weights that are not, and the mask of the first."""

    trained: PyTree
    frozen: PyTree
    mask: PyTree

    @staticmethod
    def of(params: PyTree) -> "Start":
        """Everything is trained."""
        return Start(params, jax.tree.map(jnp.zeros_like, params), masks_lib.ones(params))

    @staticmethod
    def under(params: PyTree, mask: PyTree) -> "Start":
        """What the mask keeps is trained, the rest stays what it is."""
        return Start(masks_lib.apply(params, mask), masks_lib.apply(params, jax.tree.map(jnp.logical_not, mask)), mask)


def frozen_network(network: Network) -> Network:
    """`network` on the sum of two trees, {"trained": ..., "frozen": ...}, the second without gradients."""

    def both(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda a, b: a + jax.lax.stop_gradient(b), tree["trained"], tree["frozen"])

    return lifted(network, both)


def _density(ground: Ground, masks: PyTree) -> float:
    """Share of the prunable weights that stay, the same for all seeds."""
    one = jax.tree.map(lambda leaf: leaf[0], masks)
    return float(masks_lib.density(one, ground.which))


def _starts(
    ground: Ground, final: PyTree, study: AblationConfig, kept: Mapping[str, int], level: int
) -> list[tuple[str, str, Callable[[], Start]]]:
    """Part, name and start of every training of a level; `large_final` rewound is in the first part only."""
    keys = search_keys(ground.setup.search, level, "ablations")
    fresh = init_stack(ground.setup, ground.seeds, salt=1)

    def masks(score: Callable[[PyTree, PyTree, Array], PyTree]) -> PyTree:
        def one(initial: PyTree, last: PyTree, key: Array) -> PyTree:
            return prune.keep(score(initial, last, key), masks_lib.ones(initial), ground.which, kept)

        return jax.jit(jax.vmap(one))(ground.initial, final, keys)

    def criterion(name: str) -> PyTree:
        score = supermask.MASK_CRITERIA[name]
        return masks(lambda initial, last, _: score(initial, last))

    def by_mask(name: str) -> Start:
        mask = masks(lambda initial, _, key: scores.random(initial, key=key)) if name == RANDOM else criterion(name)
        return Start.of(ground.initial)._replace(trained=masks_lib.apply(ground.initial, mask), mask=mask)

    def by_treatment(name: str) -> Start:
        ticket, treatment = criterion(TICKET), TREATMENTS[name]

        def one(initial: PyTree, mask: PyTree, key: Array, other: PyTree) -> PyTree:
            return supermask.treat(initial, mask, ground.which, *treatment, key=key, fresh=other)

        return Start.under(jax.jit(jax.vmap(one))(ground.initial, ticket, keys, fresh), ticket)

    listed = [("mask", name, partial(by_mask, name)) for name in (*study.criteria, RANDOM)]
    treated = [name for name in study.treatments if name != "rewind"]
    return listed + [("weights", name, partial(by_treatment, name)) for name in treated]


def _study(rows: list[dict[str, Any]], setup: Setup) -> Study:
    levels = sorted({row["level"] for row in rows if row["level"]})
    value, before = "final_test_accuracy", "untrained_test_accuracy"

    def cell(name: str, level: int) -> list[dict[str, Any]]:
        return sorted((r for r in rows if r["name"] == name and r["level"] == level), key=lambda row: row["seed"])

    def over(name: str, base: str, level: int) -> list[float]:
        return [a[value] - b[value] for a, b in zip(cell(name, level), cell(base, level), strict=True)]

    names = list(dict.fromkeys((row["part"], row["name"]) for row in rows if row["level"]))
    dense = [row[value] for row in cell("dense", 0)]
    body: list[list[Any]] = [["100%", "", "dense", None, with_interval(dense), None]]
    for level in levels:
        for part, name in names:
            mine = cell(name, level)
            gain = None if name == TICKET else with_interval(over(name, TICKET, level))
            shown = [with_interval([row[key] for row in mine]) for key in (before, value)]
            body.append([f"{mine[0]['density']:.1%}", part, name, *shown, gain])
    head = ["weights", "changed", "how", "untrained (%)", "trained (%)", "points over ticket"]
    findings = _findings(levels, {name for _, name in names}, cell, over)
    caption = (
        f"Test accuracy after {setup.ticket.steps} steps from the initialization. Left: one-shot masks by criterion, "
        f"weights rewound. Right: what weights under (and outside) the {TICKET} mask become before they are trained. "
        "Small marks are seeds, large ones means; dotted: the mean of the dense networks. The table has the accuracy "
        "before training too."
    )
    figure = _figure(rows, names, levels, 100 * float(np.mean(dense)))
    return Study("What makes a ticket", findings, Table(head, body), figure, caption, rows)


# Pairs whose difference is a finding, and what it is called.
ASKED = (
    (TICKET, RANDOM, "large_final masks minus random ones"),
    ("constant, signs kept", "constant", "constants with the initial signs minus constants with random ones"),
    ("reinit, signs kept", "reinit", "new values with the initial signs minus new values"),
    ("shuffle, signs kept", "shuffle", "shuffled values with the initial signs minus shuffled values"),
    ("rewind, rest frozen", TICKET, "other weights frozen at their initial values minus set to zero"),
)


def _findings(
    levels: list[int], names: set[str], cell: Callable[[str, int], list], over: Callable[[str, str, int], list]
) -> list[str]:
    found = []
    for level in levels:
        at = f"At {cell(TICKET, level)[0]['density']:.1%} of the weights"
        asked = [(a, b, words) for a, b, words in ASKED if {a, b} <= names]
        if asked:
            told = "; ".join(f"{words} {with_interval(over(a, b, level))}" for a, b, words in asked)
            found.append(f"{at}, points of test accuracy: {told}.")
        best = max(names, key=lambda name: np.mean([row["untrained_test_accuracy"] for row in cell(name, level)]))
        untrained = [with_interval([r["untrained_test_accuracy"] for r in cell(n, level)]) for n in (best, TICKET)]
        found.append(
            f"{at}, untrained, the best is {best} with {untrained[0]}% test accuracy; "
            f"{TICKET} rewound has {untrained[1]}%."
        )
    return found


@deferred
def _figure(rows: list[dict[str, Any]], names: list[tuple[str, str]], levels: list[int], dense: float) -> Figure:
    parts = {
        "Masks": [name for part, name in names if part == "mask"],
        "Weights under large_final": [TICKET, *(name for part, name in names if part == "weights")],
    }
    longest = max(len(found) for found in parts.values())
    figure, axes = canvas(2, width=10.4, height=1.3 + 0.34 * longest)
    for ax, (title, found) in zip(axes, parts.items(), strict=True):
        for place, name in enumerate(found):
            for i, level in enumerate(levels):
                mine = [row for row in rows if row["name"] == name and row["level"] == level]
                values = [100 * row["final_test_accuracy"] for row in mine]
                y = place + (i - (len(levels) - 1) / 2) * 0.3
                label = f"{mine[0]['density']:.1%} of the weights" if place == 0 else ""
                seed_marks(ax, y, values, PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)], label)
        ax.axvline(dense, color=INK, linewidth=0.9, linestyle=(0, (1.5, 1.5)))
        labels = ["rewind" if name == TICKET and title != "Masks" else name for name in found]
        ax.set_yticks(range(len(found)), labels)
        ax.invert_yaxis()
        titles(ax, title, "test accuracy (%)", "")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside lower center", ncols=9)
    return figure
