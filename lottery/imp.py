"""Iterative magnitude pruning (IMP): whole searches for lottery tickets over a stack of seeds and arms (`ARMS`).

Frankle & Carbin 2019 (arXiv:1803.03635), section 2, strategy 1 of appendix B ("resetting"); late rewinding, to step
k > 0, is Frankle et al. 2020 (arXiv:1912.05671). Level 0 trains each seed's dense network once. Every later level
prunes, sets the surviving weights back, and trains all arms of all seeds as one stack. The training function is an
argument, so nothing here knows about data, models or losses.

`Memory` keeps levels in a dict; a store on disk with the same three methods makes the search resumable.
"""

import dataclasses
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lottery import allocation, controls, counting, criteria, prune, schedules, structures, transform
from lottery import masks as masks_lib
from lottery.masks import match_paths

__all__ = [
    "ARMS",
    "Arm",
    "Memory",
    "Result",
    "SearchConfig",
    "Starts",
    "Store",
    "Trained",
    "initial_weights",
    "level_counts",
    "level_like",
    "level_names",
    "search",
    "search_keys",
]

TEACHERS = ("", "dense", "previous")


@dataclass(frozen=True)
class Arm:
    """An arm of a search: what is trained at level >= 1, by the origin of its mask and of the weights under it.

    Attributes:
      mask: where the mask comes from.
        "own": pruned from this arm's own trained weights of the level before;
        "ticket", "continue": the mask of the arm of that name;
        "random": as many units as the ticket in every layer, at random places;
        "other_seed": the ticket of the next seed;
        "oneshot": the dense network pruned once to this level's counts;
        "at_init": the untrained network pruned by the search's criterion to this level's counts;
        "large_init": as many units as the ticket in every layer, the largest of the initialization;
        "given": the masks that `given` of `lottery.imp.search` returns, another run's for instance.
      weights: where the weights come from.
        "rewind": the dense network's weights at step `rewind`;
        "trained": this arm's weights at the end of the level before;
        "fresh": a new initialization; "same_sign": its magnitudes with the first initialization's signs.
      late: the learning rate begins where the schedule ends, instead of going back to step `rewind` with the counters.

    Example:
      >>> lottery.imp.ARMS["reinit"]
      Arm(mask='ticket', weights='fresh', late=False)
    """

    mask: str
    weights: str
    late: bool = False


ARMS: dict[str, Arm] = {
    "ticket": Arm("own", "rewind"),
    # Learning-rate rewinding and fine-tuning (Renda et al. 2020, arXiv:2003.02389, section 3).
    "continue": Arm("own", "trained"),
    "finetune": Arm("own", "trained", late=True),
    # Frankle & Carbin 2019, appendix B, strategy 2: prune without resetting, reset at the end.
    "strategy2": Arm("continue", "rewind"),
    "reinit": Arm("ticket", "fresh"),
    "same_sign": Arm("ticket", "same_sign"),
    "random_mask": Arm("random", "rewind"),
    "random_reinit": Arm("random", "fresh"),
    "other_seed": Arm("other_seed", "rewind"),
    "oneshot": Arm("oneshot", "rewind"),
    "oneshot_reinit": Arm("oneshot", "fresh"),
    "at_init": Arm("at_init", "rewind"),
    "large_init": Arm("large_init", "rewind"),
    "transfer": Arm("given", "rewind"),
}

# Masks that are made from another arm's, and which arm that is.
BORROWED = {
    "ticket": "ticket",
    "random": "ticket",
    "other_seed": "ticket",
    "large_init": "ticket",
    "continue": "continue",
}


@dataclass(frozen=True)
class SearchConfig:
    """A search for lottery tickets. Raises ValueError at once for values that could not be run.

    Attributes:
      seeds: one independent repetition each (initialization, data order, random masks), 0 <= seed < 2**31.
      levels: pruning levels after the dense level 0.
      rate: fraction of the still-alive weights removed before each level.
      output_rate: the same for layers matching `output`, with scope "layer" (negative: half of `rate`, as the paper).
      output: regular expression over names of layers (`structures.layers`), for the output layer; "" for none.
      schedule: "geometric" (`rate` before every level), or "cubic" (Zhu & Gupta's curve) or "one_shot" (a single level)
        down to `density`.
      density: of the last level with those; 0 takes what `rate` would give, (1 - rate)^levels.
      scope: "layer" (every layer at its own rate), "global" (the lowest scores anywhere), "uniform" (every layer, the
        output too, at the level's density) or "erk" (densities by Erdos-Renyi-Kernel, see `lottery.allocation`).
      rates: with scope "layer", (regular expression over names of layers, rate) pairs that come before `output_rate`;
        (("^blocks_(0|29)/", 0.0),) leaves the first and last block of a decoder whole.
      score: a name in `lottery.criteria.CRITERIA`; those that look at data need the `score_inputs` of `search`.
      structure: the sparsity pattern, a name for `lottery.structures.parse`: "unstructured", "2:4", "16x16", ...
      rounds: rounds in which the arm "at_init" scores anew and prunes (SynFlow's paper takes 100).
      teacher: what tickets are distilled from: "" (nothing), "dense" (the dense network of the seed) or "previous" (the
        arm's own network of the level before). The training function does it, see `Starts.teachers`.
      arms: names in `ARMS`; arms that borrow another's mask or counts need that one among them.
      rewind: step of the dense run whose weights the survivors go back to (late rewinding); 0 is the initialization.
        All arms of later levels start counting at this step, the freshly initialized ones too, so they train for
        equally long.
      rewind_optimizer: also go back to the optimizer's state of that step (needs rewind > 0 and `opt_init` in
        `search`).
      rules: (regular expression, prunable?) over parameter paths, see `lottery.masks.prunable`.
      layouts: (regular expression, `structures.Layout`) for one's own parameters' names and axes, as there.

    Example:
      >>> lottery.imp.SearchConfig(levels=3, rate=0.5).final_density
      0.125
    """

    seeds: tuple[int, ...] = (0,)
    levels: int = 5
    rate: float = 0.2
    output_rate: float = -1.0
    output: str = ""
    schedule: str = "geometric"
    density: float = 0.0
    scope: str = "layer"
    rates: tuple[tuple[str, float], ...] = ()
    score: str = "magnitude"
    structure: str = "unstructured"
    rounds: int = 1
    teacher: str = ""
    arms: tuple[str, ...] = ("ticket", "reinit", "random_mask")
    rewind: int = 0
    rewind_optimizer: bool = False
    rules: tuple[tuple[str, bool], ...] = ()
    layouts: tuple[tuple[str, structures.Layout], ...] = ()

    def __post_init__(self):
        known: dict[str, tuple[tuple[str, ...], Collection[str]]] = {
            "arms": (self.arms, ARMS),
            "score": ((self.score,), criteria.CRITERIA),
            "scope": ((self.scope,), SCOPES),
            "schedule": ((self.schedule,), SCHEDULES),
            "teacher": ((self.teacher,), TEACHERS),
        }
        for field, (names, valid) in known.items():
            for name in names:
                if name not in valid:
                    raise ValueError(f"SearchConfig.{field}: {name!r} is not one of {', '.join(map(str, valid))}")
        if len(set(self.arms)) != len(self.arms) or not self.arms:
            raise ValueError(f"SearchConfig.arms must be distinct and not empty, got {self.arms}")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds or not all(0 <= s < 2**31 for s in self.seeds):
            raise ValueError(f"SearchConfig.seeds must be distinct numbers in [0, 2**31), got {self.seeds}")
        for arm in self.arms:
            source = BORROWED.get(ARMS[arm].mask)
            if source and source not in self.arms:
                raise ValueError(f"SearchConfig.arms: {arm} needs the mask of {source}: add {source!r} to arms")
        if "other_seed" in self.arms and len(self.seeds) < 2:
            raise ValueError("SearchConfig.arms: other_seed needs the ticket of a second seed: add one to seeds")
        if self.levels < 0 or self.rewind < 0:
            raise ValueError(f"SearchConfig: levels ({self.levels}) and rewind ({self.rewind}) must be >= 0")
        if not 0 < self.rate < 1 or self.output_rate >= 1:
            raise ValueError(f"SearchConfig: rate ({self.rate}) and output_rate ({self.output_rate}) must be in (0, 1)")
        self._check_pruning()
        if self.rewind_optimizer and self.rewind == 0:
            raise ValueError("SearchConfig.rewind_optimizer needs rewind > 0: at step 0 the optimizer has no state yet")

    def _check_pruning(self) -> None:
        try:
            if self.structure != "unstructured":
                structures.parse(self.structure)
        except ValueError as error:
            raise ValueError(f"SearchConfig.structure: {error}") from error
        if not 0 <= self.density < 1:
            raise ValueError(f"SearchConfig.density is {self.density}; 0 (as `rate` has it) or a fraction is needed")
        if self.schedule == "one_shot" and self.levels > 1:
            raise ValueError(f"SearchConfig.schedule: 'one_shot' has one level, not levels={self.levels}")
        if self.rates and self.scope != "layer":
            raise ValueError(f"SearchConfig.rates need scope 'layer', not {self.scope!r}")
        if self.rounds < 1:
            raise ValueError(f"SearchConfig.rounds is {self.rounds}; at least 1 is needed")

    @property
    def final_density(self) -> float:
        """Fraction of the units of the last level, before rounding."""
        return self.density or (1 - self.rate) ** self.levels


def _layer_scope(config: SearchConfig, rate: float) -> prune.Scope:
    output_rate = rate / 2 if config.output_rate < 0 else config.output_rate
    return prune.Layerwise(rate, (*config.rates, *(((config.output, output_rate),) if config.output else ())))


# Scopes that say how many go before a level, and those that say how many stay after it.
RATE_SCOPES: dict[str, Callable[[SearchConfig, float], prune.Scope]] = {
    "layer": _layer_scope,
    "global": lambda config, rate: prune.Global(rate),
}
DENSITY_SCOPES: dict[str, Callable[[float], allocation.Allocation]] = {
    "uniform": allocation.Uniform,
    "erk": allocation.ERK,
}
SCOPES = (*RATE_SCOPES, *DENSITY_SCOPES)
# The rates before each level.
SCHEDULES: dict[str, Callable[[SearchConfig], list[float]]] = {
    "geometric": lambda c: [1 - c.density ** (1 / c.levels) if c.density else c.rate] * c.levels,
    "cubic": lambda c: schedules.cubic(c.final_density, c.levels),
    "one_shot": lambda c: schedules.one_shot(c.final_density),
}


def level_counts(
    config: SearchConfig, units: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> list[dict[str, int]]:
    """Compute the units that stay after each level, by group ("*" or layers): the same in all seeds and arms.

    Levels at the end that would remove nothing, because the structure is at its floor (2:4 at half of the weights) or
    every layer at its last unit, are left out: the list may be shorter than `config.levels`.

    Args:
      config: the search.
      units: of every prunable layer by name (`prune.units`).
      shapes: of every prunable layer by name (`prune.shapes`).

    Raises:
      ValueError: `output` or a pattern of `rates` that matches no layer.

    Example:
      >>> config = lottery.imp.SearchConfig(levels=2, rate=0.5, output="^output/")
      >>> lottery.imp.level_counts(config, {"dense0/kernel": 100, "output/kernel": 20}, {})
      [{'dense0/kernel': 50, 'output/kernel': 15}, {'dense0/kernel': 25, 'output/kernel': 11}]
    """
    if config.output and config.scope == "layer":
        match_paths(config.output, list(units), "SearchConfig.output")
    for pattern, _ in config.rates:
        match_paths(pattern, list(units), "SearchConfig.rates")
    rates = SCHEDULES[config.schedule](config) if config.levels else []
    low = structures.floor(config.structure)
    least = {layer: round(low * size) for layer, size in units.items()} | {
        prune.EVERYTHING: round(low * sum(units.values()))
    }
    if config.scope in DENSITY_SCOPES:
        allocate = DENSITY_SCOPES[config.scope]
        begin = dict(units)
        found = [allocation.counts(units, allocate(density), shapes) for density in schedules.densities(rates)]
        # What rounding gives to one layer at one level and to another at the next does not come back.
        result = [
            {layer: min(counts[layer] for counts in found[: i + 1]) for layer in units} for i in range(len(found))
        ]
        result = [{layer: max(count, least[layer]) for layer, count in counts.items()} for counts in result]
    else:
        begin = alive = prune.pool_sizes(units, RATE_SCOPES[config.scope](config, config.rate))
        result = []
        for rate in rates:
            removals = prune.removal_counts(alive, RATE_SCOPES[config.scope](config, rate))
            alive = {group: max(alive[group] - removals[group], least[group]) for group in alive}
            result.append(alive)
    # The same rate of the same counts removes nothing at the next level either; other schedules may pause.
    constant = config.scope in RATE_SCOPES and config.schedule == "geometric"
    while result and result[-1] == (result[-2] if len(result) > 1 else begin):
        if not constant and any(count > max(least[group], 1) for group, count in result[-1].items()):
            break
        result.pop()
    return result


Row = dict[str, Any]
# ScoreInputs that a search gathers itself.
_OWN = ("key", "initial", "opt_state")


@dataclass(frozen=True)
class Starts:
    """What a level trains: S networks stacked on the leading axis of every array. Rows of the stack are `names`.

    Attributes:
      params: [S, ...] starting weights, already zero wherever the mask is False.
      masks: [S, ...] bool, same structure and shapes as params (all True at level 0 and in leaves that are not
        prunable).
      opt_state: None (start the optimizer afresh), or with `rewind_optimizer` and level >= 1 the state to start from,
        stacked [S, ...] as `jax.vmap(opt_init)` gives it, moments already masked.
      start_step: step to start counting from (data order, learning rate): 0 at level 0, `rewind` afterwards.
      seeds: [S] int32, the seed of every row: use it for the data order, so arms of one seed see the same batches.
      names: S pairs (arm, seed), arm-major; the arm is "dense" at level 0.
      teachers: with `SearchConfig.teacher` at level >= 1, [S, ...] trained weights each network is to be distilled
        from.
      late: [S] bool, rows whose learning rate begins where the schedule ends (fine-tuning); empty for none.

    Example:
      >>> params = {"kernel": jnp.zeros((1, 3))}
      >>> starts = lottery.imp.Starts(params, lottery.masks.ones(params), None, 0, np.array([7]), (("dense", 7),))
      >>> starts.names
      (('dense', 7),)
    """

    params: PyTree
    masks: PyTree
    opt_state: PyTree | None
    start_step: int
    seeds: np.ndarray
    names: tuple[tuple[str, int], ...]
    teachers: PyTree | None = None
    late: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Trained:
    """What training a level gives back.

    Attributes:
      params: [S, ...] weights at the end of training, exactly zero wherever the mask is False.
      rows: S dicts in the order of `Starts.names`, JSON-able (numbers, strings, lists), e.g. early_stop_step,
        early_stop_test_accuracy, final_test_accuracy, learning curves. The search adds arm, seed, level and densities.
      snapshot: looked at on level 0 with rewind > 0 only: {"params": [S, ...], "opt_state": [S, ...]} as they were
        after step `rewind` ("opt_state" needed with rewind_optimizer only).
      movement: with score "movement" only, [S, ...] the scores of `criteria.track_movement` over this training.

    Example:
      >>> lottery.imp.Trained(params={"kernel": jnp.zeros((1, 3))}, rows=[{"final_test_accuracy": 0.9}]).rows
      [{'final_test_accuracy': 0.9}]
    """

    params: PyTree
    rows: list[Row]
    snapshot: dict[str, PyTree] | None = None
    movement: PyTree | None = None


@runtime_checkable
class Store(Protocol):
    """A protocol: a place for finished levels.

    `save` must be atomic: afterwards `has` is true, and killed half-way it stays false.

    Example:
      >>> isinstance(lottery.imp.Memory(), lottery.imp.Store)
      True
    """

    def has(self, level: int) -> bool:
        """Whether the level was saved completely."""
        ...

    def load(self, level: int, like: PyTree) -> tuple[PyTree, list[Row]]:
        """The tree and rows saved; `like` has the tree's structure, with jax.ShapeDtypeStruct leaves."""
        ...

    def save(self, level: int, tree: PyTree, rows: list[Row]) -> None:
        """Save a finished level: a pytree of arrays and its JSON-able rows."""
        ...


class Memory:
    """A store in a dict, for searches that need not outlive the process.

    Example:
      >>> store = lottery.imp.Memory()
      >>> store.save(0, {"params": 1}, [])
      >>> store.has(0), store.has(1)
      (True, False)
    """

    def __init__(self):
        self.levels: dict[int, tuple[PyTree, list[Row]]] = {}

    def has(self, level: int) -> bool:
        """Whether the level is stored."""
        return level in self.levels

    def load(self, level: int, like: PyTree) -> tuple[PyTree, list[Row]]:
        """The tree and rows stored for the level; `like` is not needed."""
        del like
        return self.levels[level]

    def save(self, level: int, tree: PyTree, rows: list[Row]) -> None:
        """Store the level."""
        self.levels[level] = (tree, rows)


def search(
    init_fn: Callable[[jax.Array], PyTree],
    train_fn: Callable[..., Trained],
    store: Store,
    config: SearchConfig,
    *,
    opt_init: Callable[[PyTree], PyTree] | None = None,
    score_inputs: criteria.ScoreInputs | None = None,
    given: Callable[[int], PyTree] | None = None,
) -> "Result":
    """Search for lottery tickets, level by level; levels the store already has are loaded instead of trained.

    All randomness comes from (seed, level, arm), so a search killed at any moment and started again on the same store
    gives bit for bit the rows and masks of one that was never killed, if train_fn is deterministic. A finished search
    goes on to more levels with a larger `config.levels`, where a level's density does not depend on their number
    (`rate` with the geometric schedule). One whose structure or layers allow no further pruning stops with a warning.

    Args:
      init_fn: typed PRNG key -> params of one network.
      train_fn: `train_fn(starts, level=level) -> Trained`, trains a whole stack; it must not
        donate the buffers of starts, which are used again afterwards.
      store: keeps each level's tree {"params", "masks"} [S, ...]; level 0 adds "reset" [seeds, ...] (the weights
        survivors go back to) and, with rewind_optimizer, "opt_state"; score "movement" adds "movement" to every level.
        `Result.ticket` takes one network's mask and weights from it.
      config: the search.
      opt_init: params -> optimizer state of one network; needed with `rewind_optimizer` only.
      score_inputs: what the score of the config looks at, the same for all networks: loss_fn and batches, apply_fn and
        inputs (see `criteria.CRITERIA`). The key, the initial weights and movement come from the search.
      given: for the arm "transfer": level -> masks [seeds, ...] like a stack of params, see `lottery.transfer`.

    Returns:
      A list of rows of all levels, one per (level, arm, seed): what train_fn reported plus level, arm, seed, density
      (fraction of prunable weights alive), alive, prunable (counts), layers (name -> fraction alive), start_step.

    Raises:
      ValueError: rules, rates or `output` that match no parameter; a structure that does not fit one (naming its path);
        missing opt_init, score_inputs, given or snapshot; train_fn returning the wrong number of rows or weights that
        should be zero and are not; a stored level of other arms, seeds or counts.

    Example:
      >>> def train_fn(starts, *, level):  # a real one trains starts.params under starts.masks
      ...     return lottery.imp.Trained(starts.params, rows=[{"loss": 0.0} for _ in starts.names])
      >>> init_fn = lambda key: {"dense0": {"kernel": jax.random.normal(key, (4, 5))}}
      >>> config = lottery.imp.SearchConfig(levels=2, rate=0.5, arms=("ticket",))
      >>> rows = lottery.imp.search(init_fn, train_fn, lottery.imp.Memory(), config)
      >>> [(row["arm"], row["density"]) for row in rows]
      [('dense', 1.0), ('ticket', 0.5), ('ticket', 0.25)]
      >>> mask, weights = rows.ticket(seed=0, level=2)
      >>> int(mask["dense0"]["kernel"].sum()), int((weights["dense0"]["kernel"] != 0).sum())
      (5, 5)
    """
    parts = _Search(init_fn, config, opt_init, score_inputs or criteria.ScoreInputs(), given)
    rows = Result(parts, store)
    dense, previous = None, None
    if rows.levels < config.levels:
        warnings.warn(
            f"search: {config.structure} sparsity with scope {config.scope!r} and rate {config.rate} has nothing to "
            f"prune after level {rows.levels}: the search stops there, not at level {config.levels}",
            stacklevel=2,
        )
    for level in range(rows.levels + 1):
        if store.has(level):
            tree, level_rows = parts.load(store, level)
        else:
            starts = parts.dense_starts() if level == 0 else parts.starts(level, dense, previous)
            trained = train_fn(starts, level=level)
            tree, level_rows = parts.collect(level, starts, trained)
            store.save(level, tree, level_rows)
        dense = tree if level == 0 else dense
        previous = tree
        rows.extend(level_rows)
    return rows


class Result(list):
    """The rows of a search, a list of dicts, and its tickets.

    Attributes:
      levels: of the search; fewer than asked where nothing is left to prune.

    Example:
      >>> train_fn = lambda starts, level: lottery.imp.Trained(starts.params, rows=[{} for _ in starts.names])
      >>> init_fn = lambda key: {"dense0": {"kernel": jax.random.normal(key, (4, 5))}}
      >>> config = lottery.imp.SearchConfig(levels=1, rate=0.5, arms=("ticket", "random_mask"))
      >>> found = lottery.imp.search(init_fn, train_fn, lottery.imp.Memory(), config)
      >>> mask, weights = found.ticket(seed=0, level=1, arm="random_mask")
      >>> len(found), int(mask["dense0"]["kernel"].sum())
      (3, 10)
    """

    def __init__(self, parts: "_Search", store: Store):
        super().__init__()
        self._parts, self._store, self.levels = parts, store, len(parts.counts) - 1

    def ticket(self, seed: int, level: int, arm: str = "ticket") -> tuple[PyTree, PyTree]:
        """Read one network's (masks, weights that its training at the level began with); level 0 is the dense network.

        The weights are zero outside the masks. For the ticket they are the initialization, or the weights of step
        `rewind`.

        Raises:
          ValueError: no such network.
        """
        parts, config = self._parts, self._parts.config
        names = level_names(config, level) if 0 <= level <= self.levels else ()
        arm = arm if level else "dense"
        if (arm, seed) not in names:
            raise ValueError(
                f"no arm {arm!r} with seed {seed} at level {level}; levels 0 to {self.levels}, arms "
                f"{', '.join(config.arms)}, seeds {', '.join(map(str, config.seeds))}"
            )
        tree = parts.load(self._store, level)[0]
        masks = jax.tree.map(lambda x: x[names.index((arm, seed))], tree["masks"])
        if level == 0:
            weights = parts.initial()
        else:
            dense = parts.load(self._store, 0)[0]
            before = dense if level == 1 else parts.of_arm(parts.load(self._store, level - 1)[0], arm)
            weights = parts.weights(level, arm, before, dense)
        return masks, masks_lib.apply(jax.tree.map(lambda x: x[config.seeds.index(seed)], weights), masks)


class _Search:
    """Makes the stacks of one search; holds what follows from the arguments of `search`, and compiled functions."""

    def __init__(self, init_fn, config: SearchConfig, opt_init, score_inputs: criteria.ScoreInputs, given):
        if config.rewind_optimizer and opt_init is None:
            raise ValueError("search: rewind_optimizer needs opt_init, e.g. the optimizer's init function")
        if given is None and any(ARMS[arm].mask == "given" for arm in config.arms):
            raise ValueError("search: the arm 'transfer' needs `given`, a function from levels to masks")
        missing = [n for n in criteria.CRITERIA[config.score][1] if n not in _OWN and getattr(score_inputs, n) is None]
        if missing:
            raise ValueError(f"search: score {config.score!r} needs score_inputs: ScoreInputs({', '.join(missing)})")
        self.config, self.opt_init, self.given = config, opt_init, given
        self.init = jax.jit(jax.vmap(init_fn))
        self.shapes = jax.eval_shape(init_fn, jax.random.key(0))
        self.which = masks_lib.prunable(self.shapes, config.rules, config.layouts)
        self.score_inputs = dataclasses.replace(score_inputs, which=self.which)
        self.units = prune.units(self.shapes, self.which, config.structure)
        shapes = prune.shapes(self.shapes, self.which, config.structure)
        self.counts = [{}, *level_counts(config, self.units, shapes)]  # units that stay, by level
        # Over the seeds. Counts are traced, so that one program serves all levels.
        self._prune = jax.jit(jax.vmap(self._prune_one, in_axes=(0, 0, 0, 0, 0, None, None)))
        self._prune_at_init = jax.jit(jax.vmap(self._prune_at_init_one, in_axes=(0, 0, None, None)))
        self._shuffle = jax.jit(jax.vmap(self._shuffle_one))
        self._largest = jax.jit(jax.vmap(lambda mask, params: self._as_many(mask, criteria.magnitude(params))))

    def like(self, level: int) -> PyTree:
        """Shapes of the tree stored for a level."""
        opt = jax.eval_shape(self.opt_init, self.shapes) if self.config.rewind_optimizer and level == 0 else None
        return level_like(self.shapes, self.config, level, opt)

    def load(self, store: Store, level: int) -> tuple[PyTree, list[Row]]:
        """A stored level, checked: a store of another search would be continued without a word."""
        tree, rows = store.load(level, self.like(level))
        names = tuple((row["arm"], row["seed"]) for row in rows)
        if names != level_names(self.config, level):
            raise ValueError(f"level {level} in the store has the arms and seeds {names}; the search asks for others")
        if level and self.config.structure == "unstructured":
            asked = sum(self.counts[level].values())
            for row in rows:
                if row["alive"] != asked and ARMS[row["arm"]].mask != "given":
                    raise ValueError(
                        f"level {level} in the store has {row['alive']} weights, the search asks for {asked}: another "
                        "rate, scope or density. To add levels use rate with schedule 'geometric', whose levels do not "
                        "depend on their number"
                    )
        return jax.tree.map(jnp.asarray, tree), rows

    # The stacks.

    def initial(self) -> PyTree:
        """The initialization of every seed."""
        return self.init(search_keys(self.config, 0, "init"))

    def dense_starts(self) -> Starts:
        """The stack of level 0: every seed's initialization, nothing pruned."""
        params = self.initial()
        return self._stack(0, params, masks_lib.ones(params))

    def starts(self, level: int, dense: PyTree, previous: PyTree) -> Starts:
        """The stack of a level >= 1 from the trees of level 0 and of the level before."""
        arms = self.config.arms
        before = {arm: dense if level == 1 else self.of_arm(previous, arm) for arm in arms}
        masks: dict[str, PyTree] = {}
        # Masks of their own first: other arms borrow them.
        for arm in sorted(arms, key=lambda arm: ARMS[arm].mask in BORROWED):
            masks[arm] = self._mask(level, arm, before[arm], dense, masks)
        weights = {arm: self.weights(level, arm, before[arm], dense) for arm in arms}
        join = lambda trees: jax.tree.map(lambda *x: jnp.concatenate(x), *[trees[a] for a in arms])  # noqa: E731
        params, stacked = join(weights), join(masks)
        opt_state, teachers = None, None
        if self.config.rewind_optimizer:
            opt_state = join({arm: self._opt_state(arm, weights[arm], dense) for arm in arms})
            opt_state = transform.mask_state(opt_state, stacked)
        if self.config.teacher:
            own = self.config.teacher == "previous"
            teachers = join({arm: before[arm]["params"] if own else dense["params"] for arm in arms})
        return self._stack(level, params, stacked, opt_state, teachers)

    def _stack(
        self, level: int, params: PyTree, masks: PyTree, opt_state: PyTree | None = None, teachers: PyTree | None = None
    ) -> Starts:
        names = level_names(self.config, level)
        return Starts(
            params=masks_lib.apply(params, masks),
            masks=masks,
            opt_state=opt_state,
            start_step=0 if level == 0 else self.config.rewind,
            seeds=np.asarray([seed for _, seed in names], np.int32),
            names=names,
            teachers=teachers,
            late=() if level == 0 else tuple(ARMS[arm].late for arm, _ in names),
        )

    def of_arm(self, tree: PyTree, arm: str) -> PyTree:
        """The networks of one arm in a level's tree."""
        n, i = len(self.config.seeds), self.config.arms.index(arm)
        used = {name: tree[name] for name in ("params", "masks", "movement") if name in tree}
        return jax.tree.map(lambda x: x[i * n : (i + 1) * n], used)

    def weights(self, level: int, arm: str, before: PyTree, dense: PyTree) -> PyTree:
        source = ARMS[arm].weights
        if source in ("fresh", "same_sign"):
            # Not the key of this arm's random mask, and a new draw at every level.
            fresh = self.init(search_keys(self.config, level, f"{arm}/init"))
            return fresh if source == "fresh" else controls.same_sign(self.initial(), fresh, self.which)
        return dense["reset"] if source == "rewind" else before["params"]

    def _opt_state(self, arm: str, weights: PyTree, dense: PyTree) -> PyTree:
        """Snapshot for rewound weights; for others moments begin anew while counters (schedules) stand at `rewind`."""
        if ARMS[arm].weights == "rewind":
            return dense["opt_state"]
        begun = jax.vmap(self.opt_init)(weights)
        return transform.map_moments(lambda _, snapshot, new: new, weights, dense["opt_state"], begun)

    # The masks [seeds, ...] of an arm.

    def _mask(self, level: int, arm: str, before: PyTree, dense: PyTree, masks: dict[str, PyTree]) -> PyTree:
        source, keys = ARMS[arm].mask, search_keys(self.config, level, arm)
        counts = {group: counting.split(count) for group, count in self.counts[level].items()}
        # Arrays of the score_inputs are arguments of the compiled functions: captured, they would be folded into them.
        data = self.score_inputs.batches, self.score_inputs.inputs
        if source in ("own", "oneshot"):
            tree = before if source == "own" else dense
            trained = tree["params"], tree["masks"], self.initial(), tree.get("movement")
            return self._prune(*trained, keys, counts, data)
        if source == "at_init":
            return self._prune_at_init(self.initial(), keys, self._rounds(self.counts[level]), data)
        if source == "given":
            return self._given(level)
        if source == "random":
            return self._shuffle(masks["ticket"], keys)
        if source == "large_init":
            return self._largest(masks["ticket"], self.initial())
        if source == "other_seed":
            return jax.tree.map(lambda m: jnp.roll(m, -1, axis=0), masks["ticket"])
        return masks[source]

    def _score(self, params: PyTree, initial: PyTree, movement: PyTree, key: jax.Array, data: Any) -> PyTree:
        state = None if movement is None else criteria.MovementState(movement)
        batches, inputs = data
        score_inputs = dataclasses.replace(
            self.score_inputs, key=key, initial=initial, opt_state=state, batches=batches, inputs=inputs
        )
        return criteria.score(self.config.score, params, score_inputs)

    def _prune_one(self, params, masks, initial, movement, key, counts: dict[str, Any], data: Any) -> PyTree:
        score = self._score(params, initial, movement, key, data)
        return prune.keep(score, masks, self.which, counts, self.config.structure)

    def _prune_at_init_one(self, params: PyTree, key: jax.Array, rounds: list[dict[str, Any]], data: Any) -> PyTree:
        # Nothing has moved yet: magnitude increase is zero everywhere, movement is not known.
        score = lambda masked: self._score(masked, params, None, key, data)  # noqa: E731
        return prune.iterate(score, params, masks_lib.ones(params), self.which, rounds, self.config.structure)

    def _rounds(self, final: dict[str, int]) -> list[dict[str, jax.Array]]:
        """Counts of every round of pruning at initialization, falling geometrically to the level's."""
        total = {g: sum(self.units.values()) if g == prune.EVERYTHING else self.units[g] for g in final}
        shares = [(i + 1) / self.config.rounds for i in range(self.config.rounds)]
        # A group that ends empty is empty from the last round on.
        rounds = [
            {g: round(total[g] * (max(final[g], 0.5) / total[g]) ** share) if share < 1 else final[g] for g in final}
            for share in shares
        ]
        return [{g: counting.split(count) for g, count in counts.items()} for counts in rounds]

    def _shuffle_one(self, masks: PyTree, key: jax.Array) -> PyTree:
        if self.config.structure == "unstructured":
            return masks_lib.random_like(masks, self.which, key=key)
        return self._as_many(masks, criteria.random(masks, key=key))

    def _as_many(self, masks: PyTree, score: PyTree) -> PyTree:
        """As many units as `masks` in every layer, those of the highest score."""
        counts = prune.alive_units(masks, self.which, self.config.structure)
        return prune.keep(score, masks_lib.ones(masks), self.which, counts, self.config.structure)

    def _given(self, level: int) -> PyTree:
        masks = self.given(level)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(self.config.seeds), *x.shape), x.dtype), self.shapes)
        try:
            masks_lib.check(masks, like)
        except ValueError as error:
            raise ValueError(f"given masks of level {level}: {error}") from error
        return jax.tree.map(jnp.asarray, masks)

    # What is stored.

    def collect(self, level: int, starts: Starts, trained: Trained) -> tuple[PyTree, list[Row]]:
        """The tree and rows to store for a trained level; checks what train_fn returned."""
        if len(trained.rows) != len(starts.names):
            raise ValueError(f"train_fn: {len(trained.rows)} rows at level {level} for {len(starts.names)} networks")
        masks_lib.check_zeros(trained.params, starts.masks)
        tree = {"params": trained.params, "masks": starts.masks}
        if self.config.score == "movement":
            if trained.movement is None:
                raise ValueError("train_fn: score 'movement' needs Trained.movement, see criteria.track_movement")
            tree["movement"] = trained.movement
        if level == 0:
            tree |= self._reset(starts, trained)
        rows = []
        counts = jax.device_get(jax.vmap(lambda m: masks_lib.count(m, self.which))(starts.masks))
        sizes = prune.sizes(self.shapes, self.which)
        for i, ((arm, seed), row) in enumerate(zip(starts.names, trained.rows, strict=True)):
            alive = {path: int(counts[path][i]) for path in sizes}
            mine = {
                "level": level,
                "arm": arm,
                "seed": seed,
                "density": sum(alive.values()) / sum(sizes.values()),
                "alive": sum(alive.values()),
                "prunable": sum(sizes.values()),
                "layers": {path: alive[path] / sizes[path] for path in sizes},
                "start_step": starts.start_step,
            }
            if empty := [path for path, count in alive.items() if not count]:
                warnings.warn(
                    f"level {level}, arm {arm}, seed {seed}: no weight left in {', '.join(empty)}", stacklevel=3
                )
            rows.append(_plain(row | mine))
        return tree, rows

    def _reset(self, starts: Starts, trained: Trained) -> PyTree:
        if self.config.rewind == 0:
            return {"reset": starts.params}
        needed = ("params", "opt_state") if self.config.rewind_optimizer else ("params",)
        missing = [name for name in needed if name not in (trained.snapshot or {})]
        if missing or trained.snapshot is None:
            raise ValueError(f"rewind={self.config.rewind}: train_fn's snapshot of level 0 lacks {', '.join(missing)}")
        return {{"params": "reset", "opt_state": "opt_state"}[name]: trained.snapshot[name] for name in needed}


def level_names(config: SearchConfig, level: int) -> tuple[tuple[str, int], ...]:
    """List (arm, seed) of every row of a level's stack, arm-major; level 0 has one "dense" row per seed.

    Example:
      >>> lottery.imp.level_names(lottery.imp.SearchConfig(seeds=(3, 5), arms=("ticket",)), 1)
      (('ticket', 3), ('ticket', 5))
    """
    arms = ("dense",) if level == 0 else config.arms
    return tuple((arm, seed) for arm in arms for seed in config.seeds)


def level_like(params: PyTree, config: SearchConfig, level: int, opt_state: PyTree | None = None) -> PyTree:
    """Make the shapes of the tree that a search stores of a level.

    Args:
      params: of one network, arrays or shapes.
      config: the search.
      level: 0 for the dense networks.
      opt_state: of one network, where the search stores it (level 0 with rewind_optimizer).

    Example:
      >>> tree = lottery.imp.level_like({"kernel": jnp.zeros(3)}, lottery.imp.SearchConfig(seeds=(0, 1)), 0)
      >>> tree["reset"]["kernel"].shape
      (2, 3)
    """
    size = len(level_names(config, level))

    def stack(tree: PyTree, dtype: Any = None) -> PyTree:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape), dtype or x.dtype), tree)

    tree = {"params": stack(params), "masks": stack(params, jnp.bool_)}
    if config.score == "movement":
        tree["movement"] = stack(params, jnp.float32)
    if level == 0:
        tree["reset"] = stack(params)
        if opt_state is not None:
            tree["opt_state"] = stack(opt_state)
    return tree


def initial_weights(init_fn: Callable[[jax.Array], PyTree], config: SearchConfig) -> PyTree:
    """Draw the initializations [seeds, ...] that a search of this config begins with.

    Example:
      >>> init_fn = lambda key: {"dense0": {"kernel": jax.random.normal(key, (4, 5))}}
      >>> lottery.imp.initial_weights(init_fn, lottery.imp.SearchConfig(seeds=(0, 1)))["dense0"]["kernel"].shape
      (2, 4, 5)
    """
    return jax.jit(jax.vmap(init_fn))(search_keys(config, 0, "init"))


def search_keys(config: SearchConfig, level: int, name: str) -> jax.Array:
    """Derive the PRNG keys [seeds] of a level and a name.

    Arms are told apart by name, so adding an arm changes nothing in the others.

    Example:
      >>> lottery.imp.search_keys(lottery.imp.SearchConfig(seeds=(0, 1)), 1, "ticket").shape
      (2,)
    """
    seeds = jnp.asarray(config.seeds, jnp.uint32)
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    return fold(fold(jax.vmap(jax.random.key)(seeds), level), zlib.crc32(name.encode()))


def _plain(value: Any) -> Any:
    """JSON's own types, so that rows are the same whether they come from memory or from a file."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist()) if np.ndim(value) else np.asarray(value).item()
    return value
