"""What a fit says, as numbers: what `fit.json` holds, and the sentences that open the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from scaling import doctor, isoflop
from scaling.fitting.bootstrap import Bootstrap
from scaling.fitting.fit import Fit, FitConfig
from scaling.fitting.intervals import bootstrap_interval, prediction_interval
from scaling.optimum import Optimum, chinchilla_optimum, inference_optimum, off_optimum, optimum
from scaling.planner import suggest
from scaling.published import CHINCHILLA
from scaling.rows import PER_PARAMETER_AND_TOKEN, Rows, make_rows
from tessera.reports.style import short


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
    law, target = fitted.law, max(config.budgets)
    units = len(np.unique(fitted.rows[config.cluster])) if config.cluster else len(fitted.rows)

    def pair(draws: np.ndarray, estimate: float) -> list[float] | None:
        return edges(draws, units, len(law.parameters), config.level, fitted.config.objective, estimate)

    natural = by_name(fitted, boot.theta_PB[:, boot.converged_B]) if boot is not None else {}
    values: dict[str, dict[str, Any]] = {name: {"value": fitted.parameters[name]} for name in law.parameters}
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
        "doctor": [f._asdict() for f in doctor.examine(fitted, target, boot, whole=whole)],
    }
    if {"alpha", "beta"} <= set(law.parameters):
        result["exponents"] = {}
        for name, top, rest in (("a", "beta", "alpha"), ("b", "alpha", "beta")):
            value, *draws = [of[top] / (of[top] + of[rest]) for of in (fitted.parameters, natural) if of]
            result["exponents"][name] = {"value": value} | ({"interval": pair(*draws, value)} if draws else {})
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
