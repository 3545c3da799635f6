"""Fit runs by one of the three approaches, and write down what came out: `fit.json` and the report."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scaling import doctor, isoflop
from scaling.fitting.bootstrap import bootstrap, resamples
from scaling.fitting.fit import fit
from scaling.published import CHINCHILLA, find_law
from scaling.rows import RowError, Rows
from tessera.infra.logger import write_text
from tessera.reports import scaling_figures
from tessera.reports.html import Section, Table, paragraphs
from tessera.reports.run_report import config_section, write_report
from tessera.sweeps.fit_summary import ScalingConfig, describe_fit, describe_powers, medians, optima, span, summary

__all__ = ["ScalingConfig", "span", "summary", "write_fit"]

# Digitised or rounded sizes of one model differ by less than this; neighbouring models by more.
SAME_SIZE = 0.02


def groups_of(rows: Rows, config: ScalingConfig) -> tuple[np.ndarray, list[float]]:
    """Budget number of every row (-1: none), and the budgets."""
    if config.isoflops:
        return isoflop.nearest_budgets(rows["flops"], config.isoflops), list(config.isoflops)
    groups = isoflop.group_budgets(rows["flops"])
    means = [float(np.exp(np.log(rows["flops"][groups == g]).mean())) for g in range(groups.max() + 1)]
    return groups, means


def column_of(rows: Rows, name: str, purpose: str) -> np.ndarray:
    """A column of labels.

    Raises:
      RowError: there is no such column.
    """
    if name not in rows.columns:
        there = ", ".join(rows.columns)
        raise RowError([(0, name, f"the column is missing, {purpose}; there are {there}")], rows.source)
    return rows[name]


def run_parametric(rows: Rows, config: ScalingConfig, whole: Rows) -> tuple[dict[str, Any], list[Section]]:
    """Approach 3: numbers and sections."""
    clusters = column_of(rows, config.cluster, "which config.cluster names") if config.cluster else None
    fitted = fit(rows, find_law(config.law), config.fit)
    boot = bootstrap(fitted, config.resamples, seed=config.seed, clusters=clusters) if config.resamples else None
    result = describe_fit(fitted, boot, config, whole)
    groups, budgets = groups_of(rows, config)
    at = medians(fitted)
    sized = {"log_params", "log_tokens"} <= set(fitted.law.features)
    sections = [
        Section("", paragraphs(*summary(result))),
        parameters_section(result),
        optimum_section(result),
        *([next_section(result)] if result["next_runs"] else []),
        doctor_section(result),
    ]
    if sized:
        caption = (
            "Runs within 25% of a budget and the fitted law at that budget. Every curve should pass through its points "
            "and turn where they do."
        )
        curves = scaling_figures.isoflop_figure(rows, groups, budgets, fitted=fitted, at=at)
        sections.append(Section("IsoFLOP curves", curves, caption))
        sections.append(Section("Loss surface", scaling_figures.surface_figure(fitted, config.budgets, at=at)))
    sections.append(Section("Residuals", scaling_figures.residual_figure(fitted)))
    if boot is not None and len(fitted.law.parameters) > 1:
        target = max(config.budgets)
        draws = boot.theta_PB[:, boot.converged_B]
        draws = draws if fitted.law is CHINCHILLA else draws[:, :300]
        names = ("alpha", "beta") if {"alpha", "beta"} <= set(fitted.law.parameters) else fitted.law.parameters[:2]
        sizes = np.log(optima(fitted, draws, (target,)).params[0])
        sections.append(
            Section("Bootstrap", scaling_figures.bootstrap_figure(fitted, boot, (names[0], names[1]), sizes, target))
        )
    return result, sections


def run_isoflop(rows: Rows, config: ScalingConfig, whole: Rows) -> tuple[dict[str, Any], list[Section]]:
    """Approach 2: numbers and sections."""
    groups, budgets = groups_of(rows, config)
    law, found = isoflop.approach_2(rows, groups, how=config.curve)
    draws = np.zeros((2, 0))
    if config.resamples:
        clusters = column_of(rows, config.cluster, "which config.cluster names") if config.cluster else None
        counts = resamples(min(config.resamples, 1000), len(rows), seed=config.seed, clusters=clusters)
        draws = isoflop.bootstrap_exponent(rows, groups, counts, how=config.curve)
    result = describe_powers(law, draws, config, len(rows)) | {
        "approach": 2,
        "rows": len(rows),
        "minima": [m._asdict() for m in found],
        "doctor": [f._asdict() for f in doctor.examine_minima(law, found, draws, max(config.budgets))],
    }
    refused = [m for m in found if m.refused]
    table = Table(
        ("budget (FLOPs)", "runs", "N*", "loss", "depth", "scatter", "verdict"),
        [(m.budget, m.runs, m.params, m.loss, m.depth, m.scatter, m.refused or "used") for m in found],
    )
    lead = (
        f"Approach 2 ({config.curve}): {law.points} of {len(found)} budgets have a minimum; {len(refused)} are refused."
    )
    sections = [
        Section("", paragraphs(lead, *summary(result))),
        optimum_section(result),
        doctor_section(result),
        Section("Minima", [scaling_figures.powers_figure(law, found), table]),
        Section("IsoFLOP curves", scaling_figures.isoflop_figure(rows, groups, budgets, minima=found)),
    ]
    return result, sections


def run_envelope(rows: Rows, config: ScalingConfig, whole: Rows) -> tuple[dict[str, Any], list[Section]]:
    """Approach 1: numbers and sections; without a column `run`, runs of one size are read as one curve."""
    named = "run" in rows.columns
    labels = rows["run"] if named else isoflop.group_budgets(rows["params"], gap=SAME_SIZE)
    curves = isoflop.training_curves(rows, labels)
    law, envelope = isoflop.envelope(curves)
    draws = isoflop.bootstrap_envelope(curves, min(config.resamples, 1000), seed=config.seed)
    runs = len(curves.params)
    findings = doctor.examine_envelope(envelope, curves, draws, max(config.budgets), named=named)
    result = describe_powers(law, draws, config, runs) | {
        "approach": 1,
        "rows": len(rows),
        "doctor": [finding._asdict() for finding in findings],
    }
    few = envelope[np.linspace(0, len(envelope) - 1, min(20, len(envelope))).astype(int)]
    table = Table(("FLOPs", "parameters of the lowest curve", "loss"), [tuple(map(float, row)) for row in few])
    lead = f"Approach 1: {runs} training curves, the lowest of them at {len(envelope)} FLOP counts."
    sections = [
        Section("", paragraphs(lead, *summary(result))),
        optimum_section(result),
        doctor_section(result),
        Section("Envelope", [scaling_figures.envelope_figure(curves, envelope, law), table]),
    ]
    return result, sections


def parameters_section(result: Mapping[str, Any]) -> Section:
    """The law's parameters with standard errors and intervals."""
    body = [(n, f["value"], f.get("se"), span(f.get("interval"))) for n, f in result["parameters"].items()]
    caption = (
        f"Objective {result['value']:.8g}, a sum over rows; residuals of log loss have scale {result['scale']:.3g}. "
        f"Intervals: {result['intervals']}."
    )
    columns = ("parameter", "value", "standard error", f"{result['level']:.0%} interval")
    return Section("Parameters", Table(columns, body), caption)


def optimum_section(result: Mapping[str, Any]) -> Section:
    """What to train at each budget, the cost of other sizes, and what serving changes."""
    columns = ["FLOPs", "N*", "interval", "D*", "D* / N*", "interval"]
    body = [
        [
            r["flops"],
            r["params"],
            span(r.get("params_interval")),
            r["tokens"],
            r["ratio"],
            span(r.get("ratio_interval")),
        ]
        for r in result["budgets"]
    ]
    parametric = result["approach"] == 3
    if parametric:
        columns += ["loss", "one run's loss"]
        for line, r in zip(body, result["budgets"], strict=True):
            line += [r["loss"], span(r.get("run_interval"))]
    parts = [Table(columns, body)]
    caption = "FLOPs = 6 x parameters x tokens."
    if parametric:
        head = ("size over N*", "parameters", "tokens", "loss", "excess loss", "share of the budget wasted")
        names = ("factor", "params", "tokens", "loss", "excess", "wasted")
        parts.append(Table(head, [tuple(row[k] for k in names) for row in result["off_optimum"]]))
        caption += " The second table is for the first budget: what a model of another size costs."
    if result.get("inference"):
        head = ("tokens served", "parameters", "tokens", "training FLOPs", "serving FLOPs", "FLOPs saved over N*")
        names = ("inference_tokens", "params", "tokens", "training_flops", "inference_flops", "saved")
        parts.append(Table(head, [tuple(row[k] for k in names) for row in result["inference"]]))
        caption += " The third: the model of the same loss that is cheapest to train and serve."
    return Section("What to train", parts, caption)


def next_section(result: Mapping[str, Any]) -> Section:
    """Which run to buy next, at several costs."""
    names = ("flops", "params", "tokens", "before", "after")
    body = [tuple(row[name] for name in names) for row in result["next_runs"]]
    head = ("FLOPs of the run", "parameters", "tokens", "error of log N* before", "after")
    target = scaling_figures.short(max(row["flops"] for row in result["budgets"]))
    caption = (
        f"For each cost the size that takes most off the standard error of log N* at {target} FLOPs, at the noise of "
        "the residuals; the law is taken to hold."
    )
    return Section("The next run to buy", Table(head, body), caption)


def doctor_section(result: Mapping[str, Any]) -> Section:
    """The doctor's findings."""
    body = [(finding["verdict"], finding["name"], finding["text"]) for finding in result["doctor"]]
    return Section("Doctor", Table(("verdict", "examined", "finding"), body))


def finite(value: Any) -> Any:
    """The same with NaN and infinities as None, which JSON can hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if isinstance(value, np.generic) else value


def write_fit(workdir: Path, rows: Rows, config: ScalingConfig) -> tuple[dict[str, Any], Path]:
    """Fit, write `fit.json` and the report; returns the numbers and the report's path."""
    run = {1: run_envelope, 2: run_isoflop, 3: run_parametric}[config.approach]
    result, sections = run(rows.without_highest_losses(config.drop_highest), config, rows)
    write_text(workdir / "fit.json", json.dumps(finite(result), indent=1) + "\n")
    title = f"Scaling law from {result['rows']} runs"
    return result, write_report(workdir, title, [*sections, config_section(workdir)], subtitle=rows.source)
