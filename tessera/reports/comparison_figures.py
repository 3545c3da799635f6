"""Figures of a comparison of arms (runs of `tessera.reports.comparison`): losses, balance of the load, load maps."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tessera.reports.curves import column
from tessera.infra.logger import load_history
from tessera.reports.style import DASHES, MARKERS, PALETTE, canvas, label_lines, titles

ByArm = Mapping[str, Sequence[Any]]

LOSSES = (
    "Held-out text, the same for all runs. Thick: mean over seeds; thin: every seed. Right: the second half enlarged."
)
BALANCE = (
    "Every logged batch, mean over layers. Thick: mean over seeds; thin: every seed. Experts in use are exp(entropy of "
    "the load): as many as there are at perfect balance, one when all tokens go to one."
)
LOAD_MAPS = (
    "Share of the choices each expert got over the share at perfect balance, the first seed, the layer that ends "
    "furthest from balance. Experts upwards, in order of their load at the end."
)


def in_use(load: np.ndarray) -> np.ndarray:
    """exp(entropy) along the last axis of shares."""
    logs = np.log(load, where=load > 0, out=np.zeros_like(load))
    return np.exp(-(load * logs).sum(-1))


def losses(by_arm: ByArm) -> Figure:
    """Validation loss against step: the whole run, and its second half."""
    lines = {arm: [column(run.rows, "loss", "eval") for run in members] for arm, members in by_arm.items()}
    figure, axes = canvas(2, height=3.9)
    for ax, title in zip(axes, ("Whole run", "Second half"), strict=True):
        _draw(ax, lines)
        titles(ax, title, x="training step", y="validation loss (nats per token)")
    last = max(step[-1] for pairs in lines.values() for step, _ in pairs)
    late = np.concatenate([loss[step >= last / 2] for pairs in lines.values() for step, loss in pairs])
    room = 0.06 * (late.max() - late.min()) + 1e-6
    axes[1].set_xlim(last / 2, last * 1.01)
    axes[1].set_ylim(late.min() - room, late.max() + room)
    _label(axes[1], lines)
    return figure


def balance(by_arm: ByArm, arms: Sequence[str] = ()) -> Figure:
    """Busiest expert and experts in use against step; `arms` are those of the whole comparison, for their colours."""
    figure, axes = canvas(2, height=3.7)
    history = {arm: [load_history(run.rows) for run in members] for arm, members in by_arm.items()}
    experts = next(iter(history.values()))[0][1].shape[2]
    busiest = {arm: [(s, load.max(2).mean(1) * experts) for s, load in pairs] for arm, pairs in history.items()}
    used = {arm: [(s, in_use(load).mean(1)) for s, load in pairs] for arm, pairs in history.items()}
    for ax, lines, title, unit in (
        (axes[0], busiest, "Busiest expert", "load over balanced load"),
        (axes[1], used, "Experts in use", f"of {experts}, exp(entropy of the load)"),
    ):
        _draw(ax, lines, arms)
        ax.set_ylim(0, None if ax is axes[0] else experts * 1.05)
        titles(ax, title, x="training step", y=unit)
    _label(axes[1], used, arms)
    return figure


def load_maps(by_arm: ByArm) -> Figure:
    """Load over steps of the first seed of every arm, for its least balanced layer."""
    figure = Figure(figsize=(9.6, 0.6 + 1.7 * len(by_arm)), layout="constrained")
    axes = figure.subplots(len(by_arm), 1, sharex=True, squeeze=False)[:, 0]
    found = {arm: load_history(members[0].rows) for arm, members in by_arm.items()}
    experts = next(iter(found.values()))[1].shape[2]
    top = max(2.0, max(float(np.quantile(load, 0.995)) for _, load in found.values()) * experts)
    for ax, (arm, (steps, load_SLE)) in zip(axes, found.items(), strict=True):
        late_LE = load_SLE[-max(1, len(load_SLE) // 10) :].mean(0)
        layer = int(in_use(late_LE).argmin())
        order = np.argsort(late_LE[layer])
        image = ax.imshow(
            load_SLE[:, layer, order].T * experts,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            extent=(steps[0], steps[-1] + 1e-9, -0.5, experts - 0.5),
            vmin=0,
            vmax=top,
            cmap="viridis",
        )
        ax.set_title(f"{arm}, layer {layer + 1}", loc="left", fontsize=10)
        ax.set_ylabel("expert", fontsize=9)
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes[-1].set_xlabel("training step", fontsize=9)
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    figure.colorbar(image, ax=list(axes), label="load over balanced load")
    return figure


def _places(lines: Mapping[str, Any], arms: Sequence[str]) -> list[int]:
    """Which colour, mark and dash an arm has in all figures."""
    return [list(arms or lines).index(arm) for arm in lines]


def _draw(ax: Axes, lines: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], arms: Sequence[str] = ()) -> None:
    for i, pairs in zip(_places(lines, arms), lines.values(), strict=True):
        colour = PALETTE[i % len(PALETTE)]
        for step, value in pairs:
            ax.plot(step, value, color=colour, linewidth=0.7, alpha=0.45)
        mean = np.mean([value for _, value in pairs], axis=0)
        few = len(mean) <= 30
        look: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "markersize": 4} if few else {}
        ax.plot(pairs[0][0], mean, color=colour, linewidth=1.9, linestyle=DASHES[i % len(DASHES)], **look)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _label(ax: Axes, lines: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], arms: Sequence[str] = ()) -> None:
    ends = [
        (float(pairs[0][0][-1]), float(np.mean([value[-1] for _, value in pairs])), arm, PALETTE[i % len(PALETTE)])
        for i, (arm, pairs) in zip(_places(lines, arms), lines.items(), strict=True)
    ]
    label_lines(ax, ends)
