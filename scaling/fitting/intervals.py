"""Confidence intervals: bootstrap percentiles corrected for few rows, profile likelihood; prediction intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import f, norm, t

from scaling.fitting.bootstrap import Bootstrap, interval
from scaling.fitting.fit import Fit, make_problem, polish, row_losses, weights_of
from scaling.rows import Rows


class Profile(NamedTuple):
    """The profile of the objective along one parameter, the others refitted.

    Attributes:
      values: of the held parameter.
      objectives: the objective there.
      inside: whether the likelihood ratio there is within the threshold.
      interval: its two crossings, interpolated.
    """

    values: Float[np.ndarray, " S"]
    objectives: Float[np.ndarray, " S"]
    inside: Bool[np.ndarray, " S"]
    interval: tuple[float, float]


def relative_likelihood(fitted: Fit, objectives: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """Compute twice the loss of log likelihood against the best fit, the scale of the residuals estimated.

    For "normal" that is exact: n log(S / S_0), S the sum of squares. Huber's loss, the absolute value and what weighs
    rows or sides unequally are no likelihood of the actual noise, so they are used as quasi-likelihoods: 2 (S - S_0)
    times mean psi' / mean psi^2, which is chi-squared as a likelihood ratio is (Ronchetti 1982). psi' is a density at
    zero where residuals are beyond delta; it is estimated from the middle half of the residuals, without the
    interpolated ones.
    """
    lost = np.asarray(objectives) - fitted.value
    rows, parameters = len(fitted.rows), len(fitted.law.parameters)
    if is_likelihood(fitted):
        return rows * np.log1p(lost / fitted.value)
    problem, weights = make_problem(fitted.rows, fitted.law, fitted.config), weights_of(fitted.rows, fitted.config)
    delta, spare = float(problem.delta), max(rows - parameters, 1)
    observed = fitted.rows["loss"]
    size = np.sort(np.abs(observed * np.expm1(fitted.residuals) if problem.linear else fitted.residuals))
    middle = max(delta, float(size[min(parameters + spare // 2, rows - 1)]))
    inside = max(int(np.sum(size <= middle)) - parameters, 1) / spare
    sides = np.where(fitted.residuals > 0, problem.over, 1.0) * weights[:, 0]
    bend = delta / middle * inside * float(sides.mean())
    pull = weights * row_losses(fitted.theta[:, None], problem, fitted.law)[1]
    return 2 * lost * bend / (float(np.sum(pull**2)) / spare)


def is_likelihood(fitted: Fit) -> bool:
    """Whether the objective is the likelihood of normal noise."""
    config = fitted.config
    return config.objective == "normal" and config.overprediction == 1 and not config.weights


def profile(fitted: Fit, name: str, values: Sequence[float] | np.ndarray, *, level: float = 0.95) -> Profile:
    """Compute a profile-likelihood interval: hold a parameter at each value, refit the others, compare likelihoods.

    Args:
      fitted: the fit.
      name: the parameter.
      values: increasing natural values around the estimate.
      level: of the interval; its ends are interpolated, and infinite where `values` do not reach far enough.

    The threshold is F's quantile q for 1 and R - P degrees of freedom; for "normal" R log(1 + q / (R - P)), which is
    exact for a linear law.

    Example:
      >>> import numpy as np
      >>> import scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7, noise=0.002)
      >>> law = scaling.find_law("chinchilla")
      >>> fitted = scaling.fit(rows, law, starts=law.raw(truth)[:, None])
      >>> at = fitted.parameters["alpha"]
      >>> low, high = scaling.profile(fitted, "alpha", at + np.linspace(-0.1, 0.1, 21)).interval
      >>> low < at < high
      True
    """
    law = fitted.law
    index = law.parameters.index(name)
    values = np.asarray(values, float)
    theta = np.repeat(fitted.theta[:, None], len(values), 1)
    theta[index] = np.log(values) if name in law.positive else values
    solved = polish(theta, weights_of(fitted.rows, fitted.config), fitted.rows, law, fitted.config, held=(index,))
    spare = max(len(fitted.rows) - len(law.parameters), 1)
    threshold = float(f.ppf(level, 1, spare))
    if is_likelihood(fitted):
        threshold = len(fitted.rows) * float(np.log1p(threshold / spare))
    over = relative_likelihood(fitted, solved.value) - threshold
    return Profile(values, solved.value, over <= 0, _crossings(values, over))


def _crossings(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Find the outermost zero crossings of y around its minimum, linear in between; infinite where there is none."""
    middle = int(np.argmin(y))
    low, high = -np.inf, np.inf
    for i in range(middle, 0, -1):
        if y[i - 1] > 0 >= y[i]:
            low = float(np.interp(0, [y[i], y[i - 1]], [x[i], x[i - 1]]))
            break
    for i in range(middle, len(x) - 1):
        if y[i + 1] > 0 >= y[i]:
            high = float(np.interp(0, [y[i], y[i + 1]], [x[i], x[i + 1]]))
            break
    return low, high


def student_level(level: float, spare: int) -> float:
    """Compute the level whose normal quantile is Student's of `level` with `spare` degrees of freedom, for few rows.

    Percentiles transform with the quantity, so an interval of log A is that of A.
    """
    return float(2 * norm.cdf(t.ppf(0.5 + level / 2, max(spare, 1))) - 1)


def bootstrap_interval(
    draws: Float[np.ndarray, " B"],
    units: int,
    parameters: int,
    level: float = 0.95,
    objective: str = "normal",
    *,
    estimate: float | None = None,
) -> Float[np.ndarray, "2"]:
    """Compute a percentile interval of bootstrap draws that covers the level.

    Least squares uses percentiles at Student's level. End points of "huber" and "laplace" lie near order statistics:
    their draws scatter more than the estimates themselves, to one side of the estimate in one sweep and to the other in
    the next, which bias-corrected percentiles (Efron 1981) follow. The coverage of both is in
    docs/results/scaling_fits.md.

    Args:
      draws: of any quantity.
      units: number of resampled rows, or clusters.
      parameters: of the law.
      level: wanted coverage.
      objective: of the fit, see `scaling.fitting.fit.FitConfig`.
      estimate: the quantity at the full fit; without one (or where it is not finite) nothing is corrected.

    Example:
      >>> import numpy as np, scaling
      >>> draws = np.random.default_rng(0).standard_normal(10_000)
      >>> np.round(scaling.bootstrap_interval(draws, units=15, parameters=5), 1).tolist()
      [-2.2, 2.2]
    """
    if objective == "normal":
        return interval(draws, student_level(level, units - parameters))
    if estimate is None or not np.isfinite(estimate):
        return interval(draws, level)
    count = len(draws)
    below = (np.sum(draws < estimate) + 0.5 * np.sum(draws == estimate) + 0.5) / (count + 1)
    edge = float(norm.ppf(0.5 + level / 2))
    shares = norm.cdf(2 * norm.ppf(below) + np.array([-edge, edge]))
    return np.percentile(draws, 100 * shares)


def prediction_interval(fitted: Fit, boot: Bootstrap, rows: Rows, *, level: float = 0.95) -> Float[np.ndarray, "2 R"]:
    """Compute a prediction interval for the loss of one new run at each row's sizes.

    The standard error of a new run combines its noise and the fitted curve. It is multiplied by the order statistic
    ceil(level (R + 1)) of the fit's absolute residuals in units of their root mean square (a conformal interval, so
    heavy tails widen it), or by Student's t where R is too small for one. The curve's standard error is half the
    distance of its draws' 16th and 84th percentiles, which outlying resamples do not move.

    Example:
      >>> import scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7, noise=0.002)
      >>> law = scaling.find_law("chinchilla")
      >>> fitted = scaling.fit(rows, law, starts=law.raw(truth)[:, None])
      >>> new = scaling.make_rows({"params": [1e9], "tokens": [2e10], "loss": [1.0]})
      >>> low, high = scaling.prediction_interval(fitted, scaling.bootstrap(fitted, 100), new)
      >>> bool(0 < high[0] - low[0] < 0.1)
      True
    """
    count, spare = len(fitted.rows), max(len(fitted.rows) - len(fitted.law.parameters), 1)
    curves = fitted.law.predict(boot.theta_PB[:, boot.converged_B], fitted.law.gather(rows))
    low, high = np.percentile(curves, 100 * norm.cdf([-1.0, 1.0]), axis=1)
    noise = np.sum(fitted.residuals**2) / spare
    scores = np.sort(np.abs(fitted.residuals)) / np.sqrt(max(np.mean(fitted.residuals**2), 1e-300))
    rank = int(np.ceil(level * (count + 1)))
    needed = scores[rank - 1] if rank <= count else t.ppf(0.5 + level / 2, spare)
    middle = fitted.law.predict(fitted.theta[:, None], fitted.law.gather(rows))[:, 0]
    half = needed * np.sqrt(noise + ((high - low) / 2) ** 2)
    return np.exp(np.stack([middle - half, middle + half]))
