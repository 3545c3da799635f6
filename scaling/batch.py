"""Learning rate and batch size: the gradient noise scale (critical batch size), and a quadratic surface over both.

McCandlish, Kaplan, Amodei et al. 2018, "An Empirical Model of Large-Batch Training"; the surface is quadratic in the
logarithms of learning rate and batch, as sweeps of both have been found near their optimum (Bi et al. 2024, section 3).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from scaling.sweeps.plan import Rule


class CriticalBatch(NamedTuple):
    """The gradient noise scale B_simple = tr(Sigma) / |G|^2 in examples, with a bootstrap interval."""

    examples: float
    low: float
    high: float
    measurements: int


def critical_batch(
    signal: Float[np.ndarray, " R"],
    noise: Float[np.ndarray, " R"],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> CriticalBatch:
    """Estimate the gradient noise scale from measurements of |G|^2 and tr(Sigma), averaged before the division.

    Each is unbiased and their ratio is not (McCandlish et al. 2018, appendix A.1); the interval's ends are infinite
    where resamples have no signal, and NaN for a single measurement.

    Args:
      signal: |G|^2.
      noise: tr(Sigma).
      level: of the interval.
      resamples: of the bootstrap.
      seed: of the bootstrap.

    Raises:
      ValueError: no measurements, or a mean signal that is not positive.

    Example:
      >>> import numpy as np, scaling
      >>> scaling.critical_batch(np.array([2.0, 1.8, 2.2]), np.array([60.0, 62.0, 58.0])).examples
      30.0
    """
    if not len(signal) or len(signal) != len(noise):
        raise ValueError(f"{len(signal)} measurements of the signal and {len(noise)} of the noise")
    if not np.mean(signal) > 0:
        raise ValueError(f"the mean signal is {np.mean(signal):.3g}: use more batches per measurement")
    estimate = float(np.mean(noise) / np.mean(signal))
    if len(signal) == 1:
        return CriticalBatch(estimate, np.nan, np.nan, 1)
    which = np.random.default_rng(seed).integers(0, len(signal), (resamples, len(signal)))
    below = signal[which].mean(1)
    drawn = np.where(below > 0, noise[which].mean(1) / np.where(below > 0, below, 1.0), np.inf)
    low, high = (float(np.quantile(drawn, q, method="lower")) for q in (0.5 - level / 2, 0.5 + level / 2))
    return CriticalBatch(estimate, low, high, len(signal))


class Surface(NamedTuple):
    """A quadratic in log learning rate and log batch.

    Attributes:
      lr, batch, loss: its minimum; NaN if refused.
      refused: the reason where there is none, "" otherwise.
      hessian: [[lr lr, lr batch], [batch lr, batch batch]], per unit of natural logarithm.
      ridge: exponent of the best learning rate at a fixed batch, lr ~ batch^ridge.
      scatter: root mean square of the points about the surface.
    """

    lr: float
    batch: float
    loss: float
    refused: str
    hessian: Float[np.ndarray, "2 2"]
    ridge: float
    scatter: float


def fit_surface(
    lr: Float[np.ndarray, " R"],
    batch: Float[np.ndarray, " R"],
    loss: Float[np.ndarray, " R"],
    *,
    within: float = np.inf,
) -> Surface:
    """Fit the loss of a grid of learning rates and batch sizes at one size and token count.

    Args:
      lr, batch, loss: of the runs.
      within: runs whose loss is more than this above the best are left out (a quadratic holds near its minimum).

    Returns:
      The surface; refused where its minimum lies outside the runs, where it has none, or where the points scatter more
      than it rises.

    Raises:
      ValueError: fewer than three learning rates or batch sizes, or fewer than seven runs, are left.

    Example:
      >>> import numpy as np, scaling
      >>> lr, batch = (x.ravel() for x in np.meshgrid(np.geomspace(1e-4, 1e-2, 5), np.geomspace(8, 128, 5)))
      >>> loss = 2 + 0.1 * np.log(lr / 1e-3) ** 2 + 0.05 * np.log(batch / 32) ** 2
      >>> found = scaling.fit_surface(lr, batch, loss)
      >>> round(found.lr, 6), round(found.batch, 3)
      (0.001, 32.0)
    """
    near = loss <= loss.min() + within
    lr, batch, loss = lr[near], batch[near], loss[near]
    counts = len(np.unique(lr)), len(np.unique(batch)), len(loss)
    if counts[0] < 3 or counts[1] < 3 or counts[2] < 7:
        raise ValueError(
            f"{counts[0]} learning rates, {counts[1]} batch sizes, {counts[2]} runs: at least 3, 3 and 7 are needed"
        )
    x_R2 = np.log(np.stack([lr, batch], 1))
    center = x_R2.mean(0)
    x, y = (x_R2 - center).T
    design = np.stack([np.ones_like(x), x, y, x * x / 2, x * y, y * y / 2], 1)
    c = np.linalg.lstsq(design, loss, rcond=None)[0]
    scatter = float(np.sqrt(np.mean((design @ c - loss) ** 2)))
    hessian = np.array([[c[3], c[4]], [c[4], c[5]]])
    ridge = float(-c[4] / c[3])
    if not (np.linalg.eigvalsh(hessian) > 0).all():
        return Surface(np.nan, np.nan, np.nan, "the surface has no minimum", hessian, ridge, scatter)
    best = np.linalg.solve(hessian, -c[1:3])
    place = np.exp(best + center)
    lowest = float(c[0] + c[1:3] @ best / 2)
    outside = [
        f"{'larger' if at > values.max() else 'smaller'} {name}"
        for name, at, values in (("learning rates", place[0], lr), ("batches", place[1], batch))
        if not values.min() < at < values.max()
    ]
    if outside:
        refused = f"the minimum is at the edge: {' and '.join(outside)} are needed"
        return Surface(np.nan, np.nan, np.nan, refused, hessian, ridge, scatter)
    if scatter > loss.max() - lowest:
        refused = f"the points scatter ({scatter:.2g}) more than the surface rises"
        return Surface(np.nan, np.nan, np.nan, refused, hessian, ridge, scatter)
    return Surface(float(place[0]), float(place[1]), lowest, "", hessian, ridge, scatter)


def fit_rule(
    params: Sequence[float] | np.ndarray | None,
    values: Sequence[float] | np.ndarray,
    tokens: Sequence[float] | np.ndarray | None = None,
    *,
    multiple: int = 0,
) -> Rule:
    """Fit a rule, a power law of parameters, tokens or both, to the best values of several runs: lr(N, D), batch(D).

    By least squares in logarithms, as Li et al. (2025, Step Law) fit theirs.

    Args:
      params: of the runs; None for a rule of tokens alone.
      values: best learning rates or batches.
      tokens: of the runs; None for a rule of parameters alone.
      multiple: of the rule.

    Raises:
      ValueError: runs that do not determine the exponents: one size or token count, or proportional ones.

    Example:
      >>> import scaling
      >>> rule = scaling.fit_rule([1e4, 1e6], [1e-2, 1e-3])
      >>> round(rule.exponent, 3), round(rule(1e5), 5)
      (-0.5, 0.00316)
      >>> batch = scaling.fit_rule(None, [32.0, 64.0], [1e8, 4e8])
      >>> round(batch.tokens_exponent, 3)
      0.5
    """
    logs = [np.log(np.asarray(x, float)) for x in (params, tokens) if x is not None]
    centers = [float(x.mean()) for x in logs]
    design = np.stack([np.ones(len(values)), *(x - center for x, center in zip(logs, centers, strict=True))], 1)
    if np.linalg.matrix_rank(design, tol=1e-6 * len(values)) < design.shape[1]:
        what = " and ".join(name for name, x in (("params", params), ("tokens", tokens)) if x is not None)
        raise ValueError(f"{len(values)} runs do not determine a power law of {what}: they must differ, each by itself")
    height, *slopes = np.linalg.lstsq(design, np.log(np.asarray(values, float)), rcond=None)[0].tolist()
    given = [name for name, x in (("", params), ("tokens_", tokens)) if x is not None]
    fields = {f"{name}at": float(np.exp(center)) for name, center in zip(given, centers, strict=True)}
    fields |= {f"{name}exponent": slope for name, slope in zip(given, slopes, strict=True)}
    return Rule(float(np.exp(height)), multiple=multiple, **fields)
