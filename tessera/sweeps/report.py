"""What a sweep says: IsoFLOP minima and their power law, a parametric fit, gradient noise, and the page about it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from scaling import isoflop
from scaling.batch import Surface, critical_batch, fit_rule, fit_surface
from scaling.isoflop import Minimum
from scaling.published import CHINCHILLA
from scaling.rows import Rows, read_csv
from scaling.sweeps import adaptive
from tessera.infra.logger import write_text
from tessera.reports import scaling_figures, sweep_figures
from tessera.reports.html import Cell, Section, Table, paragraphs
from tessera.reports.run_report import config_section, write_report
from tessera.sweeps.fit_report import finite, run_isoflop, run_parametric
from tessera.sweeps.fit_summary import ScalingConfig, span


@dataclass(frozen=True)
class ReportConfig:
    """What is made of a sweep's rows.

    Attributes:
      resamples, level, seed: of the intervals.
      target: FLOPs to plan for; 0 is ten times the largest budget.
      stop_at: the sweep ends when half the planner's interval of log N*(target) is this narrow; 0 never.
    """

    resamples: int = 1000
    level: float = 0.95
    seed: int = 42
    target: float = 0.0
    stop_at: float = 0.0

    def __post_init__(self):
        if self.target < 0 or self.stop_at < 0 or self.resamples < 0:
            raise ValueError("target, stop_at and resamples must not be negative")


LAW = CHINCHILLA


def target_of(rows: Rows, config: ReportConfig) -> float:
    """FLOPs to plan for."""
    return config.target or 10 * float(np.max(rows["flops"]))


def enough(found: Sequence[dict[str, Any]], config: ReportConfig) -> bool:
    """Whether the planner's interval of log N*(target) is as narrow as `stop_at` asks."""
    target = config.target or 10 * max(row["flops"] for row in found)
    return adaptive.interval_reached(found, target=target, level=config.level, wanted=config.stop_at)


def best_rows(rows: Rows) -> Rows:
    """The lowest loss of every size, budget and seed, over learning rates and batches."""
    order = np.argsort(rows["loss"], kind="stable")
    keys = np.stack([rows[name][order] for name in ("params", "budget", "seed")], 1)
    first = np.sort(np.unique(keys, axis=0, return_index=True)[1])
    return rows.take(np.sort(order[first]))


def lr_minima(rows: Rows) -> list[Minimum]:
    """The best learning rate of every width: the minimum of a parabola in log learning rate, at the most tokens."""
    found = []
    for width in np.unique(rows["width"]):
        mine = rows.take((rows["width"] == width) & (rows["tokens"] == rows["tokens"].max()))
        found.append(isoflop.minimum(mine["lr"], mine["loss"], float(width)))
    return found


def lr_section(rows: Rows) -> Section:
    """Loss against learning rate by width, and how far the best rate moves."""
    last = rows.take(rows["tokens"] == rows["tokens"].max())
    minima = lr_minima(last)
    body = [(f"{m.budget:g}", m.runs, m.params, m.loss, m.refused or "used") for m in minima]
    table = Table(("width", "runs", "best learning rate", "loss there", "verdict"), body)
    good = [m for m in minima if not m.refused]
    texts = []
    if len(good) > 1:
        law = isoflop.power_fit([m.budget for m in good], [m.params for m in good])
        spread = max(m.params for m in good) / min(m.params for m in good)
        texts.append(
            f"Between widths {good[0].budget:g} and {good[-1].budget:g} the best learning rate moves by a factor of "
            f"{spread:.2f}; it goes as width^{law.exponent:.2f}. Exponent 0 would be a perfect transfer."
        )
    return Section("Learning rate", [paragraphs(*texts), sweep_figures.lr_figure(last, minima), table])


NEAR = 0.3  # nats above the best run within which a quadratic is asked to hold


def surface_part(rows: Rows) -> tuple[list[dict[str, Any]], Section]:
    """The surface over learning rate and batch of every size at its last token count: numbers, and a section."""
    body: list[tuple[Cell, ...]] = []
    found: list[dict[str, Any]] = []
    shown: list[tuple[Rows, Surface]] = []
    for params in np.unique(rows["params"]):
        mine = rows.take(rows["params"] == params)
        mine = mine.take(mine["budget"] == mine["budget"].max())
        try:
            surface = fit_surface(mine["lr"], mine["batch"], mine["loss"], within=NEAR)
        except ValueError as error:
            body.append((f"{params:g}", len(mine), None, None, None, None, str(error)))
            continue
        values = {name: getattr(surface, name) for name in ("lr", "batch", "loss", "ridge", "scatter", "refused")}
        found.append({"params": float(params), "tokens": float(mine["tokens"].max()), **values})
        body.append((f"{params:g}", len(mine), *list(values.values())[:4], surface.refused or "used"))
        shown.append((mine, surface))
    head = ("parameters", "runs", "best learning rate", "best batch", "loss", "lr ~ batch^", "verdict")
    texts = []
    good = [one for one in found if not one["refused"]]
    if len(good) > 1:
        for name in ("lr", "batch"):
            rule = fit_rule([one["params"] for one in good], [one[name] for one in good])
            texts.append(f"Best {name}: {rule.value:.3g} (parameters / {rule.at:.3g})^{rule.exponent:.2f}.")
    caption = (
        "A quadratic in the logarithms of learning rate and batch (sequences), fitted by least squares to the runs "
        f"within {NEAR} nats of the best."
    )
    content: list[str | Figure | Table] = [paragraphs(*texts), Table(head, body)]
    if shown:
        content.insert(1, sweep_figures.surface_figure(shown))
    return found, Section("Learning rate and batch", content, caption)


def noise_section(rows: Rows, length: int) -> Section:
    """The gradient noise scale: its figure, and the critical batch by budget at the best size."""
    body: list[tuple[Cell, ...]] = []
    for budget in np.unique(rows["budget"]):
        mine = rows.take(rows["budget"] == budget)
        try:
            found = critical_batch(mine["gradient_signal"], mine["gradient_noise"])
        except ValueError as error:
            body.append((scaling_figures.short(budget), len(mine), None, str(error)))
            continue
        low_high = [length * found.low, length * found.high] if np.isfinite(found.low) else None
        body.append((scaling_figures.short(budget), found.measurements, length * found.examples, span(low_high)))
    table = Table(("budget (FLOPs)", "runs", "critical batch (tokens)", "95% interval over runs"), body)
    caption = (
        "tr(Sigma) / |G|^2 (McCandlish et al. 2018, B_simple) at the branch points, before the decay. Batches far "
        "above it waste tokens, far below it waste steps."
    )
    # A curve along the budgets says something where a size has several.
    several = len(np.unique(rows["budget"])) > len(np.unique(rows["width"]))
    shown = [sweep_figures.noise_figure(rows, length)] if several else []
    return Section("Gradient noise", [*shown, table], caption)


def runs_section(rows: Rows) -> Section:
    """Every row."""
    names = [
        n for n in ("run", "params", "lr", "batch", "budget", "steps", "tokens", "epochs", "loss") if n in rows.columns
    ]

    def cell(name: str, value: Any) -> Any:
        if name in ("params", "steps", "tokens", "batch"):
            return f"{int(value):,}"
        return scaling_figures.short(value) if name == "budget" else value if isinstance(value, str) else float(value)

    body = [[cell(name, rows[name][i]) for name in names] for i in range(len(rows))]
    return Section("Rows", Table(names, body), fold=f"All {len(rows)} readouts")


def isoflop_part(rows: Rows, config: ReportConfig, path: Path) -> tuple[dict[str, Any], list[Section], list[str]]:
    """Approach 2 on the sweep: numbers, sections, and what to say first."""
    budgets = tuple(float(b) for b in np.unique(rows["budget"]))
    settings = ScalingConfig(
        runs=str(path),
        approach=2,
        resamples=config.resamples,
        level=config.level,
        seed=config.seed,
        budgets=(max(budgets), target_of(rows, config)),
        isoflops=budgets,
    )
    try:
        result, sections = run_isoflop(rows, settings, rows)
    except ValueError as error:  # fewer than two budgets have a minimum
        groups = isoflop.nearest_budgets(rows["flops"], budgets)
        found = isoflop.minima(rows, groups)
        body = [(scaling_figures.short(m.budget), m.runs, m.refused or "has a minimum") for m in found]
        shown: list[str | Figure | Table] = [
            scaling_figures.isoflop_figure(rows, groups, budgets, minima=found),
            Table(("budget (FLOPs)", "runs", "verdict"), body),
        ]
        return {"refused": str(error)}, [Section("IsoFLOP curves", shown)], [f"No power law: {error}."]
    refused = [m for m in result["minima"] if m["refused"]]
    a = result["exponents"]["a"]
    texts = [
        f"{len(result['minima']) - len(refused)} of {len(result['minima'])} budgets have a minimum inside their sizes. "
        f"Optimal parameters grow as C^{a['value']:.3f} ({config.level:.0%} interval {span(a['interval'])})."
    ]
    for m in refused:
        asked = budgets[int(np.argmin(np.abs(np.log(np.array(budgets) / m["budget"]))))]
        texts.append(f"Refused at {scaling_figures.short(asked)} FLOPs: {m['refused']}.")
    order = {"IsoFLOP curves": 0, "Minima": 1, "What to train": 2}
    return result, sorted((s for s in sections if s.title), key=lambda s: order.get(s.title, 3)), texts


def parametric_part(rows: Rows, config: ReportConfig, path: Path) -> tuple[dict[str, Any], list[Section], list[str]]:
    """Approach 3 on the sweep: numbers, sections, and what to say first."""
    target = (float(rows["flops"].max()), target_of(rows, config))
    settings = ScalingConfig(
        runs=str(path),
        resamples=config.resamples,
        level=config.level,
        seed=config.seed,
        budgets=target,
        isoflops=tuple(float(b) for b in np.unique(rows["budget"])),
        cluster="run",
    )
    result, sections = run_parametric(rows, settings, rows)
    a = result["exponents"]["a"]
    text = (
        f"The parametric fit ({result['formula']}) gives C^{a['value']:.3f} ({config.level:.0%} interval "
        f"{span(a.get('interval'))}, whole runs resampled) and "
        f"{'converged' if result['converged'] else 'did not converge'}."
    )
    own = [Section(f"Parametric fit: {s.title.lower()}", s.content, s.caption, s.fold) for s in sections if s.title]
    return result, own, [text]


def sweep_report(workdir: Path, config: ReportConfig, *, length: int) -> tuple[list[str], Path]:
    """Fit the rows of `runs.csv`, write `fit.json` and the page; returns what was found in sentences, and its path.

    Args:
      workdir: of the sweep.
      config: what to make of it.
      length: tokens of a sequence.
    """
    path = workdir / "runs.csv"
    rows = read_csv(path)
    sizes, budgets = len(np.unique(rows["params"])), np.unique(rows["budget"])
    lead = [
        f"{len(np.unique(rows['run']))} runs of {sizes} sizes, {len(rows)} readouts at {len(budgets)} budgets from "
        f"{scaling_figures.short(budgets.min())} to {scaling_figures.short(budgets.max())} FLOPs."
    ]
    results: dict[str, Any] = {}
    sections: list[Section] = []
    best = best_rows(rows)
    if sizes >= 4:
        results["isoflop"], more, texts = isoflop_part(best, config, path)
        sections, lead = [*sections, *more], [*lead, *texts]
        if len(best) >= 2 * len(LAW.parameters):
            results["parametric"], more, texts = parametric_part(best, config, path)
            sections, lead = [*sections, *more], [*lead, *texts]
    grid = len(np.unique(rows["batch"])) > 2 and len(np.unique(rows["lr"])) > 2
    if grid:
        results["surfaces"], section = surface_part(rows)
        sections.append(section)
    elif len(np.unique(rows["lr"])) > 3:
        sections.append(lr_section(rows))
    if "gradient_signal" in rows.columns:
        sections.append(noise_section(rows if grid else best, length))
    write_text(workdir / "fit.json", json.dumps(finite(results), indent=1) + "\n")
    sections = [Section("", paragraphs(*lead)), *sections, runs_section(rows), config_section(workdir)]
    return lead, write_report(workdir, f"Sweep of {len(rows)} readouts", sections, subtitle=workdir.resolve().name)
