"""The report of a sweep: IsoFLOP minima and their power law, a parametric fit, learning rates, gradient noise."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scaling import isoflop
from scaling.batch import Surface, critical_batch, fit_rule, fit_surface
from scaling.isoflop import Minimum
from scaling.published import CHINCHILLA
from scaling.rows import Rows
from scaling.sweeps import adaptive
from scaling.tables import read_csv
from tessera.reports import scaling as figures
from tessera.reports.html import Cell, Section, Table, config_section, joined, paragraphs, table_of, write_report
from tessera.reports.style import short
from tessera.sweeps.fit_page import FitPage, number_sections, span
from tessera.sweeps.fit_report import ScalingConfig, groups_of, run_isoflop, run_parametric, write_numbers


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


def split(rows: Rows, name: str) -> list[tuple[Any, Rows]]:
    """The rows of every value of a column."""
    return [(value, rows.take(rows[name] == value)) for value in np.unique(rows[name])]


def lr_minima(rows: Rows) -> list[Minimum]:
    """The best learning rate of every width: the minimum of a parabola in log learning rate, at the most tokens."""
    last = rows.take(rows["tokens"] == rows["tokens"].max())
    return [isoflop.minimum(mine["lr"], mine["loss"], float(width)) for width, mine in split(last, "width")]


def lr_section(rows: Rows) -> Section:
    """Loss against learning rate by width, and how far the best rate moves."""
    last = rows.take(rows["tokens"] == rows["tokens"].max())
    minima = lr_minima(last)
    body = [(f"{m.budget:g}", m.runs, m.params, m.loss, m.refused or "used") for m in minima]
    table = Table(("width", "runs", "best learning rate", "loss there", "verdict"), body)
    widths, rates = [m.budget for m in minima if not m.refused], [m.params for m in minima if not m.refused]
    texts = []
    if len(rates) > 1:
        law = isoflop.power_fit(widths, rates)
        texts.append(
            f"Between widths {widths[0]:g} and {widths[-1]:g} the best learning rate moves by a factor of "
            f"{max(rates) / min(rates):.2f}; it goes as width^{law.exponent:.2f}. Exponent 0 would be perfect transfer."
        )
    return Section("Learning rate", [paragraphs(*texts), partial(figures.lr_figure, last, minima), table])


NEAR = 0.3  # nats above the best run within which a quadratic is asked to hold


def surface_part(rows: Rows) -> tuple[list[dict[str, Any]], Section]:
    """The surface over learning rate and batch of every size at every budget: numbers, and a section."""
    body: list[dict[str, Any]] = []
    shown: list[tuple[Rows, Surface]] = []
    names = ("lr", "batch", "loss", "ridge", "scatter", "refused")
    for params, mine in (
        (params, mine) for params, every in split(rows, "params") for _, mine in split(every, "budget")
    ):
        row: dict[str, Any] = {"params": float(params), "tokens": float(mine["tokens"].max()), "runs": len(mine)}
        try:
            surface = fit_surface(mine["lr"], mine["batch"], mine["loss"], within=NEAR)
        except ValueError as error:
            body.append(row | {"verdict": str(error)})
            continue
        body.append(row | {name: getattr(surface, name) for name in names} | {"verdict": surface.refused or "used"})
        if shown and shown[-1][0]["params"][0] == params:
            shown.pop()  # the figure has the largest budget of every size
        shown.append((mine, surface))
    found = [{key: row[key] for key in ("params", "tokens", *names)} for row in body if "lr" in row]
    good = [row for row in found if not row["refused"]]
    texts = []
    sizes = {name: [row[name] for row in good] for name in ("params", "tokens")}
    for name in ("lr", "batch") if len(good) > 1 else ():
        values = [row[name] for row in good]
        try:  # the field's forms: lr(N, D) and batch(D)
            rule = fit_rule(sizes["params"] if name == "lr" else None, values, sizes["tokens"])
        except ValueError:
            rule = fit_rule(sizes["params"], values)
        text = f" (parameters / {short(rule.at)})^{rule.exponent:.2f}" * bool(rule.exponent)
        text += f" (tokens / {short(rule.tokens_at)})^{rule.tokens_exponent:.2f}" * bool(rule.tokens_exponent)
        texts.append(f"Best {name}: {rule.value:.3g}{text}.")
    caption = (
        "A quadratic in the logarithms of learning rate and batch (sequences), fitted by least squares to the runs "
        f"within {NEAR} nats of the best."
    )
    columns: dict[str, Any] = {"parameters": lambda row: f"{row['params']:,.0f}", "tokens": "tokens", "runs": "runs"}
    columns |= {"best learning rate": "lr", "best batch": "batch", "loss": "loss", "lr ~ batch^": "ridge"}
    pictures = [partial(figures.batch_figure, shown)] * bool(shown)
    table = table_of(body, columns | {"verdict": "verdict"})
    return found, Section("Learning rate and batch", [paragraphs(*texts), *pictures, table], caption)


def noise_section(rows: Rows, length: int) -> Section:
    """The gradient noise scale: its figure, and the critical batch by budget at the best size."""
    body: list[tuple[Cell, ...]] = []
    for budget, mine in split(rows, "budget"):
        try:
            found = critical_batch(mine["gradient_signal"], mine["gradient_noise"])
        except ValueError as error:
            body.append((short(budget), len(mine), None, str(error)))
            continue
        low_high = [length * found.low, length * found.high] if np.isfinite(found.low) else None
        body.append((short(budget), found.measurements, length * found.examples, span(low_high)))
    table = Table(("budget (FLOPs)", "runs", "critical batch (tokens)", "95% interval over runs"), body)
    caption = (
        "tr(Sigma) / |G|^2 (McCandlish et al. 2018, B_simple) at the branch points, before the decay. Batches far "
        "above it waste tokens, far below it waste steps."
    )
    # A curve along the budgets says something where a size has several.
    several = len(np.unique(rows["budget"])) > len(np.unique(rows["width"]))
    return Section("Gradient noise", [*[partial(figures.noise_figure, rows, length)] * several, table], caption)


def runs_section(rows: Rows) -> Section:
    """Every row."""
    whole = ("params", "steps", "tokens", "batch")
    names = ("run", "params", "lr", "batch", "budget", "steps", "tokens", "epochs", "loss")

    def shown(name: str, value: Any) -> Any:
        return f"{int(value):,}" if name in whole else short(value) if name == "budget" else value

    columns = {name: [shown(name, v) for v in rows[name].tolist()] for name in names if name in rows.columns}
    table = Table(list(columns), list(zip(*columns.values(), strict=True)))
    return Section("Rows", table, fold=f"All {len(rows)} readouts")


def diverged_runs(path: Path) -> Table:
    """The runs that diverged: where, and what was said."""
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    names = ["run", *(n for n in ("params", "lr", "batch") if n in found[0]), "steps", "error"]
    heads = ["before step" if name == "steps" else name for name in names]
    return Table(heads, [[row[name] for name in names] for row in found])


def settings_of(rows: Rows, config: ReportConfig, path: Path, **changes: Any) -> ScalingConfig:
    """The settings of a fit to the sweep's rows, which lie in `path`."""
    budgets = tuple(float(b) for b in np.unique(rows["budget"]))
    targets = (float(rows["flops"].max()), target_of(rows, config))
    shared = {name: getattr(config, name) for name in ("resamples", "level", "seed")}
    return ScalingConfig(runs=str(path), **{"budgets": targets, "isoflops": budgets} | shared | changes)


def isoflop_part(rows: Rows, config: ReportConfig, path: Path) -> FitPage:
    """Approach 2 on the sweep: numbers, sentences to begin with, and sections."""
    budgets = np.unique(rows["budget"]).tolist()
    settings = settings_of(rows, config, path, approach=2, budgets=(max(budgets), target_of(rows, config)))
    try:
        result, _, own = run_isoflop(rows, settings, rows)
    except ValueError as error:  # fewer than two budgets have a minimum
        groups = isoflop.nearest_budgets(rows["flops"], budgets)
        found = isoflop.minima(rows, groups)
        body = [(short(m.budget), m.runs, m.refused or "has a minimum") for m in found]
        curves = partial(figures.isoflop_figure, rows, groups, budgets, minima=found)
        caption = "Runs (dots), their parabolas (lines, dotted where refused) and minima (diamonds)."
        section = Section("IsoFLOP curves", [curves, Table(("budget (FLOPs)", "runs", "verdict"), body)], caption)
        return FitPage({"refused": str(error)}, [f"No power law: {error}."], [section])
    refused = [m for m in result["minima"] if m["refused"]]
    a = result["exponents"]["a"]
    lead = [
        f"{len(result['minima']) - len(refused)} of {len(result['minima'])} budgets have a minimum inside their sizes. "
        f"Optimal parameters grow as C^{a['value']:.3f} ({config.level:.0%} interval {span(a['interval'])})."
    ]
    try:
        spline, _ = isoflop.approach_2(rows, groups_of(rows, settings)[0], how="akima")
        lead.append(f"Akima splines in place of the parabolas give C^{spline.exponent:.3f}.")
    except ValueError:
        lead.append("Akima splines in place of the parabolas have too few minima for a power law.")
    for m in refused:
        asked = budgets[int(np.argmin(np.abs(np.log(np.array(budgets) / m["budget"]))))]
        lead.append(f"Refused at {short(asked)} FLOPs: {m['refused']}.")
    return FitPage(result, lead, [*own, *number_sections(result)])


def parametric_part(rows: Rows, config: ReportConfig, path: Path) -> FitPage:
    """Approach 3 on the sweep: numbers, sentences to begin with, and sections."""
    result, _, own = run_parametric(rows, settings_of(rows, config, path, cluster="run"), rows)
    text = f"The parametric fit ({result['formula']}) {'converged' if result['converged'] else 'did not converge'}"
    if "exponents" in result:
        a = result["exponents"]["a"]
        text += f" and gives C^{a['value']:.3f} ({config.level:.0%} interval {span(a.get('interval'))}, "
        text += "whole runs resampled)."
    else:
        text += f"; its optimum is undetermined: {result['undetermined'] or 'no size is best'}."
    return FitPage(result, [text], [joined("Parametric fit", [*number_sections(result), *own])])


def fit_sweep(workdir: Path, config: ReportConfig, *, length: int) -> FitPage:
    """Fit the rows of `runs.csv` and write `fit.json`; the page is another step, `sweep_page`.

    Args:
      workdir: of the sweep.
      config: what to make of it.
      length: tokens of a sequence.

    Returns:
      The numbers, what was found in sentences, and the sections of the page.
    """
    path = workdir / "runs.csv"
    rows = read_csv(path)
    best, budgets = best_rows(rows), np.unique(rows["budget"])
    runs, sizes, rates, batches = (len(np.unique(rows[name])) for name in ("run", "params", "lr", "batch"))
    lead = [
        f"{runs} runs of {sizes} sizes, {len(rows)} readouts at {len(budgets)} budgets from {short(budgets.min())} to "
        f"{short(budgets.max())} FLOPs."
    ]
    parts: dict[str, FitPage] = {}
    if sizes >= 4:
        parts["isoflop"] = isoflop_part(best, config, path)
    if sizes >= 4 and len(best) >= 2 * len(LAW.parameters):
        parts["parametric"] = parametric_part(best, config, path)
    results: dict[str, Any] = {name: part.result for name, part in parts.items()}
    sections = [section for part in parts.values() for section in part.own]
    grid = batches > 2 and rates > 2
    if grid:
        results["surfaces"], section = surface_part(rows)
        sections.append(section)
    elif rates > 3:
        sections.append(lr_section(rows))
    if "gradient_signal" in rows.columns:
        sections.append(noise_section(rows if grid else best, length))
    if (lost := workdir / "diverged.csv").exists():
        diverged = diverged_runs(lost)
        lead.append(f"{len(diverged.rows)} runs diverged: {', '.join(str(row[0]) for row in diverged.rows)}.")
        caption = "A diverged run is a result: its readouts before are among the rows, and it is not started again."
        sections.append(Section("Diverged runs", diverged, caption))
    write_numbers(workdir, results)
    lead += [text for part in parts.values() for text in part.lead]
    return FitPage(results, lead, [*sections, runs_section(rows)])


def sweep_page(workdir: Path, found: FitPage) -> Path:
    """Write the report of a sweep; returns its path.

    Raises:
      MissingMatplotlib: matplotlib is not installed.
    """
    sections = [Section("", paragraphs(*found.lead)), *found.own, config_section(workdir)]
    return write_report(workdir, "Scaling sweep", sections)
