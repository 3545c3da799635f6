"""Which learning rate and batch size: the gradient noise scale, and a surface over both.

McCandlish, Kaplan, Amodei et al. 2018, "An Empirical Model of Large-Batch Training"; the surface is quadratic in the
logarithms of learning rate and batch, as sweeps of both have been found near their optimum (Bi et al. 2024, section 3).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from scaling.isoflop import power_fit
from scaling.sweeps.plan import Rule


class CriticalBatch(NamedTuple):
    """B_simple = tr(Sigma) / |G|^2 in examples, with the central interval of a bootstrap over the measurements."""

    examples: float
    low: float
    high: float
    measurements: int


def critical_batch(
    signal: Float[np.ndarray, "R"],
    noise: Float[np.ndarray, "R"],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> CriticalBatch:
    """The noise scale of several measurements of |G|^2 and tr(Sigma), averaged before they are divided.

    Each is unbiased and their ratio is not (appendix A.1); the ends are infinite where resamples have no signal, and
    NaN for a single measurement.

    Raises:
      ValueError: no measurements, or no signal: the gradients' mean is lost in their noise.
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
      refused: why there is none, "" if there is.
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
    lr: Float[np.ndarray, "R"], batch: Float[np.ndarray, "R"], loss: Float[np.ndarray, "R"], *, within: float = np.inf
) -> Surface:
    """Fit the loss of a grid of learning rates and batch sizes at one size and token count.

    Args:
      lr, batch, loss: of the runs.
      within: runs whose loss is more than this above the best are left out (a quadratic holds near its minimum).

    Returns:
      The surface; refused where its minimum lies outside the runs, where it has none, or where the points scatter more
      than it rises.

    Raises:
      ValueError: fewer than three learning rates or batch sizes, or than seven runs, are left.
    """
    kept = loss <= loss.min() + within
    lr, batch, loss = lr[kept], batch[kept], loss[kept]
    counts = len(np.unique(lr)), len(np.unique(batch)), len(loss)
    if counts[0] < 3 or counts[1] < 3 or counts[2] < 7:
        raise ValueError(
            f"{counts[0]} learning rates, {counts[1]} batch sizes, {counts[2]} runs: at least 3, 3 and 7 are needed"
        )
    x_R2 = np.log(np.stack([lr, batch], 1))
    centre = x_R2.mean(0)
    x, y = (x_R2 - centre).T
    design = np.stack([np.ones_like(x), x, y, x * x / 2, x * y, y * y / 2], 1)
    c = np.linalg.lstsq(design, loss, rcond=None)[0]
    scatter = float(np.sqrt(np.mean((design @ c - loss) ** 2)))
    hessian = np.array([[c[3], c[4]], [c[4], c[5]]])
    ridge = float(-c[4] / c[3])
    if not (np.linalg.eigvalsh(hessian) > 0).all():
        return Surface(np.nan, np.nan, np.nan, "the surface has no minimum", hessian, ridge, scatter)
    best = np.linalg.solve(hessian, -c[1:3])
    place = np.exp(best + centre)
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


def fit_rule(params: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray, *, multiple: int = 0) -> Rule:
    """The rule (a power of the number of parameters) through the best values found at several sizes.

    Raises:
      ValueError: fewer than two sizes.
    """
    at = float(np.exp(np.mean(np.log(np.asarray(params, float)))))
    law = power_fit(params, values)
    return Rule(law(at), at, law.exponent, multiple)
