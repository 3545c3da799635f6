"""The next run to buy: which affordable run shrinks the interval of log N*(C) most per FLOP.

Near the fit a law is linear in its parameters, so a run's worth is known before it is made (c-optimality in the design
of experiments): with information M = sum j j' / noise^2 over runs and g the gradient of log N*, the variance of log N*
is g' M^-1 g, and a run with slopes j takes (g' M^-1 j)^2 / (noise^2 + j' M^-1 j) off it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import t

from scaling.fitting.fit import Fit, FitConfig, fit, fit_near
from scaling.laws import Law
from scaling.optimum import log_loss_at, optimum
from scaling.rows import PER_PARAMETER_AND_TOKEN, Rows

_STEP = 1e-5


class Choice(NamedTuple):
    """Candidates ranked: index of the best per FLOP, every candidate's standard error after it, and the one before."""

    best: int
    after: Float[np.ndarray, "R"]
    before: float


def slopes(
    law: Law, theta_P: Float[np.ndarray, "P"], params: Float[np.ndarray, "R"], tokens: Float[np.ndarray, "R"]
) -> Float[np.ndarray, "R P"]:
    """Derivatives of log loss by raw parameters, central differences."""
    size = len(theta_P)
    shifts = _STEP * np.concatenate([np.eye(size), -np.eye(size)], 1)
    moved = log_loss_at(law, theta_P[:, None] + shifts, params, tokens)
    return (moved[:, :size] - moved[:, size:]) / (2 * _STEP)


def target_gradient(law: Law, theta_P: Float[np.ndarray, "P"], budget: float) -> Float[np.ndarray, "P"]:
    """Gradient of log N*(budget) by raw parameters, from the first-order condition.

    h(theta, x) = d log loss / dx vanishes at x = log N*, so dx / dtheta = -(dh / dtheta) / (dh / dx).

    Raises:
      ValueError: the law has no inner minimum at the budget.
    """
    best = np.log(optimum(law, theta_P[:, None], [budget]).params[0, 0])
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
    """Covariance of the raw parameters from runs with independent noise of log loss.

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
    theta_P: Float[np.ndarray, "P"],
    params: Float[np.ndarray, "R"],
    tokens: Float[np.ndarray, "R"],
    *,
    budget: float,
    noise: float,
) -> float:
    """Standard error of log N*(budget) given runs of these sizes."""
    gradient = target_gradient(law, theta_P, budget)
    return float(np.sqrt(gradient @ covariance(slopes(law, theta_P, params, tokens), noise) @ gradient))


def choose(
    law: Law,
    theta_P: Float[np.ndarray, "P"],
    made: tuple[Float[np.ndarray, "R"], Float[np.ndarray, "R"]],
    candidates: tuple[Float[np.ndarray, "K"], Float[np.ndarray, "K"]],
    *,
    budget: float,
    noise: float,
    affordable: float = np.inf,
    cost: Float[np.ndarray, "K"] | None = None,
) -> Choice:
    """Rank candidate runs by how much each takes off the variance of log N*(budget) per FLOP it costs.

    Args:
      law: of params and tokens.
      theta_P: raw parameters of the present fit.
      made: (params, tokens) of the runs there are.
      candidates: (params, tokens) of those that could be made.
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
    """Standard deviation of log loss between runs, from the residuals and what the parameters paid."""
    spare = max(len(fitted.rows) - len(fitted.law.parameters), 1)
    return float(np.sqrt(np.sum(fitted.residuals**2) / spare))


def half_width(fitted: Fit, budget: float, *, level: float = 0.95) -> float:
    """Half the interval of log N*(budget) after a fit: Student's t x the standard error at the estimated noise.

    Infinite where the fit has no inner optimum or its rows do not determine it.
    """
    spare = max(len(fitted.rows) - len(fitted.law.parameters), 1)
    try:
        sizes = fitted.rows["params"], fitted.rows["tokens"]
        error = standard_error(fitted.law, fitted.theta, *sizes, budget=budget, noise=noise_of(fitted))
    except ValueError:
        return float("inf")
    return float(t.ppf(0.5 + level / 2, spare) * error) if np.isfinite(error) else float("inf")


class Sweep(NamedTuple):
    """Runs that were bought: the rows, the last fit, half the interval after every fit, and what all runs cost."""

    rows: Rows
    fitted: Fit
    widths: list[float]
    flops: float


def buy(
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
) -> Sweep:
    """Fit, buy the best candidate, fit again, until the interval of log N*(budget) is as narrow as wanted.

    Args:
      rows: runs to begin with.
      law: of params and tokens.
      candidates: runs that can be bought, each once, with the losses that buying them shows. Nothing looks at a loss
        before it is bought.
      budget: the target, FLOPs.
      wanted: half the width of the interval at which buying ends.
      most: runs bought at most.
      level: of the interval.
      config: of the fits.
      starts: of the first fit; the law's grid if None.

    Raises:
      ValueError: fewer rows to begin with than the law has parameters.
    """
    left = np.ones(len(candidates), bool)
    fitted = fit(rows, law, config, starts=starts)
    widths = [half_width(fitted, budget, level=level)]
    while widths[-1] > wanted and left.any() and len(widths) <= most:
        choice = next_run(fitted, candidates.take(left), budget=budget)
        bought = np.flatnonzero(left)[choice]
        left[bought] = False
        more = candidates.take(np.array([bought]))
        rows = Rows({n: np.append(rows[n], more[n]) for n in ("params", "tokens", "flops", "loss")}, rows.source)
        fitted = fit_near(fitted, rows)
        widths.append(half_width(fitted, budget, level=level))
    return Sweep(rows, fitted, widths, float(rows["flops"].sum()))


def next_run(
    fitted: Fit,
    candidates: Rows,
    *,
    budget: float,
    affordable: float = np.inf,
    made: Float[np.ndarray, "2 M"] | None = None,
    cost: Float[np.ndarray, "K"] | None = None,
) -> int:
    """Index of the candidate to buy next after a fit.

    The best by `choose`; where the fit has no inner optimum yet, or does not determine its parameters, the one farthest
    (in log params and log tokens, per log FLOP) from every run there is.

    Args:
      fitted: the fit.
      candidates: runs that can be bought.
      budget: the target, FLOPs.
      affordable: most FLOPs one run may cost.
      made: params and tokens of all runs counted on; those of the fit if None.
      cost: FLOPs of each candidate; its `flops` if None.

    Raises:
      ValueError: no candidate is affordable.
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
    """For some costs up to that of the largest run, the run that takes most off the interval of log N*(budget).

    Returns:
      Per cost, from cheap to dear: params, tokens, flops, and the standard error of log N* `before` and `after` it.
      Empty for laws of other things than params and tokens, and where the fit has no inner optimum.
    """
    if set(fitted.law.features) != {"log_params", "log_tokens"}:
        return []
    made = fitted.rows["params"], fitted.rows["tokens"]
    flops = np.geomspace(np.median(fitted.rows["flops"]), fitted.rows["flops"].max(), budgets)
    params = np.geomspace(made[0].min(), made[0].max(), sizes)
    table = []
    for cost in flops:
        goods = params, cost / (PER_PARAMETER_AND_TOKEN * params)
        try:
            found = choose(fitted.law, fitted.theta, made, goods, budget=budget, noise=noise_of(fitted))
        except ValueError:
            return []
        best = {"params": params[found.best], "tokens": goods[1][found.best], "flops": cost}
        table.append(
            {n: float(x) for n, x in best.items()} | {"before": found.before, "after": float(found.after[found.best])}
        )
    return table


def tight_enough(errors: Sequence[float], wanted: float) -> bool:
    """Whether the latest standard error of log N* is at or under what was wanted: the sweep can stop."""
    return bool(errors) and errors[-1] <= wanted
