"""Profile likelihood, prediction intervals, and simulation of how often intervals cover the truth."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.stats import chi2, t

from scaling.bootstrap import Bootstrap, bootstrap, interval
from scaling.fit import Fit, FitConfig, fit, polish
from scaling.laws import Law
from scaling.rows import Rows


class Profile(NamedTuple):
    """The objective along one parameter, the others refitted: values [S], objectives [S], interval (low, high)."""

    values: Float[np.ndarray, "S"]
    objectives: Float[np.ndarray, "S"]
    interval: tuple[float, float]


def relative_likelihood(fitted: Fit, objectives: Float[np.ndarray, "S"]) -> Float[np.ndarray, "S"]:
    """Twice the log likelihood lost against the best fit, the scale of the residuals re-estimated at each point.

    For "laplace" and "normal" that is exact: 2 n log(S / S_0) and n log(S / S_0), S the sum of absolute values or of
    squares. Huber residuals are mostly beyond delta on noisy rows, where the loss is delta times the absolute value, so
    "huber" is read as "laplace".
    """
    rows = len(fitted.rows)
    factor = rows if fitted.config.objective == "normal" else 2 * rows
    return factor * np.log(np.asarray(objectives) / fitted.value)


def profile(fitted: Fit, name: str, values: Sequence[float] | np.ndarray, *, level: float = 0.95) -> Profile:
    """Hold a parameter at each natural value, refit the rest, and read the interval off the likelihood ratio.

    Args:
      fitted: the fit.
      name: the parameter.
      values: increasing natural values around the estimate.
      level: of the interval; its ends are interpolated, and infinite where `values` do not reach far enough.
    """
    law = fitted.law
    index = law.parameters.index(name)
    rest = np.delete(fitted.theta, index)[:, None]
    held, objectives = hold(law, name), []
    for value in values:
        raw = np.log(value) if name in law.positive else value
        rows = Rows({**fitted.rows.columns, "held": np.full(len(fitted.rows), float(raw))}, fitted.rows.source)
        solved = polish(rest, np.ones((len(rows), 1)), rows, held, fitted.config)
        objectives.append(float(solved.value[0]))
    lost = relative_likelihood(fitted, np.array(objectives)) - chi2.ppf(level, 1)
    return Profile(np.asarray(values, float), np.array(objectives), _crossings(np.asarray(values, float), lost))


def hold(law: Law, name: str) -> Law:
    """The law with one parameter read, raw, from a column `held`: one compiled fit serves every value of it."""

    def log_loss(theta: Mapping[str, Array], features: Mapping[str, Array]) -> Array:
        return law.log_loss({**theta, name: features["held"]}, features)

    free = tuple(other for other in law.parameters if other != name)
    return Law(
        name=f"{law.name} with {name} held",
        parameters=free,
        positive=law.positive - {name},
        features=(*law.features, "held"),
        log_loss=log_loss,
        grid={other: law.grid[other] for other in free},
        pairs=tuple(pair for pair in law.pairs if name not in pair[:2]),
        formula=law.formula,
        optional=law.optional,
    )


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


def prediction_interval(
    fitted: Fit, boot: Bootstrap, rows: Rows, *, level: float = 0.95, seed: int = 0
) -> Float[np.ndarray, "2 R"]:
    """Where the loss of one new run at each row's sizes will fall: spread of the refits plus a drawn residual.

    Quantiles of few residuals are too narrow: with one fit to 40 runs, a nominal 95% interval held 87% of new runs.
    """
    theta = boot.theta_PB[:, boot.converged_B]
    predicted = fitted.law.predict(theta, fitted.law.gather(rows))
    # Fitted residuals are smaller than the noise by the parameters they paid for.
    paid = np.sqrt(len(fitted.rows) / max(len(fitted.rows) - len(fitted.law.parameters), 1))
    drawn = np.random.default_rng(seed).choice(fitted.residuals, predicted.shape) * paid
    return interval(np.exp(predicted - drawn), level)


class Coverage(NamedTuple):
    """Share of simulated sweeps whose interval held the truth, by quantity, with the intervals [2, sweeps]."""

    share: dict[str, float]
    intervals: dict[str, Float[np.ndarray, "2 S"]]
    truth: dict[str, float]
    sweeps: int
    converged: Bool[np.ndarray, "S"]


def student_interval(draws: Float[np.ndarray, "B"], estimate: float, rows: int, parameters: int, level: float):
    """estimate -+ Student's t x the draws' standard deviation, widened for the parameters that residuals paid for.

    A pairs bootstrap of R rows and P parameters understates the variance by about (R - P) / R; percentiles of its draws
    cover less than they say when R / P is small.
    """
    spread = np.std(draws, ddof=1) * np.sqrt(rows / max(rows - parameters, 1))
    half = t.ppf(0.5 + level / 2, max(rows - parameters, 1)) * spread
    return np.array([estimate - half, estimate + half])


def simulate_coverage(
    rows: Rows,
    law: Law,
    truth: Mapping[str, float],
    quantities: Mapping[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]],
    *,
    noise: float,
    sweeps: int,
    resampled: int = 200,
    level: float = 0.95,
    config: FitConfig | None = None,
    seed: int = 0,
) -> Coverage:
    """Simulate sweeps from a known law, fit and bootstrap each, and count how often intervals hold the truth.

    Args:
      rows: where runs are made (their losses are not used).
      law: the true and the fitted law.
      truth: its natural parameters.
      quantities: name -> function of natural parameters by name (each [S]), on a scale where sampling is near normal
        (a logarithm for sizes).
      noise: standard deviation of log loss.
      sweeps, resampled: simulated sweeps and resamples of each.
      level: of the intervals.
      config: of the fits; "normal" if None, which fits the noise that is drawn.
      seed: of noise and resamples.
    """
    config = config or FitConfig(objective="normal")
    theta = law.raw(truth)[:, None]
    mean = law.predict(theta, law.gather(rows))[:, 0]
    rng = np.random.default_rng(seed)
    exact = {name: float(np.squeeze(f(_by_name(law, theta)))) for name, f in quantities.items()}
    edges: dict[str, list[np.ndarray]] = {name: [] for name in quantities}
    converged = []
    for sweep in range(sweeps):
        drawn = Rows({**rows.columns, "loss": np.exp(mean + noise * rng.standard_normal(len(rows)))}, rows.source)
        fitted = fit(drawn, law, config, starts=theta)
        boot = bootstrap(fitted, resampled, seed=seed + 1 + sweep)
        converged.append(fitted.converged)
        for name, f in quantities.items():
            draws = f(_by_name(law, boot.theta_PB[:, boot.converged_B]))
            here = float(np.squeeze(f(_by_name(law, fitted.theta[:, None]))))
            edges[name].append(student_interval(draws, here, len(rows), len(law.parameters), level))
    stacked = {name: np.stack(found, 1) for name, found in edges.items()}
    share = {n: float(np.mean((e[0] <= exact[n]) & (exact[n] <= e[1]))) for n, e in stacked.items()}
    return Coverage(share, stacked, exact, sweeps, np.array(converged))


def _by_name(law: Law, theta_PS: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(law.parameters, law.natural(theta_PS), strict=True))
