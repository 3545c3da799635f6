"""Whether a law holds: lack-of-fit test, backtest, comparison of laws by held-out error."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import f as f_distribution
from scipy.stats import norm

from scaling.doctor import Finding
from scaling.fitting.bootstrap import bootstrap
from scaling.fitting.determined import undetermined_sizes
from scaling.fitting.discrepancy import MOST_ROWS, basis, coordinates
from scaling.fitting.fit import Fit, FitConfig, fit, polish
from scaling.fitting.intervals import prediction_interval
from scaling.laws import Law
from scaling.rows import Rows, counted

REJECTED = 0.01
# Standard deviation of log N and log D about a line under which a backtest is not made.
LINE = 0.1


class LackOfFit(NamedTuple):
    """An F test of smooth terms beside the law.

    Attributes:
      p: probability of as large a gain if the law were true.
      terms: number of terms.
      scale, scale_with: root mean square residual of log loss by least squares, without and with the terms.
    """

    p: float
    terms: int
    scale: float
    scale_with: float

    @property
    def rejected(self) -> bool:
        """Whether the law is rejected at 1%."""
        return self.p < REJECTED


def lack_of_fit(fitted: Fit) -> LackOfFit:
    """Test smooth extra terms: first and second powers of the rows' coordinates, beside the law's slopes.

    By least squares whatever the objective of the fit: from its optimum, all parameters free.

    Example:
      >>> import numpy as np, scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7, noise=0.002)
      >>> law = scaling.find_law("chinchilla")
      >>> loss = rows["loss"] * (1 + 0.01 * np.log10(rows["flops"] / 1e20) ** 2)
      >>> tables = rows, scaling.make_rows({**rows.columns, "loss": loss})
      >>> [scaling.lack_of_fit(scaling.fit(x, law, starts=law.raw(truth)[:, None])).rejected for x in tables]
      [False, True]
    """
    law, rows = fitted.law, fitted.rows
    squares = polish(fitted.theta[:, None], np.ones((len(rows), 1)), rows, law, FitConfig(objective="normal"))
    theta = squares.theta[:, 0] if np.isfinite(squares.theta).all() else fitted.theta
    residual = np.log(rows["loss"]) - law.predict(theta[:, None], law.gather(rows))[:, 0]
    base = basis(law.slopes(theta, rows))
    place = coordinates(law, rows)
    place = (place - place.mean(1, keepdims=True)) / np.maximum(place.std(1, keepdims=True), 1e-12)
    place = place[place.std(1) > 0.5]
    pairs = [place[i] * place[j] for i in range(len(place)) for j in range(i + 1)]
    terms = np.stack([*place, *pairs], 1) if len(place) else np.zeros((len(rows), 0))
    both = np.linalg.svd(np.concatenate([base, terms / np.maximum(np.linalg.norm(terms, axis=0), 1e-12)], 1), False)
    full = both[0][:, : int((both[1] > 1e-6 * both[1][0]).sum())]
    gained, spare = full.shape[1] - base.shape[1], len(rows) - full.shape[1]
    before = float(np.sum((residual - base @ (base.T @ residual)) ** 2))
    after = float(np.sum((residual - full @ (full.T @ residual)) ** 2))
    scales = np.sqrt(before / len(rows)), np.sqrt(after / len(rows))
    if gained < 1 or spare < 1 or before < 1e-18 * len(rows):
        return LackOfFit(1.0, max(gained, 0), *map(float, scales))
    ratio = max(before - after, 0.0) / gained / max(after / spare, 1e-300)
    return LackOfFit(float(f_distribution.sf(ratio, gained, spare)), gained, *map(float, scales))


def examine_law(fitted: Fit) -> Finding:
    """Report the lack-of-fit test as a finding."""
    found = lack_of_fit(fitted)
    numbers = {"p": found.p, "terms": found.terms, "scale": found.scale, "scale_with": found.scale_with}
    text = f"{found.terms} smooth terms in the sizes bring the rms residual of log loss from {found.scale:.2g} to "
    text += f"{found.scale_with:.2g} (F test, p = {found.p:.1g})"
    if found.rejected:
        text = f"The law is rejected: {text}. Beyond the runs it may bend further."
        return Finding("lack of fit", "warning", text, numbers)
    return Finding("lack of fit", "fine", f"The law is not rejected: {text}.", numbers)


class Backtest(NamedTuple):
    """Predictions of the runs above a share of the largest run's FLOPs, from a fit to the runs below it.

    Attributes:
      share: of the largest run's FLOPs.
      rows: number of runs fitted.
      held_out: runs predicted.
      interval: [2, H], with the discrepancy.
      plain: [2, H], as if the law were exact; None without resamples.
      bias: mean of log observed over predicted loss.
    """

    share: float
    rows: int
    held_out: Rows
    interval: Float[np.ndarray, "2 H"]
    plain: Float[np.ndarray, "2 H"] | None
    bias: float

    def inside(self, interval: Float[np.ndarray, "2 H"] | None = None) -> Float[np.ndarray, " H"]:
        """Compute which losses lie in their interval, `interval` or the one with the discrepancy."""
        low, high = self.interval if interval is None else interval
        return ((low <= self.held_out["loss"]) & (self.held_out["loss"] <= high)).astype(float)


def interval_score(
    interval: Float[np.ndarray, "2 H"], loss: Float[np.ndarray, " H"], level: float = 0.95
) -> Float[np.ndarray, " H"]:
    """Compute the interval score of log losses (Gneiting & Raftery 2007, eq. 43): width, plus 2 / (1 - level) x miss.

    Example:
      >>> import numpy as np
      >>> from scaling.misfit import interval_score
      >>> interval_score(np.exp([[0.0, 0.0], [1.0, 1.0]]), np.exp([0.5, 1.1])).round(6).tolist()
      [1.0, 5.0]
    """
    low, high, seen = np.log(interval[0]), np.log(interval[1]), np.log(loss)
    return high - low + 2 / (1 - level) * (np.maximum(low - seen, 0) + np.maximum(seen - high, 0))


def backtest(
    rows: Rows,
    law: Law,
    config: FitConfig | None = None,
    *,
    share: float = 0.1,
    resampled: int = 0,
    level: float = 0.95,
    seed: int = 42,
) -> Backtest:
    """Fit the runs below a share of the largest run's FLOPs and predict the others.

    Args:
      rows: all runs.
      law: to fit.
      config: of the fit.
      share: of the largest FLOPs.
      resampled: resamples for the interval without the discrepancy; 0 for none.
      level: of the intervals.
      seed: of the resamples.

    Raises:
      ValueError: no run above the share, or no more runs below, or different places of them, than the law has
        parameters, or sizes below that nearly lie on a line (one budget, say).

    Example:
      >>> import scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7, noise=0.002)
      >>> law = scaling.find_law("chinchilla")
      >>> found = scaling.backtest(rows, law, scaling.FitConfig(starts=60))
      >>> found.rows, len(found.held_out), bool(abs(found.bias) < 0.01)
      (21, 14, True)
    """
    below = rows["flops"] < share * rows["flops"].max()
    if below.all() or below.sum() <= len(law.parameters) + 1:
        raise ValueError(
            f"{rows.source}: {int(below.sum())} of {counted(len(rows), 'run')} are below {share:g} of the largest "
            f"one's FLOPs; more than {len(law.parameters) + 1} are needed, and some above"
        )
    places = len(np.unique(np.concatenate([*law.gather(rows.take(below)).values()], 1), axis=0))
    if places <= len(law.parameters):
        raise ValueError(
            f"{rows.source}: the {int(below.sum())} runs below {share:g} of the largest one's FLOPs have {places} "
            f"different {', '.join(law.features)}, which cannot determine the {len(law.parameters)} parameters of "
            f"{law.name} and judge them"
        )
    if {"log_params", "log_tokens"} <= set(law.features) and (cause := undetermined_sizes(rows.take(below), LINE)):
        raise ValueError(
            f"{rows.source}: the {int(below.sum())} runs below {share:g} of the largest one's FLOPs do not determine "
            f"{law.name}: {cause}"
        )
    fitted, held_out = fit(rows.take(below), law, config), rows.take(~below)
    plain = None
    if resampled:
        plain = prediction_interval(fitted, bootstrap(fitted, resampled, seed=seed), held_out, level=level)
    predicted = law.predict(fitted.theta[:, None], law.gather(held_out))[:, 0]
    bias = float(np.mean(np.log(held_out["loss"]) - predicted))
    interval = fitted.discrepancy().predict(held_out, level=level)
    return Backtest(share, int(below.sum()), held_out, interval, plain, bias)


def examine_backtests(found: Sequence[Backtest], level: float = 0.95, refused: Sequence[str] = ()) -> Finding:
    """Report backtests as a finding; `refused` are the messages of those that could not be made."""
    if not found:
        text = "Larger runs were not predicted from smaller ones"
        text += f": {'; '.join(refused)}." if refused else ": no backtest was asked for."
        return Finding("backtest", "note", text, {"held_out": 0})
    texts, warned = [], False
    numbers: dict[str, float] = {}
    for one in found:
        held, inside = len(one.held_out), float(one.inside().mean())
        names, right = f"{one.share:.3g}", f"{round(inside * held)} of {held} others"
        numbers |= {f"inside_{names}": inside, f"bias_{names}": one.bias, f"held_out_{names}": held}
        texts.append(
            f"fitted to {counted(one.rows, 'run')} below {one.share:.2g} of the largest, {right} lie in their "
            f"{level:.0%} intervals (observed over predicted loss: {np.exp(one.bias):.4f} on average)"
        )
        # A shortfall that chance explains in fewer than one case of a hundred, were runs independent: of the runs
        # predicted, and of the noise, which is estimated from those fitted.
        normal = float(norm.ppf(0.5 + level / 2))
        by_noise = 2 * normal * norm.pdf(normal) / np.sqrt(2 * min(one.rows, MOST_ROWS))
        warned |= inside < level - 2.6 * np.sqrt(level * (1 - level) / held + by_noise**2)
    text = "; ".join(texts) + "."
    if warned:
        text += " Predictions of larger runs from smaller ones were surer than they may be, and so may these."
    return Finding("backtest", "warning" if warned else "fine", text[0].upper() + text[1:], numbers)


class Candidate(NamedTuple):
    """A law among others, fitted by least squares.

    Attributes:
      law: of the fit.
      fitted: the fit.
      held_out: log density of every row's log loss when the row is left out [R].
      error: root mean square of the residuals of log loss when rows are left out.
      log_likelihood: of all rows.
      bic: Schwarz's criterion, less is better.
    """

    law: Law
    fitted: Fit
    held_out: Float[np.ndarray, " R"]
    error: float
    log_likelihood: float
    bic: float


def compare_laws(rows: Rows, laws: Sequence[Law], config: FitConfig | None = None) -> list[Candidate]:
    """Compare laws by the error of rows left out one at a time, and by likelihood; the chosen law first.

    Rows are left out by leverage: r / (1 - h) is exact for a linear law (PRESS, Allen 1974). Chosen is the law of
    fewest parameters that predicts as well as the best within the standard error of their difference, so that of
    nested laws that predict alike the smaller wins; of laws with equally many the better.

    Args:
      rows: with the columns that every law needs.
      laws: candidates.
      config: of the fits; the objective is least squares.

    Example:
      >>> import scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7, noise=0.002)
      >>> law = scaling.find_law("chinchilla")
      >>> found = scaling.compare_laws(rows, [scaling.tie(law, beta="alpha"), law], scaling.FitConfig(starts=60))
      >>> found[0].law.name
      'chinchilla'
    """
    squares = replace(config or FitConfig(), objective="normal", residuals="log", overprediction=1.0, weights="")
    found = [_candidate(fit(rows, law, squares)) for law in laws]
    best = max(found, key=lambda one: one.held_out.sum())

    alike = [one for one in found if not _better(best, one)]
    chosen = min(alike, key=lambda one: (len(one.law.parameters), -one.held_out.sum()))
    rest = sorted((one for one in found if one is not chosen), key=lambda one: -one.held_out.sum())
    return [chosen, *rest]


def density_gained(one: Candidate, other: Candidate) -> tuple[float, float]:
    """Compute by how much a law's log predictive density of rows left out exceeds another's, and its standard error.

    Densities are summed over rows, of which each is left out once (Vehtari, Gelman & Gabry 2017).
    """
    gained = one.held_out - other.held_out
    return float(gained.sum()), float(np.sqrt(len(gained)) * gained.std(ddof=1))


def _better(one: Candidate, other: Candidate) -> bool:
    """Whether a law predicts rows left out better than another, by more than the standard error of the difference."""
    gained, error = density_gained(one, other)
    return gained > error


def examine_laws(found: Sequence[Candidate], law: Law) -> Finding:
    """Report a comparison of laws, of which `law` was fitted, as a finding."""
    chosen, mine = found[0], next(one for one in found if one.law is law)
    numbers = {"error": mine.error, "chosen_error": chosen.error, "laws": len(found)}
    if len(found) < 2:
        text = f"{law.name} was compared with no other law."
        return Finding("other laws", "note", text, numbers)
    if chosen is mine:
        other = max(found[1:], key=lambda one: one.held_out.sum())
        gained, error = density_gained(mine, other)
        numbers |= {"density_gained": gained, "density_error": error}
        text = f"Of {len(found)} laws, {law.name} is the smallest that predicts rows left out as well as any: its log "
        text += (
            f"density of them is {gained:+.1f} ± {error:.1f} against that of {other.law.name}, the best of the others."
        )
        return Finding("other laws", "fine", text, numbers)
    gained, error = density_gained(chosen, mine)
    numbers |= {"density_gained": gained, "density_error": error}
    text = f"The log density of rows left out is {gained:+.1f} ± {error:.1f} under {chosen.law.name} "
    text += f"({counted(len(chosen.law.parameters), 'parameter')}) against {law.name} ({len(law.parameters)}); rms "
    text += f"errors are {chosen.error:.3g} and {mine.error:.3g} in log loss. "
    fewer = len(chosen.law.parameters) < len(law.parameters)
    if better := _better(chosen, mine):
        text += f"{chosen.law.name} is the better law here."
    else:
        text += "The difference is within its standard error: " + ("the smaller law will do." if fewer else "both do.")
    return Finding("other laws", "warning" if better else "note", text, numbers)


def _candidate(fitted: Fit) -> Candidate:
    base = basis(fitted.law.slopes(fitted.theta, fitted.rows))
    count, spare = len(fitted.rows), max(len(fitted.rows) - base.shape[1] - 1, 1)
    leverage = np.minimum(np.sum(base**2, 1), 1 - 1e-6)
    left_out = fitted.residuals / (1 - leverage)
    square = np.maximum((np.sum(fitted.residuals**2) - fitted.residuals * left_out) / spare, 1e-18)
    # Variance of a row that is left out: noise, and the curve's without it.
    variance = square / (1 - leverage)
    density = -0.5 * (np.log(2 * np.pi * variance) + left_out**2 / variance)
    likelihood = float(fitted.log_likelihood or 0.0)
    bic = (len(fitted.law.parameters) + 1) * np.log(count) - 2 * likelihood
    error = float(np.sqrt(np.mean(left_out**2)))
    return Candidate(fitted.law, fitted, density, error, likelihood, float(bic))
