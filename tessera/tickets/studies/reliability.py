"""What else tickets are good for: corrupted and adversarial images, wrong labels, calibration, and ensembles.

Ticket, fresh weights and random mask of equal density beside the dense network, all of equal steps (the search for a
ticket comes on top). Then ensembles of equal live weights and equal executed FLOPs of training: k tickets, k random
masks, k small dense networks, one dense network trained k times as long (finding the masks is a column of its own).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from lottery import imp, reliability, summary
from lottery import masks as masks_lib
from tessera.data.images import Images, ImageSplits
from tessera.infra.config import ConfigError, build
from tessera.infra.memo import Memo
from tessera.models.registry import Network
from tessera.reports.html import Table
from tessera.reports.style import Figure, canvas, deferred, line_with_band, look, reference, titles
from tessera.tickets.setup import Setup, init_stack, make_setup, starts_of, with_steps
from tessera.tickets.studies.study import (
    DENSE,
    Comparison,
    Study,
    column,
    direction,
    run_search,
    same,
    verdict,
    with_interval,
)
from tessera.tickets.train import batched

ARMS = {DENSE: "dense", "ticket": "ticket", "reinit": "fresh weights", "random_mask": "random mask"}

# What the strength of a change is, for axes and tables.
STRENGTHS = {
    "noise": "standard deviation",
    "blur": "width (pixels)",
    "shift": "pixels",
    "occlusion": "side (pixels)",
    "FGSM": "radius",
    "PGD": "radius",
    "wrong labels": "share of training labels",
}


@dataclass(frozen=True)
class ReliabilityConfig:
    """What the networks are tried with.

    Attributes:
      level: of the search whose networks are compared; -1 is the last.
      noise: standard deviations of Gaussian noise on pixels in [0, 1].
      blur: widths of a Gaussian blur, in pixels.
      shift: pixels by which images move, to each of the four sides; the mean over them counts.
      occlusion: sides of a hidden square, in pixels.
      radii: of FGSM and PGD in the maximum norm.
      attack_steps: gradients of PGD.
      wrong_labels: shares of the training labels that are wrong, each trained anew.
      examples: test images, the first ones.
    """

    level: int = -1
    noise: tuple[float, ...] = (0.1, 0.2, 0.4)
    blur: tuple[float, ...] = (0.5, 1.0, 1.5)
    shift: tuple[int, ...] = (1, 2)
    occlusion: tuple[int, ...] = (3, 5, 7)
    radii: tuple[float, ...] = (0.02, 0.05, 0.1)
    attack_steps: int = 20
    wrong_labels: tuple[float, ...] = (0.2, 0.4)
    examples: int = 2000

    def __post_init__(self):
        positive = (*self.noise, *self.blur, *self.shift, *self.occlusion, *self.radii)
        if min(positive, default=1) <= 0 or min(self.attack_steps, self.examples) < 1:
            raise ValueError(f"{self}: noise, blur, shift, occlusion, radii, attack_steps, examples must be positive")
        if not all(0 < share < 1 for share in self.wrong_labels) or self.level < -1 or self.level == 0:
            raise ValueError(f"{self}: wrong_labels must lie in (0, 1), level be 1 or more (-1: the last)")


def run(config: Any, memo: Memo) -> Study:
    """Search, train the arms with right and wrong labels, try them, and compare ensembles."""
    study = build(ReliabilityConfig, config.study, "config.study")
    setup = make_setup(config)
    if not isinstance(setup.splits, ImageSplits):
        raise ConfigError("config.data.kind: images are needed")
    if set(setup.search.arms) != set(ARMS) - {DENSE} or setup.search.rewind:
        raise ConfigError(f"config.search: arms {', '.join(sorted(set(ARMS) - {DENSE}))} and rewind 0 are needed")
    _, found = run_search(setup, memo, config)
    level = found.levels if study.level < 0 else study.level
    rows = memo.rows(f"tried_level{level}", _tried, setup, study, found, level)
    for share in study.wrong_labels:
        rows += memo.rows(f"wrong_labels{share}_level{level}", _mislabelled, setup, study, found, level, share)
    ensembles: list[dict[str, Any]] = []
    if config.model.get("name", "lenet") == "lenet":
        density = float(np.mean([row["density"] for row in rows if row["arm"] == "ticket"]))
        share = _narrow(setup, config, density)[1]
        costs = ensemble_costs(round(1 / density), level, setup.search.scope, density, share)
        made = memo.rows(f"ensembles_level{level}", _ensembles, setup, config, found, level)
        ensembles = [row | costs[row["arm"]] for row in made]
    return _study(rows, ensembles, level, setup)


def _stack(setup: Setup, found: imp.Result, level: int, arms: Iterable[str]) -> imp.Starts:
    names = [(arm, seed) for arm in arms for seed in setup.search.seeds]
    pairs = [found.ticket(seed, 0 if arm == DENSE else level, arm) for arm, seed in names]
    masks, params = (jax.tree.map(lambda *leaf: jnp.stack(leaf), *side) for side in zip(*pairs, strict=True))
    return starts_of(params, masks, [seed for _, seed in names], [arm for arm, _ in names])


def _densities(setup: Setup, masks: PyTree) -> list[float]:
    which = masks_lib.prunable(jax.tree.map(lambda m: m[0], masks), setup.search.rules, setup.search.layouts)
    return np.asarray(jax.vmap(lambda m: masks_lib.density(m, which))(masks)).tolist()


def trainings(arm: str, level: int, scope: str) -> int:
    """FLOPs executed for a network, its mask's search included, over those of one dense training.

    A ticket of level l costs l trainings to find and one to train, and so does its mask on fresh weights. With scope
    "layer" the rates say how many weights a random mask has in every layer, so it needs no search; in other scopes the
    search does.
    """
    return 1 if arm == DENSE or (arm == "random_mask" and scope == "layer") else level + 1


def _tried(
    setup: Setup,
    study: ReliabilityConfig,
    found: imp.Result,
    level: int,
    changes: Sequence[tuple[str, float, "Change"]] = (),
) -> list[dict[str, Any]]:
    """Networks of all arms after training, one row each and change (by default all of `conditions`)."""
    starts = _stack(setup, found, level, ARMS)
    ends, densities = setup.train(starts).params, _densities(setup, starts.masks)
    data = setup.splits.test
    x, y = jnp.asarray(data.images[: study.examples]), jnp.asarray(data.labels[: study.examples])
    rows = []
    for condition, strength, change in changes or conditions(study, setup.network):
        measured = measure(setup.network, ends, x, y, change)
        for (arm, seed), density, row in zip(starts.names, densities, measured, strict=True):
            rows.append({"arm": arm, "seed": seed, "density": density, "condition": condition, "strength": strength})
            rows[-1] |= row
    return rows


Change = Callable[[PyTree, Array, Array], Sequence[Array]]


def conditions(study: ReliabilityConfig, network: Network) -> list[tuple[str, float, Change]]:
    """(name, strength, (parameters, images, labels) -> several changed images) of everything that is tried."""

    def loss(params: PyTree, y: Array) -> Callable[[Array], Array]:
        return lambda x: -jax.nn.log_softmax(network.apply(params, x))[jnp.arange(len(y)), y].sum()

    def plain(*changes: Callable[[Array], Array]) -> Change:
        return lambda params, x, y: [change(x) for change in changes]

    def attack(change: Callable[..., Array]) -> Change:
        return lambda params, x, y: [change(loss(params, y), x)]

    key, steps = jax.random.key(3), study.attack_steps
    sides = {by: ((by, 0), (-by, 0), (0, by), (0, -by)) for by in study.shift}
    found: list[tuple[str, float, Change]] = [("none", 0.0, plain(lambda x: x))]
    found += [("noise", std, plain(partial(reliability.noise, std=std, key=key))) for std in study.noise]
    found += [("blur", sigma, plain(partial(reliability.blur, sigma=sigma))) for sigma in study.blur]
    for by, moves in sides.items():
        found.append(("shift", by, plain(*(partial(reliability.shift, rows=r, columns=c) for r, c in moves))))
    found += [("occlusion", size, plain(partial(reliability.occlude, size=size, key=key))) for size in study.occlusion]
    found += [("FGSM", radius, attack(partial(reliability.fgsm, radius=radius))) for radius in study.radii]
    found += [("PGD", r, attack(partial(reliability.pgd, radius=r, steps=steps, key=key))) for r in study.radii]
    return found


def measure(network: Network, stack: PyTree, x: Array, y: Array, change: Change) -> list[dict[str, float]]:
    """Accuracy, loss (nats) and calibration error of every network of a stack on changed images, means over changes."""

    def one(params: PyTree, x: Array, y: Array) -> dict[str, Array]:
        logits = [network.apply(params, changed) for changed in change(params, x, y)]
        right = jnp.stack([(each.argmax(-1) == y).mean() for each in logits]).mean()
        loss = jnp.stack([-jax.nn.log_softmax(each)[jnp.arange(len(y)), y].mean() for each in logits]).mean()
        error = jnp.stack([reliability.calibration_error(each, y) for each in logits]).mean()
        return {"accuracy": right, "loss": loss, "calibration_error": error}

    columns = jax.jit(lambda stack, x, y: jax.lax.map(lambda params: one(params, x, y), stack))(stack, x, y)
    return [{name: float(values[i]) for name, values in columns.items()} for i in range(len(columns["accuracy"]))]


def mislabelled(data: Images, classes: int, share: float, seed: int = 0) -> Images:
    """The same images, the given share of the labels replaced by another class, uniformly."""
    rng = np.random.default_rng(seed)
    labels = data.labels.copy()
    wrong = rng.permutation(len(labels))[: round(share * len(labels))]
    labels[wrong] = (labels[wrong] + rng.integers(1, classes, len(wrong))) % classes
    return Images(data.images, labels.astype(np.int32))


def _mislabelled(
    setup: Setup, study: ReliabilityConfig, found: imp.Result, level: int, share: float
) -> list[dict[str, Any]]:
    """Every arm trained on images of which a share has a wrong label; masks are those found with right labels."""
    splits = setup.splits
    assert isinstance(splits, ImageSplits)
    setup = replace(setup, splits=splits._replace(train=mislabelled(splits.train, setup.classes, share)))
    setup = replace(setup, programs=setup.programs_for())
    unchanged = [("wrong labels", share, lambda params, x, y: [x])]
    return _tried(setup, study, found, level, unchanged)


def small(hidden: Sequence[int], inputs: int, classes: int, weights: int) -> tuple[int, ...]:
    """Hidden sizes in the same proportions with as many weights as are asked for, or a little more."""
    count = lambda hidden: _weights(inputs, *hidden, classes)  # noqa: E731
    scaled = lambda part: tuple(max(math.ceil(part * size), 1) for size in hidden)  # noqa: E731
    low, high = 0.0, 1.0
    for _ in range(40):
        low, high = ((low + high) / 2, high) if count(scaled((low + high) / 2)) < weights else (low, (low + high) / 2)
    return scaled(high)


def _weights(*sizes: int) -> int:
    return sum(a * b for a, b in pairwise(sizes))


def _narrow(setup: Setup, config: Any, density: float) -> tuple[tuple[int, ...], float]:
    """(Hidden sizes, weights over the whole network's) of a dense network with about that share of the weights."""
    hidden = config.model.get("hidden", (300, 100))
    inputs = int(np.prod(setup.splits.train.images.shape[1:]))
    whole = _weights(inputs, *hidden, setup.classes)
    narrow = small(hidden, inputs, setup.classes, round(density * whole))
    return narrow, _weights(inputs, *narrow, setup.classes) / whole


def ensemble_costs(k: int, level: int, scope: str, density: float, share: float) -> dict[str, dict[str, float]]:
    """Live weights and executed FLOPs of every kind of ensemble, over one dense network's and its training's.

    Args:
      k: members.
      level: of the tickets, see `trainings`.
      scope: of the search.
      density: of a ticket.
      share: of the weights that a small dense network has.
    """
    masked = lambda arm: (k * density, k, k * (trainings(arm, level, scope) - 1), k)  # noqa: E731
    costs = {
        f"{k} tickets": masked("ticket"),
        f"{k} random masks": masked("random_mask"),
        f"{k} small dense": (k * share, k * k * share, 0, k * share),
        f"one dense, {k} times as long": (1, k, 0, 1),
        "one dense": (1, 1, 0, 1),
    }
    names = ("density", "training_flops", "finding_flops", "answer_flops")
    return {name: dict(zip(names, map(float, values), strict=True)) for name, values in costs.items()}


def _ensembles(setup: Setup, config: Any, found: imp.Result, level: int) -> list[dict[str, Any]]:
    """Ensembles over groups of k seeds, k = 1 / density; one row each and kind.

    All but one dense network have about its weights and execute the FLOPs of k of its trainings, finding apart.
    """
    seeds = setup.search.seeds
    starts = _stack(setup, found, level, ("ticket", "random_mask"))
    density = _densities(setup, starts.masks)[0]
    k = round(1 / density)
    groups = [seeds[i : i + k] for i in range(0, len(seeds) - k + 1, k)]
    if k < 2 or len(groups) < 2:
        return []
    steps = setup.ticket.steps
    narrow, _ = _narrow(setup, config, density)
    settings = config.to_dict()
    settings["model"] |= {"hidden": narrow}
    settings["train"] |= {"steps": f"{k * steps}it"}
    few = make_setup(ConfigDict(settings), setup.splits)
    long = with_steps(setup, config, steps=k * steps)
    many = [seed for group in groups for seed in group]
    first = [group[0] for group in groups]
    sparse = setup.train(starts).params
    members = {
        f"{k} tickets": (setup.network, _rows(sparse, starts.names, "ticket", many), k),
        f"{k} random masks": (setup.network, _rows(sparse, starts.names, "random_mask", many), k),
        f"{k} small dense": (few.network, _dense(few, many), k),
        f"one dense, {k} times as long": (setup.network, _dense(long, first), 1),
        "one dense": (setup.network, _dense(setup, first), 1),
    }
    data = setup.splits.test
    x, y = batched(data)
    rows = []
    for name, (network, stack, size) in members.items():
        for group, seed in enumerate(first):
            mine = jax.tree.map(lambda leaf: leaf[group * size : (group + 1) * size], stack)  # noqa: B023
            logits = ensemble_logits(network, mine, x)[: len(data.labels)]
            labels = jnp.asarray(data.labels)
            loss = -logits[jnp.arange(len(labels)), labels].mean()
            row = {"arm": name, "seed": seed, "loss": float(loss)}
            row |= {"accuracy": float((logits.argmax(-1) == labels).mean())}
            rows.append(row | {"calibration_error": float(reliability.calibration_error(logits, labels))})
    return rows


def _rows(stack: PyTree, names: Sequence[tuple[str, int]], arm: str, seeds: Sequence[int]) -> PyTree:
    index = np.asarray([names.index((arm, seed)) for seed in seeds])
    return jax.tree.map(lambda leaf: leaf[index], stack)


def _dense(setup: Setup, seeds: Sequence[int]) -> PyTree:
    params = init_stack(setup, seeds)
    return setup.train(starts_of(params, masks_lib.ones(params), seeds, [DENSE] * len(seeds))).params


def ensemble_logits(network: Network, stack: PyTree, x: Array) -> Array:
    """Log of the mean probability over the networks of a stack (Lakshminarayanan et al. 2017): [n * B, C]."""

    @jax.jit
    def run(stack: PyTree, x: Array) -> Array:
        each = jax.lax.map(
            lambda params: jax.lax.map(lambda batch: jax.nn.log_softmax(network.apply(params, batch)), x), stack
        )
        return jax.nn.logsumexp(each, axis=0) - jnp.log(len(each))

    found = run(stack, x)
    return found.reshape(-1, found.shape[-1])


def _study(rows: list[dict[str, Any]], ensembles: list[dict[str, Any]], level: int, setup: Setup) -> Study:
    cases = list(dict.fromkeys((row["condition"], row["strength"]) for row in rows))
    bases = {base: ARMS[base] for base in (DENSE, "random_mask")}
    compared = {case: Comparison([r for r in rows if _case(r) == case], "arm", "accuracy") for case in cases}
    body = [
        [
            _called(condition, strength),
            *(one.show(arm, 0) for arm in ARMS),
            *(one.gain("ticket", base, 0) for base in bases),
        ]
        for (condition, strength), one in compared.items()
    ]
    head = ["images", *ARMS.values(), "minus dense", "minus random"]
    findings = []
    for base, label in bases.items():
        gains = {_called(*case): one.gains("ticket", base, 0) for case, one in compared.items()}
        findings += _sides(gains, f"the {label}{' network' * (base == DENSE)}'s")
    clean = [{**row, "arm": ARMS[row["arm"]]} for row in rows if row["condition"] == "none"]
    calibration = Comparison(clean, "arm", "calibration_error", heading="calibration error (%)", sign=-1)
    for label in bases.values():
        less = calibration.gains("ticket", label, 0)
        whose = f"the {label}{' network' * (label == DENSE)}'s"
        told = verdict([-value for value in less], whose, more="higher", less="lower")
        findings.append(f"Calibration: the ticket's error is {told}.")
    names = {label: arm for arm, label in ARMS.items()}
    cost = lambda mine: f"{trainings(names[mine[0]['arm']], level, setup.search.scope)} x"  # noqa: E731
    heading = "Test accuracy (%) on changed images and with wrong labels; the ticket's minus dense and random mask"
    tables = {heading: Table(head, body)}
    heading = "Expected calibration error (ECE), 15 bins; FLOPs, search included, over those of one dense training"
    tables[heading] = calibration.table(same(bases.values()), {"FLOPs": cost})
    if ensembles:
        kinds = Comparison(ensembles, "arm", "accuracy", heading="accuracy (%)")
        base = next(name for name in kinds.arms if "as long" in name)
        than = base.replace(",", "")
        flops = {
            "training": lambda mine: f"{mine[0]['training_flops']:.3g} x",
            "finding": lambda mine: f"{mine[0]['finding_flops']:.3g} x",
            "an answer": lambda mine: f"{mine[0]['answer_flops']:.3g} x",
        }
        error = {"ECE (%)": lambda mine: with_interval(column(mine, "calibration_error"))}
        heading = "Ensembles of equal live weights; FLOPs over those of one dense network"
        tables[heading] = kinds.table({base: base.partition(", ")[2]}, flops | error)
        findings += [
            f"Ensembles: {name} {'are' if name[0].isdigit() else 'is'} {kinds.verdict(name, base, 0, than)}."
            for name in kinds.arms
            if name != base
        ]
    density = float(np.mean([row["density"] for row in rows if row["arm"] == "ticket"]))
    caption = (
        "Test accuracy over the dense network's of the same seed and of as many steps, in points, of networks with "
        f"{density:.1%} of the weights; means and 95% intervals over {len(setup.search.seeds)} seeds. The attack knows "
        f"the network that it attacks. The {level} trainings that find a ticket are not counted."
    )
    return Study("What else tickets are good for", findings, tables, _figure(rows), caption, [*rows, *ensembles])


def _case(row: Mapping[str, Any]) -> tuple[str, float]:
    return row["condition"], row["strength"]


def _called(condition: str, strength: float) -> str:
    return f"{condition} {strength:g}" if strength else "unchanged images"


def _sides(gains: Mapping[str, Sequence[float]], base: str) -> list[str]:
    """Under which changes the ticket's accuracy is better and worse, and how many would be so by chance."""
    sides: dict[str, list[str]] = {"better than": [], "worse than": [], "not told apart from": []}
    for name, values in gains.items():
        sides[direction(values, *sides)].append(name)
    found = [f"Accuracy of the ticket is {side} {base}: {', '.join(names)}." for side, names in sides.items() if names]
    told = {name: values for name, values in gains.items() if name not in sides["not told apart from"]}
    strict = [name for name in told if direction(told[name], "+", "-", "", confidence=1 - 0.05 / len(gains))]
    if len(gains) > 1 and told:
        chance, wide = 0.05 * len(gains), 100 - 5 / len(gains)
        found.append(
            f"By chance {chance:.2g} of these {len(gains)} comparisons would be called better or worse if none were; "
            f"{len(strict)} of the {len(told)} are with intervals of {wide:.4g}% (Bonferroni) too."
        )
    return found


@deferred
def _figure(rows: list[dict[str, Any]]) -> Figure:
    """Accuracy over the dense network's by strength of every change; the calibration error of unchanged images."""
    names = [name for name in dict.fromkeys(row["condition"] for row in rows) if name != "none"]
    columns = 4
    figure, axes = canvas(columns, -(-(len(names) + 1) // columns), width=11.6, height=6.4)
    for ax, condition in zip(axes, names, strict=False):
        mine = [row for row in rows if row["condition"] in (condition, "none")]
        at = sorted({row["strength"] for row in mine})
        compared = [Comparison([r for r in mine if r["strength"] == s], "arm", "accuracy") for s in at]
        reference(ax, 0, "")
        for i, (arm, label) in enumerate(ARMS.items()):
            if arm != DENSE:
                cells = [[100 * gain for gain in one.gains(arm, DENSE, 0)] for one in compared]
                mean, half, _ = zip(*map(summary.interval, cells), strict=True)
                line_with_band(ax, at, mean, half, label=label, **look(i))
        titles(ax, condition, STRENGTHS[condition], "points over dense")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=9)
    ax = axes[len(names)]
    for i, arm in enumerate(ARMS):
        values = [100 * row["calibration_error"] for row in rows if row["arm"] == arm and row["condition"] == "none"]
        center, width, _ = summary.interval(values)
        style = look(i)
        ax.errorbar([center], [i], xerr=[width], fmt=style["marker"], color=style["color"], capsize=3)
    ax.set_yticks(range(len(ARMS)), list(ARMS.values()))
    ax.invert_yaxis()
    titles(ax, "calibration error", "%", " ")
    for ax in axes[len(names) + 1 :]:
        ax.remove()
    return figure
