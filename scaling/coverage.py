"""Coverage of intervals: sweeps simulated from a known law are fitted and bootstrapped, and hits are counted."""

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from scaling.fitting.bootstrap import refit, resamples
from scaling.fitting.fit import Fit, FitConfig, fit
from scaling.fitting.intervals import bootstrap_interval, prediction_interval, profile
from scaling.laws import Law
from scaling.misfit import lack_of_fit
from scaling.optimum import chinchilla_optimum
from scaling.published import CHINCHILLA, EPOCH
from scaling.rows import PER_PARAMETER_AND_TOKEN, Rows, make_rows

Quantities = Mapping[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]]
Tail = Literal["normal", "student"]

# Quantities of Chinchilla's law: its parameters, the exponent a, and N* inside and beyond the runs.
CHINCHILLA_QUANTITIES: Quantities = {
    **{name: itemgetter(name) for name in EPOCH},
    "a": lambda p: p["beta"] / (p["alpha"] + p["beta"]),
    "N* at 1e20": lambda p: chinchilla_optimum(p, [1e20]).params[0],
    "N* at 5.88e23": lambda p: chinchilla_optimum(p, [5.88e23]).params[0],
}


class Coverage(NamedTuple):
    """Coverage of a simulation.

    Attributes:
      share: of simulated sweeps whose interval held the true value, by quantity.
      intervals: [2, sweeps] by quantity.
      truth: true values by quantity.
      new_run: share of new runs whose loss fell into its prediction interval.
      discrepant_run: the same with the discrepancy of the law allowed for; NaN if it was not asked for.
      rejected: share of sweeps whose law was rejected by the lack-of-fit test; NaN likewise.
      profiled: share of sweeps whose profile-likelihood interval held the true value, by parameter.
      sweeps: number of them.
      converged: whether each sweep's fit converged.
    """

    share: dict[str, float]
    intervals: dict[str, Float[np.ndarray, "2 S"]]
    truth: dict[str, float]
    new_run: float
    discrepant_run: float
    rejected: float
    profiled: dict[str, float]
    sweeps: int
    converged: Bool[np.ndarray, " S"]


def isoflop_design(
    truth: Mapping[str, float],
    *,
    budgets: int,
    sizes: int,
    lowest: float = 6e18,
    highest: float = 3e21,
    reach: float = 5.0,
    noise: float = 0.0,
    seed: int = 0,
) -> Rows:
    """Simulate an IsoFLOP grid around the optima of Chinchilla's law.

    Args:
      truth: natural parameters A, B, E, alpha, beta.
      budgets: their number, evenly spaced in log FLOPs from `lowest` to `highest`.
      sizes: per budget, evenly spaced in log N from N* / `reach` to N* x `reach`.
      lowest, highest: FLOPs.
      reach: see sizes.
      noise: standard deviation of normal noise of log loss.
      seed: of the noise.

    Example:
      >>> import scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=3, sizes=5)
      >>> len(rows), round(float(rows["loss"].min()), 2)
      (15, 2.23)
    """
    flops = np.geomspace(lowest, highest, budgets)
    params = chinchilla_optimum(truth, flops).params * np.geomspace(1 / reach, reach, sizes)
    tokens = flops[:, None] / (PER_PARAMETER_AND_TOKEN * params)
    rows = make_rows({"params": params.ravel(), "tokens": tokens.ravel(), "loss": np.ones(params.size)}, "design")
    return simulate_losses(rows, truth, noise, np.random.default_rng(seed))


def simulate_losses(rows: Rows, truth: Mapping[str, float], noise: float, rng: np.random.Generator) -> Rows:
    """Replace the rows' losses by those of Chinchilla's law at `truth`, with normal noise of log loss."""
    theta = CHINCHILLA.raw(truth)[:, None]
    mean = CHINCHILLA.predict(theta, CHINCHILLA.gather(rows))[:, 0]
    return Rows({**rows.columns, "loss": np.exp(mean + noise * rng.standard_normal(len(rows)))}, rows.source)


def simulate_coverage(
    rows: Rows,
    law: Law,
    truth: Mapping[str, float],
    quantities: Quantities,
    *,
    noise: float,
    sweeps: int,
    resampled: int = 200,
    level: float = 0.95,
    config: FitConfig | None = None,
    tail: Tail = "normal",
    profiled: tuple[str, ...] = (),
    misfit: bool = False,
    seed: int = 0,
) -> Coverage:
    """Simulate sweeps from a known law, fit and bootstrap each, and count how often intervals hold the true values.

    Args:
      rows: the sizes of the runs (their losses are not used).
      law: the true and the fitted law.
      truth: its natural parameters.
      quantities: name -> function of natural parameters by name (each [S]).
      noise: standard deviation of log loss.
      sweeps, resampled: simulated sweeps and resamples of each.
      level: of the intervals.
      config: of the fits; "normal" if None, which fits the noise that is drawn.
      tail: of the noise; "student" is Student's t with 4 degrees of freedom, scaled to the standard deviation.
      profiled: parameters whose profile likelihood is counted too.
      misfit: whether the discrepancy's intervals and the lack-of-fit test are counted too.
      seed: of noise and resamples.
    """
    config = config or FitConfig(objective="normal")
    theta = law.raw(truth)[:, None]
    mean = law.predict(theta, law.gather(rows))[:, 0]
    rng = np.random.default_rng(seed)
    exact = {name: float(np.squeeze(f(law.by_name(theta)))) for name, f in quantities.items()}
    edges: dict[str, list[np.ndarray]] = {name: [] for name in quantities}
    held: dict[str, list[bool]] = {name: [] for name in profiled}
    fell, bent, rejected, converged = [], [], [], []
    for sweep in range(sweeps):
        drawn, again = (np.exp(mean + noise * _draw(rng, len(rows), tail)) for _ in range(2))
        seen = Rows({**rows.columns, "loss": drawn}, rows.source)
        fitted = fit(seen, law, config, starts=around(theta))
        boot = refit(fitted, resamples(resampled, len(rows), seed=seed + 1 + sweep))
        converged.append(fitted.converged)
        draws, here = (law.by_name(x) for x in (boot.theta_PB[:, boot.converged_B], fitted.theta[:, None]))
        sizes = len(rows), len(law.parameters)
        for name, f in quantities.items():
            at = float(np.squeeze(f(here)))
            edges[name].append(bootstrap_interval(f(draws), *sizes, level, config.objective, estimate=at))
        low, high = prediction_interval(fitted, boot, rows, level=level)
        fell.append(np.mean((low <= again) & (again <= high)))
        if misfit:
            low, high = fitted.discrepancy().predict(rows, level=level)
            bent.append(np.mean((low <= again) & (again <= high)))
            rejected.append(lack_of_fit(fitted).rejected)
        for name in profiled:
            held[name].append(_profile_holds(fitted, name, truth[name], level))
    stacked = {name: np.stack(found, 1) for name, found in edges.items()}
    share = {n: float(np.mean((e[0] <= exact[n]) & (exact[n] <= e[1]))) for n, e in stacked.items()}
    bent_run, refused = (float(np.mean(values)) if misfit else float("nan") for values in (bent, rejected))
    by_profile = {name: float(np.mean(found)) for name, found in held.items()}
    return Coverage(
        share, stacked, exact, float(np.mean(fell)), bent_run, refused, by_profile, sweeps, np.array(converged)
    )


def _draw(rng: np.random.Generator, count: int, tail: Tail) -> np.ndarray:
    """Draw noise of mean 0 and standard deviation 1."""
    return rng.standard_normal(count) if tail == "normal" else rng.standard_t(4, count) / np.sqrt(2)


def around(theta_P1: Float[np.ndarray, "P 1"], spread: float = 0.1) -> Float[np.ndarray, "P S"]:
    """Make starts: the true parameters, and each of them moved up and down by `spread`."""
    moved = spread * np.concatenate([np.eye(len(theta_P1)), -np.eye(len(theta_P1))], 1)
    return np.concatenate([theta_P1, theta_P1 + moved], 1)


def _profile_holds(fitted: Fit, name: str, value: float, level: float) -> bool:
    """Whether the profile likelihood's interval holds a value, by one refit there."""
    found = profile(fitted, name, [value], level=level)
    return bool(found.inside[0])
