"""The settings of a lottery-ticket search: its arms (`ARMS`), and the weights that stay in every layer and level."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from lottery import allocation, criteria, prune, schedules, structures
from lottery.masks import match_paths

__all__ = ["ARMS", "Arm", "SearchConfig", "level_counts"]

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
      >>> lottery.search_config.ARMS["reinit"]
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
      >>> lottery.search_config.SearchConfig(levels=3, rate=0.5).final_density
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
      >>> config = lottery.search_config.SearchConfig(levels=2, rate=0.5, output="^output/")
      >>> lottery.search_config.level_counts(config, {"dense0/kernel": 100, "output/kernel": 20}, {})
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
