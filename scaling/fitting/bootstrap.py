"""Bootstrap over runs: resample the rows and refit.

A resample is the same rows with other counts, so every basin of the full fit can be scored on every resample with one
matrix product; the lowest is polished under the resample's counts. That equals a search from every start as long as a
resample's optimum descends from a basin of the full data, which `search_again` checks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from scaling.fitting.fit import Fit, fit, make_problem, polish, row_losses, weights_of

# Rows x resamples that are fitted together.
MOST_COUNTS = 2**21


class Bootstrap(NamedTuple):
    """Refits of resampled rows.

    Attributes:
      theta_PB: raw parameters of each resample's fit.
      value_B: its objective.
      converged_B: whether it converged.
      basin_B: the basin of the full fit it descends from.
      natural_PB: natural parameters.

    Example:
      >>> import scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7, noise=0.002)
      >>> law = scaling.find_law("chinchilla")
      >>> fitted = scaling.fit(rows, law, starts=law.raw(truth)[:, None])
      >>> boot = scaling.bootstrap(fitted, 100)
      >>> bool(boot.converged_B.all()), boot.standard_errors().shape
      (True, (5,))
    """

    theta_PB: Float[np.ndarray, "P B"]
    value_B: Float[np.ndarray, " B"]
    converged_B: Bool[np.ndarray, " B"]
    basin_B: Int[np.ndarray, " B"]
    natural_PB: Float[np.ndarray, "P B"]

    def standard_errors(self) -> Float[np.ndarray, " P"]:
        """Compute the standard deviation of each natural parameter over converged resamples."""
        return np.std(self.natural_PB[:, self.converged_B], axis=1, ddof=1)


def resamples(
    count: int, rows: int, *, seed: int = 42, clusters: Sequence[object] | np.ndarray | None = None
) -> Float[np.ndarray, "R B"]:
    """Draw bootstrap resamples as counts of each row, float64 [R, B].

    Draws come from numpy's frozen legacy stream: a seed gives the same resamples under every numpy (NEP 19), and seed
    42 those of the published replication of Hoffmann et al. (Besiroglu et al. 2024).

    Args:
      count: number of resamples.
      rows: number of rows.
      seed: of the draws.
      clusters: a label per row for a cluster bootstrap (all rows of one model, say).

    Raises:
      ValueError: labels for another number of rows.

    Example:
      >>> from scaling.fitting import resamples
      >>> counts = resamples(3, rows=10)
      >>> counts.shape, counts.sum(0).tolist()
      ((10, 3), [10.0, 10.0, 10.0])
    """
    stream = np.random.RandomState(seed)
    members = np.arange(rows)
    if clusters is not None:
        if len(clusters) != rows:
            raise ValueError(f"{len(clusters)} cluster labels for {rows} rows")
        members = np.unique(np.asarray(clusters), return_inverse=True)[1]
    total = int(members.max()) + 1
    counts = np.empty((total, count))
    for begun in range(0, count, 512):  # these arrays stay in the cache
        here = min(512, count - begun)
        drawn = stream.choice(total, size=(here, total))
        drawn += total * np.arange(here)[:, None]
        counts[:, begun : begun + here] = np.bincount(drawn.ravel(), minlength=here * total).reshape(here, total).T
    return counts if clusters is None else counts[members]


def bootstrap(
    fitted: Fit,
    count: int = 4000,
    *,
    seed: int = 42,
    clusters: Sequence[object] | np.ndarray | None = None,
    watch: Callable[[int], Any] = lambda done: None,
) -> Bootstrap:
    """Bootstrap a fit: refit `count` resamples of its rows; see `resamples`.

    `watch` is called with the number of resamples done since its last call, once for a small table.

    Example:
      >>> import scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7, noise=0.002)
      >>> law = scaling.find_law("chinchilla")
      >>> fitted = scaling.fit(rows, law, starts=law.raw(truth)[:, None])
      >>> boot = scaling.bootstrap(fitted, 200)
      >>> low, high = scaling.fitting.interval(boot.natural_PB[3])
      >>> bool(low < fitted.parameters["alpha"] < high)
      True
    """
    counts_RB = resamples(count, len(fitted.rows), seed=seed, clusters=clusters)
    parts, width = [], max(MOST_COUNTS // len(counts_RB), 64)
    for begun in range(0, max(count, 1), width):
        parts.append(refit(fitted, counts_RB[:, begun : begun + width]))
        watch(len(parts[-1].value_B))
    return Bootstrap(*(np.concatenate(every, -1) for every in zip(*parts, strict=True)))


def refit(fitted: Fit, counts_RB: Float[np.ndarray, "R B"]) -> Bootstrap:
    """Refit under given row weights: score all basins, polish from the best.

    Example:
      >>> import numpy as np
      >>> from scaling.fitting import refit
      >>> import scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7, noise=0.002)
      >>> law = scaling.find_law("chinchilla")
      >>> fitted = scaling.fit(rows, law, starts=law.raw(truth)[:, None])
      >>> without_first = np.ones((len(rows), 1))
      >>> without_first[0] = 0
      >>> bool(refit(fitted, without_first).converged_B[0])
      True
    """
    loss_RK, _ = row_losses(fitted.basins_PK, make_problem(fitted.rows, fitted.law, fitted.config), fitted.law)
    counts_RB = counts_RB * weights_of(fitted.rows, fitted.config) if fitted.config.weights else counts_RB
    basin_B = np.argmin(counts_RB.T @ loss_RK, axis=1)
    solved = polish(fitted.basins_PK[:, basin_B], counts_RB, fitted.rows, fitted.law, fitted.config)
    return Bootstrap(solved.theta, solved.value, solved.converged, basin_B, fitted.law.natural(solved.theta))


def search_again(fitted: Fit, counts_R: Float[np.ndarray, " R"]) -> Fit:
    """Fit one resample from every start of the grid, the slow reference of `refit`.

    Example:
      >>> from scaling.fitting import refit, resamples, search_again
      >>> import scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7, noise=0.002)
      >>> curve = scaling.find_law("curve")
      >>> fitted, counts = scaling.fit(rows, curve), resamples(1, len(rows))
      >>> slow, fast = search_again(fitted, counts[:, 0]), refit(fitted, counts)
      >>> bool(abs(slow.value / fast.value_B[0] - 1) < 1e-9)
      True
    """
    which = np.repeat(np.arange(len(counts_R)), counts_R.astype(int))
    return fit(fitted.rows.take(which), fitted.law, fitted.config)


def interval(
    draws: Float[np.ndarray, "... B"], level: float = 0.95, how: Callable = np.percentile
) -> Float[np.ndarray, "2 ..."]:
    """Compute the central interval of draws in the last axis, by percentiles.

    Example:
      >>> import numpy as np
      >>> from scaling.fitting import interval
      >>> interval(np.arange(101.0), level=0.9).round(6).tolist()
      [5.0, 95.0]
    """
    edge = 50 * (1 - level)
    return how(draws, [edge, 100 - edge], axis=-1)
