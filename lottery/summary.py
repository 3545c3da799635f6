"""Statistics of a search's rows: CSV, means with confidence intervals, paired differences, the tail of a sample.

Rows of the arm `DENSE` are the networks of level 0, every arm's reference.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

__all__ = [
    "DENSE",
    "Tail",
    "TailPower",
    "differences",
    "interval",
    "pareto_index",
    "summarize",
    "tail_index",
    "tail_power",
    "write_csv",
]

DENSE = "dense"


def write_csv(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Write rows as CSV, one line each, and return the path.

    Columns are the union of the rows' keys in order of first appearance; a dict becomes one column per entry
    ("layers/dense0/kernel"); a list (a learning curve) does not fit a cell and is left out. Floats are written so that
    reading them back gives the same number; a missing value or None is an empty cell. The file appears complete or not
    at all.

    Example:
      >>> import tempfile
      >>> rows = [{"arm": "ticket", "layers": {"dense0": 0.5}}]
      >>> path = lottery.summary.write_csv(rows, tempfile.mkdtemp() + "/rows.csv")
      >>> path.read_text().split()
      ['arm,layers/dense0', 'ticket,0.5']
    """
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(column for row in flat for column in row))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    partial.replace(path)
    return path


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{key}/")
        elif not isinstance(value, list | tuple):
            result[f"{prefix}{key}"] = value
    return result


def interval(values: Iterable[float], confidence: float = 0.95) -> tuple[float, float, int]:
    """Compute Student's t confidence interval of the mean: (mean, half-width, n).

    The half-width is t_{n-1, (1 + confidence) / 2} * s / sqrt(n) with s the sample's standard deviation (n - 1 in the
    denominator); it is not a number for n = 1, where nothing is known about the spread, as is the mean for n = 0.

    Example:
      >>> mean, half, n = lottery.summary.interval([1.0, 2.0, 3.0])
      >>> mean, round(half, 3), n
      (2.0, 2.484, 3)
    """
    sample = np.asarray(list(values), np.float64)
    n = sample.size
    if n < 2:
        return (float(sample[0]) if n else math.nan), math.nan, n
    spread = float(np.std(sample, ddof=1)) / math.sqrt(n)
    return float(np.mean(sample)), float(stdtrit(n - 1, (1 + confidence) / 2)) * spread, n


def summarize(rows: Sequence[Mapping[str, Any]], value: str, confidence: float = 0.95) -> list[dict[str, Any]]:
    """Summarize over seeds: one row per (arm, level), in the rows' order of arms, then by level.

    Args:
      rows: rows of a search. Rows whose value is None (an early stop that never came, say) are left out of mean and n.
      value: the key to summarize.
      confidence: of the Student-t interval mean +- half_width.

    Returns:
      Rows {arm, level, density, mean, half_width, n}.

    Raises:
      ValueError: no row has this key.

    Example:
      >>> row = lambda arm, seed, loss: {"arm": arm, "level": 1, "seed": seed, "density": 0.5, "loss": loss}
      >>> rows = [row("ticket", 0, 1.0), row("ticket", 1, 2.0), row("reinit", 0, 2.0), row("reinit", 1, 3.0)]
      >>> lottery.summary.summarize(rows, "loss")[0]["mean"]
      1.5
    """
    _check(rows, value)
    cells: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["arm"], row["level"]), []).append(row)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    table = []
    for arm, level in sorted(cells, key=lambda cell: (arms.index(cell[0]), cell[1])):
        cell = cells[arm, level]
        mean, half_width, n = interval((row[value] for row in cell if row.get(value) is not None), confidence)
        density = float(np.mean([row["density"] for row in cell]))
        table.append({"arm": arm, "level": level, "density": density, "mean": mean, "half_width": half_width, "n": n})
    return table


def differences(
    rows: Sequence[Mapping[str, Any]], value: str, arm: str, against: str, confidence: float = 0.95
) -> list[dict[str, Any]]:
    """Compute paired differences arm - against, one row per level: level, density, mean, half_width, n.

    Networks of the same seed and level are paired; with against="dense" every level is compared with level 0. Pairing
    takes out what the seed contributes, so the interval is usually much narrower than the arms' own. An interval that
    contains 0 has not told the arms apart.

    Raises:
      ValueError: no row has the key, or one of the two arms has no rows.

    Example:
      >>> row = lambda arm, seed, loss: {"arm": arm, "level": 1, "seed": seed, "density": 0.5, "loss": loss}
      >>> rows = [row("ticket", 0, 1.0), row("ticket", 1, 2.0), row("reinit", 0, 2.0), row("reinit", 1, 3.0)]
      >>> lottery.summary.differences(rows, "loss", "ticket", "reinit")
      [{'level': 1, 'density': 0.5, 'mean': -1.0, 'half_width': 0.0, 'n': 2}]
    """
    _check(rows, value)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for name in (arm, against):
        if name not in arms:
            raise ValueError(f"no rows of arm {name!r}; arms: {', '.join(arms)}")
    reference = {(row["level"], row["seed"]): row.get(value) for row in rows if row["arm"] == against}
    pairs: dict[int, list[float]] = {}
    densities: dict[int, list[float]] = {}
    for row in rows:
        other = reference.get((0 if against == DENSE else row["level"], row["seed"]))
        if row["arm"] == arm and row.get(value) is not None and other is not None:
            pairs.setdefault(row["level"], []).append(row[value] - other)
            densities.setdefault(row["level"], []).append(row["density"])
    table = []
    for level in sorted(pairs):
        mean, half_width, n = interval(pairs[level], confidence)
        density = float(np.mean(densities[level]))
        table.append({"level": level, "density": density, "mean": mean, "half_width": half_width, "n": n})
    return table


def _check(rows: Sequence[Mapping[str, Any]], value: str) -> None:
    if not any(value in row for row in rows):
        keys = dict.fromkeys(key for row in rows for key in row)
        raise ValueError(f"no row has {value!r}; the rows have {', '.join(keys) or 'nothing'}")


@dataclass(frozen=True)
class Tail:
    """An extreme value index with its interval: above 0 a power law, 0 exponential, below 0 a tail with an end.

    Attributes:
      index: the estimate.
      low: of the interval.
      high: of the interval.
      count: values that made the tail.

    Example:
      >>> lottery.summary.Tail(index=0.5, low=0.4, high=0.6, count=100).index
      0.5
    """

    index: float
    low: float
    high: float
    count: int


def pareto_index(sample: Float[np.ndarray, "*S N"], k: int) -> Float[np.ndarray, "*S"]:
    """Estimate upper tails' extreme value index by a generalized Pareto law (Hosking & Wallis 1987, section 4).

    Fitted by probability-weighted moments to the k largest values less the (k + 1)-th: neither a shift nor a scale of
    the sample changes it. Consistent for an index below 1; not a number where the k values are all equal.

    Args:
      sample: values [N], or a stack of samples.
      k: values that make the tail.

    Raises:
      ValueError: not 2 <= k < N.

    Example:
      >>> sample = (1 - np.arange(10_000) / 10_000) ** -0.5  # quantiles of a Pareto law with index 0.5
      >>> round(float(lottery.summary.pareto_index(sample - 7, 1000)), 1)
      0.5
    """
    sample = np.asarray(sample, np.float64)
    size = sample.shape[-1]
    if not 2 <= k < size:
        raise ValueError(f"pareto_index: k={k} of {size} values; 2 <= k < N is needed")
    ordered = np.sort(sample, axis=-1)[..., size - k - 1 :]
    excess = ordered[..., 1:] - ordered[..., :1]
    # E[X] and E[X (1 - F(X))], without bias.
    first, second = excess.mean(-1), (excess * np.arange(k - 1, -1, -1)).mean(-1) / (k - 1)
    spread = first - 2 * second
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 0, 2 - first / spread, np.nan)


def tail_index(
    sample: Float[np.ndarray, " N"], k: int, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Tail:
    """Estimate `pareto_index` with a percentile bootstrap interval over the whole sample.

    The interval is of the estimator at this k: it does not hold the bias that a k far from the tail has. How often it
    covers the truth is measured by `tail_power`. Resamples with no spread among their largest are left out.

    Args:
      sample: values [N].
      k: values that make the tail.
      resamples: of the bootstrap.
      confidence: of the interval.
      seed: of the resamples.

    Example:
      >>> sample = (1 - np.arange(1000) / 1000) ** -0.5
      >>> tail = lottery.summary.tail_index(sample, 100, resamples=50)
      >>> tail.low < tail.index < tail.high
      True
    """
    sample = np.asarray(sample, np.float64)
    generator = np.random.default_rng(seed)
    found = pareto_index(sample[generator.integers(0, len(sample), (resamples, len(sample)))], k)
    found = found[np.isfinite(found)]
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2]) if len(found) else (np.nan, np.nan)
    return Tail(float(pareto_index(sample, k)), float(low), float(high), k)


class TailPower(NamedTuple):
    """How `tail_index` does on samples whose index is known.

    Attributes:
      covers: share of its intervals that hold the true index.
      above: share that lie wholly above 0.
      below: share that lie wholly below 0.
      bias: mean of the estimates less the true index.

    Example:
      >>> lottery.summary.TailPower(0.95, 0.1, 0.0, -0.01).covers
      0.95
    """

    covers: float
    above: float
    below: float
    bias: float


def tail_power(
    size: int, k: int, index: float, trials: int = 200, resamples: int = 200, confidence: float = 0.95, seed: int = 0
) -> TailPower:
    """Measure coverage and power of `tail_index` on generalized Pareto samples [size], its best case.

    Args:
      size: of a sample.
      k: values that make the tail.
      index: true.
      trials: samples drawn.
      resamples: of each bootstrap.
      confidence: of the intervals.
      seed: of the samples.

    Example:
      >>> found = lottery.summary.tail_power(200, 50, 0.5, trials=20, resamples=50)
      >>> found.covers > 0.5
      True
    """
    uniform = np.random.default_rng(seed).random((trials, size))
    samples = -np.log(uniform) if index == 0 else (uniform**-index - 1) / index
    tails = [tail_index(sample, k, resamples, confidence, seed + i) for i, sample in enumerate(samples)]
    low, high, found = (np.asarray([getattr(tail, name) for tail in tails]) for name in ("low", "high", "index"))
    covers = np.mean((low <= index) & (index <= high))
    return TailPower(float(covers), float(np.mean(low > 0)), float(np.mean(high < 0)), float(np.nanmean(found) - index))
