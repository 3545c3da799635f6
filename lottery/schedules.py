"""Pruning schedules: the fraction of the still-alive weights removed before each level.

Every schedule gives rates, because rates compose with per-layer overrides and integer counts; `densities` turns them
into the fraction of weights alive after each level.
"""

from collections.abc import Sequence


def geometric(rate: float, levels: int) -> list[float]:
    """The same rate before every level: densities 1 - rate, (1 - rate)^2, ... (Frankle & Carbin 2019, section 2).

    Raises:
      ValueError: rate outside (0, 1) or levels < 0.
    """
    _check(rate, levels)
    return [rate] * levels


def one_shot(density: float) -> list[float]:
    """One level that leaves the fraction `density` alive (Frankle & Carbin 2019, appendix B; SNIP and the like).

    Raises:
      ValueError: density outside (0, 1).
    """
    _check(density, 1)
    return [1 - density]


def cubic(density: float, levels: int) -> list[float]:
    """Rates whose densities fall along Zhu & Gupta 2017 (arXiv:1710.01878), equation 1, from 1 to `density`.

    density after level l of L is density + (1 - density) (1 - l / L)^3: much at first, little when few are left.

    Raises:
      ValueError: density outside (0, 1) or levels < 0.
    """
    _check(density, levels)
    alive = [density + (1 - density) * (1 - level / max(levels, 1)) ** 3 for level in range(levels + 1)]
    return [1 - after / before for before, after in zip(alive, alive[1:], strict=False)]


def densities(rates: Sequence[float]) -> list[float]:
    """Fraction alive after each level, in real numbers (counts are rounded level by level, see `lottery.prune`)."""
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
