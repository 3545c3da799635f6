"""Why a ticket trains better than a random mask: three explanations, each measured on the same networks.

Favorable gradients: gradient flow (Evci et al. 2022, arXiv:2010.03533) and the empirical neural tangent kernel (Jacot
et al. 2018, arXiv:1806.07572), at initialization and along training; the largest initial weights, as many in every
layer, tell whether size alone does it. Implicit regularization: the gap between test and
training loss where the training loss is equal. Data alignment: which inputs the first layer's mask is connected to,
against each input's variance and its mutual information with the label.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from scipy import stats

from lottery import imp, summary, tangent
from lottery import masks as masks_lib
from tessera.data.images import Images
from tessera.infra.config import ConfigError, build
from tessera.infra.memo import Memo
from tessera.models.registry import STATISTICS
from tessera.reports.html import Table
from tessera.reports.style import HEAT, Figure, canvas, deferred, label_lines, line_with_band, log_values, look, titles
from tessera.tickets.setup import Setup, make_setup
from tessera.tickets.studies.study import DENSE, Study, column, run_search, verdict, with_interval
from tessera.tickets.train import batched, evaluate, train_blocks

ARMS = {
    DENSE: "dense",
    "ticket": "ticket",
    "reinit": "fresh weights",
    "large_init": "largest initial weights",
    "random_mask": "random mask",
}


@dataclass(frozen=True)
class ReasonsConfig:
    """When and on how many examples the networks are measured.

    Attributes:
      steps: of training, rising from 0; the last step is added.
      level: of the search whose networks are compared; -1 is the last.
      examples: training examples of the tangent kernel, in a fixed random order.
      losses: training examples of training loss and gradient flow.
    """

    steps: tuple[int, ...] = (0, 10, 30, 100, 300)
    level: int = -1
    examples: int = 100
    losses: int = 5000

    def __post_init__(self):
        if list(self.steps) != sorted(set(self.steps)) or self.steps[:1] != (0,) or len(self.steps) < 2:
            raise ValueError(f"steps={self.steps} must rise from 0, two of them at least")
        if min(self.examples, self.losses) < 2 or self.level < -1 or self.level == 0:
            raise ValueError(f"{self}: two examples at least, and a level from 1 (-1: the last) are needed")


def run(config: Any, memo: Memo) -> Study:
    """Search, train the arms again from their start and measure them on the way."""
    study = build(ReasonsConfig, config.study, "config.study")
    setup = make_setup(config)
    arms = set(setup.search.arms)
    if not {"ticket", "random_mask"} <= arms <= set(ARMS) or setup.search.rewind:
        raise ConfigError(
            "config.search: arms ticket and random_mask, beside them reinit and large_init, and rewind 0 are needed"
        )
    if study.steps[-1] >= setup.ticket.steps:
        raise ConfigError(f"config.study.steps: {study.steps[-1]} is not below the {setup.ticket.steps} of training")
    _, found = run_search(setup, memo, config)
    level = found.levels if study.level < 0 else study.level
    rows = memo.rows(f"reasons_level{level}", measure, setup, study, found, level)
    inputs = memo.rows(f"inputs_level{level}", first_layer, setup, found, level)
    return _study(rows, inputs, setup)


def measure(setup: Setup, study: ReasonsConfig, found: imp.Result, level: int) -> list[dict[str, Any]]:
    """Train every arm and seed from its start; one row each and step, by arm, seed and step."""
    names = [(arm, seed) for arm in (DENSE, *setup.search.arms) for seed in setup.search.seeds]
    pairs = [found.ticket(seed, 0 if arm == DENSE else level, arm) for arm, seed in names]
    masks, params = (jax.tree.map(lambda *leaf: jnp.stack(leaf), *side) for side in zip(*pairs, strict=True))
    which = masks_lib.prunable(pairs[0][1], setup.search.rules, setup.search.layouts)
    densities = [float(masks_lib.density(mask, which)) for mask, _ in pairs]
    examples, losses, test = _subset(setup, study.examples), batched(_subset(setup, study.losses)), setup.splits.test
    probe = jax.jit(lambda p, m, *data: jax.lax.map(lambda pair: _probe(setup, *pair, *data), (p, m)))
    data = (jnp.asarray(examples.images), jnp.asarray(examples.labels)), losses, batched(test)
    rows: list[dict[str, Any]] = []

    def after(step: int, state: Any, row: Any = None) -> None:
        columns = {name: np.asarray(values).tolist() for name, values in probe(state.params, masks, *data).items()}
        for i, ((arm, seed), density) in enumerate(zip(names, densities, strict=True)):
            measured = {name: values[i] for name, values in columns.items()}
            rows.append({"arm": arm, "seed": seed, "step": step, "density": density, **measured})

    state = setup.programs.init(params, masks)
    after(0, state)
    marks = [*study.steps[1:], setup.ticket.steps]
    seeds = [seed for _, seed in names]
    labels = [f"arm {arm}, seed {seed}" for arm, seed in names]
    train_blocks(
        setup.programs,
        state,
        masks,
        marks,
        config=setup.ticket,
        size=setup.size,
        seeds=seeds,
        names=labels,
        after=after,
    )
    return rows


def _subset(setup: Setup, count: int) -> Images:
    """Training examples, the first of a fixed random order."""
    data = setup.splits.train
    index = np.random.default_rng(2).permutation(len(data.labels))[:count]
    return Images(data.images[index], data.labels[index])


def _probe(setup: Setup, params: PyTree, masks: PyTree, examples: Any, losses: Any, test: Any) -> dict[str, Array]:
    apply = setup.network.apply
    if STATISTICS in params:  # held fixed
        masks = {**masks, STATISTICS: jax.tree.map(jnp.zeros_like, masks[STATISTICS])}
    kernel = tangent.kernel_summary(
        tangent.empirical_ntk(apply, params, masks, examples[0]), examples[1], setup.classes
    )
    flow = tangent.gradient_flow(lambda p: evaluate(p, losses, apply)[0], params, masks)
    (train_loss, train_accuracy), (test_loss, test_accuracy) = (
        evaluate(params, data, apply) for data in (losses, test)
    )
    return {
        "gradient_flow": flow,
        "ntk_top": kernel.top,
        "ntk_trace": kernel.trace,
        "ntk_rank": kernel.rank,
        "ntk_alignment": kernel.alignment,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
    }


def first_layer(setup: Setup, found: imp.Result, level: int) -> list[dict[str, Any]]:
    """One row an input: variance, mutual information with the label, connections of ticket and random mask.

    None where the first layer is no dense one over the inputs.
    """
    train = setup.splits.train
    inputs = train.images.reshape(len(train.labels), -1)
    size = inputs.shape[1]
    rows: list[dict[str, Any]] = []
    alive: dict[str, list[np.ndarray]] = {}
    for arm in ("ticket", "random_mask"):
        for seed in setup.search.seeds:
            masks = masks_lib.flatten(found.ticket(seed, level, arm)[0])
            first = next(
                (np.asarray(mask) for mask in masks.values() if mask.ndim == 2 and mask.shape[0] == size), None
            )
            if first is None:
                return []
            alive.setdefault(arm, []).append(first.mean(1))
    information = mutual_information(inputs, train.labels, setup.classes)
    for i in range(size):
        shares = {arm: [float(mask[i]) for mask in stack] for arm, stack in alive.items()}
        rows.append({"input": i, "variance": float(inputs[:, i].var()), "information": float(information[i]), **shares})
    return rows


def mutual_information(inputs: np.ndarray, labels: np.ndarray, classes: int, bins: int = 8) -> np.ndarray:
    """Mutual information of every input, cut into equal bins of [0, 1], with the label: float64 [inputs], nats."""
    place = np.clip((inputs * bins).astype(int), 0, bins - 1)
    joint = np.zeros((inputs.shape[1], bins, classes))
    for label in range(classes):
        for b in range(bins):
            joint[:, b, label] = (place[labels == label] == b).sum(0)
    joint /= len(labels)
    independent = joint.sum(1, keepdims=True) * joint.sum(2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(joint > 0, joint * np.log(joint / independent), 0.0).sum((1, 2))


def gaps(rows: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> tuple[float, dict[str, list[float]]]:
    """Test minus training loss of every network where its training loss first falls to one that all networks reach.

    Between two measurements both losses are taken to change in proportion. Returns the training loss and, by arm, the
    gaps in order of the seeds.
    """
    curves: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        curves.setdefault((row["arm"], row["seed"]), []).append(row)
    target = max(min(row["train_loss"] for row in curve) for curve in curves.values())

    def gap(curve: list[Mapping[str, Any]]) -> float:
        i = next(i for i, row in enumerate(curve) if row["train_loss"] <= target)
        now, before = curve[i], curve[max(i - 1, 0)]
        fall = before["train_loss"] - now["train_loss"]
        part = (before["train_loss"] - target) / fall if fall else 1.0
        return before["test_loss"] + part * (now["test_loss"] - before["test_loss"]) - target

    seeds = sorted({seed for _, seed in curves})
    return target, {arm: [gap(curves[arm, seed]) for seed in seeds] for arm in arms}


def _study(rows: list[dict[str, Any]], inputs: list[dict[str, Any]], setup: Setup) -> Study:
    steps = sorted({row["step"] for row in rows})
    cell = lambda arm, step: [r for r in sorted(rows, key=lambda r: r["seed"]) if (r["arm"], r["step"]) == (arm, step)]  # noqa: E731
    density = float(np.mean([row["density"] for row in cell("ticket", 0)]))
    arms = {arm: name for arm, name in ARMS.items() if cell(arm, 0)}
    target, found = gaps(rows, list(arms))
    findings, gradients = [], []
    for step in (steps[0], steps[-1]):
        for arm in arms:
            ratios = []
            for name in ("gradient_flow", "ntk_top", "ntk_rank"):
                pairs = zip(cell(arm, step), cell("random_mask", step), strict=True)
                ratios.append(_ratio([np.log(a[name] / b[name]) for a, b in pairs]) if arm != "random_mask" else "–")
            alignment = with_interval(column(cell(arm, step), "ntk_alignment"), 1.0)
            gradients.append(
                [step, ARMS[arm], *ratios, alignment, with_interval(column(cell(arm, step), "test_accuracy"))]
            )
    for name, called in (("gradient_flow", "gradient flow"), ("ntk_top", "top eigenvalue of the tangent kernel")):
        told = []
        for step in (steps[0], steps[-1]):
            logs = [
                np.log(a[name] / b[name]) for a, b in zip(cell("ticket", step), cell("random_mask", step), strict=True)
            ]
            told.append(f"{_ratio(logs)} at step {step}")
        findings.append(f"Gradients: the ticket's {called} over the random mask's is {' and '.join(told)}.")
    gap_table = []
    for arm in arms:
        paired = [a - b for a, b in zip(found[arm], found["random_mask"], strict=True)]
        over = with_interval(paired, 1.0, 4) if arm != "random_mask" else "–"
        gap_table.append([ARMS[arm], with_interval(found[arm], 1.0, 4), over])
    paired = [a - b for a, b in zip(found["ticket"], found["random_mask"], strict=True)]
    than = "the random mask's"
    findings.append(
        f"Regularization: where all have a training loss of {target:.4f} nats, the ticket's test loss is "
        f"{verdict(paired, than, 'nats', scale=1.0, digits=4, more='higher', less='lower')}."
    )
    untrained = [with_interval(column(cell(arm, steps[0]), "test_accuracy")) for arm in ("ticket", "random_mask")]
    findings.append(
        "Before training the ticket is right on {}% of the test images, the random mask on {}%.".format(*untrained)
    )
    tables = {
        "Gradients: flow, top eigenvalue and rank over the random mask's": Table(
            ["step", "network", "gradient flow", "top NTK eigenvalue", "NTK rank", "alignment", "accuracy (%)"],
            gradients,
        ),
        f"Test minus training loss at a training loss of {target:.4f} nats": Table(
            ["network", "gap (nats)", "over random mask"], gap_table
        ),
    }
    if inputs:
        body = []
        for arm in ("ticket", "random_mask"):
            shares = np.asarray([row[arm] for row in inputs])
            columns = [column(inputs, name) for name in ("variance", "information")]
            correlations = [[float(stats.spearmanr(share, each).statistic) for share in shares.T] for each in columns]
            variance, information = (with_interval(values, 1.0) for values in correlations)
            body.append([ARMS[arm], variance, information])
            if arm == "ticket":
                findings.append(
                    "Data: over inputs, the rank correlation of the ticket's connections is "
                    f"{variance} with the input's variance and {information} with its mutual information with the "
                    "label."
                )
        tables["Connections of inputs: rank correlation (Spearman)"] = Table(
            ["mask", "with variance", "with information about the label"], body
        )
    caption = (
        f"{density:.1%} of the weights; means and 95% intervals over {len(setup.search.seeds)} seeds. Gradient flow is "
        "of the mean training loss, over alive weights; the tangent kernel is the mean over outputs. Axes of steps are "
        "logarithmic, with step 0 at the left edge."
    )
    shape = setup.splits.train.images.shape[1:3]
    return Study(
        "Why tickets win: three explanations", findings, tables, _figure(rows, found, inputs, shape), caption, rows
    )


def _ratio(logs: Sequence[float]) -> str:
    """Geometric mean of ratios with the 95% interval of their logarithms' mean."""
    mean, half, _ = summary.interval(logs)
    return f"{np.exp(mean):.2f} ({np.exp(mean - half):.2f} to {np.exp(mean + half):.2f})"


@deferred
def _figure(
    rows: list[dict[str, Any]], found: Mapping[str, list[float]], inputs: list[dict[str, Any]], shape: tuple[int, ...]
) -> Figure:
    """Gradient flow and top eigenvalue along training, the gap, and the inputs that tickets are connected to."""
    figure, axes = canvas(2, 2, width=9.6, height=7.0) if inputs else canvas(3, width=12.5, height=3.7)
    steps = sorted({row["step"] for row in rows})
    x = [max(step, steps[1] / 3) for step in steps]
    named = (("gradient_flow", "Gradient flow"), ("ntk_top", "Top eigenvalue of the tangent kernel"))
    for ax, (name, title) in zip(axes, named, strict=False):
        for i, arm in enumerate(found):
            logs = [[np.log10(r[name]) for r in rows if (r["arm"], r["step"]) == (arm, step)] for step in steps]
            mean, half, _ = zip(*map(summary.interval, logs), strict=True)
            line_with_band(ax, x, mean, half, label=ARMS[arm], **look(i))
        log_values(ax, "x", values=x)
        ax.set_xticks(x, [f"{step:,}" for step in steps])
        titles(ax, title, "step", "log10")
        label_lines(ax)
    ax = axes[2]
    for i, arm in enumerate(found):
        center, width, _ = summary.interval(found[arm])
        style = look(i)
        ax.errorbar([center], [i], xerr=[width], fmt=style["marker"], color=style["color"], capsize=3)
    ax.set_yticks(range(len(found)), [ARMS[arm] for arm in found])
    ax.locator_params(axis="x", nbins=5)
    ax.invert_yaxis()
    titles(ax, "Test minus training loss", "nats, at equal training loss")
    if inputs:
        share = np.asarray([np.mean(row["ticket"]) for row in inputs])
        if len(share) == np.prod(shape):
            axes[3].imshow(share.reshape(shape), cmap=HEAT)
            axes[3].set_axis_off()
            titles(axes[3], "Ticket's connections by pixel")
        else:
            axes[3].plot([row["variance"] for row in inputs], share, ".")
            titles(axes[3], "Ticket's connections", "variance of the input", "share alive")
    return figure
