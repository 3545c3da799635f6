"""Strong tickets: how many subnetworks of one random, untrained network are good, by annealed importance sampling.

Ramanujan et al. 2020 (arXiv:1911.13299) find one by training scores; Malach et al. 2020 (arXiv:2002.00585) and Pensia
et al. 2020 (arXiv:2006.07990) prove that there are some. Here they are counted. Of the 2^n masks over n weights the
share with at most some number of errors is the ratio of two sums over masks, which annealed importance sampling (Neal
2001, doi:10.1023/A:1008923215028) estimates without bias for any fixed ladder of temperatures; resampling between them
(Del Moral et al. 2006) leaves it unbiased and its variance small.

Shapes: P masks of a population, N weights, L temperatures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lottery import summary

__all__ = [
    "AnnealConfig",
    "Annealed",
    "Growth",
    "LogShare",
    "anneal",
    "choose_ladder",
    "enumerate_errors",
    "growth",
    "log_share",
]

# Masks [P, N] -> the errors that each subnetwork makes [P], float32; jittable. A `jax.tree_util.Partial` of a function
# and arrays is compiled once for all networks of one shape.
Errors = Callable[[Bool[Array, "P N"]], Float[Array, " P"]]


@dataclass(frozen=True)
class AnnealConfig:
    """How a population is moved; none of it biases the estimate.

    Attributes:
      population: masks that are annealed together.
      steps: Metropolis steps of every mask at every temperature.
      flips: mean numbers of weights that a step proposes to switch on or off, drawn alike.
      survivors: effective share of the population that a pilot's next temperature leaves (`choose_ladder`).
      rise: of the inverse temperature, per error, at most, from one of a pilot's temperatures to the next.
      coldest: inverse temperature, per error, that a pilot does not pass; there it only goes on moving.
      levels: temperatures a pilot may have.

    Example:
      >>> lottery.strong.AnnealConfig(population=32).steps
      100
    """

    population: int = 128
    steps: int = 100
    flips: tuple[float, ...] = (1.0, 3.0)
    survivors: float = 0.5
    rise: float = 0.5
    coldest: float = 8.0
    levels: int = 60

    def __post_init__(self):
        if self.population < 2 or self.steps < 1 or self.levels < 1 or not self.flips or min(self.flips) <= 0:
            raise ValueError(f"{self}: population from 2, steps and levels from 1 and positive flips are needed")
        if not 0 < self.survivors < 1 or min(self.rise, self.coldest) <= 0:
            raise ValueError(f"{self}: survivors in (0, 1), a positive rise and coldest are needed")


class Annealed(NamedTuple):
    """What a population went through, by temperature.

    Attributes:
      betas: inverse temperatures [L], the first is 0.
      log_z: log of the mean over all masks of exp(-beta * excess), estimated [L].
      errors: of the population [L, P], after its steps at that temperature.
      accepted: share of the proposals [L].

    Example:
      >>> lottery.strong.Annealed._fields
      ('betas', 'log_z', 'errors', 'accepted')
    """

    betas: Float[np.ndarray, " L"]
    log_z: Float[np.ndarray, " L"]
    errors: Float[np.ndarray, "L P"]
    accepted: Float[np.ndarray, " L"]


class LogShare(NamedTuple):
    """The natural logarithm of the share of all masks with at most `threshold` errors, with a 95% interval.

    Attributes:
      mean: over independent populations; -inf where one of them found no such mask.
      half: half-width of the Student-t interval over them.
      each: of every population.
      level: the temperature that it was read at.

    Example:
      >>> lottery.strong.LogShare(-3.0, 0.1, (-3.0,), 2).mean
      -3.0
    """

    mean: float
    half: float
    each: tuple[float, ...]
    level: int


@partial(jax.jit, static_argnames="config")
def _move(errors: Errors, masks, found, beta, target, key, *, config: AnnealConfig):
    """Metropolis steps at a temperature: (masks, errors, share accepted)."""
    rates = jnp.asarray(config.flips) / masks.shape[1]

    def step(carry, key):
        masks, found = carry
        which, flips, accept = jax.random.split(key, 3)
        rate = jax.random.choice(which, rates, (len(masks), 1))
        proposed = masks ^ (jax.random.uniform(flips, masks.shape) < rate)
        new = errors(proposed)
        rise = jnp.maximum(new, target) - jnp.maximum(found, target)
        taken = jax.random.uniform(accept, found.shape) < jnp.exp(-beta * rise)
        return (jnp.where(taken[:, None], proposed, masks), jnp.where(taken, new, found)), jnp.mean(taken)

    (masks, found), accepted = jax.lax.scan(step, (masks, found), jax.random.split(key, config.steps))
    return masks, found, jnp.mean(accepted)


@jax.jit
def _count(errors: Errors, masks):
    return errors(masks)


def _excess(found: np.ndarray | Array, target: int | float) -> np.ndarray:
    """Errors above the target, float64."""
    return np.maximum(np.asarray(found, np.float64) - target, 0)


def _log_mean(logs: np.ndarray) -> float:
    high = logs.max()
    return float(high + np.log(np.mean(np.exp(logs - high)))) if np.isfinite(high) else -np.inf


def _anneal(errors: Errors, size: int, target: int | float, next_beta, config: AnnealConfig, key: Array) -> Annealed:
    """Anneal with the temperatures that `next_beta(number, beta, excess)` gives, until it gives None."""
    errors = errors if isinstance(errors, jax.tree_util.Partial) else jax.tree_util.Partial(errors)
    begin, key = jax.random.split(key)
    masks = jax.random.bernoulli(begin, 0.5, (config.population, size))
    found = _count(errors, masks)
    beta, log_z = 0.0, 0.0
    levels = [(beta, log_z, np.asarray(found), 1.0)]
    while (new := next_beta(len(levels), beta, _excess(found, target))) is not None:
        weights = -(new - beta) * _excess(found, target)
        log_z += _log_mean(weights)
        weights = np.exp(weights - weights.max())
        shift, move, key = jax.random.split(key, 3)
        # Systematic resampling: numbers of copies differ from their means by less than one.
        marks = (np.arange(config.population) + float(jax.random.uniform(shift))) / config.population
        index = np.searchsorted(np.cumsum(weights) / weights.sum(), marks).clip(max=config.population - 1)
        beta = float(new)
        masks, found, accepted = _move(errors, masks[index], found[index], beta, target, move, config=config)
        levels.append((beta, log_z, np.asarray(found), float(accepted)))
    return Annealed(*(np.asarray(column, np.float64) for column in zip(*levels, strict=True)))


def choose_ladder(errors: Errors, size: int, target: int | float, config: AnnealConfig, *, key: Array) -> Annealed:
    """Choose temperatures by a pilot population: each leaves `survivors` of it, until as many reach the target.

    The temperatures depend on the pilot, so its own estimate may be biased; anneal others on its `betas`. If none of
    its masks reaches the target after `config.levels`, such masks are too rare for it, or there are none.

    Args:
      errors: masks [P, N] -> errors [P], jittable; a `jax.tree_util.Partial` compiles once for all networks.
      size: weights.
      target: errors of a strong ticket.
      config: of the population.
      key: of the pilot.

    Example:
      >>> count_off = lambda masks: jnp.sum(~masks, axis=1).astype(jnp.float32)
      >>> config = lottery.strong.AnnealConfig(population=64, steps=20)
      >>> pilot = lottery.strong.choose_ladder(count_off, 10, 0, config, key=jax.random.key(0))
      >>> bool(pilot.betas[0] == 0), bool(np.all(np.diff(pilot.betas) > 0))
      (True, True)
    """

    def next_beta(number: int, beta: float, excess: np.ndarray) -> float | None:
        if np.mean(excess == 0) >= config.survivors or number == config.levels:
            return None

        def left(step: float) -> float:
            weights = np.exp(-step * (excess - excess.min()))
            return weights.sum() ** 2 / (weights**2).sum() / len(weights)

        low, high = 0.0, min(config.rise, config.coldest - beta)
        if left(high) > config.survivors:
            return beta + high
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if left(middle) > config.survivors else (low, middle)
        return beta + high

    return _anneal(errors, size, float(target), next_beta, config, key)


def anneal(
    errors: Errors, size: int, target: int | float, betas: Float[np.ndarray, " L"], config: AnnealConfig, *, key: Array
) -> Annealed:
    """Anneal one population of masks along a ladder of temperatures, from uniform draws on (Neal 2001).

    At inverse temperature beta a mask has weight exp(-beta * max(errors - target, 0)), so that below the target all
    masks weigh the same.

    Args:
      errors: as in `choose_ladder`.
      size: weights.
      target: errors of a strong ticket.
      betas: not falling, the first 0, fixed beforehand (`choose_ladder`).
      config: of the population.
      key: of this population.

    Raises:
      ValueError: temperatures that do not begin at 0, or fall.

    Example:
      >>> count_off = lambda masks: jnp.sum(~masks, axis=1).astype(jnp.float32)
      >>> config = lottery.strong.AnnealConfig(population=64, steps=20)
      >>> run = lottery.strong.anneal(count_off, 10, 0, np.array([0.0, 1.0, 3.0]), config, key=jax.random.key(0))
      >>> bool(abs(run.log_z[1] - 10 * np.log((1 + np.exp(-1)) / 2)) < 0.5)
      True
    """
    betas = np.asarray(betas, np.float64)
    if betas[0] != 0 or np.any(np.diff(betas) < 0):
        raise ValueError("anneal: betas must begin at 0 and not fall")
    following = lambda number, beta, excess: betas[number] if number < len(betas) else None  # noqa: E731
    return _anneal(errors, size, float(target), following, config, key)


def log_share(runs: list[Annealed], target: int | float, threshold: int | float, pilot: Annealed) -> LogShare:
    """Estimate the log of the share of masks with at most `threshold` errors, from independent populations.

    Every population's estimate is unbiased: log_z + log mean(exp(beta * excess), where errors <= threshold, else 0) at
    one temperature, the first at which half of the pilot's masks are good enough (else that with most). The mean of
    the logarithms lies below the truth by about half their variance.

    Args:
      runs: of `anneal` on the pilot's temperatures, with the same target.
      target: of the runs.
      threshold: errors, at least the target.
      pilot: of `choose_ladder`.

    Raises:
      ValueError: a threshold below the target.

    Example:
      >>> count_off = lambda masks: jnp.sum(~masks, axis=1).astype(jnp.float32)
      >>> config, keys = lottery.strong.AnnealConfig(population=256, steps=20), jax.random.split(jax.random.key(0), 5)
      >>> pilot = lottery.strong.choose_ladder(count_off, 10, 1, config, key=keys[0])
      >>> runs = [lottery.strong.anneal(count_off, 10, 1, pilot.betas, config, key=key) for key in keys[1:]]
      >>> found = lottery.strong.log_share(runs, 1, 1, pilot)
      >>> bool(abs(found.mean - np.log(11 / 1024)) < 0.3)  # all ten on, or all but one
      True
    """
    if threshold < target:
        raise ValueError(f"log_share: threshold {threshold:g} is below the target {target:g} of the runs")
    good = np.mean(pilot.errors <= threshold, axis=1)
    level = int(np.argmax(good >= 0.5)) if np.any(good >= 0.5) else int(np.argmax(good))
    each = []
    for run in runs:
        found = run.errors[level]
        logs = np.where(found <= threshold, run.betas[level] * _excess(found, target), -np.inf)
        each.append(float(run.log_z[level] + _log_mean(logs)))
    mean, half, _ = summary.interval(each) if np.all(np.isfinite(each)) else (-np.inf, np.nan, 0)
    return LogShare(mean, half, tuple(each), level)


def enumerate_errors(errors: Errors, size: int) -> Float[np.ndarray, " M"]:
    """Compute the errors of all 2^size masks, for small networks.

    Raises:
      ValueError: size beyond 22.

    Example:
      >>> lottery.strong.enumerate_errors(lambda masks: jnp.sum(~masks, axis=1).astype(jnp.float32), 2).tolist()
      [2.0, 1.0, 1.0, 0.0]
    """
    if size > 22:
        raise ValueError(f"enumerate_errors: 2^{size} masks; at most 2^22")
    block = min(size, 12)
    bits = lambda numbers: (numbers[:, None] >> jnp.arange(size)[None]) & 1 == 1  # noqa: E731
    count = jax.jit(lambda first: errors(bits(first + jnp.arange(1 << block))))
    return np.concatenate([np.asarray(count(jnp.int32(first))) for first in range(0, 1 << size, 1 << block)])


class Growth(NamedTuple):
    """How a count grows: a law N(x) with two coefficients, fitted to logarithms.

    Attributes:
      law: "exponential" (a e^(bx)), "power" (a x^b) or "linear" (a (x + b)).
      coefficients: (log a, b).
      log_likelihood: at its maximum, of normal errors of log N with one variance.

    Example:
      >>> lottery.strong.Growth("power", (0.0, 2.0), -1.0).law
      'power'
    """

    law: str
    coefficients: tuple[float, float]
    log_likelihood: float


def growth(x: Float[np.ndarray, " M"], log_counts: Float[np.ndarray, " M"]) -> list[Growth]:
    """Fit exponential, power and linear growth by maximum likelihood, the likeliest first.

    All have two coefficients and a variance, so their likelihoods compare without a penalty.

    Args:
      x: positive sizes, at least three different ones.
      log_counts: natural logarithms of counts, one a network.

    Raises:
      ValueError: fewer than three sizes.

    Example:
      >>> x = np.array([1.0, 2.0, 4.0, 8.0])
      >>> found = lottery.strong.growth(x, np.log(5 * x**3) + np.array([0.01, -0.02, 0.02, -0.01]))
      >>> found[0].law, round(found[0].coefficients[1], 1)
      ('power', 3.0)
    """
    x, y = np.asarray(x, np.float64), np.asarray(log_counts, np.float64)
    if len(np.unique(x)) < 3:
        raise ValueError(f"growth: sizes {np.unique(x).tolist()}; three different ones are needed to tell laws apart")

    def law(name: str, coefficients: tuple[float, float], residuals: np.ndarray) -> Growth:
        variance = max(float(np.mean(residuals**2)), np.finfo(np.float64).tiny)
        return Growth(name, coefficients, -len(x) / 2 * (np.log(2 * np.pi * variance) + 1))

    found = []
    for name, size in (("exponential", x), ("power", np.log(x))):
        slope, constant = np.polyfit(size, y, 1)
        found.append(law(name, (float(constant), float(slope)), y - constant - slope * size))

    def left(log_gap: float) -> np.ndarray:
        difference = y - np.log(x - x.min() + np.exp(log_gap))
        return difference - difference.mean()

    # The gap is min x + b; beyond these bounds the law is a constant, or infinite at the smallest size.
    tries = np.log(x.max()) + np.linspace(-40.0, 20.0, 200)
    best = int(np.argmin([np.sum(left(gap) ** 2) for gap in tries]))
    around = tries[max(best - 1, 0)], tries[min(best + 1, len(tries) - 1)]
    from scipy.optimize import minimize_scalar  # slow to import

    gap = float(minimize_scalar(lambda gap: float(np.sum(left(gap) ** 2)), bounds=around, method="bounded").x)
    constant = np.mean(y - np.log(x - x.min() + np.exp(gap)))
    found.append(law("linear", (float(constant), float(np.exp(gap) - x.min())), left(gap)))
    return sorted(found, key=lambda one: -one.log_likelihood)
