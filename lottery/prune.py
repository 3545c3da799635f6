"""Prune: turn scores and counts into new masks, exactly.

Counts are numbers of units by group: one group per layer (`Layerwise`, names as in `structures.layers`), or one for all
of them, `EVERYTHING` (`Global`). A unit is a weight (structure "unstructured"); other structures pool weights into
larger units, see `lottery.structures`. `remove` takes how many go, `keep` how many stay (from `lottery.allocation`).
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from lottery import counting, structures
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
    "shapes",
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
    """Prune layer by layer: remove the fraction `rate` of every layer's alive units.

    Attributes:
      rate: of layers that no override matches.
      overrides: (regular expression over names of layers, rate), first match wins; Frankle & Carbin 2019 prune the
        output layer at half the rate: ((r"^output/", rate / 2),). The first and last block of 30 stay whole by
        ((r"^blocks_(0|29)/", 0.0),).

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


def shapes(params: PyTree, which: PyTree, structure: str | Structure = "unstructured") -> dict[str, tuple[int, ...]]:
    """List the shape of every prunable layer by name, without the axes that only stack layers.

    Example:
      >>> params = {"blocks": {"up": {"kernel": jnp.zeros((2, 3, 4))}}}
      >>> lottery.prune.shapes(params, lottery.masks.prunable(params))
      {'blocks_0/up/kernel': (3, 4), 'blocks_1/up/kernel': (3, 4)}
    """
    found: dict[str, tuple[int, ...]] = {}
    leaves = flatten(params)
    for path, chosen in flatten(which).items():
        if chosen:
            shape = leaves[path].shape
            batch = structures.at(path, shape, structure, chosen).batch
            found |= dict.fromkeys(structures.layers(path, shape, chosen, structure), tuple(shape[batch:]))
    return found


def sizes(params: PyTree, which: PyTree) -> dict[str, int]:
    """Count the weights of every prunable layer by name.

    Args:
      params: arrays or jax.ShapeDtypeStruct of one network.
      which: `masks.prunable`.

    Raises:
      ValueError: a layer of 2**31 weights or more.

    Example:
      >>> params = {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}
      >>> lottery.prune.sizes(params, lottery.masks.prunable(params))
      {'kernel': 12}
    """
    found = {name: math.prod(shape) for name, shape in shapes(params, which).items()}
    for name, size in found.items():
        if size >= 2**31:
            raise ValueError(
                f"{name} has {size} weights; a layer must have fewer than 2**31: split the leaf, or use rules"
            )
    return found


def pool_sizes(alive: Mapping[str, int], scope: Scope) -> dict[str, int]:
    """Sum alive counts by group of the scope, from counts by layer (or already by group: then unchanged).

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
    arithmetic is float64 and exact for any model size; for a traced count of a layer take `counting.share`. A layer is
    never emptied by rounding, its last unit goes at rate 1 only.

    Args:
      alive: units alive by layer (`sizes`, or `masks.count` brought to the host).
      scope: Global or Layerwise.

    Returns:
      Counts by group: names of layers for Layerwise, "*" for Global.

    Raises:
      ValueError: an override that matches no layer.

    Example:
      >>> lottery.prune.removal_counts({"kernel": 10}, lottery.prune.Layerwise(0.25))
      {'kernel': 2}
    """
    if isinstance(scope, Global):
        return {EVERYTHING: round(scope.rate * sum(alive.values()))}
    for pattern, _ in scope.overrides:
        match_paths(pattern, list(alive), "Layerwise override")

    def removals(layer: str) -> int:
        rate = next((rate for pattern, rate in scope.overrides if re.search(pattern, layer)), scope.rate)
        count = int(alive[layer])
        return count if rate == 1 else min(round(rate * count), max(count - 1, 0))

    return {layer: removals(layer) for layer in alive}


def units(params: PyTree, which: PyTree, structure: str | Structure = "unstructured") -> dict[str, int]:
    """Count the units of every prunable layer by name.

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
    found: dict[str, int] = {}
    leaves = flatten(params)
    for path, chosen in flatten(which).items():
        if chosen:
            scores, mask = (jax.ShapeDtypeStruct(leaves[path].shape, dtype) for dtype in (jnp.float32, jnp.bool_))
            pooled = jax.eval_shape(lambda s, m, at=path, c=chosen: _pool(at, structure, s, m, c)[1], scores, mask)
            names = structures.layers(path, mask.shape, chosen, structure)
            found |= dict.fromkeys(names, math.prod(pooled.shape) // len(names))
    return found


def alive_units(masks: PyTree, which: PyTree, structure: str | Structure = "unstructured") -> dict[str, Array]:
    """Count the units of every prunable layer by name that have a weight alive, int32 []; under jit and vmap too.

    Example:
      >>> mask = {"kernel": jnp.array([[True, False], [True, False]])}
      >>> lottery.prune.alive_units(mask, {"kernel": True}, "neuron")
      {'kernel': Array(1, dtype=int32)}
    """
    found: dict[str, Array] = {}
    leaves = flatten(masks)
    for path, chosen in flatten(which).items():
        if chosen:
            names = structures.layers(path, leaves[path].shape, chosen, structure)
            alive = _pool(path, structure, leaves[path], leaves[path], chosen)[1].reshape(len(names), -1)
            found |= zip(names, jnp.sum(alive, axis=1, dtype=jnp.int32), strict=True)
    return found


def _pool(
    path: str, structure: str | Structure, scores: Array, mask: Array, chosen: bool | structures.Layout
) -> tuple[Array, Array]:
    """(scores of units, which of them are alive)."""
    rule = structures.at(path, mask.shape, structure, chosen)
    try:
        return rule.pool(scores, mask)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


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
    Leaves are not joined, so one that is spread over devices stays where it is.

    Args:
      scores: float tree like the parameters.
      masks: bool tree like the parameters.
      which: tree of Python bools (static), `masks.prunable`.
      removals: units to remove by group, Python ints, int32 arrays [] or pairs [2] (`counting.split`, for traced counts
        that may pass 2**31): keys are names of prunable layers (`structures.layers`), or just "*".
      structure: a name for `structures.parse` or a Structure.

    Returns:
      The new masks.

    Raises:
      ValueError: masks that do not match the scores' tree, a count for something that is not a prunable layer, an
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
    rounds = {group: jnp.stack([counting.split(c[group]) for c in counts]) for group in counts[0]}

    def step(masks: PyTree, count: Mapping[str, Array]) -> tuple[PyTree, None]:
        return keep(score_fn(apply(params, masks)), masks, which, count, structure), None

    return jax.lax.scan(step, masks, rounds)[0]


def _remove(scores, masks, which, numbers, structure, stay: bool) -> PyTree:
    check(masks, scores)
    score, mask = flatten(scores), flatten(masks)
    chosen = {path: choice for path, choice in flatten(which).items() if choice}
    layers = {path: structures.layers(path, mask[path].shape, chosen[path], structure) for path in chosen}
    everything = set(numbers) == {EVERYTHING}
    known = [name for names in layers.values() for name in names]
    wrong = sorted(set(numbers) - set(known))
    if wrong and not everything:
        raise ValueError(f"count for {', '.join(wrong)}: not a prunable layer; prunable: {', '.join(known)}")
    pruned = dict(mask)
    used = [path for path in chosen if everything or not numbers.keys().isdisjoint(layers[path])]
    rules = [structures.at(path, mask[path].shape, structure, chosen[path]) for path in used]
    pooled = [_pool(path, structure, score[path], mask[path], chosen[path]) for path in used]
    parts: list[tuple[Array, ...]] = []
    for path, rule, (unit_score, alive) in zip(used, rules, pooled, strict=True):
        unit_score = unit_score.astype(jnp.float32)
        able = alive & ~jnp.isposinf(unit_score) if rule.protects else alive
        parts.append(tuple(x.reshape(len(layers[path]), -1) for x in (unit_score, alive, able)))

    if everything:
        dropped = _gone(parts, counting.split(numbers[EVERYTHING]), stay)
    else:
        one = jax.vmap(lambda number, *rows: _gone([tuple(row[None] for row in rows)], number, stay)[0][0])
        dropped = []
        for path, part in zip(used, parts, strict=True):
            alive = jnp.sum(part[1], axis=1, dtype=jnp.int32)
            # Layers without a count stay as they are.
            same = [alive[i] if stay else 0 for i in range(len(alive))]
            counts = [numbers.get(name, same[i]) for i, name in enumerate(layers[path])]
            dropped.append(one(jnp.stack([counting.split(count) for count in counts]), *part))
    for path, rule, (_, alive), rows in zip(used, rules, pooled, dropped, strict=True):
        stays = alive & ~rows.reshape(alive.shape)
        pruned[path] = mask[path] & rule.expand(stays, mask[path].shape)
    return jax.tree.unflatten(jax.tree.structure(masks), list(pruned.values()))


def drop_lowest(
    scores: Float[Array, " N"], alive: Bool[Array, " N"], count: int | Int[Array, "..."]
) -> Bool[Array, " N"]:
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
    return alive & ~_lowest([(scores[None], alive[None])], counting.split(count))[0][0]


def _total(flags: Iterable[Array]) -> Array:
    """How many are True, a pair."""
    return counting.total([jnp.sum(x, axis=1, dtype=jnp.int32) for x in flags])


# Jitted on their own: a search prunes many layers of few shapes, and traces this once for each shape.
@partial(jax.jit, static_argnames="stay")
def _gone(parts: Sequence[tuple[Array, ...]], number: Array, stay: bool) -> list[Array]:
    """Units to remove of (scores, alive, able to go) [L, N]: `number` of them, or all but so many."""
    count = counting.subtract(_total(alive for _, alive, _ in parts), number) if stay else number
    return _lowest([(unit_score, able) for unit_score, _, able in parts], count)


@jax.jit
def _lowest(parts: Sequence[tuple[Array, Array]], count: Array) -> list[Array]:
    """The `count` (a pair) alive units of lowest score over all parts, each (scores [L, N], alive [L, N] bool)."""
    sign = jnp.uint32(1 << 31)
    alive = [flags for _, flags in parts]
    keys = []  # unsigned integers in the order of the floats
    for scores, _ in parts:
        canonical = jnp.where(scores == 0, 0.0, jnp.where(jnp.isnan(scores), jnp.nan, scores)).astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(canonical, jnp.uint32)
        keys.append(jnp.where(bits & sign, ~bits, bits | sign))
    everything = _total(alive)
    count = jnp.where(counting.less(everything, count), everything, count)

    def below(bound: Array) -> Array:
        return _total(a & (k < bound) for a, k in zip(alive, keys, strict=True))

    def refine(i: Array, bound: Array) -> Array:
        higher = bound | (sign >> i.astype(jnp.uint32))
        return jnp.where(counting.less(below(higher), count), higher, bound)

    # The largest bound with fewer than count units below it: the score of the last unit to go.
    bound = jax.lax.fori_loop(0, 32, refine, jnp.uint32(0))
    tied = [a & (k == bound) for a, k in zip(alive, keys, strict=True)]
    sums = jnp.concatenate([jnp.sum(t, axis=1, dtype=jnp.int32) for t in tied])
    # Of the ties as many as are missing, from the first layer on.
    before = jnp.cumsum(counting.split(sums[:, None])[:, 0], axis=0) - counting.split(sums[:, None])[:, 0]
    quota = counting.subtract(counting.subtract(count, below(bound))[None], before)
    quota = jnp.where(quota[:, 0] < 0, 0, jnp.where(quota[:, 0] < 1 << 19, quota[:, 0] * 4096 + quota[:, 1], sums))
    quotas = jnp.split(quota, np.cumsum([len(t) for t in tied])[:-1])
    return [
        a & (k < bound) | t & (jnp.cumsum(t, axis=1, dtype=jnp.int32) <= q[:, None])
        for a, k, t, q in zip(alive, keys, tied, quotas, strict=True)
    ]
