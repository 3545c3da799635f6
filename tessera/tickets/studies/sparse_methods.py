"""Sparse networks without a search: sparse training, gradual pruning, early birds, supermasks, penalties."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from lottery import criteria, dynamic, gates, proximal, prune, supermask
from lottery import masks as masks_lib
from lottery.imp import initial_weights, level_counts, search_keys
from tessera.infra.config import ConfigError, build
from tessera.models.registry import Network
from tessera.optim.optimizer import OptimizerConfig, learning_rate, make_optimizer
from tessera.tickets.setup import Setup
from tessera.tickets.train import Programs, make_loss, measure, stops, train_blocks


@dataclass(frozen=True)
class SparseConfig:
    """Settings of the methods; parts of training are fractions of its steps.

    Attributes:
      methods: names in `METHODS`.
      moves: steps between moves of SET and RigL.
      until: part of training after which nothing moves, and the straight-through mask is not chosen anew.
      fraction: of the weights that move at first.
      pruned: part of training after which the cubic schedule, and that of the straight-through mask, has reached its
        density.
      every: steps between its prunings, between choices of the straight-through mask, and between checks of the
        early-bird detector.
      window: masks that the early-bird detector compares, see `lottery.dynamic.early_bird`.
      threshold: distance of masks below which it has found its ticket.
      popup_lr: peak learning rate of the supermask's scores.
      l1: strength of the penalty of "l1", proximal gradient steps on the sum of absolute weights; after `pruned` the
        largest weights are trained on.
      gate_lr: learning rate of the gates of "l0" and of its Lagrange multipliers (`lottery.gates`); after `pruned` the
        weights behind the gates that are open most are trained on.
    """

    methods: tuple[str, ...] = ("set", "rigl", "straight_through", "gradual", "early_bird", "popup")
    moves: int = 50
    until: float = 0.75
    fraction: float = 0.3
    pruned: float = 0.75
    every: int = 20
    window: int = 5
    threshold: float = 0.1
    popup_lr: float = 1e-2
    l1: float = 1e-4
    gate_lr: float = 0.1

    def __post_init__(self):
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods:
            raise ValueError(f"methods={self.methods}: choose from {', '.join(METHODS)}")
        for name in ("moves", "every", "popup_lr", "gate_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.l1 < 0:
            raise ValueError(f"l1={self.l1} must not be negative")
        if not (0 < self.until <= 1 and 0 < self.pruned <= 1):
            raise ValueError(f"until={self.until} and pruned={self.pruned} must lie in (0, 1]")


@dataclass(frozen=True)
class MethodInputs:
    """The inputs that all methods share.

    Attributes:
      setup: data, network, schedule.
      study: settings of the methods.
      config: of the experiment.
      initial: weights [seeds, ...].
      which: prunable leaves, static.
      counts: weights of every prunable leaf that stay, by path.
    """

    setup: Setup
    study: SparseConfig
    config: Any
    initial: PyTree
    which: PyTree
    counts: Mapping[str, int]

    @property
    def density(self) -> float:
        """Share of the prunable weights that stay."""
        shapes = jax.eval_shape(self.setup.network.init, jax.random.key(0))
        return sum(self.counts.values()) / sum(prune.sizes(shapes, self.which).values())

    def part(self, share: float) -> int:
        """Steps in a share of the run."""
        return round(share * self.setup.ticket.steps)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the networks, in the stack's order."""
        return self.setup.search.seeds

    def largest(self, params: PyTree) -> PyTree:
        """The mask [...] of the largest weights of one network."""
        return prune.keep(criteria.magnitude(params), masks_lib.ones(params), self.which, self.counts)

    def random(self) -> PyTree:
        """Random masks [seeds, ...]."""
        draw = lambda params, key: self.largest(criteria.random(params, key=key))  # noqa: E731
        return jax.jit(jax.vmap(draw))(self.initial, search_keys(self.setup.search, 1, "sparse training"))


def make_inputs(setup: Setup, study: SparseConfig, config: Any) -> tuple[MethodInputs, list[dict[str, int]]]:
    """The inputs at the density of a search's last level, and the counts of every level.

    Raises:
      ConfigError: a scope that gives layers no counts.
    """
    shapes = jax.eval_shape(setup.network.init, jax.random.key(0))
    which = masks_lib.prunable(shapes, setup.search.rules)
    counts = level_counts(setup.search, prune.sizes(shapes, which), prune.shapes(shapes, which))
    if prune.EVERYTHING in counts[-1]:
        raise ConfigError("config.search.scope: 'global' gives layers no counts to share: layer, uniform or erk")
    initial = initial_weights(setup.network.init, setup.search)
    return MethodInputs(setup, study, config, initial, which, counts[-1]), counts


def sparse_share(alive: np.ndarray, dense_gradient: np.ndarray | float = 0.0) -> float:
    """Training FLOPs as the papers count them (Evci et al. 2020), as a share of a dense run's of as many steps.

    A weight has three products a step: forward, gradient of the inputs, its own gradient. A dead one needs none, or
    the last alone where the method looks at it. All weights count alike, those of the first layer, which have no
    gradient of the inputs, and of convolutions too.

    Args:
      alive: share of the weights that are alive, by step.
      dense_gradient: 1 at steps that need the gradients of dead weights, else 0.
    """
    return float(np.mean(alive + dense_gradient * (1 - alive) / 3))


def lifted(network: Network, effective: Callable[[PyTree], PyTree]) -> Network:
    """`network` on trees from which `effective` makes its weights; batch statistics do not move."""
    return Network(
        init=network.init,
        apply=lambda tree, x: network.apply(effective(tree), x),
        train=lambda tree, x: (network.train(effective(tree), x)[0], {}),
    )


class Result(NamedTuple):
    """What a method gives.

    Attributes:
      rows: seed, final_test_accuracy, final_test_loss, perhaps a note; one a network.
      masks: [seeds, ...].
      sparse: of every network, `sparse_share` of its steps.
      found: of every network, the share of the steps after which its mask is final.
    """

    rows: list[dict[str, Any]]
    masks: PyTree
    sparse: Sequence[float]
    found: Sequence[float]


def advance(
    inputs: MethodInputs,
    programs: Programs,
    params: PyTree,
    masks: PyTree,
    opt_state: PyTree | None,
    seeds: tuple[int, ...],
    settled: Callable[[int, Any], bool] = lambda step, state: False,
    every: int = 0,
    start: int = 0,
) -> tuple[int, Any]:
    """Train a stack from `start` to the end, or until `settled(step, state)`, asked at evaluations and other marks."""
    config = inputs.setup.ticket
    state = programs.init(params, masks, opt_state, start, start)
    looks = range(start + every, config.steps, every) if every else ()
    order: dict[str, Any] = {"config": config, "size": inputs.setup.size, "seeds": seeds, "start": start}
    after = lambda step, state, row: settled(step, state)  # noqa: E731
    return train_blocks(programs, state, masks, sorted({*stops(config, start), *looks}), **order, after=after)


def rows_of(programs: Programs, state: Any, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row for each network of a finished stack."""
    return [{"seed": seed} | row for seed, row in zip(seeds, measure(programs, state), strict=True)]


def fixed(inputs: MethodInputs, masks: PyTree) -> Result:
    """Train from the initializations under masks [seeds, ...] that do not change."""
    programs = inputs.setup.programs_for(inputs.setup.optimizer)
    _, state = advance(inputs, programs, masks_lib.apply(inputs.initial, masks), masks, None, inputs.seeds)
    density = jax.jit(jax.vmap(lambda mask: masks_lib.density(mask, inputs.which)))(masks)
    rows = rows_of(programs, state, inputs.seeds)
    return Result(rows, masks, np.asarray(density).tolist(), [0.0] * len(rows))


def one_shot(inputs: MethodInputs, half: MethodInputs) -> Result:
    """A ticket by one pruning: half of the steps train the dense network, half its ticket; `half` has that schedule."""
    programs = half.setup.programs_for(half.setup.optimizer)
    _, state = advance(half, programs, half.initial, masks_lib.ones(half.initial), None, half.seeds)
    found = fixed(half, jax.jit(jax.vmap(half.largest))(state.params))
    return found._replace(sparse=[(1 + density) / 2 for density in found.sparse], found=[0.5] * len(found.rows))


def _in_state(
    inputs: MethodInputs, make: Callable[[PyTree, Array], Any], masked: bool, sparse: float, found: float
) -> Result:
    """Train with a transformation that carries masks; `make(mask, key)`, and whether it starts from random masks."""
    full = masks_lib.ones(inputs.initial)
    begin = inputs.random() if masked else full
    keys = search_keys(inputs.setup.search, 0, "sparse training")
    state = jax.jit(jax.vmap(lambda p, m, key: make(m, key).init(masks_lib.apply(p, m))))(inputs.initial, begin, keys)
    # Where the first masks are known only now, the weights of the first step must be under them too.
    params = masks_lib.apply(inputs.initial, dynamic.masks_of(state))
    # The state carries mask and key; those given here are for the shapes only.
    programs = inputs.setup.programs_for(make(jax.tree.map(lambda leaf: leaf[0], begin), keys[0]))
    _, state = advance(inputs, programs, params, full, state, inputs.seeds)
    rows = rows_of(programs, state, inputs.seeds)
    return Result(rows, dynamic.masks_of(state.opt_state), [sparse] * len(rows), [found] * len(rows))


def _densities(inputs: MethodInputs) -> np.ndarray:
    """Share of weights alive at every step of the cubic schedule [steps]."""
    steps, study = inputs.setup.ticket.steps, inputs.study
    end = inputs.part(study.pruned)
    at = np.arange(steps)
    at = np.where(at < end, at // study.every * study.every, end)
    return np.asarray(
        dynamic.cubic_density(jnp.asarray(at), dynamic.GradualConfig(inputs.density, 0, end, study.every))
    )


def _moving(grow: str) -> Callable[[MethodInputs], Result]:
    def train(inputs: MethodInputs) -> Result:
        steps, study, inner = inputs.setup.ticket.steps, inputs.study, inputs.setup.optimizer
        config = dynamic.DynamicConfig(grow, study.moves, inputs.part(study.until), study.fraction)
        moves = np.isin(np.arange(steps), range(study.moves, config.until, study.moves))
        sparse = sparse_share(np.full(steps, inputs.density), moves & (grow == "gradient"))
        make = lambda m, key: dynamic.dynamic(inner, m, inputs.which, config, key=key)  # noqa: E731
        return _in_state(inputs, make, True, sparse, moves.sum() * study.moves / steps)

    return train


def straight_through(inputs: MethodInputs) -> Result:
    """Magnitude masks with a straight-through estimator (DPF): a ramp to the density, at last the mask is trained."""
    ramp, until = inputs.part(inputs.study.pruned), inputs.part(inputs.study.until)
    until = max(ramp, until)
    optimizer, which, counts, every = inputs.setup.optimizer, inputs.which, inputs.counts, inputs.study.every
    alive = _densities(inputs)
    return _in_state(
        inputs,
        lambda m, key: dynamic.straight_through(optimizer, which, counts, every, ramp=ramp, until=until),
        False,
        # The weights behind the mask need their gradients as long as they may come back.
        sparse_share(alive, np.arange(len(alive)) < until),
        until / len(alive),
    )


def gradual(inputs: MethodInputs) -> Result:
    """The cubic schedule: with scope "uniform" in every layer, otherwise over all of them together."""
    end = inputs.part(inputs.study.pruned)
    scope = "layer" if inputs.setup.search.scope == "uniform" else "global"
    config = dynamic.GradualConfig(inputs.density, 0, end, min(inputs.study.every, end), scope)
    make = lambda m, key: dynamic.gradual(inputs.setup.optimizer, inputs.which, config)  # noqa: E731
    return _in_state(inputs, make, False, sparse_share(_densities(inputs)), end / inputs.setup.ticket.steps)


def early_bird(inputs: MethodInputs) -> Result:
    """Dense training until the mask of the largest weights stands still, then the ticket goes on from there."""
    study, programs, one = inputs.study, inputs.setup.programs_for(inputs.setup.optimizer), jax.tree.map
    look = jax.jit(
        lambda bird, params: dynamic.observe(bird, inputs.largest(params), inputs.which, study.threshold)[:2]
    )
    found: list[tuple[dict[str, Any], PyTree]] = []
    steps: list[float] = []
    for i, seed in enumerate(inputs.seeds):
        params = one(lambda leaf: leaf[i : i + 1], inputs.initial)  # noqa: B023
        bird = dynamic.early_bird(one(lambda leaf: leaf[0], params), study.window)

        def settled(step: int, state: Any) -> bool:
            nonlocal bird
            bird, found = look(bird, one(lambda leaf: leaf[0], state.params))
            return bool(found)

        full = masks_lib.ones(params)
        step, state = advance(inputs, programs, params, full, None, (seed,), settled, study.every)
        mask = jax.jit(jax.vmap(inputs.largest))(state.params)
        note = f"dense for {step} steps"
        # Copied: the next block donates the state's buffers.
        params = masks_lib.apply(one(jnp.copy, state.params), mask)
        if step < inputs.setup.ticket.steps:
            _, state = advance(inputs, programs, params, mask, None, (seed,), start=step)
        else:
            state, note = state.replace(params=params), "never settled: pruned at the end"
        found.append((rows_of(programs, state, (seed,))[0] | {"note": note}, mask))
        steps.append(step / inputs.setup.ticket.steps)
    masks = one(lambda *leaf: jnp.concatenate(leaf), *[mask for _, mask in found])
    sparse = [part + (1 - part) * inputs.density for part in steps]
    return Result([row for row, _ in found], masks, sparse, steps)


def popup(inputs: MethodInputs) -> Result:
    """Edge-popup: the weights are signed constants and are never trained, their scores are."""
    network, which = inputs.setup.network, inputs.which

    def effective(tree: PyTree) -> PyTree:
        return supermask.popup(tree["weights"], tree["scores"], which, inputs.counts)

    settings = _settings(inputs, inputs.study.popup_lr)
    if settings.weight_decay:
        raise ConfigError("config.optimizer.weight_decay: the weights of a supermask are not to change; 0 is needed")
    programs = inputs.setup.programs_for(make_optimizer(settings), lifted(network, effective))
    keys = search_keys(inputs.setup.search, 0, "popup")
    draw = lambda params, key: {  # noqa: E731
        "scores": supermask.initial_scores(params, key=key),
        "weights": supermask.signed_constant(params, which),
    }
    tree = jax.jit(jax.vmap(draw))(inputs.initial, keys)
    _, state = advance(inputs, programs, tree, masks_lib.ones(tree), None, inputs.seeds)
    masks = jax.jit(jax.vmap(lambda s: supermask.popup_masks(s, which, inputs.counts)))(state.params["scores"])
    rows = rows_of(programs, state, inputs.seeds)
    # The gradients of all scores are needed.
    return Result(rows, masks, [sparse_share(np.array([inputs.density]), 1.0)] * len(rows), [1.0] * len(rows))


def _settings(inputs: MethodInputs, lr: float) -> OptimizerConfig:
    given = inputs.config.optimizer
    return build(OptimizerConfig, given, "config.optimizer", lr=lr, steps=inputs.setup.ticket.steps)


def _penalized(inputs: MethodInputs, programs: Programs, tree: PyTree, prune_fn: Callable[[PyTree], Any]) -> Result:
    """Train a tree densely for the part `pruned`, then the weights and masks that `prune_fn` makes of it to the end."""
    end, steps = inputs.part(inputs.study.pruned), inputs.setup.ticket.steps
    done = lambda step, state: step >= end  # noqa: E731
    step, state = advance(inputs, programs, tree, masks_lib.ones(tree), None, inputs.seeds, done, end)
    params, masks = jax.jit(jax.vmap(prune_fn))(state.params)
    after = inputs.setup.programs_for(inputs.setup.optimizer)
    params = masks_lib.apply(params, masks)
    state = after.init(params, masks, None, step, step)
    if step < steps:
        _, state = advance(inputs, after, params, masks, None, inputs.seeds, start=step)
    rows, share = rows_of(after, state, inputs.seeds), step / steps
    return Result(rows, masks, [share + (1 - share) * inputs.density] * len(rows), [share] * len(rows))


def l1(inputs: MethodInputs) -> Result:
    """Proximal gradient: soft thresholding after every step, then the largest weights trained on without penalty."""
    rate = learning_rate(_settings(inputs, inputs.config.lr))
    operator = proximal.l1(inputs.study.l1, inputs.which)
    programs = inputs.setup.programs_for(proximal.proximal(inputs.setup.optimizer, operator, rate))
    return _penalized(inputs, programs, inputs.initial, lambda params: (params, inputs.largest(params)))


def l0(inputs: MethodInputs) -> Result:
    """Hard concrete gates whose expected density Lagrange multipliers bring to the target, then a mask of the best."""
    network, which, rate = inputs.setup.network, inputs.which, inputs.study.gate_lr
    start = jax.vmap(lambda params: gates.initialize(params, which=which))(inputs.initial)
    zero = jnp.zeros(len(inputs.seeds))
    tree = {"weights": inputs.initial, "gates": start, "multipliers": {"linear": zero, "quadratic": zero}}

    def opened(tree: PyTree, key: Array | None = None) -> PyTree:
        return gates.apply(tree["weights"], tree["gates"], key=key, which=which)

    def loss(tree: PyTree, batch: Any, key: Array) -> tuple[Array, dict[str, Any]]:
        nats, _ = make_loss(network)(opened(tree, key), batch)
        expected = gates.density(tree["gates"], tree["weights"])
        return nats + gates.penalty(expected, gates.Multipliers(**tree["multipliers"]), inputs.density), {}

    optimizer = optax.multi_transform(
        {
            "weights": inputs.setup.optimizer,
            "gates": optax.adam(rate),
            "multipliers": optax.chain(optax.scale(-1.0), optax.adam(rate)),  # they ascend
        },
        {name: name for name in tree},
    )

    def prune_fn(tree: PyTree) -> tuple[PyTree, PyTree]:
        weights = opened(tree)
        chances = masks_lib.flatten(jax.tree.map(jnp.zeros_like, weights)) | tree["gates"]
        scores = jax.tree.unflatten(jax.tree.structure(weights), list(chances.values()))
        return weights, prune.keep(scores, masks_lib.ones(weights), which, inputs.counts)

    programs = inputs.setup.programs_for(optimizer, lifted(network, opened), loss=loss)
    return _penalized(inputs, programs, tree, prune_fn)


class Method(NamedTuple):
    """What a method is called, and how it trains."""

    name: str
    train: Callable[[MethodInputs], Result]


METHODS: dict[str, Method] = {
    "set": Method("SET", _moving("random")),
    "rigl": Method("RigL", _moving("gradient")),
    "straight_through": Method("straight-through", straight_through),
    "gradual": Method("cubic schedule", gradual),
    "early_bird": Method("early bird", early_bird),
    "popup": Method("edge-popup (weights untrained)", popup),
    "l1": Method("proximal L1", l1),
    "l0": Method("L0 gates", l0),
}
