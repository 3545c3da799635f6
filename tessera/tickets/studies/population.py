"""Populations: many short runs, the best continued. Can drawing initializations replace training?

First, how well a short run tells the final quality of an initialization. Then the whole recipe: many overwide networks
are trained shortly in one program, the best is trained on, whole neurons are pruned until it has the target's width, it
is cut out, distilled from the overwide network and trained on; beside it, what each part of the recipe gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from scipy import stats

from lottery import compact, coupled, criteria, summary
from lottery import masks as masks_lib
from tessera.infra.config import ConfigError, build
from tessera.infra.memo import Memo
from tessera.models.registry import Network, make_network
from tessera.reports.style import MARKERS, PALETTE, Figure, canvas, deferred, dots, titles
from tessera.tickets.setup import Setup, init_stack, make_setup, starts_of, with_steps
from tessera.tickets.studies.study import Comparison, Study, column, same, verdict

SCORE = "validation_loss"


@dataclass(frozen=True)
class PopulationConfig:
    """Populations of initializations, and overwide networks cut to size.

    Attributes:
      hidden: the target's layers.
      factor: how many times wider the overwide network is.
      draws: initializations per population.
      repeats: independent populations.
      short: steps of the short run; training is `config.train.steps` long, half of it before pruning in the recipes
        that prune.
    """

    hidden: tuple[int, ...] = (32, 16)
    factor: int = 4
    draws: int = 16
    repeats: int = 5
    short: int = 50

    def __post_init__(self):
        if min(*self.hidden, self.factor, self.draws - 1, self.repeats, self.short) < 1:
            raise ValueError(f"{self}: hidden, factor, repeats, short from 1 and draws from 2 are needed")


RECIPES = {
    "one draw": "target width, one initialization",
    "best draw": "target width, the best of all draws after the short run",
    "wide, pruned": "one overwide draw, pruned to the target width, trained on",
    "wide, pruned, distilled": "the same, distilled from the overwide network",
    "best wide, pruned, distilled": "the same from the best of all overwide draws",
}
FIRST, *_, WHOLE = RECIPES


def run(config: Any, memo: Memo) -> Study:
    """The two experiments, repeat by repeat."""
    study = build(PopulationConfig, config.study, "config.study")
    if config.model.get("name", "lenet") != "lenet":
        raise ConfigError("config.model.name: neurons are cut out of fully connected networks here, 'lenet'")
    config.search.rewind = "0it"
    base = make_setup(config)
    setups = _setups(base, config, study)
    rows: list[dict[str, Any]] = []
    for repeat in range(study.repeats):
        rows += memo.rows(f"early{repeat}", _early, setups["target"], study, repeat)
        rows += memo.rows(f"recipes{repeat}", _recipes, setups, study, repeat)
    return _study(rows, study, base)


def _setups(base: Setup, config: Any, study: PopulationConfig) -> dict[str, Setup]:
    """Programs for every kind of training, each compiled once: target, wide, half of wide, and retraining without
    ("plain") and with ("distilled") the overwide teacher.
    """

    def sized(factor: int) -> Setup:
        model = {"name": "lenet", "hidden": tuple(size * factor for size in study.hidden)}
        network = make_network(model, base.splits.train.images[:1], base.classes)
        return with_steps(replace(base, network=network), config)

    target, wide = sized(1), sized(study.factor)
    half = with_steps(wide, config, steps=target.ticket.steps // 2)
    return {
        "target": target,
        "wide": wide,
        "half": half,
        "plain": taught(target, wide.network, 0.0),
        "distilled": taught(target, wide.network, target.ticket.distill),
    }


def taught(setup: Setup, teacher: Network, weight: float) -> Setup:
    """The setup with `weight` of the loss from teachers of another architecture (`Starts.teachers`)."""
    setup = replace(setup, ticket=replace(setup.ticket, distill=weight))
    return replace(setup, programs=setup.programs_for(teacher=teacher))


def _seeds(study: PopulationConfig, repeat: int) -> list[int]:
    return [10_000 * repeat + i for i in range(study.draws)]


def draw(setup: Setup, config: PopulationConfig, repeat: int) -> tuple[PyTree, np.ndarray]:
    """(all initializations of a population [draws, ...], their validation loss after the short run): one program."""
    seeds = _seeds(config, repeat)
    initial = init_stack(setup, seeds)
    # One order of the data for all draws, so that they differ in their weights alone.
    short = replace(setup, ticket=replace(setup.ticket, steps=config.short, eval_every=config.short))
    starts = starts_of(initial, masks_lib.ones(initial), [repeat] * config.draws, ["draw"] * config.draws)
    rows = short.train(starts).rows
    return initial, np.asarray([row["curve"][SCORE][-1] for row in rows])


def _early(setup: Setup, study: PopulationConfig, repeat: int) -> list[dict[str, Any]]:
    """Early score and final accuracy of every draw of one population."""
    initial, early = draw(setup, study, repeat)
    starts = starts_of(initial, masks_lib.ones(initial), [repeat] * study.draws, ["draw"] * study.draws)
    finals = [row["final_test_accuracy"] for row in setup.train(starts).rows]
    return [
        {"kind": "draw", "repeat": repeat, "draw": i, "early": float(early[i]), "accuracy": finals[i]}
        for i in range(study.draws)
    ]


def _recipes(setups: dict[str, Setup], study: PopulationConfig, repeat: int) -> list[dict[str, Any]]:
    """Final test accuracy of every recipe for one repeat."""
    target, wide = setups["target"], setups["wide"]
    (one, best, pruned, soft, whole), orders = RECIPES, [repeat] * 2
    found: dict[str, float] = {}
    narrow, early = draw(target, study, repeat)
    picks = jax.tree.map(lambda leaf: leaf[np.asarray([0, early.argmin()])], narrow)
    rows = target.train(starts_of(picks, masks_lib.ones(picks), orders, [one, best])).rows
    found |= {name: row["final_test_accuracy"] for name, row in zip((one, best), rows, strict=True)}
    overwide, early = draw(wide, study, repeat)
    picks = jax.tree.map(lambda leaf: leaf[np.asarray([0, early.argmin()])], overwide)
    teachers = setups["half"].train(starts_of(picks, masks_lib.ones(picks), orders, ["wide", "best"])).params
    cut = [prune_to(jax.tree.map(lambda leaf: leaf[i], teachers), study.hidden) for i in (0, 1)]  # noqa: B023
    students = jax.tree.map(lambda *leaf: jnp.stack(leaf), *cut)
    starts = starts_of(students, masks_lib.ones(students), orders, [soft, whole], target.ticket.steps // 2)
    starts = replace(starts, teachers=teachers)
    # Without distillation the second network of the stack is trained for nothing: one program serves all repeats.
    found[pruned] = setups["plain"].train(starts).rows[0]["final_test_accuracy"]
    rows = setups["distilled"].train(starts).rows
    found |= {name: row["final_test_accuracy"] for name, row in zip((soft, whole), rows, strict=True)}
    return [{"kind": "recipe", "repeat": repeat, "recipe": name, "accuracy": found[name]} for name in RECIPES]


def prune_to(params: PyTree, hidden: Sequence[int]) -> PyTree:
    """A fully connected network cut to narrower hidden layers: the neurons of highest mean magnitude stay."""
    layers = (*(f"dense{i}" for i in range(len(hidden))), "output")
    which, groups = masks_lib.prunable(params), coupled.mlp_neurons(layers)
    counts = dict(zip(layers, hidden, strict=False))
    mask = coupled.keep_units(criteria.magnitude(params), masks_lib.ones(params), which, groups, counts)
    small, sizes = compact.compact_mlp(masks_lib.apply(params, mask), layers)
    if sizes != tuple(hidden):
        raise ValueError(f"prune_to: {sizes} neurons are alive, {tuple(hidden)} were asked for")
    return jax.tree.map(jnp.asarray, small)


def _study(rows: list[dict[str, Any]], study: PopulationConfig, setup: Setup) -> Study:
    draws = [
        [row for row in rows if row["kind"] == "draw" and row["repeat"] == repeat] for repeat in range(study.repeats)
    ]
    # Low early loss should go with high final accuracy: the sign makes agreement positive.
    ranks = [float(stats.spearmanr([-d["early"] for d in part], column(part, "accuracy"))[0]) for part in draws]
    gains = [
        min(part, key=lambda d: d["early"])["accuracy"] - float(np.mean(column(part, "accuracy"))) for part in draws
    ]
    recipes = [row for row in rows if row["kind"] == "recipe"]
    arms = Comparison(recipes, "recipe", "accuracy", pair="repeat")
    mean, half, _ = summary.interval(ranks)
    findings = [
        f"Rank correlation of the validation loss after {study.short} steps with final accuracy, over {study.draws} "
        f"draws: {mean:.2f} ± {half:.2f} over {study.repeats} populations (1 would be perfect).",
        f"The draw that is best after the short run ends {verdict(gains, 'the mean draw')}.",
        f"The whole recipe ({WHOLE}) ends {arms.verdict(WHOLE, FIRST, 0, 'one draw of the target width')}.",
    ]
    hidden = "-".join(str(size) for size in study.hidden)
    caption = (
        f"Target {hidden}, overwide {study.factor} times; {study.draws} draws a population, {study.repeats} "
        f"populations (colors on the left). All recipes take {setup.ticket.steps} steps after the short runs, those "
        "that prune half of them overwide. Bars are 95% intervals over populations."
    )
    table = arms.table({FIRST: FIRST}, {"what": lambda mine: RECIPES[mine[0]["recipe"]]})
    return Study("Populations of initializations", findings, table, _figure(arms, draws, study), caption, rows)


@deferred
def _figure(arms: Comparison, draws: list[list[dict[str, Any]]], study: PopulationConfig) -> Figure:
    """Left final accuracy against the loss of the short run, right the recipes' accuracies."""
    figure, axes = canvas(2, width=9.6, height=3.6)
    for i, part in enumerate(draws):
        accuracy = [100 * value for value in column(part, "accuracy")]
        dots(axes[0], column(part, "early"), accuracy, PALETTE[i % 7], 4, 1, MARKERS[i % 7])
    titles(axes[0], "Short run and final accuracy", f"validation loss after {study.short} steps, nats", "test, %")
    arms.draw(axes[1], "Final accuracy at the target width", same(arms.arms))
    return figure
