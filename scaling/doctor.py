"""The fit doctor: diagnostics of approaches 1, 2 and 3, each a verdict with a sentence and the numbers behind it."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize

from scaling.fitting.bootstrap import Bootstrap, refit
from scaling.fitting.fit import Fit, huber_sum, make_problem, polish, thresholds
from scaling.isoflop import Curves, Minimum, PowerLaw
from scaling.optimum import chinchilla_optimum, compute_optimal
from scaling.rows import Rows

Verdict = Literal["fine", "note", "warning"]


class Finding(NamedTuple):
    """The result of one diagnostic: its name, verdict, a sentence, and the numbers behind it.

    Example:
      >>> import scaling
      >>> scaling.Finding("convergence", "fine", "The optimum was reached.", {"decrement": 1e-13}).verdict
      'fine'
    """

    name: str
    verdict: Verdict
    text: str
    numbers: dict[str, float]


def convergence(fitted: Fit) -> Finding:
    """Check that the fit converged."""
    numbers = {"decrement": fitted.decrement, "tol": fitted.config.tol}
    if fitted.converged:
        text = f"Newton predicts a further relative decrease of {fitted.decrement:.1e}: the optimum was reached."
        return Finding("convergence", "fine", text, numbers)
    text = f"The fit did not converge (predicted decrease {fitted.decrement:.1e}, wanted {fitted.config.tol:.0e})."
    return Finding("convergence", "warning", text + " Its parameters mean nothing yet.", numbers)


def starts(fitted: Fit) -> Finding:
    """Count starts that never moved, did not converge in the search, or ended in other optima."""
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
    """Make the mean objective with its gradient by central differences, all columns in one call."""
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
    """Run L-BFGS-B with its default tolerances from the best start, on `scale` x the mean objective.

    Returns the sum over rows at the end, the raw parameters and the number of steps.
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
    """Compare with the mean over rows as objective, under an optimizer's default tolerances."""
    there, theta, steps = _stopped(fitted, scale=1.0)
    text = (
        f"This fit sums over rows. With the mean, gradients are {len(fitted.rows)} times smaller and L-BFGS-B with its "
        f"default tolerances stops after {steps} steps"
    )
    return _early(fitted, "mean reduction", there, theta, steps, text)


def tolerance(fitted: Fit) -> Finding:
    """Compare with an optimizer's default tolerances on the sum over rows."""
    there, theta, steps = _stopped(fitted, scale=float(len(fitted.rows)))
    text = f"The sum over rows, minimized by L-BFGS-B with its default tolerances, stops after {steps} steps"
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
    """Compute the condition number of the Jacobian with unit columns: how nearly parameters trade off."""
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
    """Find outliers by the residuals' robust scale, and the effect of leaving them out on N* at the budget."""
    middle = np.median(fitted.residuals)
    scale = 1.4826 * np.median(np.abs(fitted.residuals - middle))
    far = np.flatnonzero(np.abs(fitted.residuals - middle) > threshold * scale)
    if not len(far) or len(fitted.rows) - len(far) < len(fitted.law.parameters):
        return Finding(
            "outliers", "fine", f"No row is further than {threshold:g} robust standard deviations.", {"rows": 0}
        )
    weights = np.ones((len(fitted.rows), 1))
    weights[far] = 0
    without = refit(fitted, weights)
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
    """Compute the effect on N* of exponents rounded to two decimals, as papers quote them."""
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


def dropped(fitted: Fit, all_rows: Rows, budget: float) -> Finding:
    """Compute the effect on N* of fitting all rows, when some were left out before the fit."""
    count = len(all_rows) - len(fitted.rows)
    if not count:
        return Finding("dropped rows", "fine", "No row was left out.", {"rows": 0})
    refitted = polish(fitted.basins_PK[:, :1], np.ones((len(all_rows), 1)), all_rows, fitted.law, fitted.config)
    moved = _log_optimum(fitted, np.concatenate([fitted.theta[:, None], refitted.theta], 1), budget)
    shift = float(moved[1] - moved[0])
    if not np.isfinite(shift):
        return Finding("dropped rows", "note", f"Left out were {count} of {len(all_rows)} rows.", {"rows": count})
    text = (
        f"Left out before the fit were {count} of {len(all_rows)} rows; keeping all would put N* at {budget:.3g} FLOPs "
        f"at {np.exp(shift):.3f} times this fit's."
    )
    return Finding("dropped rows", "note", text, {"rows": count, "log_shift": shift})


def _log_optimum(fitted: Fit, theta_PS: np.ndarray, budget: float) -> Float[np.ndarray, " S"]:
    if set(fitted.law.parameters) == {"A", "B", "E", "alpha", "beta"}:
        values = dict(zip(fitted.law.parameters, fitted.law.natural(theta_PS), strict=True))
        return np.log(chinchilla_optimum(values, [budget]).params[0])
    held = {name: float(np.median(values)) for name, values in others(fitted).items()}
    return np.log(compute_optimal(fitted.law, theta_PS, [budget], at=held).params[0])


def others(fitted: Fit) -> dict[str, np.ndarray]:
    """Columns of the law and the rows besides params and tokens."""
    names = {"sparsity" if f == "log_density" else f.removeprefix("log_") for f in fitted.law.features}
    return {n: fitted.rows[n] for n in sorted(names - {"params", "tokens"}) if n in fitted.rows.columns}


def extrapolation(fitted: Fit, budget: float, limit: float = 10.0) -> Finding:
    """Compare the budget with the largest run fitted."""
    return _beyond(budget, float(fitted.rows["flops"].max()), "run fitted", "that the law holds there", limit)


def _beyond(budget: float, largest: float, what: str, assumption: str, limit: float) -> Finding:
    factor = float(budget / largest)
    text = f"The budget of {budget:.3g} FLOPs is {factor:.3g} times the largest {what}"
    if factor > limit:
        return Finding("extrapolation", "warning", f"{text}: intervals assume {assumption}.", {"factor": factor})
    return Finding("extrapolation", "fine", text + ".", {"factor": factor})


def edges(fitted: Fit) -> Finding:
    """Find parameters that ran to an edge: a vanishing positive one, or one far outside the starting grid."""
    found = []
    for name, value in zip(fitted.law.parameters, fitted.theta, strict=True):
        low, high = min(fitted.law.grid[name]), max(fitted.law.grid[name])
        margin = 2 * max(high - low, 1.0)
        if not np.isfinite(value) or value < low - margin or value > high + margin:
            found.append(name)
    if found:
        text = (
            f"{', '.join(found)} ran far outside the starting grid: a term vanishes or the law does not fit these rows."
        )
        return Finding("edge minima", "warning", text, {"parameters": len(found)})
    return Finding("edge minima", "fine", "No parameter ran to an edge of what was searched.", {"parameters": 0})


def examine(
    fitted: Fit, budget: float, boot: Bootstrap | None = None, *, all_rows: Rows | None = None
) -> list[Finding]:
    """Run all diagnostics of a fit.

    Args:
      fitted: the fit.
      budget: the target, FLOPs.
      boot: of the fit, for standard errors.
      all_rows: the rows before any were left out.

    Example:
      >>> import scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7, noise=0.002)
      >>> law = scaling.find_law("chinchilla")
      >>> fitted = scaling.fit(rows, law, starts=law.raw(truth)[:, None])
      >>> [finding.name for finding in scaling.examine(fitted, 1e24) if finding.verdict == "warning"]
      ['ill conditioning', 'extrapolation']
    """
    return [
        convergence(fitted),
        starts(fitted),
        reduction(fitted),
        tolerance(fitted),
        edges(fitted),
        conditioning(fitted),
        rounding(fitted, budget),
        outliers(fitted, boot, budget),
        *([dropped(fitted, all_rows, budget)] if all_rows is not None else []),
        extrapolation(fitted, budget),
    ]


def edge_minima(minima: Sequence[Minimum]) -> Finding:
    """List budgets that were refused, with the reasons."""
    refused = [m for m in minima if m.refused]
    numbers: dict[str, float] = {"budgets": len(minima), "refused": len(refused)}
    if not refused:
        return Finding("edge minima", "fine", f"All {len(minima)} budgets have their minimum inside.", numbers)
    reasons = "; ".join(f"{m.budget:.3g} FLOPs: {m.refused}" for m in refused)
    text = f"{len(refused)} of {len(minima)} budgets are refused and not used ({reasons})."
    return Finding("edge minima", "warning", text, numbers)


def scatter(minima: Sequence[Minimum]) -> Finding:
    """Compare the scatter of points with the depth of their IsoFLOP curves."""
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
    """Check the number of budgets of the power law and their distance from it."""
    numbers = {"budgets": law.points, "residual": law.residual}
    if law.points < 4:
        text = f"The power law rests on {law.points} budgets; with so few a straight line cannot be doubted."
        return Finding("few budgets", "warning", text, numbers)
    text = f"{law.points} optima lie within {np.expm1(law.residual):.1%} (rms) of the power law."
    return Finding("few budgets", "fine", text, numbers)


def power_law_extrapolation(largest: float, budget: float, limit: float = 10.0) -> Finding:
    """Compare the budget with the largest one of a power law."""
    return _beyond(budget, largest, "used", "a straight line", limit)


def lost_resamples(draws: Float[np.ndarray, "2 B"]) -> Finding:
    """Count resamples without a power law: intervals leave them out and so may be too narrow."""
    lost = float(np.mean(~np.isfinite(draws[0]))) if draws.shape[1] else 0.0
    text = f"{lost:.1%} of {draws.shape[1]} resamples have fewer than two optima and are left out."
    return Finding("lost resamples", "warning" if lost > 0.05 else "fine", text, {"share": lost})


def examine_minima(
    law: PowerLaw, minima: Sequence[Minimum], draws: Float[np.ndarray, "2 B"], budget: float
) -> list[Finding]:
    """Run all diagnostics of approach 2 for a target budget (FLOPs)."""
    largest = max(m.budget for m in minima if not m.refused)
    return [
        edge_minima(minima),
        scatter(minima),
        straightness(law),
        lost_resamples(draws),
        power_law_extrapolation(largest, budget),
    ]


def run_labels(runs: int, named: bool) -> Finding:
    """Check whether the rows name their runs."""
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
    """Run all diagnostics of approach 1 for a target budget (FLOPs); `named`: the rows name their runs."""
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
