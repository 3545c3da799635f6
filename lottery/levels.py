"""What goes in and out of one level of a lottery-ticket search: arms, configuration, stacks and the store.

`lottery.imp` runs the search and offers all of these names too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import PyTree

from lottery import prune, scores

Row = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """What an arm trains at level >= 1: where its mask comes from and which weights it puts under that mask.

    mask: "own" (pruned from this arm's own trained weights of the level before), "ticket" (the arm called ticket's),
      "random" (the ticket's count in every layer, at random places), "oneshot" (the dense network pruned once to this
      level's counts).
    weights: "rewind" (the dense network's weights at step `rewind`), "trained" (this arm's weights at the end of the
      level before), "fresh" (a new initialization).
    """

    mask: str
    weights: str


ARMS: dict[str, Arm] = {
    "ticket": Arm(mask="own", weights="rewind"),
    "continue": Arm(mask="own", weights="trained"),
    "reinit": Arm(mask="ticket", weights="fresh"),
    "random_mask": Arm(mask="random", weights="rewind"),
    "random_reinit": Arm(mask="random", weights="fresh"),
    "oneshot": Arm(mask="oneshot", weights="rewind"),
    "oneshot_reinit": Arm(mask="oneshot", weights="fresh"),
}


@dataclass(frozen=True)
class SearchConfig:
    """A search. Raises ValueError at once for values that could not be run.

    seeds: one independent repetition each (initialization, data order, random masks), 0 <= seed < 2**31.
    levels: pruning levels after the dense level 0.
    rate: fraction of the still-alive weights removed before each level.
    output_rate: the same for layers matching `output`, with scope "layer" (negative: half of `rate`, as the paper).
    output: regular expression over parameter paths naming the output layer; "" for none.
    scope: "layer" (every layer at its own rate) or "global" (the lowest scores anywhere).
    score: a name in `lottery.scores.SCORES`.
    arms: names in `ARMS`; arms that borrow the ticket's mask or counts need "ticket" among them.
    rewind: step of the dense run whose weights the survivors go back to; 0 is the initialization. All arms of later
      levels start counting at this step, the freshly initialized ones too, so they train for equally long.
    rewind_optimizer: also go back to the optimizer's state of that step (needs rewind > 0 and `opt_init` in `search`).
    rules: (regular expression, prunable?) over parameter paths, see `lottery.masks.prunable`.
    """

    seeds: tuple[int, ...] = (0,)
    levels: int = 5
    rate: float = 0.2
    output_rate: float = -1.0
    output: str = "^output/"
    scope: str = "layer"
    score: str = "magnitude"
    arms: tuple[str, ...] = ("ticket", "reinit", "random_mask")
    rewind: int = 0
    rewind_optimizer: bool = False
    rules: tuple[tuple[str, bool], ...] = ()

    def __post_init__(self):
        known = {"arms": (self.arms, ARMS), "score": ((self.score,), scores.SCORES), "scope": ((self.scope,), SCOPES)}
        for field, (names, valid) in known.items():
            for name in names:
                if name not in valid:
                    raise ValueError(f"SearchConfig.{field}: {name!r} is not one of {', '.join(valid)}")
        if len(set(self.arms)) != len(self.arms) or not self.arms:
            raise ValueError(f"SearchConfig.arms must be distinct and not empty, got {self.arms}")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds or not all(0 <= s < 2**31 for s in self.seeds):
            raise ValueError(f"SearchConfig.seeds must be distinct numbers in [0, 2**31), got {self.seeds}")
        borrowed = [arm for arm in self.arms if ARMS[arm].mask in ("ticket", "random")]
        if borrowed and "ticket" not in self.arms:
            raise ValueError(f"SearchConfig.arms: {', '.join(borrowed)} need the ticket's mask: add 'ticket' to arms")
        if self.levels < 0 or self.rewind < 0:
            raise ValueError(f"SearchConfig: levels ({self.levels}) and rewind ({self.rewind}) must be >= 0")
        if not 0 < self.rate < 1 or self.output_rate >= 1:
            raise ValueError(f"SearchConfig: rate ({self.rate}) and output_rate ({self.output_rate}) must be in (0, 1)")
        if self.rewind_optimizer and self.rewind == 0:
            raise ValueError("SearchConfig.rewind_optimizer needs rewind > 0: at step 0 the optimizer has no state yet")


@dataclass(frozen=True)
class Starts:
    """What a level trains: S networks stacked on the leading axis of every array. Rows of the stack are `names`.

    params: [S, ...] starting weights, already zero wherever the mask is False.
    masks: [S, ...] bool, same structure and shapes as params (all True at level 0 and in leaves that are not prunable).
    opt_state: None (start the optimizer afresh), or with `rewind_optimizer` and level >= 1 the state to start from,
      stacked [S, ...] as `jax.vmap(opt_init)` gives it, moments already masked.
    start_step: step to start counting from (data order, learning rate): 0 at level 0, `rewind` afterwards.
    seeds: [S] int32, the seed of every row: use it for the data order, so arms of one seed see the same batches.
    names: S pairs (arm, seed), arm-major; the arm is "dense" at level 0.
    """

    params: PyTree
    masks: PyTree
    opt_state: PyTree | None
    start_step: int
    seeds: np.ndarray
    names: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Trained:
    """What training a level gives back.

    params: [S, ...] weights at the end of training, exactly zero wherever the mask is False.
    rows: S dicts in the order of `Starts.names`, JSON-able (numbers, strings, lists), e.g. early_stop_step,
      early_stop_test_accuracy, final_test_accuracy, learning curves. The search adds arm, seed, level and densities.
    snapshot: looked at on level 0 with rewind > 0 only: {"params": [S, ...], "opt_state": [S, ...]} as they were after
      step `rewind` ("opt_state" needed with rewind_optimizer only).
    """

    params: PyTree
    rows: list[Row]
    snapshot: dict[str, PyTree] | None = None


@runtime_checkable
class Store(Protocol):
    """Keeps finished levels. `save` must be atomic: afterwards `has` is true, and killed half-way it stays false."""

    def has(self, level: int) -> bool:
        """Whether the level was saved completely."""
        ...

    def load(self, level: int, like: PyTree) -> tuple[PyTree, list[Row]]:
        """The tree and rows saved; `like` has the tree's structure, with jax.ShapeDtypeStruct leaves."""
        ...

    def save(self, level: int, tree: PyTree, rows: list[Row]) -> None:
        """Keep a finished level: a pytree of arrays and its JSON-able rows."""
        ...


class Memory:
    """A store in a dict, for searches that need not outlive the process."""

    def __init__(self):
        self.levels: dict[int, tuple[PyTree, list[Row]]] = {}

    def has(self, level: int) -> bool:
        """Whether the level is kept."""
        return level in self.levels

    def load(self, level: int, like: PyTree) -> tuple[PyTree, list[Row]]:
        """The tree and rows kept for the level; `like` is not needed."""
        del like
        return self.levels[level]

    def save(self, level: int, tree: PyTree, rows: list[Row]) -> None:
        """Keep the level."""
        self.levels[level] = (tree, rows)


def level_names(config: SearchConfig, level: int) -> tuple[tuple[str, int], ...]:
    """(arm, seed) of every row of a level's stack, arm-major; level 0 has one "dense" row per seed."""
    arms = ("dense",) if level == 0 else config.arms
    return tuple((arm, seed) for arm in arms for seed in config.seeds)


def _global_scope(config: SearchConfig, rate: float) -> prune.Scope:
    return prune.Global(rate)


def _layer_scope(config: SearchConfig, rate: float) -> prune.Scope:
    output_rate = rate / 2 if config.output_rate < 0 else config.output_rate
    return prune.Layerwise(rate, ((config.output, output_rate),) if config.output else ())


SCOPES: dict[str, Callable[[SearchConfig, float], prune.Scope]] = {"layer": _layer_scope, "global": _global_scope}
