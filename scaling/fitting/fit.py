"""Approach 3 of Hoffmann et al. (2022): fit a law by the Huber loss of log loss, from every start of a grid.

Two passes: a short IRLS (majorizing) one from every start, on at most MOST_SEARCHED rows, then exact Newton from the
distinct end points, on all. The results
are basins: local optima of the objective, the best first, as in basin-hopping. Resamples of the rows move the basins a
little, so a bootstrap need not search again (`scaling.fitting.bootstrap`).
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from scaling.fitting.determined import undetermined_fit
from scaling.fitting.discrepancy import Discrepancy, estimate_discrepancy
from scaling.fitting.solve import Problem, Solved, solve
from scaling.laws import Law
from scaling.rows import RowError, Rows, counted

Objective = Literal["huber", "laplace", "normal"]
# Rows (`Rows.thin`) that the first pass sees: it takes time with every one, and finds the same basins of these.
MOST_SEARCHED = 1000


@dataclass(frozen=True)
class FitConfig:
    """Options of a fit.

    Attributes:
      objective: summed over rows, of residuals. "huber" with `delta`; "laplace", the absolute value, and "normal", the
        square: the likelihoods with a free scale, whose best location does not depend on it.
      residuals: of log loss ("log"), or of the loss itself ("loss", as Gadre et al. 2024 fit).
      overprediction: factor on the objective of rows that the law predicts too high; above 1 the fit follows the best
        runs, as where others are badly tuned.
      delta: Huber's threshold (Hoffmann et al. 2022: 1e-3).
      search_steps: steps of the first pass from every start.
      polish_steps: most steps of the second.
      tol: relative predicted decrease of the objective at which a fit has converged.
      keep: most distinct end points that are polished.
      starts: most starts, evenly chosen from the law's grid; 0 for all.
      weights: column of the rows' weights in the objective; "" for equal ones.

    Example:
      >>> import scaling
      >>> scaling.FitConfig(objective="normal").tol
      1e-11
    """

    objective: Objective = "huber"
    residuals: Literal["log", "loss"] = "log"
    overprediction: float = 1.0
    delta: float = 1e-3
    search_steps: int = 30
    polish_steps: int = 200
    tol: float = 1e-11
    keep: int = 32
    starts: int = 0
    weights: str = ""

    def __post_init__(self):
        if not self.delta > 0:
            raise ValueError(f"delta {self.delta}: Huber's threshold must be positive")
        if not 0 < self.overprediction < np.inf:
            raise ValueError(f"overprediction {self.overprediction}: a positive factor is wanted, 1 for none")
        if not 0 < self.tol < 1:
            raise ValueError(f"tol {self.tol}: a relative decrease between 0 and 1 is wanted, such as 1e-11")
        for name, least in (("search_steps", 1), ("polish_steps", 1), ("keep", 1), ("starts", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: at least {least} is wanted")


class Search(NamedTuple):
    """The first pass: raw starts [P, S], and their end points."""

    start_PS: Float[np.ndarray, "P S"]
    ended: Solved


class Prediction(NamedTuple):
    """Losses [R] that a fit predicts, and the ends of the interval of one new run at each place, NaN for none."""

    loss: Float[np.ndarray, " R"]
    low: Float[np.ndarray, " R"]
    high: Float[np.ndarray, " R"]


@dataclass(frozen=True, repr=False)
class Fit:
    """A fitted law.

    Attributes:
      law: of the fit.
      rows: fitted.
      config: options.
      theta: raw parameters [P], the best found.
      value: objective there, a sum over rows.
      converged: whether Newton's decrement there went below `config.tol`.
      decrement: that decrement, relative to the value.
      basins_PK: raw parameters of the distinct converged optima, best first; column 0 is `theta`.
      basin_values: their objectives [K].
      residuals: log predicted - log observed loss [R], whatever the objective's residuals are.
      search: the first pass.

    Example:
      >>> import scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7, noise=0.002)
      >>> law = scaling.find_law("chinchilla")
      >>> fitted = scaling.fit(rows, law, starts=law.raw(truth)[:, None])
      >>> fitted.converged, round(fitted.parameters["alpha"], 1)
      (True, 0.3)
    """

    law: Law
    rows: Rows
    config: FitConfig
    theta: Float[np.ndarray, " P"]
    value: float
    converged: bool
    decrement: float
    basins_PK: Float[np.ndarray, "P K"]
    basin_values: Float[np.ndarray, " K"]
    residuals: Float[np.ndarray, " R"]
    search: Search

    @property
    def parameters(self) -> dict[str, float]:
        """Natural parameters by name."""
        return dict(zip(self.law.parameters, self.law.natural(self.theta).tolist(), strict=True))

    @property
    def scale(self) -> float:
        """Scale of the residuals: mean absolute value for "laplace", else root of the mean square."""
        if self.config.objective == "laplace":
            return float(np.mean(np.abs(self.residuals)))
        return float(np.sqrt(np.mean(self.residuals**2)))

    @property
    def log_likelihood(self) -> float | None:
        """Of log losses at the best scale; None where the objective is no likelihood of them."""
        count, scale = len(self.residuals), max(self.scale, 1e-300)
        if self.config.residuals != "log" or self.config.overprediction != 1 or self.config.weights:
            return None
        if self.config.objective == "laplace":
            return -count * (np.log(2 * scale) + 1)
        if self.config.objective == "normal":
            return -count * (0.5 * np.log(2 * np.pi * scale**2) + 0.5)
        return None

    @cached_property
    def undetermined(self) -> str:
        """Why the fit determines no compute-optimal size; "" if it does. See `scaling.undetermined`."""
        return undetermined_fit(self.law, self.theta, self.rows)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value:.5g}" for name, value in self.parameters.items())
        state = "converged" if self.converged else "not converged"
        state += f", undetermined: {self.undetermined}" if self.undetermined else ""
        return f"Fit({self.law.name} to {counted(len(self.rows), 'row')}, {state}: {values})"

    def summary(self) -> str:
        """Describe the fit in lines: law, rows, parameters, objective, residuals, and why it is undetermined if so."""
        lines = [f"{self.law.name}: {self.law.formula}" if self.law.formula else self.law.name]
        lines += [f"  {name} = {value:.6g}" for name, value in self.parameters.items()]
        state = "converged" if self.converged else "did not converge"
        where = f"{counted(len(self.rows), 'row')} of {self.rows.source}"
        lines.append(f"{where}, {self.config.objective}: {self.value:.6g}, {state}")
        lines.append(f"residuals of log loss: scale {self.scale:.3g}, largest {np.abs(self.residuals).max():.3g}")
        lines += [f"undetermined: {self.undetermined}"] if self.undetermined else []
        return "\n".join(lines)

    def discrepancy(self) -> Discrepancy:
        """Estimate what the law misses from the residuals; see `scaling.fitting.discrepancy`."""
        return estimate_discrepancy(self.law, self.theta, self.rows, self.residuals)

    def predict(self, rows: Rows, *, level: float = 0.95) -> Prediction:
        """Predict losses at rows' sizes (their losses are not used), with the interval of one new run each.

        A fit that is undetermined warns, with the cause, and has no interval: its ends are NaN.

        Example:
          >>> import scaling
          >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
          >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7, noise=0.002)
          >>> law = scaling.find_law("chinchilla")
          >>> fitted = scaling.fit(rows, law, starts=law.raw(truth)[:, None])
          >>> new = scaling.make_rows({"params": [1e9], "tokens": [2e10], "loss": [1.0]})
          >>> predicted = fitted.predict(new)
          >>> bool(predicted.low[0] < predicted.loss[0] < predicted.high[0])
          True
        """
        loss = np.exp(self.law.predict(self.theta[:, None], self.law.gather(rows))[:, 0])
        if self.undetermined:
            text = f"{self.law.name} is undetermined by {self.rows.source} ({self.undetermined}): no interval is given"
            warnings.warn(text, stacklevel=2)
            return Prediction(loss, *np.full((2, len(loss)), np.nan))
        return Prediction(loss, *self.discrepancy().predict(rows, level=level))


def thresholds(config: FitConfig) -> list[float]:
    """List the Huber thresholds of the stages of a fit.

    The absolute value is approached from above, so that every stage starts near its optimum; a millionth of log loss is
    under any run's noise. The square is a threshold above any residual.
    """
    return {"huber": [config.delta], "laplace": [1e-3, 1e-4, 1e-5, 1e-6], "normal": [1e3]}[config.objective]


def weights_of(rows: Rows, config: FitConfig) -> Float[np.ndarray, "R 1"]:
    """Read the weights of rows in the objective; ones without a column for them.

    Raises:
      scaling.rows.RowError: the column is missing, not numeric or negative.
    """
    if not config.weights:
        return np.ones((len(rows), 1))
    weights = rows.need([config.weights])[config.weights]
    bad = np.flatnonzero(weights < 0)
    if len(bad):
        problems = [(int(i) + 1, config.weights, f"{weights[i]} is a negative weight") for i in bad]
        raise RowError(problems, rows.source, rows.lines)
    return weights[:, None]


def make_problem(
    rows: Rows, law: Law, config: FitConfig, delta: float | None = None, *, centered: bool = True
) -> Problem:
    """Make features, targets and the change of variables that centers them (none without `centered`).

    Without `delta` it is the last threshold: the problem whose objective a fit reports.
    """
    features = law.gather(rows)
    mixing = np.eye(len(law.parameters))
    means = {name: float(values.mean()) if centered else 0.0 for name, values in features.items()}
    for coefficient, exponent, feature, sign in law.pairs:
        # theta_coefficient = phi_coefficient - sign exponent mean(feature)
        mixing[law.parameters.index(coefficient), law.parameters.index(exponent)] -= sign * means[feature]
    linear = config.residuals == "loss"
    target = (rows["loss"] if linear else np.log(rows["loss"]))[:, None]
    threshold = np.float64(thresholds(config)[-1] if delta is None else delta)
    return Problem(features, target, means, mixing, threshold, config.overprediction, linear)


def row_losses(
    theta_PS: Float[np.ndarray, "P S"], problem: Problem, law: Law
) -> tuple[Float[np.ndarray, "R S"], Float[np.ndarray, "R S"]]:
    """Compute each row's Huber loss, unweighted, and its derivative; not finite where the residual is not."""
    with np.errstate(over="ignore", invalid="ignore"):
        predicted = law.predict(theta_PS, problem.features)
        residual = (np.exp(predicted) if problem.linear else predicted) - problem.target_R1
        clipped = np.clip(residual, -problem.delta, problem.delta)
        pull = clipped * np.where(residual > 0, problem.over, 1.0)
        return pull * (residual - 0.5 * clipped), pull


def polish(
    theta_PS: Float[np.ndarray, "P S"],
    weights_RS: Float[np.ndarray, "R S"] | Float[np.ndarray, "R 1"],
    rows: Rows,
    law: Law,
    config: FitConfig,
    *,
    held: tuple[int, ...] = (),
) -> Solved:
    """Run Newton from every column of theta under its own row weights, to convergence.

    Exponents in `law.nonnegative` that end below `law.least` are held there, and the rest is fitted again.

    Args:
      theta_PS: raw parameters to start from.
      weights_RS: of the rows, by fit or one column for all.
      rows: to fit.
      law: to fit.
      config: options.
      held: indices of parameters that do not move.

    Example:
      >>> import numpy as np, scaling
      >>> from scaling.fitting import FitConfig, polish
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7, noise=0.002)
      >>> law = scaling.find_law("chinchilla")
      >>> polish(law.raw(truth)[:, None], np.ones((len(rows), 1)), rows, law, FitConfig()).converged.tolist()
      [True]
    """
    solved = _polish(theta_PS, weights_RS, rows, law, config, held)
    signed = [i for i, name in enumerate(law.parameters) if name in law.nonnegative and i not in held]
    for _ in signed:
        below_ES = solved.theta[signed] < law.least
        if not below_ES.any():
            break
        for pattern in np.unique(below_ES[:, below_ES.any(0)], axis=1).T:
            which = np.flatnonzero((below_ES == pattern[:, None]).all(0))
            bound = tuple(i for i, below in zip(signed, pattern, strict=True) if below)
            # Those held before are at the bound exactly.
            before = tuple(i for i in signed if (solved.theta[i, which] == law.least).all())
            start = np.where(np.isin(np.arange(len(solved.theta)), bound)[:, None], law.least, solved.theta[:, which])
            mine = weights_RS if weights_RS.shape[1] == 1 else weights_RS[:, which]
            again = _polish(start, mine, rows, law, config, (*held, *bound, *before))
            for every, part in zip(solved, again, strict=True):
                every[..., which] = part
    return solved


def _polish(
    theta_PS: np.ndarray, weights_RS: np.ndarray, rows: Rows, law: Law, config: FitConfig, held: tuple[int, ...]
) -> Solved:
    """See `polish`, without bounds."""
    # A held coefficient must not mix with its exponent.
    centered = not any(law.parameters[i] in law.positive for i in held)
    for delta in thresholds(config):
        solved = solve(
            theta_PS,
            weights_RS,
            make_problem(rows, law, config, delta, centered=centered),
            law,
            newton=True,
            iterations=config.polish_steps,
            tol=config.tol,
            held=held,
        )
        theta_PS = np.where(np.isfinite(solved.value), solved.theta, theta_PS)
    return solved


def check_count(rows: Rows, law: Law) -> None:
    """Refuse to fit more parameters than there are rows.

    Raises:
      ValueError: with both numbers.
    """
    if len(rows) < len(law.parameters):
        raise ValueError(
            f"{rows.source}: {counted(len(rows), 'row')} cannot determine the {len(law.parameters)} parameters of "
            f"{law.name} ({', '.join(law.parameters)}); add runs, or hold parameters at known values "
            f"(--config.hold.{law.parameters[-1]}=VALUE, from Python scaling.restrict)"
        )


def distinct(theta_PS: np.ndarray, value_S: np.ndarray, predicted_RS: np.ndarray, *, tol: float, most: int) -> list:
    """Find indices of end points whose predictions differ by more than `tol` somewhere, best first, `most` at most."""
    chosen: list[int] = []
    for i in np.argsort(value_S, kind="stable"):
        if not np.isfinite(value_S[i]) or not np.isfinite(theta_PS[:, i]).all():
            continue
        apart = [np.abs(predicted_RS[:, i] - predicted_RS[:, j]).max() > tol for j in chosen]
        if all(apart):
            chosen.append(int(i))
        if len(chosen) == most:
            break
    return chosen


def fit(rows: Rows, law: Law, config: FitConfig | None = None, *, starts: np.ndarray | None = None) -> Fit:
    """Fit a scaling law to runs: Hoffmann et al. (2022), approach 3, with Newton's method in float64.

    Args:
      rows: at least as many as the law has parameters.
      law: to fit.
      config: options; the defaults are the published recipe.
      starts: raw starting values [P, S]; the law's grid if None.

    Raises:
      ValueError: fewer rows than parameters, or no start from which the law is finite.
      scaling.rows.RowError: a column the law needs is missing or wrong.

    Example:
      >>> import scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7)
      >>> law = scaling.find_law("chinchilla")
      >>> fitted = scaling.fit(rows, law, starts=law.starts()[:, ::50])  # all 4500 starts without `starts`
      >>> {name: round(value, 2) for name, value in fitted.parameters.items()}
      {'A': 406.4, 'B': 410.7, 'E': 1.69, 'alpha': 0.34, 'beta': 0.28}
    """
    config = config or FitConfig()
    check_count(rows, law)
    start_PS = law.starts() if starts is None else np.asarray(starts, float)
    if starts is None and config.starts:
        start_PS = start_PS[:, :: -(-start_PS.shape[1] // config.starts)]
    searched = rows.take(rows.thin(MOST_SEARCHED))
    problem = make_problem(searched, law, config, thresholds(config)[0])
    ended = solve(
        start_PS,
        weights_of(searched, config),
        problem,
        law,
        newton=False,
        iterations=config.search_steps,
        tol=1e-6,
    )
    best_first = np.argsort(np.where(np.isfinite(ended.value), ended.value, np.inf), kind="stable")[:1024]
    predicted = law.predict(ended.theta[:, best_first], problem.features)
    which = distinct(ended.theta[:, best_first], ended.value[best_first], predicted, tol=1e-3, most=config.keep)
    if not which:
        raise ValueError(f"{law.name}: not finite from any of {start_PS.shape[1]} starts; give others")
    return _finish(ended.theta[:, best_first[which]], rows, law, config, Search(start_PS, ended))


def fit_near(fitted: Fit, rows: Rows, *, spread: float = 0.3) -> Fit:
    """Fit the law to other rows (one more, say) from the basins of a fit, without searching the grid again.

    Starts are the basins, and the best of them with every parameter moved up and down by `spread`.

    Example:
      >>> import scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7, noise=0.002)
      >>> law = scaling.find_law("chinchilla")
      >>> fitted = scaling.fit(rows, law, starts=law.raw(truth)[:, None])
      >>> more = scaling.isoflop_design(truth, budgets=6, sizes=7, noise=0.002)
      >>> scaling.fit_near(fitted, more).converged
      True
    """
    moved = spread * np.concatenate([np.eye(len(fitted.theta)), -np.eye(len(fitted.theta))], 1)
    start_PS = np.concatenate([fitted.basins_PK, fitted.theta[:, None] + moved], 1)
    check_count(rows, fitted.law)
    return _finish(start_PS, rows, fitted.law, fitted.config, fitted.search)


def _finish(theta_PS: np.ndarray, rows: Rows, law: Law, config: FitConfig, search: Search) -> Fit:
    """Polish candidates, select the distinct optima, and make the record."""
    features, seen = law.gather(rows), np.log(rows["loss"])
    solved = polish(theta_PS, weights_of(rows, config), rows, law, config)
    order = np.argsort(np.where(np.isfinite(solved.value), solved.value, np.inf), kind="stable")
    if not np.isfinite(solved.value[order[0]]):
        raise ValueError(
            f"{law.name}: no finite fit to {rows.source}; hold a parameter (--config.hold), or give other starts"
        )
    final = law.predict(solved.theta, features)
    # Basins: converged optima, and in any case the best point.
    candidate = np.where(solved.converged | (np.arange(len(order)) == order[0]), solved.value, np.inf)
    basins = distinct(solved.theta, candidate, final, tol=1e-5, most=config.keep)
    best = basins[0]
    if not solved.converged[best]:
        best = int(order[0])
    return Fit(
        law=law,
        rows=rows,
        config=config,
        theta=solved.theta[:, best],
        value=float(solved.value[best]),
        converged=bool(solved.converged[best]),
        decrement=float(solved.decrement[best]),
        basins_PK=solved.theta[:, basins],
        basin_values=solved.value[basins],
        residuals=final[:, best] - seen,
        search=search,
    )
