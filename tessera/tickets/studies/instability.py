"""The instability curve (linear mode connectivity): when does data order stop deciding the minimum training ends in?

Frankle et al. 2020 (arXiv:1912.05671), sections 2 and 3: a network is trained to step k, then twice to the end in
different orders; the error along the line between the two ends is compared with the mean of the ends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lottery import imp, summary, transform
from lottery import masks as masks_lib
from lottery.connectivity import STABLE
from tessera.infra.config import build
from tessera.infra.memo import Memo
from tessera.reports.html import Table
from tessera.reports.style import (
    MARKERS,
    MUTED,
    PALETTE,
    Figure,
    canvas,
    deferred,
    label_lines,
    line_with_band,
    reference,
    titles,
)
from tessera.tickets.probes import AnalysisConfig, path_rows
from tessera.tickets.setup import Setup, init_stack, make_setup
from tessera.tickets.studies.study import Study, magnitude_masks, with_interval
from tessera.tickets.train import train_blocks


@dataclass(frozen=True)
class InstabilityConfig:
    """Where a network becomes stable to the order of the data (Frankle et al. 2020, figure 2).

    Attributes:
      steps: the k, rising, from which two runs go on in other orders.
      densities: 1 is the dense network; others are pruned once by magnitude at the end of the trunk, all layers alike
        (the output layer too).
      orders: runs from every k.
      analysis: points and examples.
    """

    steps: tuple[int, ...]
    densities: tuple[float, ...] = (1.0,)
    orders: int = 2
    analysis: AnalysisConfig = AnalysisConfig()

    def __post_init__(self):
        if list(self.steps) != sorted(set(self.steps)) or not self.steps or self.steps[0] < 0:
            raise ValueError(f"steps={self.steps} must rise from 0 or more")
        if not all(0 < density <= 1 for density in self.densities) or self.orders < 2:
            raise ValueError(f"densities={self.densities} must lie in (0, 1], orders={self.orders} be at least 2")


def run(config: Any, memo: Memo) -> Study:
    """Train trunk and branches, measure, draw."""
    study = build(InstabilityConfig, config.study, "config.study")
    setup = make_setup(config)
    if study.steps[-1] >= setup.ticket.steps:
        raise ValueError(
            f"config.study.steps: {study.steps[-1]} is not below the {setup.ticket.steps} steps of training"
        )
    like = jax.eval_shape(lambda: _start(setup))
    names = [f"trunk{step}" for step in (*study.steps, setup.ticket.steps)]
    trunk: dict[str, PyTree] = {}
    for before, name in zip([None, *names], names, strict=False):
        start = int(before[5:]) if before else 0
        trunk[name] = memo.tree(name, like, _grow, setup, trunk.get(before or ""), start, int(name[5:]))
    rows = []
    for density in study.densities:
        masks, _ = magnitude_masks(trunk[names[-1]]["params"], density)
        for step in study.steps:
            state = trunk[f"trunk{step}"]
            rows += memo.rows(f"density{density}_step{step}", _branches, setup, study, state, masks, step, density)
    return _study(rows, study, setup)


def _start(setup: Setup) -> PyTree:
    """The trunk at step 0."""
    params = init_stack(setup, setup.search.seeds)
    return {"params": params, "opt_state": jax.vmap(setup.optimizer.init)(params)}


def _grow(setup: Setup, state: PyTree | None, start: int, stop: int) -> PyTree:
    """The trunk at step `stop` from the trunk at step `start` (None: the initialization)."""
    state = _start(setup) if state is None else state
    masks = masks_lib.ones(state["params"])
    grown = setup.programs.init(state["params"], masks, state["opt_state"], start, start)
    marks = [*range(start + setup.ticket.eval_every, stop, setup.ticket.eval_every), stop] if stop > start else []
    order: dict[str, Any] = {"config": setup.ticket, "size": setup.size, "seeds": setup.search.seeds, "start": start}
    _, grown = train_blocks(setup.programs, grown, masks, marks, **order)
    return {"params": grown.params, "opt_state": grown.opt_state}


def _branches(
    setup: Setup, study: InstabilityConfig, state: PyTree, masks: PyTree, step: int, density: float
) -> list[dict[str, Any]]:
    """Train every seed's branches from `step` and measure the lines between them."""
    seeds, count = setup.search.seeds, study.orders
    repeat = lambda tree: jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), tree)  # noqa: E731
    params, stacked = repeat(state["params"]), repeat(masks)
    # Orders of their own: a branch that went on in the trunk's order would be the trunk.
    orders = np.asarray([100_000 + 1000 * seed + i for seed in seeds for i in range(count)], np.int32)
    names = tuple((f"order {i}", seed) for seed in seeds for i in range(count))
    opt_state = transform.mask_state(repeat(state["opt_state"]), stacked)
    starts = imp.Starts(masks_lib.apply(params, stacked), stacked, opt_state, step, orders, names)
    ends = setup.train(starts).params
    pairs = [
        (s * count + i, s * count + j) for s in range(len(seeds)) for i in range(count) for j in range(i + 1, count)
    ]
    first, second = (np.asarray(side) for side in zip(*pairs, strict=True))
    take = lambda index: jax.tree.map(lambda leaf: leaf[index], ends)  # noqa: E731
    found = path_rows(setup, take(first), take(second), study.analysis)
    return [
        {"density": density, "step": step, "seed": seeds[i // count], **row}
        for i, row in zip(first.tolist(), found, strict=True)
    ]


def stable_from(steps: Sequence[int], stable: Sequence[bool | int]) -> int | None:
    """The first step from which on a network is stable at all that were tried; None where it is not at the last."""
    return next((k for i, k in enumerate(steps) if all(stable[i:])), None)


def _study(rows: list[dict[str, Any]], study: InstabilityConfig, setup: Setup) -> Study:
    cell = lambda d, k: [row for row in rows if row["density"] == d and row["step"] == k]  # noqa: E731
    body: list[list[Any]] = []
    findings: list[str] = []
    for density in study.densities:
        stable = []
        for k in study.steps:
            mine = cell(density, k)
            rise, _, n = summary.interval(row["instability"] for row in mine)
            stable.append(rise < STABLE)
            columns = [
                with_interval([row[name] for row in mine], scale, digits)
                for name, scale, digits in (("instability", 100, 2), ("loss_barrier", 1, 3), ("ends", 100, 2))
            ]
            body.append([f"{density:.0%}", k, *columns, f"{sum(row['stable'] for row in mine)} of {n}"])
        name = "The dense network" if density == 1 else f"The network of {density:.0%} of the weights"
        first = stable_from(study.steps, stable)
        findings.append(
            f"{name} is stable (mean rise of the error below 2 points) "
            + ("from step 0 on." if first == 0 else f"from step {first} on." if first else "at no step that was tried.")
        )
    head = ["weights", "k", "error rise (points)", "loss barrier (nats)", "error of the ends (%)", "stable pairs"]
    caption = (
        f"Mean over {len(setup.search.seeds)} seeds and 95% intervals; k = 0 stands at the left edge of the log axis. "
        "Test set; two runs from step k in different data orders, optimizer state included."
    )
    return Study(
        "Instability over the step at which two runs part",
        findings,
        Table(head, body),
        _figure(cell, study),
        caption,
        rows,
    )


@deferred
def _figure(cell: Callable[[float, int], list], study: InstabilityConfig) -> Figure:
    """Error and loss on the line against the step at which the runs part, a band for every density."""
    figure, axes = canvas(2, width=9.6, height=3.6)
    reference(axes[0], 100 * STABLE, "2%: stable below", MUTED)
    for ax, (name, title) in zip(axes, (("instability", "Error"), ("loss_barrier", "Loss")), strict=True):
        scale = 100 if name == "instability" else 1
        for i, density in enumerate(study.densities):
            found = [summary.interval(row[name] for row in cell(density, k)) for k in study.steps]
            mean, half = (scale * np.asarray([f[j] for f in found]) for j in (0, 1))
            at = [max(k, study.steps[1] / 2 if len(study.steps) > 1 else 1) for k in study.steps]
            label = "dense" if density == 1 else f"{density:.0%} of weights"
            line_with_band(ax, at, mean, half, label=label, color=PALETTE[i], marker=MARKERS[i])
        ax.set_xscale("log")
        ax.set_xticks(at, [str(k) for k in study.steps], minor=False)
        ax.set_xticks([], minor=True)
        label_lines(ax)
        unit = "rise over the ends' mean, points" if scale == 100 else "barrier, nats"
        titles(ax, f"{title} on the line", "step k at which the runs part", unit)
    return figure
