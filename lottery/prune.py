"""Prune: turn scores and counts into new masks, exactly.

Counts are numbers of units by group of leaves: one group per leaf (`Layerwise`), or one for all of them, `EVERYTHING`
(`Global`). A unit is a weight (structure "unstructured"); other structures pool weights into larger units, see
`lottery.structures`. `remove` takes how many go, `keep` how many stay (from `lottery.allocation`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from lottery import structures
from lottery.masks import apply, check, flatten, match_paths
from lottery.structures import Structure

__all__ = [
    "EVERYTHING",
    "Global",
    "Layerwise",
    "alive_units",
    "drop_lowest",
    "iterate",
    "keep",
    "pool_sizes",
    "removal_counts",
    "remove",
    "sizes",
    "units",
]

# The only group of a Global scope. Not a possible '/'-joined path of a leaf in a nested tree.
EVERYTHING = "*"


@dataclass(frozen=True)
class Global:
    """Prune globally: remove the fraction `rate` (0 to 1) of all alive units, the lowest scores wherever they are.

    Example:
      >>> lottery.prune.removal_counts({"one/kernel": 60, "two/kernel": 40}, lottery.prune.Global(0.2))
      {'*': 20}
    """

    rate: float

    def __post_init__(self):
        _check_rate(self.rate, "Global.rate")


@dataclass(frozen=True)
class Layerwise:
    """Prune layer by layer: remove the fraction `rate` of every leaf's alive units.

    Attributes:
      rate: of leaves that no override matches.
      overrides: (regular expression over '/'-joined paths, rate), first match wins; Frankle & Carbin 2019 prune the
        output layer at half the rate: ((r"^output/", rate / 2),).

    Example:
      >>> scope = lottery.prune.Layerwise(0.2, (("^output/", 0.1),))
      >>> lottery.prune.removal_counts({"dense0/kernel": 60, "output/kernel": 40}, scope)
      {'dense0/kernel': 12, 'output/kernel': 4}
    """

    rate: float
    overrides: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        _check_rate(self.rate, "Layerwise.rate")
        for pattern, rate in self.overrides:
            _check_rate(rate, f"Layerwise.overrides {pattern!r}")


Scope = Global | Layerwise


def _check_rate(rate: float, what: str) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"{what} is {rate}; a fraction of the alive weights, 0 to 1, is needed")


def sizes(params: PyTree, which: PyTree) -> dict[str, int]:
    """Count the weights of every prunable leaf by path.

    Args:
      params: arrays or jax.ShapeDtypeStruct of one network.
      which: `masks.prunable`.

    Example:
      >>> params = {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}
      >>> lottery.prune.sizes(params, lottery.masks.prunable(params))
      {'kernel': 12}
    """
    chosen = flatten(which)
    return {path: int(np.prod(leaf.shape)) for path, leaf in flatten(params).items() if chosen[path]}


def pool_sizes(alive: Mapping[str, int], scope: Scope) -> dict[str, int]:
    """Sum alive counts by group of the scope, from counts by path (or already by group: then unchanged).

    Example:
      >>> lottery.prune.pool_sizes({"one/kernel": 60, "two/kernel": 40}, lottery.prune.Global(0.2))
      {'*': 100}
    """
    if isinstance(scope, Global):
        return {EVERYTHING: sum(alive.values())}
    return dict(alive)


def removal_counts(alive: Mapping[str, int], scope: Scope) -> dict[str, int]:
    """Compute how many units to prune from each group: round(rate * alive), halves to the even number.

    The rounding is the one of Frankle & Carbin's published code (np.round). Counts are Python integers, so the
    arithmetic is float64 and exact for any model size; a traced count may be rounded by `jnp.round(rate * alive)`
    instead, exact up to 2**24 weights.

    Args:
      alive: units alive by path (`sizes`, or `masks.count` brought to the host).
      scope: Global or Layerwise.

    Returns:
      Counts by group: paths for Layerwise, "*" for Global.

    Raises:
      ValueError: an override that matches no path.

    Example:
      >>> lottery.prune.removal_counts({"kernel": 10}, lottery.prune.Layerwise(0.25))
      {'kernel': 2}
    """
    if isinstance(scope, Global):
        return {EVERYTHING: round(scope.rate * sum(alive.values()))}
    paths = list(alive)
    for pattern, _ in scope.overrides:
        match_paths(pattern, paths, "Layerwise override")

    def rate(path: str) -> float:
        return next((rate for pattern, rate in scope.overrides if re.search(pattern, path)), scope.rate)

    return {path: round(rate(path) * int(alive[path])) for path in paths}


def units(params: PyTree, which: PyTree, structure: str | Structure = "unstructured") -> dict[str, int]:
    """Count the units of every prunable leaf by path.

    Args:
      params: arrays or jax.ShapeDtypeStruct of one network.
      which: `masks.prunable`.
      structure: a name for `structures.parse` or a Structure.

    Raises:
      ValueError: a structure that does not fit a leaf, naming the path.

    Example:
      >>> params = {"kernel": jnp.zeros((8, 4))}
      >>> lottery.prune.units(params, {"kernel": True}, "4x2"), lottery.prune.units(params, {"kernel": True}, "neuron")
      ({'kernel': 4}, {'kernel': 4})
    """
    chosen = flatten(which)
    pooled = {path: _unit_shape(path, leaf, structure) for path, leaf in flatten(params).items() if chosen[path]}
    return {path: int(np.prod(shape)) for path, shape in pooled.items()}


def alive_units(masks: PyTree, which: PyTree, structure: str | Structure = "unstructured") -> dict[str, Array]:
    """Count the units of every prunable leaf by path that have a weight alive, int32 []; under jit and vmap too.

    Example:
      >>> mask = {"kernel": jnp.array([[True, False], [True, False]])}
      >>> lottery.prune.alive_units(mask, {"kernel": True}, "neuron")
      {'kernel': Array(1, dtype=int32)}
    """
    chosen = flatten(which)
    alive = {path: _pool(path, structure, mask, mask)[1] for path, mask in flatten(masks).items() if chosen[path]}
    return {path: jnp.sum(unit, dtype=jnp.int32) for path, unit in alive.items()}


def _unit_shape(path: str, leaf: Array | jax.ShapeDtypeStruct, structure: str | Structure) -> tuple[int, ...]:
    scores, mask = (jax.ShapeDtypeStruct(leaf.shape, dtype) for dtype in (jnp.float32, jnp.bool_))
    return jax.eval_shape(lambda s, m: _pool(path, structure, s, m)[1], scores, mask).shape


def _pool(path: str, structure: str | Structure, scores: Array, mask: Array) -> tuple[Array, Array]:
    """(scores of units, which of them are alive)."""
    if structure == "unstructured":  # every weight is a unit
        return scores, mask
    try:
        return structures.at(path, structure).pool(scores, mask)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(path) else f"{path}: {error}") from error


def remove(
    scores: PyTree,
    masks: PyTree,
    which: PyTree,
    removals: Mapping[str, int | Array],
    structure: str | Structure = "unstructured",
) -> PyTree:
    """Prune exactly removals[group] units of every group: the lowest scores go, among equal ones the first.

    The order among equal scores is by flat index, and in a Global group by the leaves' order in the tree first. Only
    alive units are removed; a count above the number alive removes all of them (all that n:m allows), one below zero
    none. A score that is not a number counts as the highest. Runs under jit and, for a stack of networks, under vmap.

    Args:
      scores: float tree like the parameters.
      masks: bool tree like the parameters.
      which: tree of Python bools (static), `masks.prunable`.
      removals: units to remove by group, Python ints or int arrays []: keys are prunable paths, or just "*".
      structure: a name for `structures.parse` or a Structure.

    Returns:
      The new masks.

    Raises:
      ValueError: masks that do not match the scores' tree, a count for something that is not a prunable path, an
        unknown structure, or one that does not fit a leaf (naming the path).

    Example:
      >>> scores, masks = {"kernel": jnp.array([3.0, 1.0, 2.0])}, {"kernel": jnp.ones(3, bool)}
      >>> lottery.prune.remove(scores, masks, {"kernel": True}, {"kernel": 1})["kernel"].tolist()
      [True, False, True]
    """
    return _remove(scores, masks, which, removals, structure, stay=False)


def keep(
    scores: PyTree,
    masks: PyTree,
    which: PyTree,
    counts: Mapping[str, int | Array],
    structure: str | Structure = "unstructured",
) -> PyTree:
    """Prune until counts[group] units of every group are alive: `remove` of those beyond that. Never brings any back.

    Args, Raises: as `remove`; counts are of units that stay, e.g. from `allocation.counts`.

    Example:
      >>> scores, masks = {"kernel": jnp.array([3.0, 1.0, 2.0])}, {"kernel": jnp.ones(3, bool)}
      >>> lottery.prune.keep(scores, masks, {"kernel": True}, {"*": 1})["kernel"].tolist()
      [True, False, False]
    """
    return _remove(scores, masks, which, counts, structure, stay=True)


def iterate(
    score_fn: Callable[[PyTree], PyTree],
    params: PyTree,
    masks: PyTree,
    which: PyTree,
    counts: Sequence[Mapping[str, int | Array]],
    structure: str | Structure = "unstructured",
) -> PyTree:
    """Prune in several rounds, scoring the masked parameters anew before each (SynFlow, iterative SNIP).

    Args:
      score_fn: masked params -> scores.
      params: of one network.
      masks: before.
      which: `masks.prunable`.
      counts: units that stay after each round, with the same groups in all of them.
      structure: a name for `structures.parse` or a Structure.

    Example:
      >>> params = {"kernel": jnp.array([3.0, 1.0, 2.0])}
      >>> score_fn = lottery.criteria.magnitude
      >>> masks = lottery.masks.ones(params)
      >>> lottery.prune.iterate(score_fn, params, masks, {"kernel": True}, [{"*": 2}, {"*": 1}])["kernel"].tolist()
      [True, False, False]
    """
    rounds = {group: jnp.asarray([count[group] for count in counts], jnp.int32) for group in counts[0]}

    def step(masks: PyTree, count: Mapping[str, Array]) -> tuple[PyTree, None]:
        return keep(score_fn(apply(params, masks)), masks, which, count, structure), None

    return jax.lax.scan(step, masks, rounds)[0]


def _remove(scores, masks, which, numbers, structure, stay: bool) -> PyTree:
    check(masks, scores)
    chosen = [path for path, prunable in flatten(which).items() if prunable]
    groups = {EVERYTHING: chosen} if set(numbers) == {EVERYTHING} else {path: [path] for path in numbers}
    wrong = [path for paths in groups.values() for path in paths if path not in chosen]
    if wrong:
        raise ValueError(f"count for {', '.join(wrong)}: not a prunable parameter; prunable: {', '.join(chosen)}")
    score, mask = flatten(scores), flatten(masks)
    pruned = dict(mask)
    for group, paths in groups.items():
        rules = [None if structure == "unstructured" else structures.at(path, structure) for path in paths]
        pooled = [_pool(path, structure, score[path], mask[path]) for path in paths]
        flat_scores = jnp.concatenate([s.astype(jnp.float32).ravel() for s, _ in pooled])
        flat_alive = jnp.concatenate([a.ravel() for _, a in pooled])
        count = jnp.sum(flat_alive, dtype=jnp.int32) - numbers[group] if stay else numbers[group]
        if any(rule and rule.protects for rule in rules):
            count = jnp.minimum(count, jnp.sum(flat_alive & ~jnp.isposinf(flat_scores), dtype=jnp.int32))
        stays = drop_lowest(flat_scores, flat_alive, count)
        bounds = np.cumsum([s.size for s, _ in pooled])[:-1]
        for path, rule, part, (unit, _) in zip(paths, rules, jnp.split(stays, bounds), pooled, strict=True):
            part = part.reshape(unit.shape)
            pruned[path] = mask[path] & (rule.expand(part, mask[path].shape) if rule else part)
    return jax.tree.unflatten(jax.tree.structure(masks), list(pruned.values()))


def drop_lowest(scores: Float[Array, " N"], alive: Bool[Array, " N"], count: int | Int[Array, ""]) -> Bool[Array, " N"]:
    """Drop the `count` alive units of lowest score, ties by index; count is clipped to the number alive.

    Scores are ordered as `jax.lax.sort` orders them: zeros of both signs are equal, NaN comes last. The threshold is
    found bit by bit, 32 counts over the scores, which takes a small part of the time of a sort.

    Args:
      scores: [N].
      alive: [N] bool.
      count: units to drop, may be traced.

    Returns:
      [N] bool, the units that stay.

    Example:
      >>> lottery.prune.drop_lowest(jnp.array([3.0, 1.0, 2.0]), jnp.ones(3, bool), 2).tolist()
      [True, False, False]
    """
    canonical = jnp.where(scores == 0, 0.0, jnp.where(jnp.isnan(scores), jnp.nan, scores)).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(canonical, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # Unsigned integers in the order of the floats.
    key = jnp.where(bits & sign, ~bits, bits | sign)
    count = jnp.minimum(count, jnp.sum(alive, dtype=jnp.int32))

    def below(bound: Array) -> Array:
        return jnp.sum(alive & (key < bound), dtype=jnp.int32)

    def refine(i: Array, bound: Array) -> Array:
        higher = bound | (sign >> i.astype(jnp.uint32))
        return jnp.where(below(higher) < count, higher, bound)

    # The largest bound with fewer than count units below it: the score of the last unit to go.
    bound = jax.lax.fori_loop(0, 32, refine, jnp.uint32(0))
    tied = alive & (key == bound)
    among = jnp.cumsum(tied, dtype=jnp.int32) <= count - below(bound)
    return alive & ~((key < bound) | (tied & among))
