"""Train a stack of tickets together: one compiled program for many seeds and arms of a lottery search.

A stack is a pytree whose leaves have a leading axis S (one entry per seed and arm). The data set is small enough to
live on the device, so a whole stretch of training is one `lax.scan` over a block of batch indices and the host is only
woken to evaluate, to report progress and to save.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from lottery.imp import Starts, Trained
from lottery.transform import mask_state, sparse
from training.batches import index_block
from training.images import Images, ImageSplits

ApplyFn = Callable[[PyTree, Array], Array]  # (params, images [B, ...]) -> logits [B, C]


@dataclass(frozen=True)
class TicketConfig:
    """How every ticket of a stack is trained.

    Attributes:
      steps: optimizer steps of one training run (a rewound ticket takes the rest, `steps - rewind`).
      batch_size: images per step.
      eval_every: steps between evaluations on the validation set; early stopping looks at these points.
      rewind: step at which the dense network's weights are kept for later levels.
      stack: "map" runs the scans of the tickets one after the other inside one program, "vmap" batches every product
        over the stack, "auto" takes what measured faster: "map" on CPU, "vmap" on accelerators.
      save_seconds: seconds between two saves of an unfinished level; 0 saves at every evaluation.
    """

    steps: int = 1000
    batch_size: int = 60
    eval_every: int = 100
    rewind: int = 0
    stack: str = "auto"
    save_seconds: float = 20.0

    def __post_init__(self):
        if self.stack not in ("auto", "map", "vmap"):
            raise ValueError(f"stack={self.stack!r}: choose 'auto', 'map' or 'vmap'")
        if not 0 <= self.rewind < self.steps:
            raise ValueError(f"rewind={self.rewind} must lie in [0, steps={self.steps})")
        for name in ("steps", "batch_size", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class Best(NamedTuple):
    """What early stopping would keep: the weights at the smallest validation loss so far."""

    loss: Float[Array, "..."]
    step: Int[Array, "..."]
    params: PyTree


class Carry(NamedTuple):
    """Everything that changes while a ticket trains; saving it is enough to go on bit for bit."""

    params: PyTree
    opt_state: PyTree
    best: Best


def at_step(opt_state: PyTree, step: Array) -> PyTree:
    """Set the counters that learning-rate schedules read to `step`, so that a rewound ticket resumes the schedule.

    Adam's own count stays 0: it corrects the bias of moments that do start from zero.
    """

    def is_schedule(node):
        return isinstance(node, optax.ScaleByScheduleState)

    def move(node):
        return node._replace(count=step) if is_schedule(node) else node

    return jax.tree.map(move, opt_state, is_leaf=is_schedule)


def batched(images: Images, size: int = 1000) -> tuple[Array, Array]:
    """Cut a set into equal batches for evaluation; the tail is padded with label -1, which counts for nothing.

    Returns images [n, size, ...] float32 and labels [n, size] int32.
    """
    count = len(images.labels)
    size = min(size, count)
    pad = -count % size
    x = np.concatenate([images.images, np.zeros((pad, *images.images.shape[1:]), np.float32)])
    y = np.concatenate([images.labels, np.full(pad, -1, np.int32)])
    return jnp.asarray(x.reshape(-1, size, *x.shape[1:])), jnp.asarray(y.reshape(-1, size))


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


def train_block(
    carry: Carry, masks: PyTree, index_TB: Int[Array, "T B"], x_NX: Array, y_N: Array, *, apply: ApplyFn, optimizer: Any
) -> tuple[Carry, Float[Array, ""]]:
    """Take T optimizer steps on one masked network; returns the carry and the mean training loss of the block."""
    tx = sparse(optimizer, masks, moments="in")

    def loss_fn(params, x_BX, y_B):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, x_BX), y_B).mean()

    def step(state, index_B):
        params, opt_state = state
        x_BX, y_B = x_NX[index_B], y_N[index_B]
        loss, grads = jax.value_and_grad(loss_fn)(params, x_BX, y_B)
        # SAM asks for gradients at other weights; every other optimizer ignores the argument.
        updates, opt_state = tx.update(
            grads, opt_state, params, grad_fn=lambda p, _: jax.grad(loss_fn)(p, x_BX, y_B), value=loss
        )
        return (optax.apply_updates(params, updates), opt_state), loss

    (params, opt_state), loss_T = jax.lax.scan(step, (carry.params, carry.opt_state), index_TB)
    return carry._replace(params=params, opt_state=mask_state(opt_state, masks)), loss_T.mean()


def over_stack(function: Callable, stack: str) -> Callable:
    """Lift `function(per-ticket pytree) -> pytree` to a stack: "map" in sequence, "vmap" batched, "auto" by backend."""
    if stack == "auto":
        stack = "map" if jax.default_backend() == "cpu" else "vmap"
    return partial(jax.lax.map, function) if stack == "map" else jax.vmap(function)


class Programs(NamedTuple):
    """The compiled programs of a search; see `make_programs`."""

    init: Callable
    advance: Callable
    test: Callable


def make_programs(splits: ImageSplits, *, apply: ApplyFn, optimizer: Any, config: TicketConfig) -> Programs:
    """Compile-once programs over a stack.

    `init(params, masks, opt_state or None, step) -> Carry`;
    `advance(carry, masks, index [S, T, B], step) -> (carry, row)` trains T steps, evaluates on validation and updates
    the best weights, `row` a dict of [S] arrays;
    `test(carry) -> dict of [S] arrays` is the only place where the test set is read.
    """
    # The sets are arguments of the jitted functions: captured as constants they would be folded into the program, which
    # takes XLA ten times as long to compile.
    train = (jnp.asarray(splits.train.images), jnp.asarray(splits.train.labels))
    validation, test = batched(splits.validation), batched(splits.test)

    def init_one(args, step):
        params, masks, opt_state = args
        if opt_state is None:
            opt_state = at_step(sparse(optimizer, masks).init(params), step)
        return Carry(params, opt_state, Best(jnp.float32(jnp.inf), jnp.int32(0), params))

    def advance_one(args, step, train, validation):
        carry, masks, index_TB = args
        carry, train_loss = train_block(carry, masks, index_TB, *train, apply=apply, optimizer=optimizer)
        loss, accuracy = evaluate(carry.params, validation, apply)
        better = loss < carry.best.loss
        now = Best(loss, step, carry.params)
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), now, carry.best)
        row = {"train_loss": train_loss, "validation_loss": loss, "validation_accuracy": accuracy}
        return carry._replace(best=best), row

    def test_one(carry, test):
        _, early = evaluate(carry.best.params, test, apply)
        _, final = evaluate(carry.params, test, apply)
        return {"early_stop_test_accuracy": early, "final_test_accuracy": final}

    def lift(function):
        return lambda stacked, *shared: over_stack(lambda one: function(one, *shared), config.stack)(stacked)

    def advance(carry, masks, index, step, train, validation):
        return lift(advance_one)((carry, masks, index), step, train, validation)

    init_stack, test_stack = jax.jit(lift(init_one)), jax.jit(lift(test_one))
    advance_stack = jax.jit(advance, donate_argnums=0)
    return Programs(
        init=lambda params, masks, opt_state=None, step=0: init_stack((params, masks, opt_state), jnp.int32(step)),
        advance=lambda carry, masks, index, step: advance_stack(
            carry, masks, index, jnp.int32(step), train, validation
        ),
        test=lambda carry: test_stack(carry, test),
    )


def stops(config: TicketConfig, start: int) -> list[int]:
    """Steps after `start` at which the host wakes: every evaluation, the rewind point and the end."""
    marks = set(range(0, config.steps, config.eval_every)) | {config.rewind, config.steps}
    return sorted(mark for mark in marks if mark > start)


@runtime_checkable
class Unfinished(Protocol):
    """Keeps a level that is still training, so that a killed run goes on where it last saved."""

    def load(self, like: PyTree) -> tuple[int, PyTree, list[dict]] | None:
        """The step, carry and evaluation rows last saved, or None."""
        ...

    def save(self, step: int, carry: PyTree, rows: list[dict]) -> None:
        """Keep them, atomically."""
        ...


def train_stack(
    starts: Starts,
    programs: Programs,
    *,
    config: TicketConfig,
    size: int,
    unfinished: Unfinished | None = None,
    report: Callable[[int, dict], None] = lambda steps, row: None,
) -> Trained:
    """Train all networks of `starts` from its start step to `config.steps`; the train function `lottery.imp` asks for.

    Args:
      starts: the stack, see `lottery.imp.Starts`.
      programs: from `make_programs`.
      config: the schedule.
      size: images in the training set (the order of batches depends on it).
      unfinished: where to save between evaluations; None keeps nothing.
      report: called after every evaluation with the steps taken since the last call and means over the stack; first of
        all, when going on from a save, with the steps saved and an empty dict.

    Raises:
      FloatingPointError: a loss became NaN or infinite, naming arm, seed and step.
    """
    start, snapshot = starts.start_step, None
    carry = programs.init(starts.params, starts.masks, starts.opt_state, start)
    rows: list[dict] = []
    # With a rewind point the level-0 carry at that point is part of what must survive a kill.
    keep = start < config.rewind
    blank = {"params": carry.params, "opt_state": carry.opt_state} if keep else {}
    saved = unfinished.load({"carry": carry, "snapshot": blank}) if unfinished else None
    if saved:
        start, tree, rows = saved
        carry, snapshot = tree["carry"], tree["snapshot"]
        report(start - starts.start_step, {})
    last_save = time.monotonic()
    for step in stops(config, start):
        index = np.stack(
            [
                index_block(seed=int(seed), start=start, steps=step - start, batch_size=config.batch_size, size=size)
                for seed in starts.seeds
            ]
        )
        carry, row = programs.advance(carry, starts.masks, index, step)
        rows.append({"step": step} | {name: np.asarray(value).tolist() for name, value in row.items()})
        _check_finite(rows[-1], starts)
        if step == config.rewind:
            # Copied, since the next block donates the carry's buffers.
            snapshot = jax.tree.map(jnp.copy, {"params": carry.params, "opt_state": carry.opt_state})
        report(step - start, {name: float(np.mean(value)) for name, value in rows[-1].items() if name != "step"})
        start = step
        if unfinished and step < config.steps and time.monotonic() - last_save >= config.save_seconds:
            unfinished.save(step, {"carry": carry, "snapshot": snapshot or blank}, rows)
            last_save = time.monotonic()
    tests = {name: np.asarray(value).tolist() for name, value in programs.test(carry).items()}
    return Trained(carry.params, _ticket_rows(carry, rows, tests), snapshot)


def _check_finite(row: dict, starts: Starts) -> None:
    for name in ("train_loss", "validation_loss"):
        for (arm, seed), value in zip(starts.names, row[name], strict=True):
            if not np.isfinite(value):
                where = f"step {row['step']} (arm {arm}, seed {seed})"
                raise FloatingPointError(f"{name} is {value} at {where}: a lower learning rate usually helps")


def _ticket_rows(carry: Carry, rows: list[dict], tests: dict[str, list]) -> list[dict]:
    """One row per network: early stopping, tests and the curve, from rows that hold the whole stack."""
    steps, losses = np.asarray(carry.best.step).tolist(), np.asarray(carry.best.loss).tolist()
    result = []
    for i, (step, loss) in enumerate(zip(steps, losses, strict=True)):
        curve = {name: [row[name][i] for row in rows] for name in rows[0] if name != "step"}
        result.append(
            {"early_stop_step": step, "best_validation_loss": loss}
            | {name: values[i] for name, values in tests.items()}
            | {"curve": {"step": [row["step"] for row in rows]} | curve}
        )
    return result
