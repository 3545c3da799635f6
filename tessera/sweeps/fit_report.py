"""Fit runs by one of the three approaches, and write down what came out: `fit.json` and the report."""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaling import doctor_powers, isoflop
from scaling.fitting.bootstrap import bootstrap, resamples
from scaling.fitting.fit import fit
from scaling.published import find_law
from scaling.rows import RowError, Rows
from tessera.infra.logger import write_text
from tessera.reports import scaling as figures
from tessera.reports.html import Section, Table, config_section, paragraphs, table_of, write_report
from tessera.reports.style import pick, short
from tessera.sweeps.fit_summary import (
    ScalingConfig,
    converged_draws,
    describe_fit,
    describe_powers,
    medians,
    optima,
    span,
    summary,
)

__all__ = ["ScalingConfig", "fit_page", "fit_runs", "span", "summary"]

# Digitized or rounded sizes of one model differ by less than this; neighboring models by more.
SAME_SIZE = 0.02


class FitPage(NamedTuple):
    """A fit: its numbers, what to say before them, and the sections of its own approach."""

    result: dict[str, Any]
    lead: list[str]
    own: list[Section]


def groups_of(rows: Rows, config: ScalingConfig) -> tuple[np.ndarray, list[float]]:
    """Budget number of every row (-1: none), and the budgets."""
    if config.isoflops:
        return isoflop.nearest_budgets(rows["flops"], config.isoflops), list(config.isoflops)
    groups = isoflop.group_budgets(rows["flops"])
    means = [float(np.exp(np.log(rows["flops"][groups == g]).mean())) for g in range(groups.max() + 1)]
    return groups, means


def clusters_of(rows: Rows, config: ScalingConfig) -> np.ndarray | None:
    """The labels of the rows that are resampled together; None for single rows.

    Raises:
      RowError: there is no such column.
    """
    if config.cluster and config.cluster not in rows.columns:
        what = f"the column is missing, which config.cluster names; there are {', '.join(rows.columns)}"
        raise RowError([(0, config.cluster, what)], rows.source)
    return rows[config.cluster] if config.cluster else None


def run_parametric(rows: Rows, config: ScalingConfig, whole: Rows) -> FitPage:
    """Approach 3: a parametric loss."""
    clusters = clusters_of(rows, config)
    fitted = fit(rows, find_law(config.law), config.fit)
    boot = bootstrap(fitted, config.resamples, seed=config.seed, clusters=clusters) if config.resamples else None
    law, at = fitted.law, medians(fitted)
    own = []
    if {"log_params", "log_tokens"} <= set(law.features):
        caption = (
            "Runs within 25% of a budget and the fitted law at that budget. Every curve should pass through its points "
            "and turn where they do."
        )
        curves = partial(figures.isoflop_figure, rows, *groups_of(rows, config), fitted=fitted, at=at)
        surface = partial(figures.surface_figure, fitted, config.budgets, at=at)
        own = [Section("IsoFLOP curves", curves, caption), Section("Loss surface", surface)]
    own.append(Section("Residuals", partial(figures.residual_figure, fitted)))
    if boot is not None and len(law.parameters) > 1:
        target = max(config.budgets)
        names = ("alpha", "beta") if {"alpha", "beta"} <= set(law.parameters) else law.parameters[:2]
        sizes = np.log(optima(fitted, converged_draws(fitted, boot), (target,)).params[0])
        own.append(Section("Bootstrap", partial(figures.bootstrap_figure, fitted, boot, tuple(names), sizes, target)))
    return FitPage(describe_fit(fitted, boot, config, whole), [], own)


def run_isoflop(rows: Rows, config: ScalingConfig, whole: Rows) -> FitPage:
    """Approach 2: a power law through the minima of IsoFLOP curves."""
    groups, budgets = groups_of(rows, config)
    law, found = isoflop.approach_2(rows, groups, how=config.curve)
    draws = np.zeros((2, 0))
    if config.resamples:
        counts = min(config.resamples, 1000), len(rows)
        drawn = resamples(*counts, seed=config.seed, clusters=clusters_of(rows, config))
        draws = isoflop.bootstrap_exponent(rows, groups, drawn, how=config.curve)
    findings = doctor_powers.examine_minima(law, found, draws, max(config.budgets))
    result = describe_powers(law, draws, config, len(rows), findings)
    result |= {"approach": 2, "rows": len(rows), "minima": [m._asdict() for m in found]}
    columns = {"budget (FLOPs)": "budget", "runs": "runs", "N*": "params"} | {
        k: k for k in ("loss", "depth", "scatter")
    }
    table = table_of(result["minima"], columns | {"verdict": lambda row: row["refused"] or "used"})
    refused = sum(bool(m.refused) for m in found)
    lead = f"Approach 2 ({config.curve}): {law.points} of {len(found)} budgets have a minimum; {refused} are refused."
    own = [
        Section("IsoFLOP curves", partial(figures.isoflop_figure, rows, groups, budgets, minima=found)),
        Section("Minima", [partial(figures.powers_figure, law, found), table]),
    ]
    return FitPage(result, [lead], own)


def run_envelope(rows: Rows, config: ScalingConfig, whole: Rows) -> FitPage:
    """Approach 1: the envelope of training curves; without a column `run`, runs of one size are read as one curve."""
    named = "run" in rows.columns
    labels = rows["run"] if named else isoflop.group_budgets(rows["params"], gap=SAME_SIZE)
    curves = isoflop.training_curves(rows, labels)
    law, envelope = isoflop.envelope(curves)
    draws = isoflop.bootstrap_envelope(curves, min(config.resamples, 1000), seed=config.seed)
    runs = len(curves.params)
    findings = doctor_powers.examine_envelope(envelope, curves, draws, max(config.budgets), named=named)
    result = describe_powers(law, draws, config, runs, findings) | {"approach": 1, "rows": len(rows)}
    table = Table(("FLOPs", "parameters of the lowest curve", "loss"), pick(envelope.tolist(), 20))
    lead = f"Approach 1: {runs} training curves, the lowest of them at {len(envelope)} FLOP counts."
    own = [Section("Envelope", [partial(figures.envelope_figure, curves, envelope, law), table])]
    return FitPage(result, [lead], own)


def number_sections(result: Mapping[str, Any]) -> list[Section]:
    """The law's parameters, the sizes to train at each budget, the next run to buy, the doctor's findings."""
    sections = []
    if "parameters" in result:
        found = [{"name": name} | values for name, values in result["parameters"].items()]
        columns = {"parameter": "name", "value": "value", "standard error": "se"}
        table = table_of(found, columns | {f"{result['level']:.0%} interval": lambda row: span(row.get("interval"))})
        caption = (
            f"Objective {result['value']:.8g}, a sum over rows; residuals of log loss have scale "
            f"{result['scale']:.3g}. Intervals: {result['intervals']}."
        )
        sections.append(Section("Parameters", table, caption))
    sections.append(optimum_section(result))
    if result.get("next_runs"):
        columns = {"FLOPs of the run": "flops", "parameters": "params", "tokens": "tokens"}
        table = table_of(result["next_runs"], columns | {"error of log N* before": "before", "after": "after"})
        caption = (
            "For each cost the size that takes most off the standard error of log N* at "
            f"{short(max(row['flops'] for row in result['budgets']))} FLOPs, at the noise of the residuals; the law is "
            "assumed to hold."
        )
        sections.append(Section("The next run to buy", table, caption))
    findings = table_of(result["doctor"], {"verdict": "verdict", "examined": "name", "finding": "text"})
    return [*sections, Section("Doctor", findings)]


def optimum_section(result: Mapping[str, Any]) -> Section:
    """Compute-optimal sizes at each budget, the cost of other sizes, and the change when tokens will be served."""
    columns: dict[str, Any] = {"FLOPs": "flops", "N*": "params", "interval of N*": "params_interval", "D*": "tokens"}
    columns |= {"D* / N*": "ratio", "interval of D* / N*": "ratio_interval"}
    caption = "FLOPs = 6 x parameters x tokens."
    more = []
    if result["approach"] == 3:
        columns |= {"loss": "loss", "one run's loss": "run_interval"}
        other = {"size over N*": "factor", "parameters": "params", "tokens": "tokens", "loss": "loss"}
        more = [
            table_of(result["off_optimum"], other | {"excess loss": "excess", "share of the budget wasted": "wasted"})
        ]
        caption += " The second table is for the first budget: what a model of another size costs."
    if result.get("inference"):
        served = {"tokens served": "inference_tokens", "parameters": "params", "tokens": "tokens"}
        served |= {
            "training FLOPs": "training_flops",
            "serving FLOPs": "inference_flops",
            "FLOPs saved over N*": "saved",
        }
        more.append(table_of(result["inference"], served))
        caption += " The third: the model of the same loss that is cheapest to train and serve."
    rows = [row | {k: span(row.get(k)) for k in columns.values() if "interval" in k} for row in result["budgets"]]
    return Section("What to train", [table_of(rows, columns), *more], caption)


def finite(value: Any) -> Any:
    """The same with NaN and infinities as None, which JSON can hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_numbers(workdir: Path, numbers: Mapping[str, Any]) -> None:
    """Write `fit.json`."""
    write_text(workdir / "fit.json", json.dumps(finite(numbers), indent=1) + "\n")


def fit_runs(workdir: Path, rows: Rows, config: ScalingConfig) -> FitPage:
    """Fit runs by `config.approach` and write `fit.json`; the page is another step, `fit_page`."""
    run = {1: run_envelope, 2: run_isoflop, 3: run_parametric}[config.approach]
    found = run(rows.without_highest_losses(config.drop_highest), config, rows)
    write_numbers(workdir, found.result)
    return found


def fit_page(workdir: Path, found: FitPage, source: str) -> Path:
    """Write the report of a fit to the rows of `source`; returns its path.

    Raises:
      MissingMatplotlib: matplotlib is not installed.
    """
    lead = Section("", paragraphs(*found.lead, *summary(found.result)))
    sections = [lead, *number_sections(found.result), *found.own, config_section(workdir)]
    return write_report(workdir, f"Scaling law from {found.result['rows']} runs", sections, subtitle=source)
