"""Figures of routing: load of the experts over training, balance, specialization on classes of tokens."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from moe.specialization import mutual_information
from tessera.infra.logger import Rows, load_history, write_text
from tessera.models.lm_loss import expert_table, router_paths
from tessera.models.transformer import Decoder
from tessera.reports import style
from tessera.reports.html import Section
from tessera.reports.style import PALETTE, Figure, line_with_band, titles

SPECIALIZATION = "specialization.json"

# Classes of bytes for the specialization map.
BYTE_CLASSES = ("lower case", "upper case", "digit", "space", "line end", "punctuation", "other")


def byte_classes(tokens: np.ndarray) -> np.ndarray:
    """Class of every byte, an index into `BYTE_CLASSES`, int32 of the shape of `tokens`."""
    table = np.full(256, len(BYTE_CLASSES) - 1, np.int32)
    for byte in range(33, 127):
        c = chr(byte)
        table[byte] = 0 if c.islower() else 1 if c.isupper() else 2 if c.isdigit() else 5
    table[ord(" ")], table[ord("\t")], table[ord("\n")] = 3, 3, 4
    return table[np.asarray(tokens)]


def load_maps(steps: np.ndarray, loads: Mapping[str, np.ndarray], height: float, quantile: float = 1.0) -> Figure:
    """A heat map of loads [S, E] per name: experts upwards, steps to the right, color the load over the balanced load.

    The scale ends at the `quantile` of all loads, never below twice the balanced load.
    """
    experts = next(iter(loads.values())).shape[1]
    top = max(2.0, max(float(np.quantile(load, quantile)) for load in loads.values()) * experts)
    extent = (steps[0], steps[-1] + 1e-9, -0.5, experts - 0.5)
    images = {name: load.T * experts for name, load in loads.items()}
    figure, axes = style.heat_maps(
        images, label="load / balanced load", height=height, top=top, extent=extent, origin="lower"
    )
    for ax in axes:
        ax.set_ylabel("expert")
        ax.locator_params(axis="y", nbins=5, integer=True)
    style.steps_axis(axes[-1])
    axes[-1].set_xlabel("training step")
    return figure


def balance_figure(rows: Rows) -> Figure:
    """Largest violation, entropy of the load and of a choice, and what was dropped, over steps, a line per layer."""
    found = [row for row in rows if row.get("kind") == "train" and "router/load" in row]
    experts = len(found[0]["router/load"][0])
    panels = {
        "router/max_violation": ("Busiest expert", "load over the mean, less one"),
        "router/load_entropy": ("Entropy of the load", f"nats; {math.log(experts):.2f} at perfect balance"),
        "router/entropy": ("Entropy of a choice", "nats, mean over tokens"),
        "router/drop_fraction": ("Dropped", "share of the choices"),
    }
    values = {name: np.array([row[name] for row in found], float) for name in panels}
    if not values["router/drop_fraction"].any():  # nothing is ever dropped without a capacity
        values.pop("router/drop_fraction")
    figure, axes = style.canvas(len(values), height=2.9)
    for ax, (name, values_SL) in zip(axes, values.items(), strict=True):
        for layer, value in enumerate(values_SL.T):
            how: Any = {"color": PALETTE[layer % len(PALETTE)], "linewidth": 1, "label": f"layer {layer + 1}"}
            line_with_band(ax, [row["step"] for row in found], value, **how)
        ax.set_ylim(bottom=0)
        style.steps_axis(ax, 3)
        titles(ax, panels[name][0], x="training step", y=panels[name][1])
    style.label_lines(axes[-1])
    return figure


def write_specialization(
    workdir: Path, model: Decoder, params: PyTree, batches: Iterable[Mapping[str, Any]], tokenizer: str
) -> None:
    """Count on held-out batches which experts every byte, and every class of bytes, is routed to; save the counts.

    Nothing is written for a model without routed layers or for tokens that are no bytes.
    """
    if not router_paths(model.config) or tokenizer != "bytes":
        return
    count = jax.jit(lambda p, tokens, positions: expert_table(model, p, tokens, tokens, 256, positions))
    total: Any = 0
    for batch in batches:
        tokens = np.asarray(batch["tokens"])[:, :-1]
        total = total + np.asarray(count(params, tokens, batch.get("positions")), np.int64)
    kinds = np.eye(len(BYTE_CLASSES), dtype=np.int64)[byte_classes(np.arange(256))]
    by_class = np.einsum("lve,vc->lce", total, kinds)
    found = {"classes": BYTE_CLASSES, "counts": by_class.tolist(), "bytes": total.tolist()}
    write_text(workdir / SPECIALIZATION, json.dumps(found))


def specialization_figure(counts_LCE: np.ndarray, classes: Sequence[str] = BYTE_CLASSES) -> Figure:
    """A map per routed layer: share of a class's choices that go to each expert."""
    layers, _, experts = counts_LCE.shape
    share_LCE = counts_LCE / np.maximum(counts_LCE.sum(2, keepdims=True), 1)
    images = {}
    for layer, share in enumerate(share_LCE):
        found = mutual_information(counts_LCE[layer])
        name = f"layer {layer + 1}: mutual information {found.corrected:.3f} nats"
        images[f"{name} ({found.normalized:.0%} of the most possible)"] = share
    how: Any = {"label": "share of the class's choices", "height": 0.8 + 1.9 * layers}
    figure, axes = style.heat_maps(images, top=max(share_LCE.max(), 1e-9), **how)
    for ax in axes:
        ax.set_yticks(range(len(classes)), classes, fontsize=8)
    axes[-1].set_xlabel("expert")
    axes[-1].set_xticks(range(0, experts, -(-experts // 16)))
    return figure


def depth_figure(classes_LCE: np.ndarray, bytes_LVE: np.ndarray) -> Figure:
    """Mutual information with the expert, over the most possible, against the position of the layer."""
    figure, (ax,) = style.canvas(height=2.9)
    layers = np.arange(1, len(classes_LCE) + 1)
    for color, name, counts in zip(PALETTE, ("byte read", "its class"), (bytes_LVE, classes_LCE), strict=False):
        shares = [100 * mutual_information(layer[layer.sum(1) > 0]).normalized for layer in counts]
        line_with_band(ax, layers, shares, marker="o", color=color, label=name)
    ax.set_ylim(bottom=0)
    style.steps_axis(ax, len(layers))
    unit = "mutual information, % of the most possible"
    titles(ax, "What tokens tell about experts, by depth", x="routed layer", y=unit)
    style.label_lines(ax)
    return figure


def router_sections(rows: Rows, workdir: Path | None = None) -> list[Section]:
    """The report's sections about routing; empty for a run without routed layers.

    Args:
      rows: the run's rows.
      workdir: where `write_specialization` may have left its counts.
    """
    steps, load_SLE = load_history(rows)
    if not len(steps):
        return []
    last = load_SLE[-1] * load_SLE.shape[2]
    caption = (
        "Share of the choices each expert got in the batch of a logged step, over the share at perfect balance. At the "
        f"last one the busiest expert of a layer got {last.max():.2f} times its share, the least used {last.min():.2f}."
    )
    loads = {f"layer {i + 1}": load_SLE[:, i] for i in range(load_SLE.shape[1])}
    maps = load_maps(steps, loads, 1.2 + 1.5 * len(loads))
    sections = [Section("Load of the experts", [maps, balance_figure(rows)], caption)]
    path = workdir / SPECIALIZATION if workdir else None
    if path and path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        counts = np.array(found["counts"])
        figures = [specialization_figure(counts, found["classes"])]
        if len(counts) > 1:
            figures.append(depth_figure(counts, np.array(found["bytes"])))
        text = "Where the tokens of a class went on held-out text, by the class of the byte read."
        sections.append(Section("Specialization", figures, text))
    return sections
