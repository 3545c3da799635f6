"""Fit runs by one of the three approaches, and write down what came out: `fit.json` and the report."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scaling import doctor, figures, isoflop
from scaling.bootstrap import Bootstrap, bootstrap, interval, resamples
from scaling.fit import Fit, FitConfig, fit
from scaling.optimum import Optimum, chinchilla_optimum, off_optimum, optimum
from scaling.published import CHINCHILLA, find_law
from scaling.rows import Rows
from training.logs import write_text
from training.page import Section, Table, paragraphs
from training.report import config_section, write_report


@dataclass(frozen=True)
class ScalingConfig:
    """What to fit.

    Attributes:
      runs: the CSV of runs.
      law: name of the law, for approach 3.
      approach: 1 envelope, 2 IsoFLOP minima, 3 parametric.
      drop_highest: rows with the highest losses that are left out.
      fit: of approach 3.
      resamples: bootstrap resamples; 0 for none.
      cluster: column whose values are resampled as wholes; "" for single rows.
      level: of the intervals.
      seed: of the resamples.
      budgets: FLOPs to plan for.
      isoflops: the budgets the runs were made at; empty: found from gaps in their FLOPs.
      curve: of approach 2.
    """

    runs: str
    law: str = "chinchilla"
    approach: Literal[1, 2, 3] = 3
    drop_highest: int = 0
    fit: FitConfig = FitConfig()
    resamples: int = 4000
    cluster: str = ""
    level: float = 0.95
    seed: int = 42
    budgets: tuple[float, ...] = ()
    isoflops: tuple[float, ...] = ()
    curve: Literal["parabola", "akima"] = "parabola"

    def __post_init__(self):
        if not self.runs:
            raise ValueError("runs is empty: give a CSV of runs with --config.runs=FILE")
        if not self.budgets or min(self.budgets) <= 0:
            raise ValueError(f"budgets {self.budgets}: at least one positive number of FLOPs is needed")
        if not 0 < self.level < 1:
            raise ValueError(f"level {self.level} must be between 0 and 1")


def groups_of(rows: Rows, config: ScalingConfig) -> tuple[np.ndarray, list[float]]:
    """Budget number of every row (-1: none), and the budgets."""
    if config.isoflops:
        return isoflop.nearest_budgets(rows["flops"], config.isoflops), list(config.isoflops)
    groups = isoflop.group_budgets(rows["flops"])
    means = [float(np.exp(np.log(rows["flops"][groups == g]).mean())) for g in range(groups.max() + 1)]
    return groups, means


def by_name(fitted: Fit, theta: np.ndarray) -> dict[str, np.ndarray]:
    """Natural parameters by name."""
    return dict(zip(fitted.law.parameters, fitted.law.natural(theta), strict=True))


def optima(fitted: Fit, theta_PS: np.ndarray, budgets: tuple[float, ...]) -> Optimum:
    """N*, D* and loss at budgets; in closed form for Chinchilla's law, further columns at their medians."""
    if fitted.law is CHINCHILLA:
        return chinchilla_optimum(by_name(fitted, theta_PS), budgets)
    return optimum(fitted.law, theta_PS, budgets, at=medians(fitted))


def medians(fitted: Fit) -> dict[str, float]:
    """The median of every further column the law reads."""
    return {name: float(np.median(values)) for name, values in doctor.others(fitted).items()}


def _pair(draws: np.ndarray, level: float) -> list[float] | None:
    finite = draws[np.isfinite(draws)]
    return [float(edge) for edge in interval(finite, level)] if len(finite) > 1 else None


def describe_fit(fitted: Fit, boot: Bootstrap | None, config: ScalingConfig) -> dict[str, Any]:
    """Everything `fit.json` holds for approach 3."""
    here = fitted.parameters
    drawn = boot.theta_PB[:, boot.converged_B] if boot is not None else None
    # Laws without a closed form take a search per draw: some hundreds give the interval.
    few = drawn if drawn is None or fitted.law is CHINCHILLA else drawn[:, :300]
    natural = by_name(fitted, drawn) if drawn is not None else {}
    parameters: dict[str, dict[str, Any]] = {
        name: {"value": here[name]}
        | (
            {"interval": _pair(natural[name], config.level), "se": float(np.std(natural[name], ddof=1))}
            if natural
            else {}
        )
        for name in fitted.law.parameters
    }
    best = optima(fitted, fitted.theta[:, None], config.budgets)
    spread = optima(fitted, few, config.budgets) if few is not None else None
    planned = []
    for c, budget in enumerate(config.budgets):
        row: dict[str, Any] = {"flops": budget}
        for name in ("params", "tokens", "ratio", "loss"):
            row[name] = float(getattr(best, name)[c, 0])
            if spread is not None:
                row[f"{name}_interval"] = _pair(getattr(spread, name)[c], config.level)
        planned.append(row)
    target = max(config.budgets)
    result: dict[str, Any] = {
        "approach": 3,
        "law": fitted.law.name,
        "formula": fitted.law.formula,
        "rows": len(fitted.rows),
        "objective": fitted.config.objective,
        "value": fitted.value,
        "converged": fitted.converged,
        "log_likelihood": fitted.log_likelihood,
        "scale": fitted.scale,
        "level": config.level,
        "parameters": parameters,
        "budgets": planned,
        "off_optimum": off_optimum(
            fitted.law, fitted.theta, config.budgets[0], (0.25, 0.5, 2.0, 4.0), at=medians(fitted)
        ),
        "doctor": [finding._asdict() for finding in doctor.examine(fitted, target, boot)],
    }
    if {"alpha", "beta"} <= set(fitted.law.parameters):
        exponents = {"a": ("beta", "alpha"), "b": ("alpha", "beta")}
        result["exponents"] = {
            name: {"value": here[top] / (here[top] + here[rest])}
            | ({"interval": _pair(natural[top] / (natural[top] + natural[rest]), config.level)} if natural else {})
            for name, (top, rest) in exponents.items()
        }
    return result


def run_parametric(rows: Rows, config: ScalingConfig) -> tuple[dict[str, Any], list[Section]]:
    """Approach 3: numbers and sections."""
    fitted = fit(rows, find_law(config.law), config.fit)
    clusters = rows[config.cluster] if config.cluster else None
    boot = bootstrap(fitted, config.resamples, seed=config.seed, clusters=clusters) if config.resamples else None
    result = describe_fit(fitted, boot, config)
    groups, budgets = groups_of(rows, config)
    at = medians(fitted)
    sections = [
        Section("", paragraphs(*summary(result))),
        parameters_section(result),
        optimum_section(result),
        doctor_section(result),
        Section(
            "IsoFLOP curves",
            figures.isoflop_figure(rows, groups, budgets, fitted=fitted, at=at),
            "Runs within 25% of a budget and the fitted law at that budget. Every curve should pass through its points "
            "and turn where they do.",
        ),
        Section("Loss surface", figures.surface_figure(fitted, config.budgets, at=at)),
        Section("Residuals", figures.residual_figure(fitted)),
    ]
    if boot is not None and len(fitted.law.parameters) > 1:
        target = max(config.budgets)
        draws = boot.theta_PB[:, boot.converged_B]
        draws = draws if fitted.law is CHINCHILLA else draws[:, :300]
        names = ("alpha", "beta") if {"alpha", "beta"} <= set(fitted.law.parameters) else fitted.law.parameters[:2]
        cloud = figures.bootstrap_figure(
            fitted, boot, (names[0], names[1]), np.log(optima(fitted, draws, (target,)).params[0]), target
        )
        sections.append(Section("Bootstrap", cloud))
    return result, sections


def run_isoflop(rows: Rows, config: ScalingConfig) -> tuple[dict[str, Any], list[Section]]:
    """Approach 2: numbers and sections."""
    groups, budgets = groups_of(rows, config)
    law, found = isoflop.approach_2(rows, groups, how=config.curve)
    draws = np.zeros((2, 0))
    if config.resamples:
        counts = resamples(
            min(config.resamples, 1000),
            len(rows),
            seed=config.seed,
            clusters=rows[config.cluster] if config.cluster else None,
        )
        draws = isoflop.bootstrap_exponent(rows, groups, counts, how=config.curve)
    result = describe_powers(law, draws, config) | {
        "approach": 2,
        "rows": len(rows),
        "minima": [m._asdict() for m in found],
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
        Section("Minima", [figures.powers_figure(law, found), table]),
        Section("IsoFLOP curves", figures.isoflop_figure(rows, groups, budgets, minima=found)),
    ]
    return result, sections


def run_envelope(rows: Rows, config: ScalingConfig) -> tuple[dict[str, Any], list[Section]]:
    """Approach 1: numbers and sections; needs a column `run`."""
    law, envelope = isoflop.approach_1(rows, rows["run"])
    result = describe_powers(law, np.zeros((2, 0)), config) | {"approach": 1, "rows": len(rows)}
    few = envelope[np.linspace(0, len(envelope) - 1, min(20, len(envelope))).astype(int)]
    table = Table(("FLOPs", "parameters of the lowest curve", "loss"), [tuple(map(float, row)) for row in few])
    sections = [
        Section("", paragraphs(f"Approach 1: an envelope of {len(envelope)} points.", *summary(result))),
        optimum_section(result),
        Section("Envelope", table),
    ]
    return result, sections


def describe_powers(law: isoflop.PowerLaw, draws: np.ndarray, config: ScalingConfig) -> dict[str, Any]:
    """Exponents and optima of a power law, with intervals from draws [2, B] of (exponent, intercept)."""
    planned = []
    for budget in config.budgets:
        params = law(budget)
        tokens = isoflop.tokens_at(budget, params)
        row: dict[str, Any] = {"flops": budget, "params": params, "tokens": tokens, "ratio": tokens / params}
        drawn = np.exp(draws[1] + draws[0] * np.log(budget))
        row["params_interval"] = _pair(drawn, config.level)
        row["tokens_interval"] = _pair(budget / (6 * drawn), config.level)
        row["ratio_interval"] = _pair(budget / (6 * drawn**2), config.level)
        planned.append(row)
    exponents = {
        "a": {"value": law.exponent, "interval": _pair(draws[0], config.level)},
        "b": {"value": 1 - law.exponent, "interval": _pair(1 - draws[0], config.level)},
    }
    return {"exponents": exponents, "budgets": planned, "level": config.level, "doctor": []}


def span(pair: list[float] | None) -> str:
    """An interval in words; "not measured" without one."""
    return f"{pair[0]:.4g} to {pair[1]:.4g}" if pair else "not measured"


def summary(result: Mapping[str, Any]) -> list[str]:
    """What was fitted and what follows, in sentences."""
    texts = []
    if result["approach"] == 3:
        values = ", ".join(f"{name} = {found['value']:.5g}" for name, found in result["parameters"].items())
        state = "converged" if result["converged"] else "did not converge"
        texts.append(f"{result['formula']}, fitted to {result['rows']} runs: {values}. The fit {state}.")
    if "exponents" in result:
        a, b = result["exponents"]["a"], result["exponents"]["b"]
        texts.append(
            f"Optimal parameters grow as C^{a['value']:.3f} ({result['level']:.0%} interval "
            f"{span(a.get('interval'))}), optimal tokens as C^{b['value']:.3f}."
        )
    for row in result["budgets"]:
        texts.append(
            f"At {figures.short(row['flops'])} FLOPs: {row['params']:.3g} parameters "
            f"({span(row.get('params_interval'))}), {row['tokens']:.3g} tokens, {row['ratio']:.3g} per parameter "
            f"({span(row.get('ratio_interval'))})."
        )
    warnings = [f["name"] for f in result["doctor"] if f["verdict"] == "warning"]
    if warnings:
        texts.append(f"The doctor warns of: {', '.join(warnings)}.")
    return texts


def parameters_section(result: Mapping[str, Any]) -> Section:
    """The law's parameters with standard errors and intervals."""
    body = [(n, f["value"], f.get("se"), span(f.get("interval"))) for n, f in result["parameters"].items()]
    caption = (
        f"Objective {result['value']:.8g}, a sum over rows; residuals of log loss have scale {result['scale']:.3g}."
    )
    columns = ("parameter", "value", "standard error", f"{result['level']:.0%} interval")
    return Section("Parameters", Table(columns, body), caption)


def optimum_section(result: Mapping[str, Any]) -> Section:
    """What to train at each budget, and the cost of other sizes."""
    columns = ("FLOPs", "N*", "interval", "D*", "D* / N*", "interval", "loss")
    body = [
        (
            r["flops"],
            r["params"],
            span(r.get("params_interval")),
            r["tokens"],
            r["ratio"],
            span(r.get("ratio_interval")),
        )
        + (r.get("loss"),)
        for r in result["budgets"]
    ]
    parts = [Table(columns, body)]
    if "off_optimum" in result:
        head = ("size over N*", "parameters", "tokens", "loss", "excess loss", "share of the budget wasted")
        rows = [
            tuple(row[k] for k in ("factor", "params", "tokens", "loss", "excess", "wasted"))
            for row in result["off_optimum"]
        ]
        parts.append(Table(head, rows))
    caption = "FLOPs = 6 x parameters x tokens. The second table is for the first budget." if len(parts) > 1 else ""
    return Section("What to train", parts, caption)


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
    result, sections = run(rows.without_highest_losses(config.drop_highest), config)
    write_text(workdir / "fit.json", json.dumps(finite(result), indent=1) + "\n")
    title = f"Scaling law from {result['rows']} runs"
    return result, write_report(workdir, title, [*sections, config_section(workdir)], subtitle=rows.source)
