"""The page of a pruned language model: perplexity before and after, every layer's density and error, settings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tessera.reports.html import Section, config_section, paragraphs, table_of, write_report
from tessera.reports.style import PALETTE, Figure, canvas, deferred, label_lines, line_with_band, titles


def prune_report(
    workdir: Path | str, findings: Sequence[str], texts: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> Path:
    """Write the report of a pruned model.

    Args:
      workdir: the run's directory.
      findings: sentences that open the page.
      texts: a row per evaluated text.
      rows: a row per layer, see `tessera.compress.pruning.PrunedDecoder`.

    Raises:
      MissingMatplotlib: matplotlib is not installed; nothing is written.
    """
    layers: list[Any] = [table_of(list(rows))]
    if any("error" in row for row in rows):
        layers.insert(0, layers_figure(rows))
    caption = (
        "Density: share of the weights that are not zero. Error: squares of what the layer's outputs lost over their "
        "own squares, on the calibration text as the pruned blocks before it leave it."
    )
    sections = [
        Section("", paragraphs(*findings)),
        Section("Perplexity", table_of(list(texts)), "exp of the nats per token, in windows that do not overlap."),
        Section("Layers", layers, caption),
        config_section(workdir),
    ]
    return write_report(workdir, "Pruned language model", sections)


@deferred
def layers_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Error and density of each kernel by block; a mean over experts."""
    figure, axes = canvas(2, height=3.9)
    names = list(dict.fromkeys(row["layer"].split("/")[-2] for row in rows))
    for ax, (key, title) in zip(axes, (("error", "Relative error"), ("density", "Density")), strict=True):
        for number, name in enumerate(names):
            found: dict[int, list[float]] = {}
            for row in rows:
                if row["layer"].split("/")[-2] == name:
                    found.setdefault(row["block"], []).append(row[key])
            means = [sum(values) / len(values) for values in found.values()]
            color = PALETTE[number % len(PALETTE)]
            line_with_band(ax, list(found), means, color=color, marker="o", label=name)
        titles(ax, title, "block")
        ax.set_ylim(bottom=0)
        ax.locator_params(axis="x", integer=True)
        label_lines(ax)
    return figure
