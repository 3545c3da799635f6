"""What makes a ticket: which weights stay, their signs, their sizes, or the zeros? The ablations of Zhou et al. 2019.

Arms of arXiv:1905.01067 on the same dense networks: the mask criteria of section 2, the mask-0 and mask-1 actions of
sections 3 and 4, and how well a mask does before anything is trained (the supermasks of section 5). Masks are made in
one shot from the trained dense weights; in the paper pruning is iterative.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from lottery import criteria, prune, supermask
from lottery import masks as masks_lib
from lottery.imp import search_keys
from tessera.infra.config import ConfigError, build
from tessera.infra.memo import Memo
from tessera.models.registry import STATISTICS, Network
from tessera.tickets.setup import Setup, init_stack, make_setup
from tessera.tickets.studies.sparse_methods import MethodInputs, SparseConfig, advance, lifted, make_inputs, rows_of
from tessera.tickets.studies.study import DENSE, Comparison, Study, same

RANDOM = "random"
TICKET = "large_final"


class Ablation(NamedTuple):
    """Arguments of `lottery.supermask.ablate_weights`."""

    one: str = "rewind"
    keep_sign: bool = False
    zero: str = "zero"


ABLATIONS: dict[str, Ablation] = {
    "rewind": Ablation(),
    "rewind, rest frozen": Ablation(zero="initial"),
    "reinit": Ablation("reinit"),
    "reinit, signs kept": Ablation("reinit", True),
    "shuffle": Ablation("shuffle"),
    "shuffle, signs kept": Ablation("shuffle", True),
    "constant": Ablation("constant"),
    "constant, signs kept": Ablation("constant", True),
}


@dataclass(frozen=True)
class AblationConfig:
    """What is ablated (Zhou et al. 2019).

    Attributes:
      criteria: of `lottery.supermask.MASK_CRITERIA`, "large_final" among them, with which the others are compared.
      treatments: names in `ABLATIONS` under `large_final` masks, "rewind" among them, with which the others are
        compared.
    """

    criteria: tuple[str, ...] = tuple(supermask.MASK_CRITERIA)
    treatments: tuple[str, ...] = tuple(ABLATIONS)

    def __post_init__(self):
        for field, known in (("criteria", supermask.MASK_CRITERIA), ("treatments", ABLATIONS)):
            unknown = [name for name in getattr(self, field) if name not in known]
            if unknown:
                raise ValueError(f"{field}: {', '.join(unknown)} unknown; choose from {', '.join(known)}")
        if TICKET not in self.criteria or "rewind" not in self.treatments:
            raise ValueError(
                f"criteria must have {TICKET!r} and treatments 'rewind': the others are compared with them"
            )


def run(config: Any, memo: Memo) -> Study:
    """Train the dense networks, then every mask and every ablation from the same initializations."""
    study = build(AblationConfig, config.study, "config.study")
    setup = make_setup(config)
    if setup.search.rewind or not setup.search.levels:
        raise ConfigError("config.search: rewind 0 and a level are needed")
    if config.optimizer.get("weight_decay", 0):
        raise ConfigError("config.optimizer.weight_decay: frozen weights are not to change; 0 is needed")
    inputs, counts = make_inputs(setup, SparseConfig(), config)
    if STATISTICS in inputs.initial:
        raise ConfigError("config.model.name: a network without batch statistics is needed, such as lenet or conv2")
    programs = setup.programs_for(setup.optimizer, frozen_network(setup.network))

    def train(start: Start) -> tuple[list[dict[str, Any]], PyTree]:
        tree = {"trained": start.trained, "frozen": start.frozen}
        masks = {"trained": start.mask, "frozen": masks_lib.ones(start.frozen)}
        before = rows_of(programs, programs.init(tree, masks), inputs.seeds)
        _, state = advance(inputs, programs, tree, masks, None, inputs.seeds)
        # The share of the prunable weights that stay is the same for all seeds.
        density = float(masks_lib.density(jax.tree.map(lambda leaf: leaf[0], start.mask), inputs.which))
        rows = [
            {"density": density, **row, "untrained_test_accuracy": first["final_test_accuracy"]}
            for first, row in zip(before, rows_of(programs, state, inputs.seeds), strict=True)
        ]
        return rows, state.params["trained"]

    def rows_for(part: str, name: str, level: int, start: Callable[[], Start]) -> list[dict[str, Any]]:
        return [{"part": part, "name": name, "level": level} | row for row in train(start())[0]]

    dense = cache(lambda: train(Start.of(inputs.initial)))
    rows = memo.rows("dense", lambda: [{"part": DENSE, "name": DENSE, "level": 0} | row for row in dense()[0]])
    final = memo.tree("dense_weights", inputs.initial, lambda: dense()[1])
    for level, left in enumerate(counts, 1):
        for part, name, start in _starts(inputs, final, study, left, level):
            saved = f"level{level} {part} {name}".replace(",", "").replace(" ", "_")
            rows += memo.rows(saved, rows_for, part, name, level, start)
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


def _starts(
    inputs: MethodInputs, final: PyTree, study: AblationConfig, counts: Mapping[str, int], level: int
) -> Iterator[tuple[str, str, Callable[[], Start]]]:
    """Part, name and start of every training of a level; `large_final` rewound is in the first part only."""
    keys = search_keys(inputs.setup.search, level, "ablations")
    fresh = init_stack(inputs.setup, inputs.seeds, salt=1)

    def masks(score: Callable[[PyTree, PyTree, Array], PyTree]) -> PyTree:
        def one(initial: PyTree, last: PyTree, key: Array) -> PyTree:
            return prune.keep(score(initial, last, key), masks_lib.ones(initial), inputs.which, counts)

        return jax.jit(jax.vmap(one))(inputs.initial, final, keys)

    def by_criterion(name: str) -> PyTree:
        if name == RANDOM:
            return masks(lambda initial, _, key: criteria.random(initial, key=key))
        return masks(lambda initial, last, _: supermask.MASK_CRITERIA[name](initial, last))

    def rewound(name: str) -> Start:
        mask = by_criterion(name)
        return Start.of(inputs.initial)._replace(trained=masks_lib.apply(inputs.initial, mask), mask=mask)

    def ablated(name: str) -> Start:
        ticket = by_criterion(TICKET)

        def one(initial: PyTree, mask: PyTree, key: Array, other: PyTree) -> PyTree:
            return supermask.ablate_weights(initial, mask, inputs.which, *ABLATIONS[name], key=key, fresh=other)

        return Start.under(jax.jit(jax.vmap(one))(inputs.initial, ticket, keys, fresh), ticket)

    for name in (*study.criteria, RANDOM):
        yield "mask", name, partial(rewound, name)
    for name in study.treatments:
        if name != "rewind":
            yield "weights", name, partial(ablated, name)


# Pairs whose difference is a finding, and what it is called.
ASKED = (
    (TICKET, RANDOM, "large_final masks minus random ones"),
    ("constant, signs kept", "constant", "constants with the initial signs minus constants with random ones"),
    ("reinit, signs kept", "reinit", "new values with the initial signs minus new values"),
    ("shuffle, signs kept", "shuffle", "shuffled values with the initial signs minus shuffled values"),
    ("rewind, rest frozen", TICKET, "other weights frozen at their initial values minus set to zero"),
)


def _study(rows: list[dict[str, Any]], setup: Setup) -> Study:
    arms, untrained, findings = Comparison(rows, "name"), "untrained_test_accuracy", []
    for level in arms.levels:
        at = f"At {arms.density(level)} of the weights"
        told = [f"{text} {arms.gain(a, b, level)}" for a, b, text in ASKED if {a, b} <= set(arms.arms)]
        if told:
            findings.append(f"{at}, points of test accuracy: {'; '.join(told)}.")
        best = max(arms.arms, key=lambda name: arms.mean(name, level, untrained))
        findings.append(
            f"{at}, untrained, the best is {best} with {arms.show(best, level, untrained)}% test accuracy; "
            f"{TICKET} rewound has {arms.show(TICKET, level, untrained)}%."
        )
    parts = {name: next(row["part"] for row in rows if row["name"] == name) for name in arms.arms}
    columns = {
        "changed": lambda mine: mine[0]["part"],
        "untrained (%)": lambda mine: arms.show(mine[0]["name"], mine[0]["level"], untrained),
    }
    caption = (
        f"Test accuracy after {setup.ticket.steps} steps from the initialization. Left: one-shot masks by criterion, "
        f"weights rewound. Right: ablations of the weights under (and outside) the {TICKET} mask. Small marks are "
        "seeds, large ones means with 95% intervals; dotted: the mean of the dense networks. The table has the "
        "accuracy before training too."
    )
    masks, weights = ([name for name in arms.arms if parts[name] == part] for part in ("mask", "weights"))
    panels = {
        "Masks": same(masks),
        f"Weights under {TICKET}": {TICKET: "rewind"} | same(weights),
    }
    return Study(
        "What makes a ticket", findings, arms.table({TICKET: TICKET}, columns), arms.figure(panels), caption, rows
    )
