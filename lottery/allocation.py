"""Allocate a density over layers: how many units of every layer stay. `lottery.prune.keep` takes the counts.

Layers have the names of `structures.layers`, each block of a scanned model its own, so a ratio per block (as OWL's, Yin
et al. 2024, arXiv:2310.05175) is a `PerPath`. A density above zero leaves at least one unit in every layer.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lottery.masks import match_paths
from lottery.prune import EVERYTHING

__all__ = ["ERK", "Everywhere", "PerPath", "Uniform", "counts", "erk_densities", "spread_densities"]


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
    """Allocate uniformly: the fraction `density` of the units of every layer.

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
    """Allocate by hand: a density for every layer.

    Attributes:
      densities: (regular expression over names of layers, density), first match wins.
      default: for the rest.

    Example:
      >>> ratios = {0: 1.0, 1: 0.5}  # block 0 whole, half of block 1
      >>> blocks = lottery.allocation.PerPath(tuple((f"^blocks_{i}/", ratio) for i, ratio in ratios.items()))
      >>> lottery.allocation.counts({"blocks_0/up/kernel": 6, "blocks_1/up/kernel": 6}, blocks, {})
      {'blocks_0/up/kernel': 6, 'blocks_1/up/kernel': 3}
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
    """Compute how many units stay, by group: names of layers, or "*" for `Everywhere`.

    Each layer's count is rounded (halves to even), to one at least unless its density is zero. ERK's add up to the
    rounded total exactly, what rounding leaves over goes to the largest remainders.

    Args:
      units: units by layer, `prune.units`.
      allocation: one of the classes of this module.
      shapes: shapes by layer, `prune.shapes` (used by ERK).

    Raises:
      ValueError: a pattern of PerPath that matches no layer, a layer that ERK has no shape of.

    Example:
      >>> lottery.allocation.counts({"kernel": 10}, lottery.allocation.Uniform(0.3), {})
      {'kernel': 3}
    """
    if isinstance(allocation, Everywhere):
        return {EVERYTHING: round(allocation.density * sum(units.values()))}
    if isinstance(allocation, Uniform):
        return {layer: _some(allocation.density, size) for layer, size in units.items()}
    if isinstance(allocation, PerPath):
        for pattern, _ in allocation.densities:
            match_paths(pattern, list(units), "PerPath density")
        found = {
            layer: next((d for pattern, d in allocation.densities if re.search(pattern, layer)), allocation.default)
            for layer in units
        }
        return {layer: _some(found[layer], size) for layer, size in units.items()}
    wanted = {layer: d * units[layer] for layer, d in erk_densities(units, shapes, allocation).items()}
    total = round(allocation.density * sum(units.values()))
    least = int(total >= len(units))
    # A sum a rounding error below an integer must not lose a unit.
    result = {layer: max(math.floor(value + 1e-6), min(least, units[layer])) for layer, value in wanted.items()}
    left = total - sum(result.values())
    # Equal remainders by name, so that the order of a tree's leaves changes nothing.
    over = lambda layer: (round(result[layer] - wanted[layer], 6), layer)  # noqa: E731
    for layer in sorted(wanted, key=over)[: max(left, 0)]:
        result[layer] += 1
    for _ in range(-left):
        result[max((layer for layer in wanted if result[layer] > least), key=over)] -= 1
    return result


def _some(density: float, size: int) -> int:
    return max(round(density * size), int(density > 0 and size > 0))


def erk_densities(units: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], allocation: ERK) -> dict[str, float]:
    """Compute the densities of ERK by layer, real numbers in [0, 1]; their mean weighted by units is the density asked.

    Example:
      >>> units, shapes = {"one": 64, "two": 64}, {"one": (8, 8), "two": (16, 4)}
      >>> found = lottery.allocation.erk_densities(units, shapes, lottery.allocation.ERK(0.5))
      >>> {path: round(density, 3) for path, density in found.items()}
      {'one': 0.444, 'two': 0.556}
    """
    if missing := [layer for layer in units if layer not in shapes]:
        raise ValueError(f"ERK needs the shape of {missing[0]}: pass shapes by layer, lottery.prune.shapes")
    raw = {layer: (sum(shapes[layer]) / math.prod(shapes[layer])) ** allocation.power for layer in units}
    free, rest = allocation.density * sum(units.values()), math.fsum(raw[layer] * units[layer] for layer in units)
    left = dict.fromkeys(units)
    while left:
        scale = free / rest
        full = [layer for layer in left if raw[layer] * scale > 1]
        if not full:
            break
        for layer in full:
            del left[layer]
        free, rest = free - sum(units[x] for x in full), math.fsum(raw[layer] * units[layer] for layer in left)
    return {layer: raw[layer] * scale if layer in left else 1.0 for layer in units}


def spread_densities(
    values: Sequence[float], density: float, width: float = 0.08, sizes: Sequence[float] | None = None
) -> tuple[float, ...]:
    """Allocate densities by what layers are sensitive to, in a band of 2 `width`: OWL (Yin et al. 2024, section 4).

    The densities are a linear function of the values, highest where these are, with the mean that is asked for
    (arXiv:2310.05175; the authors give blocks the outlier ratios of Wanda's scores, `calibrated.outlier_ratio`).

    Args:
      values: one per layer; equal ones give equal densities.
      density: mean of the result.
      width: lambda, half of the distance between the densest and the sparsest layer.
      sizes: weights by layer, for a weighted mean; default equal.

    Raises:
      ValueError: a layer would get a density outside (0, 1], or a value is not finite.

    Example:
      >>> densities = lottery.allocation.spread_densities((1.0, 2.0, 3.0), 0.5, width=0.1)
      >>> [round(one, 6) for one in densities]
      [0.4, 0.5, 0.6]
    """
    _check(density, "density")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"values {list(values)} by layer: all must be finite")
    weights = sizes or [1.0] * len(values)
    low, high = min(values), max(values)
    raw = [2 * width * (value - low) / (high - low) if high > low else 0.0 for value in values]
    mean = math.fsum(one * weight for one, weight in zip(raw, weights, strict=True)) / math.fsum(weights)
    result = tuple(one - mean + density for one in raw)
    if min(result) <= 0 or max(result) > 1:
        raise ValueError(
            f"density={density} with width={width}: layers would have {min(result):.3g} to {max(result):.3g} of their "
            "weights; a smaller width is needed"
        )
    return result
