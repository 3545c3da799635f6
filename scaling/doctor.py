"""The fit doctor: diagnostics of approaches 1, 2 and 3, each a verdict with a sentence and the numbers behind it."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.stats import chi2, f

from scaling.fitting.bootstrap import Bootstrap, refit
from scaling.fitting.fit import Fit, make_problem, polish, row_losses, weights_of
from scaling.fitting.intervals import relative_likelihood
from scaling.isoflop import Curves, Minimum, PowerLaw, approach_2
from scaling.optimum import chinchilla_optimum, compute_optimal
from scaling.published import CHINCHILLA
from scaling.rows import Rows, counted

Verdict = Literal["fine", "note", "warning"]
At = Mapping[str, float] | None
"""Values at which a law's further columns are held; the medians of the rows where None."""


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


def _short(value: float) -> str:
    """A number with three digits, its exponent without sign and zeros: 1e25."""
    return re.sub(r"e\+0*", "e", f"{value:.3g}")


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
        f"{numbers['unmoved']} had not moved; distinct optima after polishing: {numbers['basins']}."
    )
    if near.mean() < 0.2:
        text += " A single start, or an average over starts, would not have found the optimum."
    return Finding("unconverged starts", "note" if near.mean() < 0.2 and total > 1 else "fine", text, numbers)


def _objective(fitted: Fit) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """Make the mean objective with its gradient by central differences, all columns in one call."""
    weights = weights_of(fitted.rows, fitted.config)
    problem = make_problem(fitted.rows, fitted.law, fitted.config)

    def value_and_gradient(theta: np.ndarray) -> tuple[float, np.ndarray]:
        step = 1e-6
        shifts = np.concatenate([np.zeros((len(theta), 1)), step * np.eye(len(theta)), -step * np.eye(len(theta))], 1)
        values = np.sum(weights * row_losses(theta[:, None] + shifts, problem, fitted.law)[0], 0) / len(fitted.rows)
        values = np.where(np.isfinite(values), values, 1e10)
        return float(values[0]), (values[1 : 1 + len(theta)] - values[1 + len(theta) :]) / (2 * step)

    return value_and_gradient


def _stopped(fitted: Fit, *, scale: float) -> tuple[float, np.ndarray, int]:
    """Run L-BFGS-B with its default tolerances from the best start, on `scale` x the mean objective.

    Returns the sum over rows at the end, the raw parameters and the number of steps.
    """
    mean = _objective(fitted)
    start = fitted.search.start_PS
    problem = make_problem(fitted.rows, fitted.law, fitted.config)
    initial = np.sum(weights_of(fitted.rows, fitted.config) * row_losses(start, problem, fitted.law)[0], 0)
    first = start[:, int(np.nanargmin(np.where(np.isfinite(initial), initial, np.inf)))]

    def scaled(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = mean(theta)
        return scale * value, scale * gradient

    stopped = minimize(scaled, first, jac=True, method="L-BFGS-B")
    return float(stopped.fun / scale * len(fitted.rows)), stopped.x, int(stopped.nit)


def growth(
    fitted: Fit, theta_PS: Float[np.ndarray, "P S"], budgets: Sequence[float], at: At = None
) -> Float[np.ndarray, " S"]:
    """Compute the slope of log N* over log C between the smallest and the largest budget; of one, from its tenth.

    Example:
      >>> import scaling
      >>> from scaling.doctor import growth
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7, noise=0.002)
      >>> law = scaling.find_law("chinchilla")
      >>> fitted = scaling.fit(rows, law, starts=law.raw(truth)[:, None])
      >>> round(float(growth(fitted, law.raw(truth)[:, None], [1e20, 1e22])[0]), 4)  # beta / (alpha + beta)
      0.4516
    """
    low, high = min(budgets), max(budgets)
    low = low if low < high else high / 10
    smaller, larger = (_log_optimum(fitted, theta_PS, budget, at) for budget in (low, high))
    return (larger - smaller) / np.log(high / low)


def reduction(fitted: Fit, budgets: Sequence[float], at: At = None) -> Finding:
    """Compare with the mean over rows as objective, under an optimizer's default tolerances."""
    there, theta, steps = _stopped(fitted, scale=1.0)
    text = (
        f"This fit sums over rows. With the mean, gradients are {len(fitted.rows)} times smaller and L-BFGS-B with its "
        f"default tolerances stops after {counted(steps, 'step')}"
    )
    return _early(fitted, "mean reduction", there, theta, steps, text, budgets, at)


def tolerance(fitted: Fit, budgets: Sequence[float], at: At = None) -> Finding:
    """Compare with an optimizer's default tolerances on the sum over rows."""
    there, theta, steps = _stopped(fitted, scale=float(len(fitted.rows)))
    text = f"The sum over rows, minimized by L-BFGS-B with its default tolerances, stops after {counted(steps, 'step')}"
    return _early(fitted, "loose tolerance", there, theta, steps, text, budgets, at)


def _early(
    fitted: Fit, name: str, there: float, theta: np.ndarray, steps: int, text: str, budgets: Sequence[float], at: At
) -> Finding:
    ratio = there / max(fitted.value, 1e-300)
    numbers = {"sum": fitted.value, "stopped": there, "ratio": ratio, "steps": steps}
    if ratio <= 1.001:
        return Finding(name, "fine", text + " at the same optimum.", numbers)
    text += f" at {ratio:.3g} times the objective"
    elsewhere, here = growth(fitted, np.stack([theta, fitted.theta], 1), budgets, at)
    if np.isfinite(here):
        numbers |= {"a": float(elsewhere), "a_here": float(here)}
        text += f" (a = {elsewhere:.3f} instead of {here:.3f})" if np.isfinite(elsewhere) else " (without a best size)"
    return Finding(name, "note", text + ".", numbers)


def without_effect(fitted: Fit) -> list[str]:
    """List parameters that no row's prediction depends on at the fit, to first order."""
    size = np.linalg.norm(fitted.law.slopes(fitted.theta, fitted.rows), axis=0)
    return [name for name, norm in zip(fitted.law.parameters, size, strict=True) if norm < 1e-8 * size.max()]


def conditioning(fitted: Fit, limit: float = 100.0) -> Finding:
    """Compute the condition number of the Jacobian with unit columns: how nearly parameters trade off."""
    law = fitted.law
    slopes = law.slopes(fitted.theta, fitted.rows)
    size = np.linalg.norm(slopes, axis=0)
    if dead := without_effect(fitted):
        text = (
            f"The rows do not determine {', '.join(dead)}: predictions do not depend on them. Hold them (--config.hold."
            f"{dead[0]}=VALUE) or add rows."
        )
        return Finding("ill conditioning", "warning", text, {"condition": float("inf")})
    unit = slopes / size
    number = float(np.linalg.cond(unit))
    overlap = np.abs(unit.T @ unit) - np.eye(len(size))
    i, j = np.unravel_index(np.argmax(overlap), overlap.shape)
    pair = f"{law.parameters[i]} and {law.parameters[j]}"
    numbers = {"condition": number, "largest_correlation": float(overlap[i, j])}
    text = f"Condition number {number:.3g}; {pair} are the hardest to tell apart (cosine {overlap[i, j]:.4f})."
    if number > limit:
        text += " They trade off against each other: single parameters mean little without the rest."
    return Finding("ill conditioning", "warning" if number > limit else "fine", text, numbers)


def outliers(fitted: Fit, boot: Bootstrap | None, budget: float, threshold: float = 8.0, at: At = None) -> Finding:
    """Find outliers by the residuals' robust scale, and the effect of leaving them out on N* at the budget."""
    middle = np.median(fitted.residuals)
    scale = 1.4826 * np.median(np.abs(fitted.residuals - middle))
    # Residuals of 1e-9 are rounding.
    far = np.flatnonzero(np.abs(fitted.residuals - middle) > threshold * max(scale, 1e-9))
    if not len(far) or len(fitted.rows) - len(far) < len(fitted.law.parameters):
        return Finding(
            "outliers", "fine", f"No row is further than {threshold:g} robust standard deviations.", {"rows": 0}
        )
    weights = np.ones((len(fitted.rows), 1))
    weights[far] = 0
    without = refit(fitted, weights)
    pair = np.concatenate([fitted.theta[:, None], without.theta_PB], 1)
    moved = _log_optimum(fitted, pair, budget, at)
    shift = float(moved[1] - moved[0])
    numbers = {"rows": len(far), "log_shift": shift}
    are_far = f"Of the rows fitted, {len(far)} ({fitted.rows.places(far)}) {'is' if len(far) == 1 else 'are'} further "
    are_far += f"than {threshold:g} robust standard deviations"
    if not np.isfinite(shift):
        text = f"{are_far} from the law."
        return Finding("outliers", "note", text, {"rows": len(far)})
    text = f"{are_far} from the law; without {'it' if len(far) == 1 else 'them'} N* at {_short(budget)} FLOPs is "
    text += f"{np.exp(shift):.3f} times this fit's"
    verdict: Verdict = "note"
    if boot is not None:
        spread = float(np.nanstd(_log_optimum(fitted, boot.theta_PB[:, boot.converged_B][:, :200], budget, at)))
        numbers["standard_errors"] = abs(shift) / max(spread, 1e-12)
        text += f", {numbers['standard_errors']:.2f} of its standard error"
        verdict = "warning" if abs(shift) > 0.5 * spread else "note"
    return Finding("outliers", verdict, text + ".", numbers)


def rounding(fitted: Fit, budget: float, at: At = None) -> Finding:
    """Compute the effect on N* of exponents rounded to two decimals, as papers quote them."""
    exponents = [i for i, name in enumerate(fitted.law.parameters) if name not in fitted.law.positive]
    rounded = fitted.theta.copy()
    rounded[exponents] = np.round(rounded[exponents], 2)
    moved = _log_optimum(fitted, np.stack([fitted.theta, rounded], 1), budget, at)
    shift = float(moved[1] - moved[0])
    if not np.isfinite(shift):
        return Finding("rounded parameters", "fine", "The law has no inner optimum over sizes to be moved.", {})
    text = (
        f"With the exponents rounded to two decimals, N* at {_short(budget)} FLOPs would be "
        f"{np.exp(shift):.3f} times as large"
    )
    if abs(shift) > 0.05:
        return Finding("rounded parameters", "note", text + ": quote more digits.", {"log_shift": shift})
    return Finding("rounded parameters", "fine", text + ".", {"log_shift": shift})


def dropped(fitted: Fit, all_rows: Rows, budget: float, at: At = None) -> Finding:
    """Compute the effect on N* of fitting all rows, when some were left out before the fit."""
    if len(all_rows) == len(fitted.rows):
        return left_out(fitted.rows, all_rows)
    refitted = polish(fitted.basins_PK[:, :1], weights_of(all_rows, fitted.config), all_rows, fitted.law, fitted.config)
    moved = _log_optimum(fitted, np.concatenate([fitted.theta[:, None], refitted.theta], 1), budget, at)
    shift = float(moved[1] - moved[0])
    effect = f"N* at {_short(budget)} FLOPs at {np.exp(shift):.3f} times this fit's" if np.isfinite(shift) else ""
    return left_out(fitted.rows, all_rows, effect, **({"log_shift": shift} if np.isfinite(shift) else {}))


def left_out(rows: Rows, all_rows: Rows, effect: str = "", **numbers: float) -> Finding:
    """Tell how many rows were left out before a fit, and the effect of leaving them in, as text and numbers."""
    count = len(all_rows) - len(rows)
    if not count:
        return Finding("dropped rows", "fine", "No row was left out.", {"rows": 0})
    text = f"Left out before the fit were {count} of {len(all_rows)} rows, those of the highest losses"
    text += f"; keeping all would put {effect}." if effect else "."
    return Finding("dropped rows", "note", text, {"rows": count} | numbers)


def _log_optimum(fitted: Fit, theta_PS: np.ndarray, budget: float, at: At) -> Float[np.ndarray, " S"]:
    if fitted.law is CHINCHILLA:  # names alone do not tell: others may hold a parameter more
        return np.log(chinchilla_optimum(fitted.law.by_name(theta_PS), [budget]).params[0])
    held = {name: float(np.median(values)) for name, values in others(fitted).items()} | dict(at or {})
    return np.log(compute_optimal(fitted.law, theta_PS, [budget], at=held).params[0])


def others(fitted: Fit) -> dict[str, np.ndarray]:
    """Columns of the law and the rows besides sizes, which a budget sets."""
    names = {"sparsity" if f == "log_density" else f.removeprefix("log_") for f in fitted.law.features}
    return {n: fitted.rows[n] for n in sorted(names - {"params", "tokens", "flops"}) if n in fitted.rows.columns}


def undetermined(fitted: Fit) -> str:
    """Find the reason why a fit determines no compute-optimal size; "" if there is none.

    Reasons are the rows' (`undetermined_rows`), an exponent of params or tokens at its bound or far beyond those of any
    loss curve, or a term that vanishes.

    Example:
      >>> import numpy as np, scaling
      >>> tokens = np.geomspace(1e9, 1e11, 12)
      >>> rows = scaling.make_rows({"params": [1e8] * 12, "tokens": tokens, "loss": 2 + 300 / tokens**0.3})
      >>> law = scaling.find_law("chinchilla")
      >>> scaling.undetermined(scaling.fit(rows, law, starts=law.starts()[:, ::90]))
      'all runs have N = 1e+08 params: runs of other params are needed'
    """
    return fitted.undetermined


def near_optima(fitted: Fit, budget: float, at: At = None) -> Finding:
    """Find other optima that the rows hardly tell from the best, and how far apart they are.

    An optimum counts as near while its likelihood ratio to the best is under chi-squared's 95% point for one parameter.
    """
    close = np.arange(0)
    if fitted.value > 1e-18 * len(fitted.rows):  # residuals of 1e-9 are rounding: no likelihood to compare
        close = np.flatnonzero(relative_likelihood(fitted, fitted.basin_values) < chi2.ppf(0.95, 1))
        close = close[close > 0]
    if not len(close):
        return Finding("near-equal optima", "fine", "No other optimum comes near the best.", {"optima": 1})
    natural = fitted.law.natural(fitted.basins_PK)
    sizes = _log_optimum(fitted, fitted.basins_PK, budget, at)
    told, largest = [], 0.0
    for k in close[:3]:
        moved = natural[:, k] / np.where(natural[:, 0] == 0, np.nan, natural[:, 0])
        apart = np.abs(np.log(np.where(moved > 0, moved, np.nan)))
        i = int(np.nanargmax(apart)) if np.isfinite(apart).any() else 0
        text = f"objective {fitted.basin_values[k] / fitted.value - 1:.1e} above, {fitted.law.parameters[i]} "
        text += f"{natural[i, k]:.4g} instead of {natural[i, 0]:.4g}"
        shift = float(sizes[k] - sizes[0])
        if np.isfinite(shift):
            largest = max(largest, abs(shift))
            text += f", N* {np.exp(shift):.3g} times as large"
        told.append(text)
    others_ = f"{len(close)} other optima are" if len(close) > 1 else "Another optimum is"
    text = f"{others_} as likely: {'; '.join(told)}. Intervals are about the best alone."
    return Finding("near-equal optima", "warning", text, {"optima": 1 + len(close), "log_shift": largest})


def lost_fits(boot: Bootstrap) -> Finding:
    """Count resamples whose fit did not converge: intervals leave them out."""
    lost = float(np.mean(~boot.converged_B))
    text = f"{int((~boot.converged_B).sum())} of {len(boot.converged_B)} resamples did not converge and are left out."
    return Finding("lost resamples", "warning" if lost > 0.01 else "fine", text, {"share": lost})


def outside_budgets(groups: Int[np.ndarray, " R"], rows: Rows, used: str = "IsoFLOP curves") -> Finding:
    """Count rows outside every budget."""
    out = np.flatnonzero(groups < 0)
    numbers: dict[str, float] = {"rows": len(out), "budgets": int(groups.max(initial=-1)) + 1}
    if not len(out):
        text = f"All {len(rows)} rows are at one of {numbers['budgets']} budgets."
        return Finding("rows outside budgets", "fine", text, numbers)
    text = f"{len(out)} of {len(rows)} rows are at none of {numbers['budgets']} budgets, and {used} leave them out: "
    text += "name the budgets with --config.isoflops."
    return Finding("rows outside budgets", "warning", text, numbers)


def cubic_term(minima: Sequence[Minimum]) -> Finding:
    """Test whether IsoFLOP curves are parabolas: an F test of a cubic term in log N, over all budgets together."""
    tested = [m for m in minima if m.runs > 4 and np.isfinite(m.cubic_scatter)]
    spare = sum(m.runs - 4 for m in tested)
    if not spare:
        text = "No budget has the five sizes that a test of its parabola needs."
        return Finding("cubic term", "fine", text, {})
    rest = sum(m.runs * m.cubic_scatter**2 for m in tested)
    gained = sum(m.runs * m.scatter**2 for m in tested) - rest
    p = float(f.sf(gained / len(tested) / max(rest / spare, 1e-300), len(tested), spare))
    numbers = {"p": p, "budgets": len(tested)}
    if p >= 0.01:
        return Finding(
            "cubic term", "fine", f"A cubic term in log N is not significant (F test, p = {p:.2g}).", numbers
        )
    text = "IsoFLOP curves are skewed: a cubic term in log N is significant (F test over "
    text += (
        f"{counted(len(tested), 'budget')}, p = {p:.1g}), so a parabola's minimum depends on the sizes beside it. It "
    )
    text += (
        "depends on them less with fewer sizes (--config.nearest=7, --config.within=4), and that of an Akima spline "
    )
    text += "(--config.curve=akima) only on those next to it."
    return Finding("cubic term", "warning", text, numbers)


def minima_under_law(
    fitted: Fit, groups: Int[np.ndarray, " R"], *, draws: int = 200, seed: int = 42, **options: Any
) -> Float[np.ndarray, " B"]:
    """Simulate the exponents that approach 2 would give at these sizes if the fitted law were true.

    Losses are the law's with normal noise of the residuals' scale, which a wrong law widens. Curves that are no
    parabola bias approach 2 in the same way here, so what it really gave can be compared.

    Args:
      fitted: the law.
      groups: budget of every row.
      draws: number of simulated tables.
      seed: of the noise.
      **options: of `scaling.isoflop.minimum`.
    """
    stream = np.random.RandomState(seed)
    mean = np.log(fitted.rows["loss"]) + fitted.residuals
    found = []
    for _ in range(draws):
        losses = np.exp(mean + fitted.scale * stream.standard_normal(len(mean)))
        try:
            found.append(approach_2(Rows({**fitted.rows.columns, "loss": losses}), groups, **options)[0].exponent)
        except ValueError:
            continue
    return np.array(found)


def disagreement(
    found: Mapping[str, tuple[float, float, float]],
    paired: Mapping[tuple[str, str], Sequence[float] | None] | None = None,
    under_law: Mapping[str, tuple[float, float, float]] | None = None,
) -> Finding:
    """Compare exponents of N* from several approaches.

    Two disagree where the interval of their difference leaves out 0: that of paired draws, or, where there are none,
    as if they were independent (they share their rows, so that it is wide).

    Args:
      found: value, lower and upper end by approach.
      paired: interval of the difference of two approaches, from the same resamples.
      under_law: for approach 2, the value, and the ends of the values it would have if the fitted law were true
        (`minima_under_law`).

    Example:
      >>> from scaling.doctor import disagreement
      >>> disagreement({"approach 2": (0.43, 0.41, 0.45), "approach 3": (0.345, 0.33, 0.36)}).verdict
      'warning'
    """
    names, apart, texts = list(found), [], []
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            (a, *first), (b, *second) = found[one], found[other]
            ends = (first[1] - a, b - second[0]) if a < b else (a - first[0], second[1] - b)
            between = (paired or {}).get((one, other))
            if (between[0] > 0 or between[1] < 0) if between else abs(a - b) > np.hypot(*ends):
                apart.append(f"{one} (C^{a:.3f}) and {other} (C^{b:.3f})")
    if apart:
        texts.append(f"{'; '.join(apart)} are further apart than their intervals allow")
    for name, (value, low, high) in (under_law or {}).items():
        if not low <= value <= high:
            texts.append(
                f"{name} would give C^{low:.3f} to C^{high:.3f} if the fitted law were true, not C^{value:.3f}"
            )
    numbers: dict[str, float] = {"approaches": len(names), "disagreements": len(texts)}
    if len(names) < 2 and not texts:
        text = f"Exponents of N* with an interval: {len(names)}. There is nothing to compare."
        return Finding("approaches disagree", "note", text, numbers)
    if not texts:
        text = f"The exponents of N* by {len(names)} approaches agree within their intervals."
        return Finding("approaches disagree", "fine", text, numbers)
    assumed = {
        "approach 1": "that the size of the lowest curve is the best (approach 1)",
        "approach 2, parabola": "the parabola (2)",
        "approach 2, akima": "that losses have little noise (2, akima)",
        "approach 3": "the law (3)",
    }
    told = "; ".join(texts).replace("the fitted law", "approach 3")
    doubted = [what for name, what in assumed.items() if name in told]
    text = f"Exponents of N* do not fit together: {'; '.join(texts)}. At least one assumption is wrong: "
    text += f"{', or '.join(doubted)}."
    return Finding("approaches disagree", "warning", text, numbers)


def extrapolation(fitted: Fit, budget: float, limit: float = 10.0) -> Finding:
    """Compare the budget with the largest run fitted."""
    return _beyond(budget, float(fitted.rows["flops"].max()), "run fitted", "that the law holds there", limit)


def _beyond(budget: float, largest: float, what: str, assumption: str, limit: float) -> Finding:
    factor = float(budget / largest)
    text = f"The budget of {_short(budget)} FLOPs is {factor:.3g} times the largest {what}"
    if factor > limit:
        return Finding("extrapolation", "warning", f"{text}: intervals assume {assumption}.", {"factor": factor})
    return Finding("extrapolation", "fine", text + ".", {"factor": factor})


def ran_away(fitted: Fit) -> list[str]:
    """List parameters that ran to an edge: a vanishing positive one, or one far outside the starting grid."""
    found = []
    for name, value in zip(fitted.law.parameters, fitted.theta, strict=True):
        low, high = min(fitted.law.grid[name]), max(fitted.law.grid[name])
        margin = 2 * max(high - low, 1.0)
        if not np.isfinite(value) or value < low - margin or value > high + margin:
            found.append(name)
    return found


def edges(fitted: Fit) -> Finding:
    """Find parameters that ran to an edge; see `ran_away`."""
    if found := ran_away(fitted):
        text = (
            f"{', '.join(found)} ran far outside the starting grid: a term vanishes or the law does not fit these rows."
        )
        return Finding("edge minima", "warning", text, {"parameters": len(found)})
    return Finding("edge minima", "fine", "No parameter ran to an edge of what was searched.", {"parameters": 0})


def examine(
    fitted: Fit,
    budget: float,
    boot: Bootstrap | None = None,
    *,
    all_rows: Rows | None = None,
    at: At = None,
    lowest: float | None = None,
) -> list[Finding]:
    """Run all diagnostics of a fit.

    Args:
      fitted: the fit.
      budget: the target, FLOPs.
      boot: of the fit, for standard errors.
      all_rows: the rows before any were left out.
      at: values at which the law's further columns are held.
      lowest: FLOPs from which to the target the growth of N* is told; a tenth of the target if None.

    Of a fit that is undetermined no optima are compared.

    Example:
      >>> import scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7, noise=0.002)
      >>> law = scaling.find_law("chinchilla")
      >>> fitted = scaling.fit(rows, law, starts=law.raw(truth)[:, None])
      >>> [finding.name for finding in scaling.examine(fitted, 1e24) if finding.verdict == "warning"]
      ['ill conditioning', 'extrapolation']
    """
    lost = [lost_fits(boot)] if boot is not None else []
    if fitted.undetermined:
        text = f"The rows determine no optimum ({fitted.undetermined}): none is compared with another."
        left = [left_out(fitted.rows, all_rows)] if all_rows is not None else []
        none = Finding("undetermined", "warning", text, {})
        return [convergence(fitted), starts(fitted), none, edges(fitted), conditioning(fitted), *lost, *left]
    span = (lowest or budget, budget)
    return [
        convergence(fitted),
        starts(fitted),
        reduction(fitted, span, at),
        tolerance(fitted, span, at),
        edges(fitted),
        near_optima(fitted, budget, at),
        conditioning(fitted),
        *lost,
        rounding(fitted, budget, at),
        outliers(fitted, boot, budget, at=at),
        *([dropped(fitted, all_rows, budget, at)] if all_rows is not None else []),
        extrapolation(fitted, budget),
    ]


def edge_minima(minima: Sequence[Minimum]) -> Finding:
    """List budgets that were refused, with the reasons."""
    refused = [m for m in minima if m.refused]
    numbers: dict[str, float] = {"budgets": len(minima), "refused": len(refused)}
    if not refused:
        return Finding("edge minima", "fine", f"All {len(minima)} budgets have their minimum inside.", numbers)
    reasons = "; ".join(f"{_short(m.budget)} FLOPs: {m.refused}" for m in refused)
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
    parabolas = any(m.coefficients for m in minima)  # splines pass through their points
    return [
        edge_minima(minima),
        *([cubic_term(minima), scatter(minima)] if parabolas else []),
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
