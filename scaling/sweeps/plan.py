"""Plans of sweeps: model shapes by width, rules for learning rate and batch size, and the table of runs.

A run is one trunk of training (warmup, then a stable learning rate) that is read out at several token counts: from the
trunk's weights at a branch point the learning rate decays to zero (a WSD schedule), which gives the loss of a run of
just that length, while the trunk continues (Hu et al. 2024, section 4.3; Hägele et al. 2024). So every size costs about
its largest budget, not the sum of all.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scaling import flops
from scaling.flops import Shape


@dataclass(frozen=True)
class Family:
    """Decoder shapes by width.

    Attributes:
      vocab, length: vocabulary and context in tokens.
      aspect: width per layer; the depth is width / aspect, rounded.
      least_layers: of any member. One layer and two differ in kind, which puts a step into a curve over sizes.
      head_dim: of every head, whatever the width; there are width / head_dim heads, rounded, at least 1.
      ff_ratio, ff_multiple: hidden width of the gated feed-forward part over the width, rounded to a multiple.

    Example:
      >>> from scaling.sweeps import Family
      >>> shape = Family(vocab=256).shape(64)
      >>> shape.layers, shape.heads, shape.ff
      (2, 8, 172)
    """

    vocab: int = 256
    length: int = 64
    aspect: float = 32.0
    least_layers: int = 2
    head_dim: int = 8
    ff_ratio: float = 8 / 3
    ff_multiple: int = 4

    def __post_init__(self):
        for name in ("vocab", "length", "aspect", "least_layers", "head_dim", "ff_ratio", "ff_multiple"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be positive")

    def shape(self, width: int) -> Shape:
        """Make the shape of this width."""
        return Shape(
            layers=max(self.least_layers, _rounded(width / self.aspect)),
            width=width,
            ff=self.ff_multiple * _rounded(self.ff_ratio * width / self.ff_multiple),
            heads=_rounded(width / self.head_dim),
            head_dim=self.head_dim,
            vocab=self.vocab,
            length=self.length,
            gated=True,
        )


def _rounded(value: float) -> int:
    """Round to the nearest integer (halves up), at least 1."""
    return max(1, math.floor(value + 0.5))


@dataclass(frozen=True)
class Rule:
    """A power law of parameters and tokens, clipped to `least` and `most`.

    value (params / at)^exponent (tokens / tokens_at)^tokens_exponent: the form of Step Law (Li et al. 2025, learning
    rate of N and D, batch of D), of DeepSeek LLM (Bi et al. 2024, both of C: equal exponents) and of Porian et al.
    (2024, both of N); docs/sweeps.md has their constants.

    Attributes:
      value: at `at` parameters and `tokens_at` tokens.
      at: see value.
      exponent: of the parameters; 0 for none.
      multiple: round to a multiple of this; 0 for no rounding.
      least, most: bounds.
      tokens_at: see value.
      tokens_exponent: of the tokens of training; 0 for none.

    Example:
      >>> from scaling.sweeps import Rule
      >>> Rule(1e-2, at=1e4, exponent=-0.5)(1e6)
      0.001
      >>> step_law = Rule(1.79, at=1.0, exponent=-0.713, tokens_at=1.0, tokens_exponent=0.307)
      >>> f"{step_law(1e9, 1e11):.2e}"
      '1.63e-03'
    """

    value: float
    at: float = 1e4
    exponent: float = 0.0
    multiple: int = 0
    least: float = 0.0
    most: float = math.inf
    tokens_at: float = 1e9
    tokens_exponent: float = 0.0

    def __post_init__(self):
        positive = self.value > 0 and self.at > 0 and self.tokens_at > 0
        if not (positive and self.multiple >= 0 and 0 <= self.least <= self.most):
            raise ValueError(
                f"{self}: value, at and tokens_at must be positive, 0 <= least <= most, multiple not negative"
            )

    def __call__(self, params: float, tokens: float | None = None) -> float:
        """The value for a model that is trained on so many tokens.

        Raises:
          ValueError: a rule of tokens without them.
        """
        if self.tokens_exponent and tokens is None:
            raise ValueError(f"{self}: a rule of tokens needs their number")
        value = self.value * (params / self.at) ** self.exponent
        value *= (tokens / self.tokens_at) ** self.tokens_exponent if tokens is not None else 1.0
        value = min(max(value, self.least), self.most)
        return float(self.multiple * _rounded(value / self.multiple)) if self.multiple else value


@dataclass(frozen=True)
class Readout:
    """One loss to be read off a run.

    Attributes:
      steps: optimizer steps, warmup and decay among them.
      branch: step of the trunk at which the decay begins.
      tokens: seen after `steps`.
      flops: spent then, under the plan's convention.
      budget: FLOPs of the plan; `flops` is the nearest integer number of steps to it.

    Example:
      >>> from scaling.sweeps import Readout
      >>> readout = Readout(steps=100, branch=80, tokens=102_400, flops=6e9, budget=6e9)
      >>> readout.steps - readout.branch  # of the decay
      20
    """

    steps: int
    branch: int
    tokens: int
    flops: float
    budget: float


@dataclass(frozen=True)
class PlannedRun:
    """One training run and where it is read out.

    Attributes:
      name: for messages and tables.
      settings: everything its weights depend on, JSON values; their hash names the run's directory.
      readouts: by rising step.
      columns: further columns of its rows (params, width, learning rate ...).
      flops_per_step: of training, for progress and cost.

    Example:
      >>> from scaling.sweeps import PlannedRun, Readout
      >>> readouts = (Readout(100, 80, 102_400, 6e9, 6e9), Readout(200, 160, 204_800, 12e9, 12e9))
      >>> PlannedRun("w16", {"width": 16}, readouts).steps  # the trunk to 160, decays of 20 and 40
      220
    """

    name: str
    settings: Mapping[str, Any]
    readouts: tuple[Readout, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    flops_per_step: float = 1.0

    @property
    def key(self) -> str:
        """SHA-256 of the settings, hex. Readouts are not part of it: more of them can be added to a run."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    @property
    def steps(self) -> int:
        """Steps of training: the trunk to the last branch point, and every decay."""
        return self.readouts[-1].branch + sum(r.steps - r.branch for r in self.readouts)

    @property
    def cost(self) -> float:
        """FLOPs of those steps."""
        return self.steps * self.flops_per_step


@dataclass(frozen=True)
class PlanConfig:
    """A table of runs: every width x learning-rate factor x batch factor x seed, read out at all budgets.

    Attributes:
      widths: of the models.
      budgets: FLOPs at which every size is read out; or else
      tokens: token counts at which every size is read out.
      lr: learning rate before the width transfer, a rule of the parameters and of the tokens of the longest readout.
      batch: sequences per step, likewise.
      lr_factors, batch_factors: a grid around the rules.
      seeds: of initialization and data order.
      warmup: steps to the full learning rate.
      decay: share of a readout's steps over which the learning rate falls to zero.
      least_steps: a readout of fewer steps is left out of the plan.
      tokens_per_parameter: readouts outside this range are left out (the ends of an IsoFLOP curve cost most and say
        least).
      convention: how parameters and FLOPs are counted, a key of `scaling.flops.CONVENTIONS`.

    Example:
      >>> from scaling.sweeps import PlanConfig, Rule
      >>> PlanConfig(widths=(16, 32), budgets=(1e12, 1e13), lr=Rule(3e-3)).convention
      '6ND'
    """

    widths: tuple[int, ...]
    budgets: tuple[float, ...] = ()
    tokens: tuple[float, ...] = ()
    lr: Rule = Rule(1e-2)
    batch: Rule = Rule(16.0, multiple=1)
    lr_factors: tuple[float, ...] = (1.0,)
    batch_factors: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (0,)
    warmup: int = 50
    decay: float = 0.2
    least_steps: int = 100
    tokens_per_parameter: tuple[float, float] = (0.0, math.inf)
    convention: str = "6ND"

    def __post_init__(self):
        if bool(self.budgets) == bool(self.tokens):
            raise ValueError(
                f"give budgets (FLOPs) or tokens, one of them: budgets={self.budgets}, tokens={self.tokens}"
            )
        for name in ("widths", "lr_factors", "batch_factors", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} = {values}: at least one value, each once")
        if min(*self.widths, *self.budgets, *self.tokens, *self.lr_factors, *self.batch_factors) <= 0:
            raise ValueError("widths, budgets, tokens and factors must be positive")
        if not 0 < self.decay < 1 or self.warmup < 0:
            raise ValueError(
                f"decay = {self.decay} must be a share between 0 and 1, warmup = {self.warmup} not negative"
            )
        if self.convention not in flops.CONVENTIONS:
            known = ", ".join(map(repr, flops.CONVENTIONS))
            raise ValueError(f"convention = {self.convention!r}: choose one of {known}")


def _asked(config: PlanConfig, count: flops.Count) -> list[tuple[float, float]]:
    """Tokens and FLOPs at which one size is to be read out, by rising tokens, inside the range of ratios."""
    asked = [(budget / count.flops_per_token, budget) for budget in config.budgets]
    asked += [(tokens, tokens * count.flops_per_token) for tokens in config.tokens]
    low, high = config.tokens_per_parameter
    return [(tokens, budget) for tokens, budget in sorted(asked) if low <= tokens / count.params <= high]


def plan_readouts(config: PlanConfig, count: flops.Count, tokens_per_step: int) -> tuple[Readout, ...]:
    """Place the readouts of one size, by rising step, without those too short or outside the range of ratios."""
    found: dict[int, Readout] = {}
    for tokens, budget in _asked(config, count):
        steps = round(tokens / tokens_per_step)
        branch = steps - max(1, round(config.decay * steps))
        if steps < config.least_steps or branch < config.warmup:
            continue
        seen = steps * tokens_per_step
        found[steps] = Readout(steps, branch, seen, seen * count.flops_per_token, budget)
    return tuple(found[steps] for steps in sorted(found))


def plan_runs(family: Family, config: PlanConfig, common: Mapping[str, Any]) -> list[PlannedRun]:
    """Plan a table of runs, cheapest first.

    Args:
      family: the models.
      config: what to train them for.
      common: further settings that decide the weights (optimizer, data and its hash ...), the same for all runs.

    Raises:
      ValueError: no size can be read out at any budget.

    Example:
      >>> from scaling.sweeps import Family, PlanConfig, plan_runs
      >>> plan = PlanConfig(widths=(16, 32), budgets=(1e12, 2e12))
      >>> [(run.name, len(run.readouts)) for run in plan_runs(Family(), plan, {"data": "bytes"})]
      [('w32', 2), ('w16', 2)]
    """
    runs = []
    for width in config.widths:
        shape = family.shape(width)
        count = flops.count(shape, config.convention)
        asked = _asked(config, count)
        if not asked:
            continue
        sizes = float(count.params), asked[-1][0]
        for lr_factor in config.lr_factors:
            for batch_factor in config.batch_factors:
                batch = _rounded(config.batch(*sizes) * batch_factor)
                readouts = plan_readouts(config, count, batch * family.length)
                if not readouts:
                    continue
                lr = config.lr(*sizes) * lr_factor
                for seed in config.seeds:
                    runs.append(_run(shape, count, config, readouts, common, lr=lr, batch=batch, seed=seed))
    if not runs:
        raise ValueError(
            f"no width of {config.widths} can be read out anywhere: every readout has fewer than {config.least_steps} "
            f"steps, or tokens per parameter outside {config.tokens_per_parameter}"
        )
    return sorted(runs, key=lambda run: (run.cost, run.name))


def _run(
    shape: Shape,
    count: flops.Count,
    config: PlanConfig,
    readouts: tuple[Readout, ...],
    common: Mapping[str, Any],
    *,
    lr: float,
    batch: int,
    seed: int,
) -> PlannedRun:
    model = {name: getattr(shape, name) for name in ("layers", "width", "ff", "heads", "head_dim", "vocab", "length")}
    own = {"lr": lr, "batch": batch, "seed": seed, "warmup": config.warmup}
    columns = {"width": shape.width, "layers": shape.layers, "params": int(count.params)} | own
    parts = [f"w{shape.width}"]
    parts += [f"lr{lr:.3g}"] * (len(config.lr_factors) > 1)
    parts += [f"b{batch}"] * (len(config.batch_factors) > 1)
    parts += [f"s{seed}"] * (len(config.seeds) > 1)
    settings = {"model": model, **own, **common}
    return PlannedRun("-".join(parts), settings, readouts, columns, batch * shape.length * count.flops_per_token)
