"""The fit doctor: diagnostics of approaches 1, 2 and 3, each a verdict with a sentence and the numbers behind it."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize

from scaling.fitting.bootstrap import Bootstrap, refit
from scaling.fitting.fit import Fit, huber_sum, make_problem, polish, thresholds
from scaling.isoflop import Curves, Minimum, PowerLaw
from scaling.optimum import chinchilla_optimum, optimum
from scaling.rows import Rows

Verdict = Literal["fine", "note", "warning"]


class Finding(NamedTuple):
    """One examination: its name, the verdict, a sentence, and the numbers behind it."""

    name: str
    verdict: Verdict
    text: str
    numbers: dict[str, float]


def convergence(fitted: Fit) -> Finding:
    """Whether the reported optimum is one."""
    numbers = {"decrement": fitted.decrement, "tol": fitted.config.tol}
    if fitted.converged:
        text = f"Newton predicts a further relative decrease of {fitted.decrement:.1e}: the optimum was reached."
        return Finding("convergence", "fine", text, numbers)
    text = f"The fit did not converge (predicted decrease {fitted.decrement:.1e}, wanted {fitted.config.tol:.0e})."
    return Finding("convergence", "warning", text + " Its parameters mean nothing yet.", numbers)


def starts(fitted: Fit) -> Finding:
    """How many starts never moved, had not converged when searching ended, or ended elsewhere."""
    search = fitted.search
    total = search.start_PS.shape[1]
    moved = np.abs(search.ended.theta - search.start_PS).max(0) > 1e-3
    near = search.ended.value <= 1.01 * search.ended.value.min()
    numbers = {
        "starts": total,
        "unmoved": int((~moved).sum()),
        "unconverged": int((~search.ended.converged).sum()),
        "near_best": int(near.sum()),
        "basins": fitted.basins_PK.shape[1],
    }
    text = (
        f"Of {total} starts {numbers['near_best']} came within 1% of the best objective in "
        f"{fitted.config.search_steps} steps, {numbers['unconverged']} had not converged and "
        f"{numbers['unmoved']} had not moved; {numbers['basins']} distinct optima remain after polishing."
    )
    if near.mean() < 0.2:
        text += " A single start, or an average over starts, would not have found the optimum."
    return Finding("unconverged starts", "note" if near.mean() < 0.2 and total > 1 else "fine", text, numbers)


def _objective(fitted: Fit) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """The mean objective and its gradient by central differences, all columns in one call."""
    delta = thresholds(fitted.config)[-1]
    problem = make_problem(fitted.rows, fitted.law, delta)

    def value_and_gradient(theta: np.ndarray) -> tuple[float, np.ndarray]:
        step = 1e-6
        shifts = np.concatenate([np.zeros((len(theta), 1)), step * np.eye(len(theta)), -step * np.eye(len(theta))], 1)
        residual = fitted.law.predict(theta[:, None] + shifts, problem.features) - problem.target_R1
        values = huber_sum(residual, delta) / len(fitted.rows)
        values = np.where(np.isfinite(values), values, 1e10)
        return float(values[0]), (values[1 : 1 + len(theta)] - values[1 + len(theta) :]) / (2 * step)

    return value_and_gradient


def _stopped(fitted: Fit, *, scale: float) -> tuple[float, np.ndarray, int]:
    """Where L-BFGS-B with its default tolerances stops from the best start, for `scale` x the mean objective.

    Returns the sum over rows there, the raw parameters and the number of steps.
    """
    mean = _objective(fitted)
    delta = thresholds(fitted.config)[-1]
    problem = make_problem(fitted.rows, fitted.law, delta)
    start = fitted.search.start_PS
    initial = huber_sum(fitted.law.predict(start, problem.features) - problem.target_R1, delta)
    first = start[:, int(np.nanargmin(np.where(np.isfinite(initial), initial, np.inf)))]

    def scaled(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = mean(theta)
        return scale * value, scale * gradient

    stopped = minimize(scaled, first, jac=True, method="L-BFGS-B")
    return float(stopped.fun / scale * len(fitted.rows)), stopped.x, int(stopped.nit)


def _share(fitted: Fit, theta: np.ndarray) -> float | None:
    """beta / (alpha + beta) of raw parameters, for laws that have both."""
    if not {"alpha", "beta"} <= set(fitted.law.parameters):
        return None
    alpha, beta = (theta[fitted.law.parameters.index(name)] for name in ("alpha", "beta"))
    return float(beta / (alpha + beta))


def reduction(fitted: Fit) -> Finding:
    """What the mean over rows, with an optimizer's default tolerances, would have returned from the best start."""
    there, theta, steps = _stopped(fitted, scale=1.0)
    text = (
        f"This fit sums over rows. With the mean, gradients are {len(fitted.rows)} times smaller and L-BFGS-B with its "
        f"default tolerances stops after {steps} steps"
    )
    return _early(fitted, "mean reduction", there, theta, steps, text)


def tolerance(fitted: Fit) -> Finding:
    """What the sum over rows with an optimizer's default tolerances would have returned from the best start."""
    there, theta, steps = _stopped(fitted, scale=float(len(fitted.rows)))
    text = f"The sum over rows, minimised by L-BFGS-B with its default tolerances, stops after {steps} steps"
    return _early(fitted, "loose tolerance", there, theta, steps, text)


def _early(fitted: Fit, name: str, there: float, theta: np.ndarray, steps: int, text: str) -> Finding:
    ratio = there / max(fitted.value, 1e-300)
    numbers = {"sum": fitted.value, "stopped": there, "ratio": ratio, "steps": steps}
    elsewhere, here = _share(fitted, theta), _share(fitted, fitted.theta)
    if ratio <= 1.001:
        return Finding(name, "fine", text + " at the same optimum.", numbers)
    text += f" at {ratio:.3g} times the objective"
    if elsewhere is not None and here is not None:
        numbers |= {"a": elsewhere, "a_here": here}
        text += f" (a = {elsewhere:.3f} instead of {here:.3f})"
    return Finding(name, "note", text + ".", numbers)


def conditioning(fitted: Fit, limit: float = 100.0) -> Finding:
    """How nearly some combination of parameters is free: condition number of the unit-column Jacobian."""
    law, theta = fitted.law, fitted.theta[:, None]
    step = 1e-6
    features = law.gather(fitted.rows)
    shifts = np.concatenate([step * np.eye(len(theta)), -step * np.eye(len(theta))], 1)
    moved = law.predict(theta + shifts, features)
    slopes = (moved[:, : len(theta)] - moved[:, len(theta) :]) / (2 * step)
    size = np.linalg.norm(slopes, axis=0)
    dead = [name for name, norm in zip(law.parameters, size, strict=True) if norm < 1e-8 * size.max()]
    if dead:
        text = (
            f"The rows do not determine {', '.join(dead)}: predictions do not depend on it here. Hold it or add rows."
        )
        return Finding("ill conditioning", "warning", text, {"condition": float("inf")})
    unit = slopes / size
    number = float(np.linalg.cond(unit))
    overlap = np.abs(unit.T @ unit) - np.eye(len(theta))
    i, j = np.unravel_index(np.argmax(overlap), overlap.shape)
    pair = f"{law.parameters[i]} and {law.parameters[j]}"
    numbers = {"condition": number, "largest_correlation": float(overlap[i, j])}
    text = f"Condition number {number:.3g}; {pair} are the hardest to tell apart (cosine {overlap[i, j]:.4f})."
    if number > limit:
        text += " They trade off against each other: single parameters mean little without the rest."
    return Finding("ill conditioning", "warning" if number > limit else "fine", text, numbers)


def outliers(fitted: Fit, boot: Bootstrap | None, budget: float, threshold: float = 8.0) -> Finding:
    """Rows far from the law by the residuals' own scale, and what leaving them out does to N* at the budget."""
    middle = np.median(fitted.residuals)
    scale = 1.4826 * np.median(np.abs(fitted.residuals - middle))
    far = np.flatnonzero(np.abs(fitted.residuals - middle) > threshold * scale)
    if not len(far) or len(fitted.rows) - len(far) < len(fitted.law.parameters):
        return Finding(
            "outliers", "fine", f"No row is further than {threshold:g} robust standard deviations.", {"rows": 0}
        )
    kept = np.ones((len(fitted.rows), 1))
    kept[far] = 0
    without = refit(fitted, kept)
    pair = np.concatenate([fitted.theta[:, None], without.theta_PB], 1)
    moved = _log_optimum(fitted, pair, budget)
    shift = float(moved[1] - moved[0])
    numbers = {"rows": len(far), "log_shift": shift}
    if not np.isfinite(shift):
        text = f"Of the rows fitted, {len(far)} are further than {threshold:g} robust standard deviations from the law."
        return Finding("outliers", "note", text, {"rows": len(far)})
    shown = ", ".join(str(i + 1) for i in far[:10]) + (" ..." if len(far) > 10 else "")
    text = (
        f"Of the rows fitted, {len(far)} (number {shown}) are further than {threshold:g} robust standard "
        f"deviations from the law; without them N* at {budget:.3g} FLOPs is {np.exp(shift):.3f} times this fit's"
    )
    verdict: Verdict = "note"
    if boot is not None:
        spread = float(np.nanstd(_log_optimum(fitted, boot.theta_PB[:, boot.converged_B][:, :200], budget)))
        numbers["standard_errors"] = abs(shift) / spread
        text += f", {abs(shift) / spread:.2f} of its standard error"
        verdict = "warning" if abs(shift) > 0.5 * spread else "note"
    return Finding("outliers", verdict, text + ".", numbers)


def rounding(fitted: Fit, budget: float) -> Finding:
    """What quoting exponents with two decimals, as papers do, does to N*."""
    exponents = [i for i, name in enumerate(fitted.law.parameters) if name not in fitted.law.positive]
    rounded = fitted.theta.copy()
    rounded[exponents] = np.round(rounded[exponents], 2)
    moved = _log_optimum(fitted, np.stack([fitted.theta, rounded], 1), budget)
    shift = float(moved[1] - moved[0])
    if not np.isfinite(shift):
        return Finding("rounded parameters", "fine", "The law has no inner optimum over sizes to be moved.", {})
    text = (
        f"With the exponents rounded to two decimals, N* at {budget:.3g} FLOPs would be {np.exp(shift):.3f} times as "
        "large"
    )
    if abs(shift) > 0.05:
        return Finding("rounded parameters", "note", text + ": quote more digits.", {"log_shift": shift})
    return Finding("rounded parameters", "fine", text + ".", {"log_shift": shift})


def dropped(fitted: Fit, whole: Rows, budget: float) -> Finding:
    """What keeping all rows would have done to N*, when some were left out before the fit."""
    count = len(whole) - len(fitted.rows)
    if not count:
        return Finding("dropped rows", "fine", "No row was left out.", {"rows": 0})
    kept = polish(fitted.basins_PK[:, :1], np.ones((len(whole), 1)), whole, fitted.law, fitted.config)
    moved = _log_optimum(fitted, np.concatenate([fitted.theta[:, None], kept.theta], 1), budget)
    shift = float(moved[1] - moved[0])
    if not np.isfinite(shift):
        return Finding("dropped rows", "note", f"Left out were {count} of {len(whole)} rows.", {"rows": count})
    text = (
        f"Left out before the fit were {count} of {len(whole)} rows; keeping all would put N* at {budget:.3g} FLOPs "
        f"at {np.exp(shift):.3f} times this fit's."
    )
    return Finding("dropped rows", "note", text, {"rows": count, "log_shift": shift})


def _log_optimum(fitted: Fit, theta_PS: np.ndarray, budget: float) -> Float[np.ndarray, "S"]:
    if set(fitted.law.parameters) == {"A", "B", "E", "alpha", "beta"}:
        values = dict(zip(fitted.law.parameters, fitted.law.natural(theta_PS), strict=True))
        return np.log(chinchilla_optimum(values, [budget]).params[0])
    held = {name: float(np.median(values)) for name, values in others(fitted).items()}
    return np.log(optimum(fitted.law, theta_PS, [budget], at=held).params[0])


def others(fitted: Fit) -> dict[str, np.ndarray]:
    """Columns besides params and tokens that the law reads and the rows have."""
    names = {"sparsity" if f == "log_density" else f.removeprefix("log_") for f in fitted.law.features}
    return {n: fitted.rows[n] for n in sorted(names - {"params", "tokens"}) if n in fitted.rows.columns}


def extrapolation(fitted: Fit, budget: float, limit: float = 10.0) -> Finding:
    """How far the budget lies beyond the largest run."""
    return _beyond(budget, float(fitted.rows["flops"].max()), "run fitted", "that the law holds there", limit)


def _beyond(budget: float, largest: float, what: str, assumption: str, limit: float) -> Finding:
    factor = float(budget / largest)
    text = f"The budget of {budget:.3g} FLOPs is {factor:.3g} times the largest {what}"
    if factor > limit:
        return Finding("extrapolation", "warning", f"{text}: intervals assume {assumption}.", {"factor": factor})
    return Finding("extrapolation", "fine", text + ".", {"factor": factor})


def edges(fitted: Fit) -> Finding:
    """Parameters that ran to an edge: a positive one that vanished, or one far outside its starting grid."""
    found = []
    for name, value in zip(fitted.law.parameters, fitted.theta, strict=True):
        low, high = min(fitted.law.grid[name]), max(fitted.law.grid[name])
        room = max(high - low, 1.0)
        if not np.isfinite(value) or value < low - 2 * room or value > high + 2 * room:
            found.append(name)
    if found:
        text = (
            f"{', '.join(found)} ran far outside the starting grid: a term vanishes or the law does not fit these rows."
        )
        return Finding("edge minima", "warning", text, {"parameters": len(found)})
    return Finding("edge minima", "fine", "No parameter ran to an edge of what was searched.", {"parameters": 0})


def examine(fitted: Fit, budget: float, boot: Bootstrap | None = None, *, whole: Rows | None = None) -> list[Finding]:
    """All examinations of a fit for a target budget (FLOPs); `whole` are the rows before any were left out."""
    return [
        convergence(fitted),
        starts(fitted),
        reduction(fitted),
        tolerance(fitted),
        edges(fitted),
        conditioning(fitted),
        rounding(fitted, budget),
        outliers(fitted, boot, budget),
        *([dropped(fitted, whole, budget)] if whole is not None else []),
        extrapolation(fitted, budget),
    ]


def edge_minima(minima: Sequence[Minimum]) -> Finding:
    """Budgets that were refused, and why."""
    refused = [m for m in minima if m.refused]
    numbers: dict[str, float] = {"budgets": len(minima), "refused": len(refused)}
    if not refused:
        return Finding("edge minima", "fine", f"All {len(minima)} budgets have their minimum inside.", numbers)
    reasons = "; ".join(f"{m.budget:.3g} FLOPs: {m.refused}" for m in refused)
    text = f"{len(refused)} of {len(minima)} budgets are refused and not used ({reasons})."
    return Finding("edge minima", "warning", text, numbers)


def scatter(minima: Sequence[Minimum]) -> Finding:
    """How noisy the points are beside the depth of the curves they should determine."""
    ratios = [m.scatter / m.depth for m in minima if not m.refused and m.scatter > 0]
    if not ratios:
        return Finding("scatter", "fine", "The curves pass through their points: scatter is not measured.", {})
    worst = float(max(ratios))
    text = (
        f"Points scatter about their parabolas by {np.median(ratios):.2g} of the parabola's depth (worst {worst:.2g})"
    )
    numbers = {"median": float(np.median(ratios)), "worst": worst}
    if worst > 0.5:
        return Finding("scatter", "warning", text + ": the minima move with the noise.", numbers)
    return Finding("scatter", "fine", text + ".", numbers)


def straightness(law: PowerLaw) -> Finding:
    """How many budgets the power law rests on and how far they are from it."""
    numbers = {"budgets": law.points, "residual": law.residual}
    if law.points < 4:
        text = f"The power law rests on {law.points} budgets; with so few a straight line cannot be doubted."
        return Finding("few budgets", "warning", text, numbers)
    text = f"{law.points} optima lie within {np.expm1(law.residual):.1%} (rms) of the power law."
    return Finding("few budgets", "fine", text, numbers)


def power_law_extrapolation(largest: float, budget: float, limit: float = 10.0) -> Finding:
    """How far the budget lies beyond the largest that a power law rests on."""
    return _beyond(budget, largest, "used", "a straight line", limit)


def lost_resamples(draws: Float[np.ndarray, "2 B"]) -> Finding:
    """Resamples without a power law: intervals leave them out, so many of them make intervals too narrow."""
    lost = float(np.mean(~np.isfinite(draws[0]))) if draws.shape[1] else 0.0
    text = f"{lost:.1%} of {draws.shape[1]} resamples have fewer than two optima and are left out."
    return Finding("lost resamples", "warning" if lost > 0.05 else "fine", text, {"share": lost})


def examine_minima(
    law: PowerLaw, minima: Sequence[Minimum], draws: Float[np.ndarray, "2 B"], budget: float
) -> list[Finding]:
    """All examinations of approach 2 for a target budget (FLOPs)."""
    largest = max(m.budget for m in minima if not m.refused)
    return [
        edge_minima(minima),
        scatter(minima),
        straightness(law),
        lost_resamples(draws),
        power_law_extrapolation(largest, budget),
    ]


def run_labels(runs: int, named: bool) -> Finding:
    """Whether the rows said which run they belong to."""
    if named:
        return Finding("runs", "fine", f"{runs} runs by the column `run`.", {"runs": runs})
    text = (
        f"There is no column `run`: rows of equal size were read as one curve, {runs} in all. That is what approach 1 "
        "wants if every row is a run trained to the end of its own schedule."
    )
    return Finding("runs", "note", text, {"runs": runs})


def examine_envelope(
    envelope: Float[np.ndarray, "E 3"],
    curves: Curves,
    draws: Float[np.ndarray, "2 B"],
    budget: float,
    *,
    named: bool = True,
) -> list[Finding]:
    """All examinations of approach 1 for a target budget (FLOPs); `named`: the rows said which run they belong to."""
    sizes, used = len(np.unique(curves.params)), len(np.unique(envelope[:, 1]))
    share = len(envelope) / len(curves.flops)
    numbers = {"sizes": sizes, "used": used, "share": share}
    text = (
        f"{used} of {sizes} sizes are the lowest somewhere, at {share:.0%} of the FLOP counts looked at; where the "
        "smallest or the largest size wins, better sizes may not have been tried, and the point is left out."
    )
    edges = Finding("edge minima", "warning" if share < 0.5 or used < 4 else "fine", text, numbers)
    largest = float(envelope[:, 0].max())
    return [
        run_labels(len(curves.params), named),
        edges,
        lost_resamples(draws),
        power_law_extrapolation(largest, budget),
    ]
