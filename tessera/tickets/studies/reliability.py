"""What else tickets are good for: corrupted and adversarial images, wrong labels, calibration, and ensembles.

Ticket, fresh weights and random mask of equal density beside the dense network. Then ensembles of equal live weights
and equal executed FLOPs of training: k tickets, k random masks, k small dense networks, one dense network trained k
times as long (finding the tickets is a column of its own).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from tessera.reports.style import Figure, canvas, deferred, line_with_band, look, titles
from tessera.tickets.setup import Setup, init_stack, make_setup, starts_of, with_steps
from tessera.tickets.studies.study import DENSE, Comparison, Study, run_search
from tessera.tickets.train import batched

ARMS = {DENSE: "dense", "ticket": "ticket", "reinit": "fresh weights", "random_mask": "random mask"}


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
        ensembles = memo.rows(f"ensembles_level{level}", _ensembles, setup, config, found, level)
    return _study(rows, ensembles, study, setup)


def _stack(setup: Setup, found: imp.Result, level: int, arms: Iterable[str]) -> imp.Starts:
    names = [(arm, seed) for arm in arms for seed in setup.search.seeds]
    pairs = [found.ticket(seed, 0 if arm == DENSE else level, arm) for arm, seed in names]
    masks, params = (jax.tree.map(lambda *leaf: jnp.stack(leaf), *side) for side in zip(*pairs, strict=True))
    return starts_of(params, masks, [seed for _, seed in names], [arm for arm, _ in names])


def _densities(setup: Setup, masks: PyTree) -> list[float]:
    which = masks_lib.prunable(jax.tree.map(lambda m: m[0], masks), setup.search.rules, setup.search.layouts)
    return np.asarray(jax.vmap(lambda m: masks_lib.density(m, which))(masks)).tolist()


def _tried(setup: Setup, study: ReliabilityConfig, found: imp.Result, level: int) -> list[dict[str, Any]]:
    """Networks trained with right labels, one row each and condition."""
    starts = _stack(setup, found, level, ARMS)
    ends, densities = setup.train(starts).params, _densities(setup, starts.masks)
    data = setup.splits.test
    x, y = jnp.asarray(data.images[: study.examples]), jnp.asarray(data.labels[: study.examples])
    rows = []
    for condition, strength, change in conditions(study, setup.network):
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
    splits = splits._replace(train=mislabelled(splits.train, setup.classes, share))
    setup = replace(setup, splits=splits)
    setup = replace(setup, programs=setup.programs_for())
    starts = _stack(setup, found, level, ARMS)
    ends, densities = setup.train(starts).params, _densities(setup, starts.masks)
    data = setup.splits.test
    x, y = jnp.asarray(data.images[: study.examples]), jnp.asarray(data.labels[: study.examples])
    measured = measure(setup.network, ends, x, y, lambda params, x, y: [x])
    return [
        {"arm": arm, "seed": seed, "density": density, "condition": "wrong labels", "strength": share, **row}
        for (arm, seed), density, row in zip(starts.names, densities, measured, strict=True)
    ]


def small(hidden: Sequence[int], inputs: int, classes: int, weights: int) -> tuple[int, ...]:
    """Hidden sizes in the same proportions with as many weights as are asked for, or a little more."""

    def count(hidden: Sequence[int]) -> int:
        sizes = (inputs, *hidden, classes)
        return sum(a * b for a, b in zip(sizes[:-1], sizes[1:], strict=True))

    scaled = lambda part: tuple(max(math.ceil(part * size), 1) for size in hidden)  # noqa: E731
    low, high = 0.0, 1.0
    for _ in range(40):
        low, high = ((low + high) / 2, high) if count(scaled((low + high) / 2)) < weights else (low, (low + high) / 2)
    return scaled(high)


def _ensembles(setup: Setup, config: Any, found: imp.Result, level: int) -> list[dict[str, Any]]:
    """Ensembles over groups of k seeds, k = 1 / density; one row each and kind.

    All have about the weights of one dense network and execute the FLOPs of k dense trainings, finding apart.
    """
    seeds = setup.search.seeds
    starts = _stack(setup, found, level, ("ticket", "random_mask"))
    density = _densities(setup, starts.masks)[0]
    k = round(1 / density)
    groups = [seeds[i : i + k] for i in range(0, len(seeds) - k + 1, k)]
    if k < 2 or len(groups) < 2:
        return []
    steps, hidden = setup.ticket.steps, tuple(config.model.get("hidden", (300, 100)))
    inputs = int(np.prod(setup.splits.train.images.shape[1:]))
    sizes = (inputs, *hidden, setup.classes)
    whole = sum(a * b for a, b in zip(sizes[:-1], sizes[1:], strict=True))
    narrow = small(hidden, inputs, setup.classes, round(density * whole))
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
        cost = (1 if name == "one dense" else k) + (k * level if "tickets" in name or "masks" in name else 0)
        for group, seed in enumerate(first):
            mine = jax.tree.map(lambda leaf: leaf[group * size : (group + 1) * size], stack)  # noqa: B023
            logits = ensemble_logits(network, mine, x)[: len(data.labels)]
            labels = jnp.asarray(data.labels)
            loss = -logits[jnp.arange(len(labels)), labels].mean()
            row = {"arm": name, "seed": seed, "density": 1.0, "flops": cost, "loss": float(loss)}
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


def _study(
    rows: list[dict[str, Any]], ensembles: list[dict[str, Any]], study: ReliabilityConfig, setup: Setup
) -> Study:
    cases = list(dict.fromkeys((row["condition"], row["strength"]) for row in rows))
    body, findings = [], []
    head = [
        "images",
        "strength",
        *(f"{label} (%)" for label in ARMS.values()),
        "ticket minus dense",
        "minus random mask",
    ]
    better: dict[str, list[str]] = {}
    for condition, strength in cases:
        mine = [row for row in rows if (row["condition"], row["strength"]) == (condition, strength)]
        arms = Comparison(mine, "arm", "accuracy")
        gains = [arms.gain("ticket", base, 0) for base in (DENSE, "random_mask")]
        body.append([condition, strength, *(arms.show(arm, 0) for arm in ARMS), *gains])
        mean, half, _ = summary.interval(arms.gains("ticket", DENSE, 0))
        verdict = "better" if mean > half else "worse" if -mean > half else "no different"
        better.setdefault(verdict, []).append(condition if condition == "none" else f"{condition} {strength:g}")
    for verdict, names in better.items():
        findings.append(f"Accuracy of the ticket is {verdict} than the dense network's: {', '.join(names)}.")
    findings = [text.replace("no different than", "not told apart from") for text in findings]
    clean = [row for row in rows if row["condition"] == "none"]
    calibration = Comparison(clean, "arm", "calibration_error", heading="calibration error (%)", sign=-1)
    findings.append(
        "Calibration: the ticket's error is lower than the dense network's by "
        f"{calibration.gain('ticket', DENSE, 0)} points."
    )
    tables = {"Accuracy on changed images and with wrong labels": Table(head, body)}
    tables["Expected calibration error, 15 bins"] = calibration.table({DENSE: "dense, + is better"})
    if ensembles:
        arms = Comparison(ensembles, "arm", "accuracy")
        base = next(name for name in arms.arms if "as long" in name)
        cost = {"FLOPs, finding included": lambda mine: f"{mine[0]['flops']} x one dense training"}
        error = {"calibration error (%)": lambda mine: f"{100 * np.mean([r['calibration_error'] for r in mine]):.2f}"}
        tables["Ensembles of equal live weights"] = arms.table({base: base}, cost | error)
        for name in arms.arms:
            if name != base:
                findings.append(f"Ensembles: {name} minus {base}: {arms.gain(name, base, 0)} points.")
    density = float(np.mean([row["density"] for row in rows if row["arm"] == "ticket"]))
    caption = (
        f"Test accuracy of networks with {density:.1%} of the weights, means and 95% intervals over "
        f"{len(setup.search.seeds)} seeds; the attack knows the network that it attacks."
    )
    return Study("What else tickets are good for", findings, tables, _figure(rows), caption, [*rows, *ensembles])


@deferred
def _figure(rows: list[dict[str, Any]]) -> Figure:
    """Accuracy over the strength of every change, a line for each arm; the calibration error of unchanged images."""
    names = [name for name in dict.fromkeys(row["condition"] for row in rows) if name != "none"]
    columns = 4
    figure, axes = canvas(columns, -(-(len(names) + 1) // columns), width=11.6, height=6.4)
    for ax, condition in zip(axes, names, strict=False):
        mine = [row for row in rows if row["condition"] in (condition, "none")]
        at = sorted({row["strength"] for row in mine})
        for i, (arm, label) in enumerate(ARMS.items()):
            cells = [[100 * r["accuracy"] for r in mine if (r["arm"], r["strength"]) == (arm, s)] for s in at]
            mean, half, _ = zip(*map(summary.interval, cells), strict=True)
            line_with_band(ax, at, mean, half, label=label, **look(i))
        titles(ax, condition, "strength", "test accuracy (%)" if ax in axes[::columns] else "")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside lower center", ncols=9)
    ax = axes[len(names)]
    for i, arm in enumerate(ARMS):
        values = [100 * row["calibration_error"] for row in rows if row["arm"] == arm and row["condition"] == "none"]
        center, width, _ = summary.interval(values)
        style = look(i)
        ax.errorbar([center], [i], xerr=[width], fmt=style["marker"], color=style["color"], capsize=3)
    ax.set_yticks(range(len(ARMS)), list(ARMS.values()))
    ax.invert_yaxis()
    titles(ax, "Calibration error", "%")
    for ax in axes[len(names) + 1 :]:
        ax.remove()
    return figure
