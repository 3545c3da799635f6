"""What the routers of a run did, as figures for its report: load over steps, balance, and who serves which tokens."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe.specialization import mutual_information
from tessera.infra.logger import write_text
from tessera.models.lm_loss import expert_table, router_paths
from tessera.models.transformer import Decoder
from tessera.reports.html import Section
from tessera.reports.style import PALETTE, canvas, titles

Rows = Sequence[Mapping[str, Any]]
SPECIALISATION = "specialisation.json"

# Classes of bytes for the specialisation map.
BYTE_CLASSES = ("lower case", "upper case", "digit", "space", "line end", "punctuation", "other")


def byte_classes(tokens: np.ndarray) -> np.ndarray:
    """Class of every byte, an index into `BYTE_CLASSES`, int32 of the shape of `tokens`."""
    table = np.full(256, len(BYTE_CLASSES) - 1, np.int32)
    for byte in range(33, 127):
        c = chr(byte)
        table[byte] = 0 if c.islower() else 1 if c.isupper() else 2 if c.isdigit() else 5
    table[ord(" ")], table[ord("\t")], table[ord("\n")] = 3, 3, 4
    return table[np.asarray(tokens)]


def load_history(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Steps [S] and loads [S, L, E] (shares of the choices) of the rows that have them."""
    found = [row for row in rows if row.get("kind") == "train" and "router/load" in row]
    if not found:
        return np.zeros(0), np.zeros((0, 0, 0))
    return np.array([row["step"] for row in found]), np.array([row["router/load"] for row in found], float)


def load_figure(rows: Rows) -> Figure:
    """A map per routed layer: experts upwards, steps to the right, colour the load over the balanced load."""
    steps, load_SLE = load_history(rows)
    layers, experts = load_SLE.shape[1:]
    figure = Figure(figsize=(8, 1.2 + 1.5 * layers), layout="constrained")
    axes = figure.subplots(layers, 1, sharex=True, squeeze=False)[:, 0]
    top = max(2.0, float(load_SLE.max()) * experts)
    for layer, ax in enumerate(axes):
        image = ax.imshow(
            load_SLE[:, layer].T * experts,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            extent=(steps[0], steps[-1] + 1e-9, -0.5, experts - 0.5),
            vmin=0,
            vmax=top,
            cmap="viridis",
        )
        ax.set_ylabel(f"layer {layer + 1}\nexpert")
    axes[-1].set_xlabel("step")
    figure.colorbar(image, ax=list(axes), label="load / balanced load")
    return figure


def balance_figure(rows: Rows) -> Figure:
    """Largest violation, entropy of the load and of a choice, and what was dropped, over steps, a line per layer."""
    found = [row for row in rows if row.get("kind") == "train" and "router/load" in row]
    steps, experts = [row["step"] for row in found], len(found[0]["router/load"][0])
    names = {
        "router/max_violation": ("Busiest expert", "load over the mean, less one"),
        "router/load_entropy": ("Entropy of the load", f"nats; {math.log(experts):.2f} at perfect balance"),
        "router/entropy": ("Entropy of a choice", "nats, mean over tokens"),
        "router/drop_fraction": ("Dropped", "share of the choices"),
    }
    values = {name: np.array([row[name] for row in found], float) for name in names}
    if not values["router/drop_fraction"].any():  # nothing is ever dropped without a capacity
        values.pop("router/drop_fraction")
    figure, axes = canvas(len(values), height=2.9)
    for ax, (name, values_SL) in zip(axes, values.items(), strict=True):
        for layer in range(values_SL.shape[1]):
            colour = PALETTE[layer % len(PALETTE)]
            ax.plot(steps, values_SL[:, layer], linewidth=1, color=colour, label=f"layer {layer + 1}")
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(3, integer=True, steps=[1, 2, 5, 10]))
        titles(ax, names[name][0], x="training step", y=names[name][1])
    axes[-1].legend(fontsize=8, frameon=False)
    return figure


def write_specialisation(
    workdir: Path, model: Decoder, params: PyTree, batches: Iterable[Mapping[str, Any]], tokenizer: str
) -> None:
    """Count on held-out batches who serves which byte, and which class of bytes, and keep it for the report.

    Nothing is written for a model without routed layers or for tokens that are no bytes.
    """
    if not router_paths(model.config) or tokenizer != "bytes":
        return
    count = jax.jit(lambda p, tokens: expert_table(model, p, tokens, tokens, 256))
    total: Any = 0
    for batch in batches:
        total = total + np.asarray(count(params, np.asarray(batch["tokens"])[:, :-1]), np.int64)
    kinds = np.eye(len(BYTE_CLASSES), dtype=np.int64)[byte_classes(np.arange(256))]
    by_class = np.einsum("lve,vc->lce", total, kinds)
    found = {"classes": BYTE_CLASSES, "counts": by_class.tolist(), "bytes": total.tolist()}
    write_text(workdir / SPECIALISATION, json.dumps(found))


def specialisation_figure(counts_LCE: np.ndarray, classes: Sequence[str] = BYTE_CLASSES) -> Figure:
    """A map per routed layer: share of a class's choices that go to each expert."""
    layers, _, experts = counts_LCE.shape
    figure = Figure(figsize=(8, 0.8 + 1.9 * layers), layout="constrained")
    axes = figure.subplots(layers, 1, sharex=True, squeeze=False)[:, 0]
    share_LCE = counts_LCE / np.maximum(counts_LCE.sum(2, keepdims=True), 1)
    for layer, ax in enumerate(axes):
        image = ax.imshow(share_LCE[layer], aspect="auto", vmin=0, vmax=max(share_LCE.max(), 1e-9), cmap="magma")
        information = mutual_information(counts_LCE[layer])
        ax.set_yticks(range(len(classes)), classes, fontsize=8)
        ax.set_title(
            f"layer {layer + 1}: mutual information {information.corrected:.3f} nats "
            f"({information.normalized:.0%} of the most possible)",
            fontsize=9,
            loc="left",
        )
    axes[-1].set_xlabel("expert")
    axes[-1].set_xticks(range(0, experts, -(-experts // 16)))
    figure.colorbar(image, ax=list(axes), label="share of the class's choices")
    return figure


def depth_figure(classes_LCE: np.ndarray, bytes_LVE: np.ndarray) -> Figure:
    """Mutual information with the expert, over the most possible, against the position of the layer."""
    figure, (ax,) = canvas(1, height=2.9)
    layers = np.arange(1, len(classes_LCE) + 1)
    for colour, name, counts in zip(PALETTE, ("byte read", "its class"), (bytes_LVE, classes_LCE), strict=False):
        shares = [100 * mutual_information(layer[layer.sum(1) > 0]).normalized for layer in counts]
        ax.plot(layers, shares, marker="o", markersize=4, color=colour, label=name)
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize=8, frameon=False)
    titles(
        ax, "What tokens tell about experts, by depth", x="routed layer", y="mutual information, % of the most possible"
    )
    return figure


def router_sections(rows: Rows, workdir: Path | None = None) -> list[Section]:
    """The report's sections about routing; empty for a run without routed layers.

    Args:
      rows: the run's rows.
      workdir: where `write_specialisation` may have left its counts.
    """
    steps, load_SLE = load_history(rows)
    if not len(steps):
        return []
    last = load_SLE[-1] * load_SLE.shape[2]
    caption = (
        "Share of the choices each expert got in the batch of a logged step, over the share at perfect balance. At the "
        f"last one the busiest expert of a layer got {last.max():.2f} times its share, the idlest {last.min():.2f}."
    )
    sections = [Section("Load of the experts", [load_figure(rows), balance_figure(rows)], caption)]
    path = workdir / SPECIALISATION if workdir else None
    if path and path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        counts = np.array(found["counts"])
        figures = [specialisation_figure(counts, found["classes"])]
        if len(counts) > 1:
            figures.append(depth_figure(counts, np.array(found["bytes"])))
        text = "Where the tokens of a class went on held-out text, by the class of the byte read."
        sections.append(Section("Specialisation", figures, text))
    return sections
