"""Train a stack of tickets together: one compiled program for many seeds and arms of a lottery search.

A stack is a pytree whose leaves have a leading axis S (one entry per seed and arm). The data set is small enough to
live on the device: a whole stretch of training is one call of `tessera.step.scan_steps`, and the host wakes only
to evaluate, to report progress and to save.

A network with batch statistics keeps them in its parameter tree: no gradient reaches them, and a step replaces them by
what the forward pass gives (`tessera.models.registry.Network.train`). So they are saved, rewound and cut like any leaf.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from lottery import criteria
from lottery.imp import Starts, Trained
from lottery.transform import mask_state, sparse
from tessera.data.images import Images, ImageSplits
from tessera.data.windows import Windows, WindowSplits
from tessera.infra.artifacts import ArtifactStore
from tessera.losses import distillation
from tessera.models.registry import STATISTICS, Network
from tessera.step import LossFn, Row, TrainState, index_block, make_train_step, run_blocks, scan_steps

ApplyFn = Callable[[PyTree, Array], Array]  # (params, inputs [B, ...]) -> logits [B, ..., C]

# Inputs and their classes: images [N, H, W, C] with labels [N], or tokens [N, T] with the next ones [N, T].
Examples = Images | Windows
Splits = ImageSplits | WindowSplits


@dataclass(frozen=True)
class TicketConfig:
    """Training of every ticket of a stack.

    Attributes:
      steps: optimizer steps of one training run (a rewound ticket takes the rest, `steps - rewind`).
      batch_size: images per step.
      eval_every: steps between evaluations on the validation set; early stopping looks at these points.
      rewind: step at which the dense network's weights are saved for later levels.
      stack: "map" runs the scans of the tickets one after the other inside one program, "vmap" batches every product
        over the stack, "auto" takes what measured faster: "map" on CPU, "vmap" on accelerators.
      save_seconds: seconds between two saves of an unfinished level; 0 saves at every evaluation.
      distill: weight of the teacher's part of the loss where the search has a teacher (`SearchConfig.teacher`), 0 to 1.
      temperature: of that part, see `tessera.losses.distillation`.
    """

    steps: int = 1000
    batch_size: int = 60
    eval_every: int = 100
    rewind: int = 0
    stack: str = "auto"
    save_seconds: float = 20.0
    distill: float = 0.5
    temperature: float = 4.0

    def __post_init__(self):
        if self.stack not in ("auto", "map", "vmap"):
            raise ValueError(f"stack={self.stack!r}: choose 'auto', 'map' or 'vmap'")
        if not 0 <= self.rewind < self.steps:
            raise ValueError(f"rewind={self.rewind} must lie in [0, steps={self.steps})")
        if not 0 <= self.distill <= 1 or self.temperature <= 0:
            raise ValueError(f"distill={self.distill} must lie in [0, 1], temperature={self.temperature} be positive")
        for name in ("steps", "batch_size", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class Best(NamedTuple):
    """The weights that early stopping would choose: those at the smallest validation loss so far."""

    loss: Float[Array, "..."]
    step: Int[Array, "..."]
    params: PyTree


@flax.struct.dataclass
class TicketState(TrainState):
    """Everything that changes while a ticket trains; saving it is enough to go on bit for bit."""

    best: Best | None = None


class Programs(NamedTuple):
    """The compiled programs of a search; see `make_programs`."""

    init: Callable
    advance: Callable
    test: Callable


def at_step(opt_state: PyTree, step: Array) -> PyTree:
    """Set the counters that learning-rate schedules read to `step` where they are behind it: a rewound ticket resumes.

    Adam's own count stays 0: it corrects the bias of moments that do start from zero.
    """

    def is_schedule(node):
        return isinstance(node, optax.ScaleByScheduleState)

    def move(node):
        return node._replace(count=jnp.maximum(node.count, step)) if is_schedule(node) else node

    return jax.tree.map(move, opt_state, is_leaf=is_schedule)


def batched(images: Examples, size: int = 1000) -> tuple[Array, Array]:
    """Cut a set into equal batches for evaluation; the tail is padded with label -1, which counts for nothing.

    Returns inputs [n, size, ...] and labels [n, size, ...] int32.
    """
    count = len(images.labels)
    size = min(size, count)
    pad = -count % size
    x = np.concatenate([images.images, np.zeros((pad, *images.images.shape[1:]), images.images.dtype)])
    y = np.concatenate([images.labels, np.full((pad, *images.labels.shape[1:]), -1, np.int32)])
    return jnp.asarray(x.reshape(-1, size, *x.shape[1:])), jnp.asarray(y.reshape(-1, size, *y.shape[1:]))


def evaluate(params: PyTree, batches: tuple[Array, Array], apply: ApplyFn) -> tuple[Array, Array]:
    """Mean cross-entropy (nats) and accuracy over `batches` as made by `batched`; both float32 scalars."""

    def one(batch):
        x_BX, y_B = batch
        logits_BC = apply(params, x_BX)
        loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, jnp.maximum(y_B, 0))
        live_B = y_B >= 0
        right_B = logits_BC.argmax(-1) == y_B
        return (loss_B * live_B).sum(), (right_B & live_B).sum(), live_B.sum()

    loss, right, live = jax.tree.map(lambda n: n.sum(), jax.lax.map(one, batches))
    return loss / live, right / live


def make_loss(
    network: Network, teacher: Callable[[Array], Array] | None = None, distill: float = 0.0, temperature: float = 1.0
) -> LossFn:
    """The training loss for `tessera.step.make_train_step`: mean cross-entropy, in nats, and new batch statistics.

    Args:
      network: what is trained.
      teacher: inputs -> logits to distill from (Hinton et al. 2015, arXiv:1503.02531); None for none.
      distill: weight of that part of the loss.
      temperature: of that part.
    """

    def loss_fn(params, batch, key=None):
        x_BX, y_B = batch
        logits, statistics = network.train(params, x_BX)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y_B).mean()
        if teacher is not None:
            loss = (1 - distill) * loss + distill * distillation(logits, teacher(x_BX), temperature)
        return loss, statistics

    return loss_fn


def train_block(
    state: TicketState,
    masks: PyTree,
    index_TB: Int[Array, "T B"],
    x_NX: Array,
    y_N: Array,
    *,
    loss_fn: LossFn,
    optimizer: Any,
) -> tuple[TicketState, Float[Array, ""]]:
    """Take T optimizer steps on one masked network; returns the state and the mean training loss of the block."""
    # Masked where moments enter a step, which is faster (docs/architecture.md); so the last state is masked at the end.
    tx = sparse(optimizer, masks, moments="in")
    train_step = make_train_step(loss_fn, tx, adjust=with_statistics)

    def step(state: Any, index_B: Array) -> tuple[Any, Array]:
        key = jax.random.fold_in(jax.random.key(0), state.step)
        state, metrics = train_step(state, (x_NX[index_B], y_N[index_B]), key)
        return state, metrics["loss"]

    # What the steps do not change stays out of the loop.
    after, loss = scan_steps(step, replace(state, best=None), index_TB)
    return replace(after, opt_state=mask_state(after.opt_state, masks), best=state.best), loss


def with_statistics(params: PyTree, metrics: dict[str, Any]) -> PyTree:
    """The parameters with the batch statistics that `make_loss` gives as a metric: an `adjust` of `make_train_step`."""
    return {**params, STATISTICS: metrics[STATISTICS]} if STATISTICS in metrics else params


def over_stack(function: Callable, stack: str) -> Callable:
    """Lift `function(per-ticket pytree) -> pytree` to a stack: "map" in sequence, "vmap" batched, "auto" by backend."""
    if stack == "auto":
        stack = "map" if jax.default_backend() == "cpu" else "vmap"
    return partial(jax.lax.map, function) if stack == "map" else jax.vmap(function)


def make_programs(
    splits: Splits,
    network: Network,
    optimizer: Any,
    config: TicketConfig,
    *,
    teacher: Network | None = None,
    loss: LossFn | None = None,
) -> Programs:
    """Programs over a stack, each compiled once.

    Args:
      splits: the data, put on the device.
      network: what is trained.
      optimizer: optax transformation, without masks of its own.
      config: schedule; `distill` and `temperature` of the loss where there are teachers.
      teacher: architecture of the teachers, where it is another one than `network`.
      loss: in place of `make_loss`; its key differs by step and is that of all tickets of a stack.

    Returns:
      `init(params, masks, opt_state or None, steps [S], start) -> TicketState` at step `start`, with the counters of
      learning-rate schedules set to `steps` (those of a given state only where they are behind);
      `advance(state, masks, index [S, T, B], teachers) -> (state, row)` trains T steps, evaluates on validation and
      updates the best weights, `row` a dict of [S] arrays; the state is donated;
      `test(state) -> dict of [S] arrays` is the only place where the test set is read.
    """
    # The sets are arguments of the jitted functions: captured as constants they would be folded into the program, which
    # takes XLA ten times as long to compile.
    data = (jnp.asarray(splits.train.images), jnp.asarray(splits.train.labels))
    validation, test = batched(splits.validation), batched(splits.test)
    teacher_apply = (teacher or network).apply

    def init_one(args):
        params, masks, opt_state, counter, start = args
        # Masks the first state; where moments are masked within a step (`train_block`) makes no difference to `init`.
        opt_state = sparse(optimizer, masks).init(params) if opt_state is None else opt_state
        best = Best(jnp.float32(jnp.inf), jnp.int32(0), params)
        return TicketState(start, params, at_step(opt_state, counter), best=best)

    def advance_one(args, data, validation):
        state, masks, index_TB, weights = args
        target_fn = None if weights is None else partial(teacher_apply, weights)
        loss_fn = loss or make_loss(network, target_fn, config.distill, config.temperature)
        state, train_loss = train_block(state, masks, index_TB, *data, loss_fn=loss_fn, optimizer=optimizer)
        held_out, accuracy = evaluate(state.params, validation, network.apply)
        better = held_out < state.best.loss
        now = Best(held_out, state.step, state.params)
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), now, state.best)
        row = {"train_loss": train_loss, "validation_loss": held_out, "validation_accuracy": accuracy}
        return replace(state, best=best), row

    def test_one(state, test):
        _, early = evaluate(state.best.params, test, network.apply)
        loss, final = evaluate(state.params, test, network.apply)
        return {"early_stop_test_accuracy": early, "final_test_accuracy": final, "final_test_loss": loss}

    def lift(function):
        return lambda stacked, *shared: over_stack(lambda one: function(one, *shared), config.stack)(stacked)

    def advance(state, masks, index, teachers, data, validation):
        return lift(advance_one)((state, masks, index, teachers), data, validation)

    init_stack, test_stack = jax.jit(lift(init_one)), jax.jit(lift(test_one))
    advance_stack = jax.jit(advance, donate_argnums=0)

    def init(params, masks, opt_state=None, steps=0, start=0):
        size = len(jax.tree.leaves(params)[0])
        counters = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), (size,)) for x in (steps, start))
        return init_stack((params, masks, opt_state, *counters))

    return Programs(
        init=init,
        advance=lambda state, masks, index, teachers=None: advance_stack(
            state, masks, index, teachers, data, validation
        ),
        test=lambda state: test_stack(state, test),
    )


def stops(config: TicketConfig, start: int) -> list[int]:
    """Steps after `start` at which the host wakes: every evaluation, the rewind point and the end."""
    marks = set(range(0, config.steps, config.eval_every)) | {config.rewind, config.steps}
    return sorted(mark for mark in marks if mark > start)


def train_blocks(
    programs: Programs,
    state: TicketState,
    masks: PyTree,
    marks: Iterable[int],
    *,
    config: TicketConfig,
    size: int,
    seeds: Sequence[int] | np.ndarray,
    start: int = 0,
    names: Sequence[str] = (),
    teachers: PyTree | None = None,
    **options: Any,
) -> tuple[int, TicketState]:
    """Train a stack from one of `marks` to the next; the seeds order its data.

    Returns and `options` are those of `tessera.step.run_blocks`.
    """

    def advance(state: TicketState, start: int, stop: int) -> tuple[TicketState, dict[str, Array]]:
        sizes: dict[str, int] = {"batch_size": config.batch_size, "size": size}
        index = [index_block(seed=int(seed), start=start, steps=stop - start, **sizes) for seed in seeds]
        return programs.advance(state, masks, np.stack(index), teachers)

    names = names or [f"seed {seed}" for seed in seeds]
    return run_blocks(advance, state, marks, start=start, names=names, save_seconds=config.save_seconds, **options)


def train_stack(
    starts: Starts,
    programs: Programs,
    *,
    config: TicketConfig,
    size: int,
    unfinished: ArtifactStore | None = None,
    report: Callable[[int, dict], None] = lambda steps, row: None,
) -> Trained:
    """Train all networks of `starts` from its start step to `config.steps`; the train function `lottery.imp` asks for.

    Args:
      starts: the stack, see `lottery.imp.Starts`.
      programs: from `make_programs`.
      config: the schedule.
      size: images in the training set (the order of batches depends on it).
      unfinished: where to save between evaluations, so that a killed run goes on from there; None saves nothing.
      report: called after every evaluation with the steps taken since the last call and means over the stack; first of
        all, when going on from a save, with the steps saved and an empty dict.

    Raises:
      FloatingPointError: a loss became NaN or infinite, naming arm, seed and step.
    """
    start, snapshot = starts.start_step, None
    late = np.asarray(starts.late or (False,) * len(starts.names))
    counters = np.where(late, config.steps, start)
    state = programs.init(starts.params, starts.masks, starts.opt_state, counters, start)
    rows: list[Row] = []
    # With a rewind point the level-0 state at that point is part of what must survive a kill.
    blank = {"params": state.params, "opt_state": state.opt_state} if start < config.rewind else {}
    saved = unfinished.latest({"state": state, "snapshot": blank}) if unfinished else None
    if saved:
        start, tree, extra = saved
        state, snapshot, rows = tree["state"], tree["snapshot"], extra["rows"]
        report(start - starts.start_step, {})

    begun = start

    def after(step: int, state: TicketState, row: Row) -> None:
        nonlocal begun, snapshot
        rows.append(row)
        if step == config.rewind:
            # Copied, since the next block donates the state's buffers.
            snapshot = jax.tree.map(jnp.copy, {"params": state.params, "opt_state": state.opt_state})
        report(step - begun, {name: float(np.mean(value)) for name, value in row.items() if name != "step"})
        begun = step

    def save(step: int, state: TicketState) -> None:
        if unfinished:
            unfinished.save(step, {"state": state, "snapshot": snapshot or blank}, {"rows": rows})
            unfinished.clear(before=step)

    names = [f"arm {arm}, seed {seed}" for arm, seed in starts.names]
    order: dict[str, Any] = {"config": config, "size": size, "seeds": starts.seeds, "start": start, "names": names}
    marks, teachers = stops(config, start), starts.teachers
    _, state = train_blocks(programs, state, starts.masks, marks, **order, teachers=teachers, after=after, save=save)
    return Trained(state.params, _ticket_rows(state, rows, measure(programs, state)), snapshot, _movement(state))


def measure(programs: Programs, state: TicketState) -> list[Row]:
    """One row of test measurements for each network of a stack."""
    tests = {name: np.asarray(values).tolist() for name, values in programs.test(state).items()}
    return [dict(zip(tests, values, strict=True)) for values in zip(*tests.values(), strict=True)]


def _movement(state: TicketState) -> PyTree | None:
    """The scores of `criteria.track_movement`, if the optimizer has it."""
    try:
        return criteria.movement(state.opt_state)
    except ValueError:
        return None


def _ticket_rows(state: TicketState, rows: list[Row], tests: list[Row]) -> list[Row]:
    """One row per network: early stopping, tests and the curve, from rows that hold the whole stack."""
    assert state.best is not None
    steps, losses = np.asarray(state.best.step).tolist(), np.asarray(state.best.loss).tolist()
    result = []
    for i, (step, loss, test) in enumerate(zip(steps, losses, tests, strict=True)):
        curve = {name: [row[name][i] for row in rows] for name in rows[0] if name != "step"}
        result.append(
            {"early_stop_step": step, "best_validation_loss": loss}
            | test
            | {"curve": {"step": [row["step"] for row in rows]} | curve}
        )
    return result
