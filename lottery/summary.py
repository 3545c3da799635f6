"""Statistics of a search's rows: CSV, means with confidence intervals, paired differences, the tail of a sample.

Rows of the arm `DENSE` are the networks of level 0, every arm's reference.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

__all__ = ["DENSE", "Tail", "differences", "interval", "moment_index", "summarize", "tail_index", "write_csv"]

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


def moment_index(sample: Float[np.ndarray, " N"], k: int) -> float:
    """Estimate the upper tail's extreme value index by moments (Dekkers, Einmahl & de Haan 1989, section 1).

    From the k largest values over the (k + 1)-th. It takes logarithms, so the sample must be positive there.

    Raises:
      ValueError: not 2 <= k < N, or values that are not positive.

    Example:
      >>> sample = (1 - np.arange(10_000) / 10_000) ** -0.5  # quantiles of a Pareto law with index 0.5
      >>> round(lottery.summary.moment_index(sample, 1000), 1)
      0.5
    """
    ordered = np.sort(np.asarray(sample, np.float64))[::-1]
    if not 2 <= k < len(ordered):
        raise ValueError(f"moment_index: k={k} of {len(ordered)} values; 2 <= k < N is needed")
    if ordered[k] <= 0:
        raise ValueError(f"moment_index: the {k + 1} largest values must be positive, one is {ordered[k]}")
    excess = np.log(ordered[:k]) - np.log(ordered[k])
    first, second = excess.mean(), (excess**2).mean()
    if second == 0:
        return float("nan")
    spread = 1 - first**2 / second
    return float(first + 1 - 0.5 / spread) if spread > 0 else float("-inf")


def tail_index(
    sample: Float[np.ndarray, " N"], k: int, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Tail:
    """Estimate `moment_index` with a percentile bootstrap interval over the whole sample.

    The interval is of the estimator at this k: it does not hold the bias that a k far from the tail has. Resamples with
    no spread among their largest are left out.

    Args:
      sample: positive values [N].
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
    draws = sample[generator.integers(0, len(sample), (resamples, len(sample)))]
    found = np.asarray([moment_index(draw, k) for draw in draws])
    found = found[np.isfinite(found)]
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2]) if len(found) else (np.nan, np.nan)
    return Tail(moment_index(sample, k), float(low), float(high), k)
