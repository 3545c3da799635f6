"""The discrepancy of a law: a smooth random function of a run's sizes beside the law and independent noise.

A Gaussian process (Kennedy & O'Hagan 2001) over decades of FLOPs and of tokens per parameter, on a law that is linear
in its parameters near the fit, with a flat prior on them (universal kriging). Its size and length are averaged over by
restricted likelihood: intervals widen where residuals are not independent, and as far as the rows cannot exclude it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import stdtr

from scaling.laws import Law
from scaling.optimum import Optimum, compute_optimal
from scaling.rows import PER_PARAMETER_AND_TOKEN, Rows, make_rows

# Prior probability that a law holds exactly; lengths (decades) over which its discrepancy may change; its variances in
# units of the noise's. Chosen on the tables of docs/fits.md, with simulated sweeps as the check.
EXACT, LENGTHS, VARIANCES = 0.1, (0.5, 1.0, 2.0), tuple(np.geomspace(1e-2, 1e4, 13))
# Sizes about the law's optimum, in log N, among which that of the law with its discrepancy is looked for.
REACH = 3.0
# Rows (`Rows.thin`) that a discrepancy is estimated from: its time grows with their cube.
MOST_ROWS = 500


def coordinates(law: Law, rows: Rows) -> Float[np.ndarray, "K R"]:
    """Compute where rows lie: decades of FLOPs and of tokens per parameter, and the law's further features."""
    features = {name: values[:, 0] / np.log(10) for name, values in law.gather(rows).items() if name.startswith("log_")}
    others = [values[:, 0] for name, values in law.gather(rows).items() if not name.startswith("log_")]
    if {"log_params", "log_tokens"} <= set(features):
        size, data = features.pop("log_params"), features.pop("log_tokens")
        return np.stack([size + data, data - size, *features.values(), *others])
    return np.stack([*features.values(), *others])


def basis(slopes_RP: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the columns, without those that rows do not determine."""
    scale = np.linalg.norm(slopes_RP, axis=0)
    left, values, _ = np.linalg.svd(slopes_RP / np.where(scale > 0, scale, 1.0), full_matrices=False)
    return left[:, values > 1e-6 * values[0]]


class Discrepancy(NamedTuple):
    """The discrepancy of a fitted law, averaged over its size and length.

    Attributes:
      law: that was fitted.
      theta: raw parameters.
      rows: fitted.
      residuals: log predicted - log observed loss [R].
      share: posterior probability of every candidate [M], the exact law first.
      settings: (length in decades, variance over that of the noise) of every candidate.
      noise: standard deviation of the noise under every candidate.
      spare: degrees of freedom.
    """

    law: Law
    theta: Float[np.ndarray, " P"]
    rows: Rows
    residuals: Float[np.ndarray, " R"]
    share: Float[np.ndarray, " M"]
    settings: tuple[tuple[float, float], ...]
    noise: Float[np.ndarray, " M"]
    spare: int

    def predict(self, rows: Rows, *, level: float = 0.95) -> Float[np.ndarray, "2 R"]:
        """Compute the prediction interval of one new run's loss at each row's sizes.

        Where the rows hardly determine the law it may reach to infinity.
        """
        likely = np.flatnonzero(self.share)
        found = [self._law_and_discrepancy(rows, int(m)) for m in likely]
        mean, variance = (np.array(parts) for parts in zip(*found, strict=True))
        error = np.sqrt(self.noise[likely, None] ** 2 + variance)
        with np.errstate(over="ignore"):
            return np.exp(_mixture(mean, error, self.share[likely], max(self.spare, 1), level))

    def surfaces(self, rows: Rows, count: int = 400, *, seed: int = 42) -> Float[np.ndarray, "R B"]:
        """Draw log losses without noise, law and discrepancy together, from their posterior."""
        stream, drawn = np.random.default_rng(seed), []
        for m, number in enumerate(stream.multinomial(count, self.share)):
            if number:
                mean, covariance = self._law_and_discrepancy(rows, m, joint=True)
                values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
                normal = vectors @ (
                    np.sqrt(np.maximum(values, 0))[:, None] * stream.standard_normal((len(mean), number))
                )
                drawn.append(
                    mean[:, None] + normal * np.sqrt(self.spare / stream.chisquare(max(self.spare, 1), number))
                )
        return np.concatenate(drawn, 1)

    def optima(
        self, budgets: Sequence[float], *, at: Mapping[str, float] | None = None, count: int = 400, seed: int = 42
    ) -> Optimum:
        """Draw compute-optimal sizes at budgets [C, B]: the lowest points of drawn surfaces, near those of the law."""
        best = compute_optimal(self.law, self.theta[:, None], budgets, at=at).params[:, 0]
        sizes = best[:, None] * np.exp(np.linspace(-REACH, REACH, 101))
        flops = np.repeat(np.asarray(budgets, float), sizes.shape[1])
        columns = {"params": sizes.ravel(), "flops": flops, "loss": np.ones(sizes.size)}
        others = {name: np.full(sizes.size, value) for name, value in (at or {}).items()}
        loss = self.surfaces(make_rows(columns | others), count, seed=seed).reshape(*sizes.shape, -1)
        lowest = np.clip(loss.argmin(1), 1, sizes.shape[1] - 2)
        # The vertex of the parabola through the lowest point and its neighbors.
        below, here, above = (np.take_along_axis(loss, lowest[:, None] + i, 1)[:, 0] for i in (-1, 0, 1))
        aside = 0.5 * (below - above) / np.maximum(below - 2 * here + above, 1e-15)
        step = 2 * REACH / (sizes.shape[1] - 1)
        params = np.take_along_axis(sizes, lowest, 1) * np.exp(step * np.clip(aside, -0.5, 0.5))
        tokens = np.asarray(budgets, float)[:, None] / (PER_PARAMETER_AND_TOKEN * params)
        return Optimum(params, tokens, np.exp(loss.min(1)))

    def _law_and_discrepancy(self, rows: Rows, m: int, *, joint: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Mean [R] and variance [R], or covariance [R, R], of log loss at rows under one candidate."""
        law, (length, variance) = self.law, self.settings[m]
        slopes, there = (law.slopes(self.theta, one) for one in (self.rows, rows))
        here, new = coordinates(law, self.rows), coordinates(law, rows)
        cross = variance * _kernel(new, here, length)
        inverse, step, root = _solve(slopes, variance * _kernel(here, here, length), -self.residuals)
        weights = cross @ inverse
        mean = law.predict(self.theta[:, None], law.gather(rows))[:, 0] + there @ step
        mean = mean + weights @ (-self.residuals - slopes @ step)
        rest, square = there - weights @ slopes, self.noise[m] ** 2
        if joint:
            unknown = rest @ root
            return mean, square * (variance * _kernel(new, new, length) - weights @ cross.T + unknown @ unknown.T)
        explained = np.sum(weights * cross, 1)
        return mean, square * (np.maximum(variance - explained, 0) + np.sum((rest @ root) ** 2, 1))


def estimate_discrepancy(
    law: Law, theta_P: Float[np.ndarray, " P"], rows: Rows, residuals: Float[np.ndarray, " R"]
) -> Discrepancy:
    """Estimate the discrepancy of a fitted law from its residuals, log predicted - log observed loss.

    Example:
      >>> import scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7, noise=0.002)
      >>> law = scaling.find_law("chinchilla")
      >>> fitted = scaling.fit(rows, law, starts=law.raw(truth)[:, None])
      >>> found = scaling.fitting.estimate_discrepancy(law, fitted.theta, rows, fitted.residuals)
      >>> low, high = found.predict(scaling.make_rows({"params": [1e9], "tokens": [2e10], "loss": [1.0]}))
      >>> bool(0.002 < high[0] - low[0] < 0.1)
      True
    """
    few = rows.thin(MOST_ROWS)
    rows, residuals = rows.take(few), residuals[few]
    slopes, residual = law.slopes(theta_P, rows), -residuals
    place, base = coordinates(law, rows), basis(slopes)
    # Contrasts that no parameter of the law can explain.
    free = np.linalg.svd(base, full_matrices=True)[0][:, base.shape[1] :]
    spare = free.shape[1]
    settings = [(LENGTHS[0], 0.0), *((length, variance) for length in LENGTHS for variance in VARIANCES)]
    likelihood, noise = [], []
    for length in LENGTHS:
        kernel = _kernel(place, place, length)
        values, vectors = np.linalg.eigh(free.T @ kernel @ free)
        seen = vectors.T @ (free.T @ residual)
        for variance in [v for one, v in settings if one == length]:
            scale = 1 + variance * np.maximum(values, 0)
            square = max(float(np.mean(seen**2 / scale)), 1e-18) if spare else 1e-18
            prior = EXACT if variance == 0 else (1 - EXACT) / (len(settings) - 1)
            likelihood.append(np.log(prior) - 0.5 * (spare * np.log(square) + np.log(scale).sum()))
            noise.append(np.sqrt(square))
    share = np.exp(np.array(likelihood) - max(likelihood))
    # What no one would ever draw costs time only.
    share = np.where(share > 1e-4 * share.max(), share, 0.0)
    share /= share.sum()
    return Discrepancy(law, theta_P, rows, residuals, share, tuple(settings), np.array(noise), spare)


def _kernel(one: np.ndarray, other: np.ndarray, length: float) -> np.ndarray:
    apart = sum((a[:, None] - b[None, :]) ** 2 for a, b in zip(one, other, strict=True))
    return np.exp(-0.5 * apart / length**2)


def _solve(slopes: np.ndarray, kernel: np.ndarray, residual: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Generalized least squares under 1 + kernel: its inverse, the parameters' step, and a root of their spread."""
    inverse = np.linalg.inv(np.eye(len(kernel)) + kernel)
    scale = np.linalg.norm(slopes, axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    unit = slopes / scale
    values, vectors = np.linalg.eigh(unit.T @ inverse @ unit)
    # Of eigenvalues that are rounding, some are negative: variances are sums of squares by the root of the others.
    seen = values > 1e-13 * values[-1]
    root = vectors[:, seen] / np.sqrt(values[seen]) / scale[:, None]
    return inverse, root @ (root.T @ (slopes.T @ (inverse @ residual))), root


def _mixture(mean_MR: np.ndarray, error_MR: np.ndarray, share_M: np.ndarray, spare: int, level: float) -> np.ndarray:
    """Central intervals [2, R] of a mixture of Student's t distributions."""
    reach = 100 * error_MR.max(0)
    ends = []
    for share in (0.5 - level / 2, 0.5 + level / 2):
        low, high = mean_MR.min(0) - reach, mean_MR.max(0) + reach
        # Bisection: to a millionth of the spread, all rows at once.
        for _ in range(40):
            middle = (low + high) / 2
            under = share_M @ stdtr(spare, (middle - mean_MR) / error_MR) < share
            low, high = np.where(under, middle, low), np.where(under, high, middle)
        ends.append((low + high) / 2)
    return np.stack(ends)
