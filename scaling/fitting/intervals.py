"""Intervals: bootstrap percentiles that allow for few rows, profile likelihood, and losses of new runs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import f, norm, t

from scaling.fitting.bootstrap import Bootstrap, interval
from scaling.fitting.fit import Fit, polish, thresholds
from scaling.rows import Rows


class Profile(NamedTuple):
    """The objective along one parameter, the others refitted.

    Attributes:
      values: what the parameter was held at.
      objectives: the objective there.
      inside: whether the likelihood ratio there is within the threshold.
      interval: its two crossings, interpolated.
    """

    values: Float[np.ndarray, "S"]
    objectives: Float[np.ndarray, "S"]
    inside: Bool[np.ndarray, "S"]
    interval: tuple[float, float]


def relative_likelihood(fitted: Fit, objectives: Float[np.ndarray, "S"]) -> Float[np.ndarray, "S"]:
    """Twice the log likelihood lost against the best fit, the scale of the residuals estimated.

    For "normal" that is exact: n log(S / S_0), S the sum of squares. Huber's loss and the absolute value are no
    likelihood of the noise that is there, so what is lost of them is read as a quasi-likelihood: 2 (S - S_0) times
    mean psi' / mean psi^2, which is chi-squared as a likelihood ratio is (Ronchetti 1982). psi' is a density at zero
    where residuals are beyond delta; it is taken over the middle half of the residuals, those that the parameters
    interpolate left out.
    """
    lost = np.asarray(objectives) - fitted.value
    rows, parameters = len(fitted.rows), len(fitted.law.parameters)
    if fitted.config.objective == "normal":
        return rows * np.log1p(lost / fitted.value)
    delta, spare = thresholds(fitted.config)[-1], max(rows - parameters, 1)
    size = np.sort(np.abs(fitted.residuals))
    middle = max(delta, float(size[min(parameters + spare // 2, rows - 1)]))
    inside = max(int(np.sum(size <= middle)) - parameters, 1) / spare
    bend = delta / middle * inside
    square = float(np.sum(np.minimum(size, delta) ** 2)) / spare
    return 2 * lost * bend / square


def profile(fitted: Fit, name: str, values: Sequence[float] | np.ndarray, *, level: float = 0.95) -> Profile:
    """Hold a parameter at each natural value, refit the rest, and read the interval off the likelihood ratio.

    Args:
      fitted: the fit.
      name: the parameter.
      values: increasing natural values around the estimate.
      level: of the interval; its ends are interpolated, and infinite where `values` do not reach far enough.

    The threshold is F's quantile q for 1 and R - P degrees of freedom, for "normal" what makes it exact for a linear
    law: R log(1 + q / (R - P)).
    """
    law = fitted.law
    index = law.parameters.index(name)
    values = np.asarray(values, float)
    theta = np.repeat(fitted.theta[:, None], len(values), 1)
    theta[index] = np.log(values) if name in law.positive else values
    solved = polish(theta, np.ones((len(fitted.rows), 1)), fitted.rows, law, fitted.config, held=(index,))
    spare = max(len(fitted.rows) - len(law.parameters), 1)
    threshold = float(f.ppf(level, 1, spare))
    if fitted.config.objective == "normal":
        threshold = len(fitted.rows) * float(np.log1p(threshold / spare))
    over = relative_likelihood(fitted, solved.value) - threshold
    return Profile(values, solved.value, over <= 0, _crossings(values, over))


def _crossings(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Outermost zero crossings of y around its minimum, linear in between; infinite where there is none."""
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
    """The level whose normal quantile is Student's of `level` with `spare` degrees of freedom, for few rows.

    Percentiles transform with the quantity, so an interval of log A is that of A.
    """
    return float(2 * norm.cdf(t.ppf(0.5 + level / 2, max(spare, 1))) - 1)


def bootstrap_interval(
    draws: Float[np.ndarray, "B"],
    units: int,
    parameters: int,
    level: float = 0.95,
    objective: str = "normal",
    *,
    estimate: float | None = None,
) -> Float[np.ndarray, "2"]:
    """The percentile interval of bootstrap draws that covers the level.

    Least squares takes percentiles at Student's level. End points of "huber" and "laplace" lie near order statistics:
    their draws scatter more than the estimates they stand for, to one side of the estimate in one sweep and to the
    other in the next, and bias-corrected percentiles (Efron 1981) follow that. Both are measured in
    docs/results/scaling_fits.md.

    Args:
      draws: of any quantity.
      units: rows, or clusters, that were resampled.
      parameters: of the law.
      level: wanted coverage.
      objective: of the fit, see `scaling.fitting.fit.FitConfig`.
      estimate: the quantity at the full fit; without one (or where it is not finite) nothing is corrected.
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
    """Where the loss of one new run at each row's sizes will fall.

    The standard error of a new run is that of its noise and of the fitted curve together; how many of them are needed
    is read off the fit's own residuals, in units of their root mean square, as the order statistic ceil(level (R + 1))
    of their sizes (a conformal interval, so heavy tails widen it), or from Student's t where R is too small for one.
    The curve's is half the distance of its draws' 16th and 84th percentiles, which outlying resamples do not move.
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
