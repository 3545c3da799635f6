"""Fit runs by one of the three approaches of Hoffmann et al. 2022, and write the result: `fit.json` and the report."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from scaling import doctor, isoflop
from scaling.fitting.bootstrap import Bootstrap, bootstrap, resamples
from scaling.fitting.fit import Fit, FitConfig, fit
from scaling.fitting.intervals import bootstrap_interval, prediction_interval
from scaling.optimum import Optimum, chinchilla_optimum, compute_optimal, inference_optimum, off_optimum
from scaling.planner import suggest
from scaling.published import CHINCHILLA, find_law
from scaling.rows import PER_PARAMETER_AND_TOKEN, RowError, Rows, make_rows
from tessera.infra.logger import write_text
from tessera.reports import scaling as figures
from tessera.reports.html import Section, Table, config_section, paragraphs, table_of, write_report
from tessera.reports.style import pick, short

# Digitized or rounded sizes of one model differ by less than this; neighboring models by more.
SAME_SIZE = 0.02


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
      inference_tokens: tokens that will be served; for each, the model that reaches the first budget's loss with the
        fewest FLOPs of training and serving together (approach 3).
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
    inference_tokens: tuple[float, ...] = ()

    def __post_init__(self):
        if not self.runs:
            raise ValueError("runs is empty: give a CSV of runs with --config.runs=FILE")
        if not self.budgets or min(self.budgets) <= 0:
            raise ValueError(f"budgets {self.budgets}: at least one positive number of FLOPs is needed")
        if not 0 < self.level < 1:
            raise ValueError(f"level {self.level} must be between 0 and 1")
        if self.inference_tokens and min(self.inference_tokens) < 0:
            raise ValueError(f"inference_tokens {self.inference_tokens}: counts of tokens cannot be negative")


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
        own.append(
            Section("Bootstrap", partial(figures.bootstrap_figure, fitted, boot, (names[0], names[1]), sizes, target))
        )
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
    findings = doctor.examine_minima(law, found, draws, max(config.budgets))
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
    findings = doctor.examine_envelope(envelope, curves, draws, max(config.budgets), named=named)
    result = describe_powers(law, draws, config, runs, findings) | {"approach": 1, "rows": len(rows)}
    table = Table(("FLOPs", "parameters of the lowest curve", "loss"), pick(envelope.tolist(), 20))
    lead = f"Approach 1: {runs} training curves, the lowest of them at {len(envelope)} FLOP counts."
    own = [Section("Envelope", [partial(figures.envelope_figure, curves, envelope, law), table])]
    return FitPage(result, [lead], own)


def by_name(fitted: Fit, theta: np.ndarray) -> dict[str, np.ndarray]:
    """Natural parameters by name."""
    return dict(zip(fitted.law.parameters, fitted.law.natural(theta), strict=True))


def optima(fitted: Fit, theta_PS: np.ndarray, budgets: tuple[float, ...]) -> Optimum:
    """N*, D* and loss at budgets; in closed form for Chinchilla's law, further columns at their medians."""
    if fitted.law is CHINCHILLA:
        return chinchilla_optimum(by_name(fitted, theta_PS), budgets)
    return compute_optimal(fitted.law, theta_PS, budgets, at=medians(fitted))


def medians(fitted: Fit) -> dict[str, float]:
    """The median of every further column the law reads."""
    return {name: float(np.median(values)) for name, values in doctor.others(fitted).items()}


def converged_draws(fitted: Fit, boot: Bootstrap) -> np.ndarray:
    """Parameters [P, S] of the resamples that converged.

    Some hundreds for laws without a closed form, which take a search per draw: they give the interval.
    """
    return boot.theta_PB[:, boot.converged_B][:, : None if fitted.law is CHINCHILLA else 300]


def edges(
    draws: np.ndarray, units: int, parameters: int, level: float, objective: str, estimate: float | None = None
) -> list[float] | None:
    """An interval from draws, or None from fewer than two finite ones; see `bootstrap_interval`."""
    finite = draws[np.isfinite(draws)]
    if len(finite) < 2:
        return None
    return [float(edge) for edge in bootstrap_interval(finite, units, parameters, level, objective, estimate=estimate)]


def describe_fit(fitted: Fit, boot: Bootstrap | None, config: ScalingConfig, whole: Rows) -> dict[str, Any]:
    """Everything `fit.json` holds for approach 3; `whole` are the rows before any were left out."""
    law, here, target = fitted.law, fitted.parameters, max(config.budgets)
    units = len(np.unique(fitted.rows[config.cluster])) if config.cluster else len(fitted.rows)

    def pair(draws: np.ndarray, estimate: float) -> list[float] | None:
        return edges(draws, units, len(law.parameters), config.level, fitted.config.objective, estimate)

    natural = by_name(fitted, boot.theta_PB[:, boot.converged_B]) if boot is not None else {}
    values: dict[str, dict[str, Any]] = {name: {"value": here[name]} for name in law.parameters}
    for name, draws in natural.items():
        values[name] |= {"interval": pair(draws, values[name]["value"]), "se": float(np.std(draws, ddof=1))}
    intervals = "bootstrap over runs, percentiles (bias-corrected for huber and laplace)"
    result: dict[str, Any] = {
        "approach": 3,
        "law": law.name,
        "formula": law.formula,
        "rows": len(fitted.rows),
        "objective": fitted.config.objective,
        **{name: getattr(fitted, name) for name in ("value", "converged", "log_likelihood", "scale")},
        "level": config.level,
        "intervals": intervals if boot is not None else "none",
        "parameters": values,
        "budgets": planned(fitted, boot, config, pair),
        "off_optimum": off_optimum(law, fitted.theta, config.budgets[0], (0.25, 0.5, 2.0, 4.0), at=medians(fitted)),
        "inference": serving(fitted, config),
        "next_runs": suggest(fitted, target),
        "doctor": [f._asdict() for f in doctor.examine(fitted, target, boot, all_rows=whole)],
    }
    if {"alpha", "beta"} <= set(law.parameters):
        result["exponents"] = {}
        for name, top, rest in (("a", "beta", "alpha"), ("b", "alpha", "beta")):
            value = here[top] / (here[top] + here[rest])
            result["exponents"][name] = {"value": value}
            if natural:
                result["exponents"][name]["interval"] = pair(natural[top] / (natural[top] + natural[rest]), value)
    return result


def planned(fitted: Fit, boot: Bootstrap | None, config: ScalingConfig, pair: Any) -> list[dict[str, Any]]:
    """N*, D*, their ratio and the loss at every asked budget, with intervals, and one new run's loss there."""
    best = optima(fitted, fitted.theta[:, None], config.budgets)
    drawn = optima(fitted, converged_draws(fitted, boot), config.budgets) if boot is not None else None
    table = []
    for c, budget in enumerate(config.budgets):
        row: dict[str, Any] = {"flops": budget}
        for name in ("params", "tokens", "ratio", "loss"):
            row[name] = float(getattr(best, name)[c, 0])
            if drawn is not None:
                row[f"{name}_interval"] = pair(getattr(drawn, name)[c], row[name])
        if boot is not None and np.isfinite(row["params"]):
            columns = {"params": [row["params"]], "tokens": [row["tokens"]], "loss": [1.0]}
            there = make_rows(columns | {name: [value] for name, value in medians(fitted).items()}, "the optimum")
            row["run_interval"] = prediction_interval(fitted, boot, there, level=config.level)[:, 0].tolist()
        table.append(row)
    return table


def serving(fitted: Fit, config: ScalingConfig) -> list[dict[str, float]]:
    """The cheapest model of the first budget's loss when tokens will be served, for every number of them."""
    best = optima(fitted, fitted.theta[:, None], config.budgets[:1])
    loss, params, table = float(best.loss[0, 0]), float(best.params[0, 0]), []
    for tokens in config.inference_tokens if np.isfinite(loss) else ():
        found = inference_optimum(fitted.law, fitted.theta, loss, tokens, at=medians(fitted))
        total = found.training_flops + found.inference_flops
        saved = 1 - total / (config.budgets[0] + 2 * params * tokens)
        table.append({"inference_tokens": tokens, "loss": loss, "saved": saved, **found._asdict()})
    return table


def describe_powers(
    law: isoflop.PowerLaw, draws: np.ndarray, config: ScalingConfig, units: int, findings: Sequence[Any]
) -> dict[str, Any]:
    """Exponents and optima of a power law, with intervals from draws [2, B] of (exponent, intercept)."""

    def pair(values: np.ndarray) -> list[float] | None:
        return edges(values, units, 2, config.level, "normal")

    def sizes(budget: float, params: Any) -> dict[str, Any]:
        tokens = budget / (PER_PARAMETER_AND_TOKEN * params)
        return {"params": params, "tokens": tokens, "ratio": tokens / params}

    table = []
    for budget in config.budgets:
        drawn = sizes(budget, np.exp(draws[1] + draws[0] * np.log(budget)))
        intervals = {f"{name}_interval": pair(values) for name, values in drawn.items()}
        table.append({"flops": budget} | sizes(budget, law(budget)) | intervals)
    exponents = {
        "a": {"value": law.exponent, "interval": pair(draws[0])},
        "b": {"value": 1 - law.exponent, "interval": pair(1 - draws[0])},
    }
    found = [finding._asdict() for finding in findings]
    return {"exponents": exponents, "budgets": table, "level": config.level, "doctor": found}


def span(pair: list[float] | None) -> str:
    """An interval in words; "not measured" without one."""
    return f"{pair[0]:.4g} to {pair[1]:.4g}" if pair else "not measured"


def summary(result: Mapping[str, Any]) -> list[str]:
    """The fit and what follows from it, in sentences."""
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
        at = f"At {short(row['flops'])} FLOPs"
        if not np.isfinite(row["params"]):
            texts.append(f"{at} this law has no best size between one and all.")
            continue
        params, ratio = (span(row.get(f"{name}_interval")) for name in ("params", "ratio"))
        texts.append(
            f"{at}: {row['params']:.3g} parameters ({params}), {row['tokens']:.3g} tokens, {row['ratio']:.3g} per "
            f"parameter ({ratio})."
        )
    warnings = [f["name"] for f in result["doctor"] if f["verdict"] == "warning"]
    if warnings:
        texts.append(f"The doctor warns of: {', '.join(warnings)}.")
    return texts


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
