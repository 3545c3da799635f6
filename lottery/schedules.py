"""Pruning schedules: the fraction of the still-alive weights removed before each level.

Every schedule gives rates, because rates compose with per-layer overrides and integer counts; `densities` turns them
into the fraction of weights alive after each level.
"""

from collections.abc import Sequence

__all__ = ["cubic", "densities", "geometric", "one_shot"]


def geometric(rate: float, levels: int) -> list[float]:
    """Prune geometrically: the same rate before every level (iterative pruning, Frankle & Carbin 2019, section 2).

    Densities are 1 - rate, (1 - rate)^2, ...

    Raises:
      ValueError: rate outside (0, 1) or levels < 0.

    Example:
      >>> lottery.schedules.geometric(0.2, 3)
      [0.2, 0.2, 0.2]
    """
    _check(rate, levels)
    return [rate] * levels


def one_shot(density: float) -> list[float]:
    """Prune once: one level that leaves the fraction `density` alive (one-shot pruning; SNIP and the like).

    Raises:
      ValueError: density outside (0, 1).

    Example:
      >>> lottery.schedules.one_shot(0.25)
      [0.75]
    """
    _check(density, 1)
    return [1 - density]


def cubic(density: float, levels: int) -> list[float]:
    """Prune along a cubic from density 1 to `density` (Zhu & Gupta 2017, arXiv:1710.01878, equation 1).

    The density after level l of L is density + (1 - density) (1 - l / L)^3: much goes at first, little when few are
    left.

    Raises:
      ValueError: density outside (0, 1) or levels < 0.

    Example:
      >>> [round(rate, 3) for rate in lottery.schedules.cubic(0.1, 3)]
      [0.633, 0.636, 0.25]
    """
    _check(density, levels)
    alive = [density + (1 - density) * (1 - level / max(levels, 1)) ** 3 for level in range(levels + 1)]
    return [1 - after / before for before, after in zip(alive, alive[1:], strict=False)]


def densities(rates: Sequence[float]) -> list[float]:
    """Compute the fraction alive after each level, in real numbers; `lottery.prune` rounds counts level by level.

    Example:
      >>> [round(density, 3) for density in lottery.schedules.densities([0.2, 0.2])]
      [0.8, 0.64]
    """
    alive, result = 1.0, []
    for rate in rates:
        alive *= 1 - rate
        result.append(alive)
    return result


def _check(fraction: float, levels: int) -> None:
    if not 0 < fraction < 1:
        raise ValueError(f"a fraction strictly between 0 and 1 is needed, got {fraction}")
    if levels < 0:
        raise ValueError(f"levels must be >= 0, got {levels}")
