"""Optimal experiment design: the candidate run that shrinks the interval of log N*(C) most per FLOP (c-optimality).

Near the fit a law is linear in its parameters, so a run's information is known before it is trained: with information
M = sum j j' / noise^2 over runs and g the gradient of log N*, the variance of log N*
is g' M^-1 g, and a run with slopes j reduces it by (g' M^-1 j)^2 / (noise^2 + j' M^-1 j).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import t

from scaling.fitting.fit import Fit, FitConfig, fit, fit_near
from scaling.laws import Law
from scaling.optimum import compute_optimal, log_loss_at, sizes_as_rows
from scaling.rows import PER_PARAMETER_AND_TOKEN, Rows


class Choice(NamedTuple):
    """Ranked candidates: index of the best per FLOP, standard errors after every candidate, and the one before."""

    best: int
    after: Float[np.ndarray, " R"]
    before: float


def slopes(
    law: Law, theta_P: Float[np.ndarray, " P"], params: Float[np.ndarray, " R"], tokens: Float[np.ndarray, " R"]
) -> Float[np.ndarray, "R P"]:
    """Differentiate log loss by raw parameters at sizes."""
    return law.slopes(theta_P, sizes_as_rows(params, tokens))


def target_gradient(law: Law, theta_P: Float[np.ndarray, " P"], budget: float) -> Float[np.ndarray, " P"]:
    """Differentiate log N*(budget) by raw parameters, by the implicit function theorem.

    h(theta, x) = d log loss / dx vanishes at x = log N*, so dx / dtheta = -(dh / dtheta) / (dh / dx).

    Raises:
      ValueError: the law has no inner minimum at the budget.
    """
    best = np.log(compute_optimal(law, theta_P[:, None], [budget]).params[0, 0])
    if not np.isfinite(best):
        raise ValueError(f"{law.name} has no inner minimum over sizes at {budget:.3g} FLOPs")
    width = 1e-2
    x = best + width * np.array([-1.0, 0.0, 1.0])
    sizes = np.exp(x), budget / (PER_PARAMETER_AND_TOKEN * np.exp(x))
    height = log_loss_at(law, theta_P[:, None], *sizes)[:, 0]
    bend = (height[0] - 2 * height[1] + height[2]) / width**2
    by_parameter = slopes(law, theta_P, *sizes)
    return -(by_parameter[2] - by_parameter[0]) / (2 * width) / bend


def covariance(slopes_RP: Float[np.ndarray, "R P"], noise: float) -> Float[np.ndarray, "P P"]:
    """Compute the covariance of the raw parameters, from runs with independent noise of log loss.

    Raises:
      ValueError: the runs do not determine all parameters.
    """
    size = np.linalg.norm(slopes_RP, axis=0)
    # Slopes are differences, right to 1e-9: smaller singular values are their rounding.
    if (size == 0).any() or np.linalg.matrix_rank(slopes_RP / np.where(size, size, 1.0), 1e-7) < slopes_RP.shape[1]:
        raise ValueError(f"{len(slopes_RP)} runs do not determine {slopes_RP.shape[1]} parameters: add different sizes")
    unit = slopes_RP / size
    return noise**2 * np.linalg.inv(unit.T @ unit) / np.outer(size, size)


def standard_error(
    law: Law,
    theta_P: Float[np.ndarray, " P"],
    params: Float[np.ndarray, " R"],
    tokens: Float[np.ndarray, " R"],
    *,
    budget: float,
    noise: float,
) -> float:
    """Compute the standard error of log N*(budget) given runs of these sizes (delta method)."""
    gradient = target_gradient(law, theta_P, budget)
    return float(np.sqrt(gradient @ covariance(slopes(law, theta_P, params, tokens), noise) @ gradient))


def choose(
    law: Law,
    theta_P: Float[np.ndarray, " P"],
    made: tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]],
    candidates: tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]],
    *,
    budget: float,
    noise: float,
    affordable: float = np.inf,
    cost: Float[np.ndarray, " K"] | None = None,
) -> Choice:
    """Rank candidate runs by the reduction of the variance of log N*(budget) per FLOP.

    Args:
      law: of params and tokens.
      theta_P: raw parameters of the present fit.
      made: (params, tokens) of the existing runs.
      candidates: (params, tokens) of possible runs.
      budget: the target, FLOPs.
      noise: standard deviation of log loss between runs.
      affordable: most FLOPs one run may cost.
      cost: FLOPs of each candidate; 6 N D if None.

    Raises:
      ValueError: no candidate is affordable, or the runs made do not determine the law.
    """
    if cost is None:
        cost = PER_PARAMETER_AND_TOKEN * candidates[0] * candidates[1]
    if not (cost <= affordable).any():
        raise ValueError(f"no candidate costs {affordable:.3g} FLOPs or less; the cheapest costs {cost.min():.3g}")
    gradient = target_gradient(law, theta_P, budget)
    spread = covariance(slopes(law, theta_P, *made), noise)
    before = gradient @ spread @ gradient
    rows = slopes(law, theta_P, *candidates)
    gain = (rows @ spread @ gradient) ** 2 / (noise**2 + np.einsum("rp,pq,rq->r", rows, spread, rows))
    worth = np.where(cost <= affordable, gain / cost, -np.inf)
    return Choice(int(np.argmax(worth)), np.sqrt(np.maximum(before - gain, 0.0)), float(np.sqrt(before)))


def noise_of(fitted: Fit) -> float:
    """Estimate the standard deviation of log loss between runs, from residuals and degrees of freedom."""
    spare = max(len(fitted.rows) - len(fitted.law.parameters), 1)
    return float(np.sqrt(np.sum(fitted.residuals**2) / spare))


def half_width(fitted: Fit, budget: float, *, level: float = 0.95) -> float:
    """Compute half the width of the interval of log N*(budget): Student's t x the standard error.

    Infinite where the fit has no inner optimum or its rows do not determine it.

    Example:
      >>> import scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=4, sizes=5, noise=0.005)
      >>> law = scaling.find_law("chinchilla")
      >>> fitted = scaling.fit(rows, law, starts=law.raw(truth)[:, None])
      >>> 0 < scaling.half_width(fitted, 1e22) < scaling.half_width(fitted, 1e24)
      True
    """
    spare = max(len(fitted.rows) - len(fitted.law.parameters), 1)
    try:
        sizes = fitted.rows["params"], fitted.rows["tokens"]
        error = standard_error(fitted.law, fitted.theta, *sizes, budget=budget, noise=noise_of(fitted))
    except ValueError:
        return float("inf")
    return float(t.ppf(0.5 + level / 2, spare) * error) if np.isfinite(error) else float("inf")


class AcquiredRuns(NamedTuple):
    """Acquired runs: their rows, the last fit, half the interval after every fit, and the FLOPs of all runs."""

    rows: Rows
    fitted: Fit
    widths: list[float]
    flops: float


def acquire_runs(
    rows: Rows,
    law: Law,
    candidates: Rows,
    *,
    budget: float,
    wanted: float,
    most: int = 1000,
    level: float = 0.95,
    config: FitConfig | None = None,
    starts: Float[np.ndarray, "P S"] | None = None,
) -> AcquiredRuns:
    """Acquire runs one by one, fitting after each, until the interval of log N*(budget) is as narrow as wanted.

    Args:
      rows: initial runs.
      law: of params and tokens.
      candidates: possible runs, each acquired once at most, with their losses. No loss is used before its run is
        acquired.
      budget: the target, FLOPs.
      wanted: half the width of the interval at which the search ends.
      most: runs acquired at most.
      level: of the interval.
      config: of the fits.
      starts: of the first fit; the law's grid if None.

    Raises:
      ValueError: fewer initial rows than the law has parameters.

    Example:
      >>> import numpy as np, scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> law = scaling.find_law("chinchilla")
      >>> first = scaling.isoflop_design(truth, budgets=2, sizes=5, highest=2e19, noise=0.005)
      >>> candidates = scaling.isoflop_design(truth, budgets=3, sizes=9, noise=0.005, seed=1)
      >>> starts = law.raw(truth)[:, None]
      >>> found = scaling.acquire_runs(first, law, candidates, budget=1e22, wanted=0.3, starts=starts)
      >>> found.widths[-1] <= 0.3 < found.widths[0]
      True
    """
    left = np.ones(len(candidates), bool)
    fitted = fit(rows, law, config, starts=starts)
    widths = [half_width(fitted, budget, level=level)]
    while widths[-1] > wanted and left.any() and len(widths) <= most:
        choice = next_run(fitted, candidates.take(left), budget=budget)
        acquired = np.flatnonzero(left)[choice]
        left[acquired] = False
        more = candidates.take(np.array([acquired]))
        rows = Rows({n: np.append(rows[n], more[n]) for n in ("params", "tokens", "flops", "loss")}, rows.source)
        fitted = fit_near(fitted, rows)
        widths.append(half_width(fitted, budget, level=level))
    return AcquiredRuns(rows, fitted, widths, float(rows["flops"].sum()))


def next_run(
    fitted: Fit,
    candidates: Rows,
    *,
    budget: float,
    affordable: float = np.inf,
    made: Float[np.ndarray, "2 M"] | None = None,
    cost: Float[np.ndarray, " K"] | None = None,
) -> int:
    """Choose the next run to train after a fit: the index of a candidate.

    The best by `choose`; where the fit has no inner optimum yet, or does not determine its parameters, the one farthest
    (in log params and log tokens, per log FLOP) from every run there is.

    Args:
      fitted: the fit.
      candidates: possible runs.
      budget: the target, FLOPs.
      affordable: most FLOPs one run may cost.
      made: params and tokens of all runs counted on; those of the fit if None.
      cost: FLOPs of each candidate; its `flops` if None.

    Raises:
      ValueError: no candidate is affordable.

    Example:
      >>> import scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=4, sizes=5, noise=0.005)
      >>> law = scaling.find_law("chinchilla")
      >>> fitted = scaling.fit(rows, law, starts=law.raw(truth)[:, None])
      >>> candidates = scaling.make_rows({"params": [1e8, 1e9], "tokens": [2e9, 2e9], "loss": [1.0, 1.0]})
      >>> scaling.next_run(fitted, candidates, budget=1e22) in (0, 1)
      True
    """
    known = (fitted.rows["params"], fitted.rows["tokens"]) if made is None else (made[0], made[1])
    sizes = candidates["params"], candidates["tokens"]
    flops = candidates["flops"] if cost is None else cost
    cheap = flops <= affordable
    if not cheap.any():
        raise ValueError(f"no candidate costs {affordable:.3g} FLOPs or less; the cheapest costs {flops.min():.3g}")
    limits = {"budget": budget, "noise": noise_of(fitted), "affordable": affordable}
    try:
        found = choose(fitted.law, fitted.theta, known, sizes, cost=flops, **limits)
    except ValueError:
        found = None
    if found is not None and np.isfinite(found.before):
        return found.best
    here, there = (np.log(np.stack(pair, 1)) for pair in (known, sizes))
    distance = np.linalg.norm(there[:, None] - here[None], axis=2).min(1)
    return int(np.argmax(np.where(cheap, distance / np.log(flops), -np.inf)))


def suggest(fitted: Fit, budget: float, *, budgets: int = 4, sizes: int = 13) -> list[dict[str, float]]:
    """Suggest, for some costs up to that of the largest run, the run that shrinks the interval of log N*(budget) most.

    Returns:
      Per cost, in rising order: params, tokens, flops, and the standard error of log N* `before` and `after` it.
      Empty for laws of other things than params and tokens, and where the fit has no inner optimum.
    """
    if set(fitted.law.features) != {"log_params", "log_tokens"}:
        return []
    made = fitted.rows["params"], fitted.rows["tokens"]
    flops = np.geomspace(np.median(fitted.rows["flops"]), fitted.rows["flops"].max(), budgets)
    params = np.geomspace(made[0].min(), made[0].max(), sizes)
    table = []
    for cost in flops:
        sizes_at_cost = params, cost / (PER_PARAMETER_AND_TOKEN * params)
        try:
            found = choose(fitted.law, fitted.theta, made, sizes_at_cost, budget=budget, noise=noise_of(fitted))
        except ValueError:
            return []
        best = {"params": params[found.best], "tokens": sizes_at_cost[1][found.best], "flops": cost}
        table.append(
            {n: float(x) for n, x in best.items()} | {"before": found.before, "after": float(found.after[found.best])}
        )
    return table
