"""Allocate a density over layers: how many units of every layer stay. `lottery.prune.keep` takes the counts."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lottery import structures
from lottery.masks import match_paths
from lottery.prune import EVERYTHING

__all__ = ["ERK", "Everywhere", "PerPath", "Uniform", "counts", "erk_densities"]


@dataclass(frozen=True)
class Everywhere:
    """Allocate globally: the fraction `density` of all units together, the best wherever they are.

    Example:
      >>> lottery.allocation.counts({"one": 6, "two": 4}, lottery.allocation.Everywhere(0.5), {})
      {'*': 5}
    """

    density: float

    def __post_init__(self):
        _check(self.density, "Everywhere.density")


@dataclass(frozen=True)
class Uniform:
    """Allocate uniformly: the fraction `density` of the units of every leaf.

    Example:
      >>> lottery.allocation.counts({"one": 6, "two": 4}, lottery.allocation.Uniform(0.5), {})
      {'one': 3, 'two': 2}
    """

    density: float

    def __post_init__(self):
        _check(self.density, "Uniform.density")


@dataclass(frozen=True)
class ERK:
    """Allocate by Erdos-Renyi-Kernel (Evci et al. 2020, arXiv:1911.11134, section 3): small layers are pruned less.

    The density of a kernel of axes n_1, n_2, ... is proportional to ((n_1 + n_2 + ...) / (n_1 n_2 ...)) ** power; those
    that would exceed 1 stay dense and the others are solved again.

    Attributes:
      density: overall.
      power: 0 is uniform.

    Example:
      >>> units, shapes = {"one": 64, "two": 16}, {"one": (8, 8), "two": (8, 2)}
      >>> lottery.allocation.counts(units, lottery.allocation.ERK(0.5), shapes)
      {'one': 25, 'two': 15}
    """

    density: float
    power: float = 1.0

    def __post_init__(self):
        _check(self.density, "ERK.density")


@dataclass(frozen=True)
class PerPath:
    """Allocate by hand: a density for every path.

    Attributes:
      densities: (regular expression, density), first match wins.
      default: for the rest.

    Example:
      >>> by_hand = lottery.allocation.PerPath((("^one", 0.5),))
      >>> lottery.allocation.counts({"one": 6, "two": 4}, by_hand, {})
      {'one': 3, 'two': 4}
    """

    densities: tuple[tuple[str, float], ...]
    default: float = 1.0

    def __post_init__(self):
        _check(self.default, "PerPath.default")
        for pattern, density in self.densities:
            _check(density, f"PerPath.densities {pattern!r}")


Allocation = Everywhere | Uniform | ERK | PerPath


def _check(density: float, what: str) -> None:
    if not 0 <= density <= 1:
        raise ValueError(f"{what} is {density}; a fraction of the weights, 0 to 1, is needed")


def counts(units: Mapping[str, int], allocation: Allocation, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Compute how many units stay, by group: paths, or "*" for `Everywhere`.

    Each leaf's count is rounded (halves to even); ERK's add up to the rounded total exactly, what rounding leaves over
    goes to the largest remainders.

    Args:
      units: units by path, `prune.units`.
      allocation: one of the classes of this module.
      shapes: leaf shapes by path (used by ERK).

    Raises:
      ValueError: a pattern of PerPath that matches no path.

    Example:
      >>> lottery.allocation.counts({"kernel": 10}, lottery.allocation.Uniform(0.3), {})
      {'kernel': 3}
    """
    if isinstance(allocation, Everywhere):
        return {EVERYTHING: round(allocation.density * sum(units.values()))}
    if isinstance(allocation, Uniform):
        return {path: round(allocation.density * size) for path, size in units.items()}
    if isinstance(allocation, PerPath):
        for pattern, _ in allocation.densities:
            match_paths(pattern, list(units), "PerPath density")
        found = {
            path: next((d for pattern, d in allocation.densities if re.search(pattern, path)), allocation.default)
            for path in units
        }
        return {path: round(found[path] * size) for path, size in units.items()}
    wanted = {path: d * units[path] for path, d in erk_densities(units, shapes, allocation).items()}
    # A sum a rounding error below an integer must not lose a unit.
    result = {path: math.floor(value + 1e-6) for path, value in wanted.items()}
    left = round(allocation.density * sum(units.values())) - sum(result.values())
    for path in sorted(wanted, key=lambda path: result[path] - wanted[path])[: max(left, 0)]:
        result[path] += 1
    return result


def erk_densities(units: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], allocation: ERK) -> dict[str, float]:
    """Compute the densities of ERK by path, real numbers in [0, 1]; their mean weighted by units is allocation.density.

    Axes that only stack kernels (`structures.LAYOUTS`) do not count as axes of the kernel.

    Example:
      >>> units, shapes = {"one": 64, "two": 64}, {"one": (8, 8), "two": (16, 4)}
      >>> found = lottery.allocation.erk_densities(units, shapes, lottery.allocation.ERK(0.5))
      >>> {path: round(density, 3) for path, density in found.items()}
      {'one': 0.444, 'two': 0.556}
    """
    axes = {path: shape[structures.layout(path).batch :] for path, shape in shapes.items() if path in units}
    raw = {path: (sum(a) / math.prod(a)) ** allocation.power for path, a in axes.items()}
    total = allocation.density * sum(units.values())
    dense: set[str] = set()
    while len(dense) < len(units):
        free = total - sum(units[path] for path in dense)
        scale = free / sum(raw[path] * units[path] for path in units if path not in dense)
        full = {path for path in units if path not in dense and raw[path] * scale > 1}
        if not full:
            return {path: 1.0 if path in dense else raw[path] * scale for path in units}
        dense |= full
    return dict.fromkeys(units, 1.0)
