"""The compiled programs that train and test a stack of tickets: one step, one block of steps, one evaluation.

A network with batch statistics keeps them in its parameter tree: no gradient reaches them, and a step replaces them by
what the forward pass gives (`tessera.models.registry.Network.train`). So they are saved, rewound and cut like any leaf.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from lottery.transform import mask_state, sparse
from tessera.data.images import Images, ImageSplits
from tessera.data.windows import Windows, WindowSplits
from tessera.losses import distillation

ApplyFn = Callable[[PyTree, Array], Array]  # (params, inputs [B, ...]) -> logits [B, ..., C]
TrainFn = Callable[[PyTree, Array], tuple[Array, dict[str, PyTree]]]  # the same, and new values of some of its entries


# Inputs and their classes: images [N, H, W, C] with labels [N], or tokens [N, T] with the next ones [N, T].
Examples = Images | Windows
Splits = ImageSplits | WindowSplits


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
      distil: weight of the teacher's part of the loss where the search has a teacher (`SearchConfig.teacher`), 0 to 1.
      temperature: of that part, see `tessera.losses.distillation`.
    """

    steps: int = 1000
    batch_size: int = 60
    eval_every: int = 100
    rewind: int = 0
    stack: str = "auto"
    save_seconds: float = 20.0
    distil: float = 0.5
    temperature: float = 4.0

    def __post_init__(self):
        if self.stack not in ("auto", "map", "vmap"):
            raise ValueError(f"stack={self.stack!r}: choose 'auto', 'map' or 'vmap'")
        if not 0 <= self.rewind < self.steps:
            raise ValueError(f"rewind={self.rewind} must lie in [0, steps={self.steps})")
        if not 0 <= self.distil <= 1 or self.temperature <= 0:
            raise ValueError(f"distil={self.distil} must lie in [0, 1], temperature={self.temperature} be positive")
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


def plain_train(apply: ApplyFn) -> TrainFn:
    """The training pass of a network that is the same in training and evaluation."""
    return lambda params, x: (apply(params, x), {})


@dataclass(frozen=True)
class StepConfig:
    """One step: `train` is the network's training pass, `apply` the teacher's; the rest as in `TicketConfig`."""

    apply: ApplyFn
    train: TrainFn
    optimizer: Any
    distil: float = 0.0
    temperature: float = 1.0


def train_block(
    carry: Carry,
    masks: PyTree,
    index_TB: Int[Array, "T B"],
    x_NX: Array,
    y_N: Array,
    teacher: PyTree | None = None,
    *,
    config: StepConfig,
) -> tuple[Carry, Float[Array, ""]]:
    """Take T optimizer steps on one masked network; returns the carry and the mean training loss of the block."""
    # Masked where moments enter a step, which is faster (docs/architecture.md); so the last state is masked at the end.
    tx = sparse(config.optimizer, masks, moments="in")

    def loss_fn(params, x_BX, y_B):
        logits, statistics = config.train(params, x_BX)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y_B).mean()
        if teacher is not None:
            soft = distillation(logits, config.apply(teacher, x_BX), config.temperature)
            loss = (1 - config.distil) * loss + config.distil * soft
        return loss, statistics

    def step(state, index_B):
        params, opt_state = state
        x_BX, y_B = x_NX[index_B], y_N[index_B]
        (loss, statistics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x_BX, y_B)
        # SAM asks for gradients at other weights; every other optimizer ignores the argument.
        updates, opt_state = tx.update(
            grads, opt_state, params, grad_fn=lambda p, _: jax.grad(loss_fn, has_aux=True)(p, x_BX, y_B)[0], value=loss
        )
        params = optax.apply_updates(params, updates)
        return ({**params, **statistics} if statistics else params, opt_state), loss

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


def make_programs(
    splits: Splits,
    *,
    apply: ApplyFn,
    optimizer: Any,
    config: TicketConfig,
    train: TrainFn | None = None,
    step_config: StepConfig | None = None,
) -> Programs:
    """Compile-once programs over a stack.

    `train` is the training pass if it differs from `apply`; `step_config` says all about the step (another optimizer's
    or teacher's, say) instead of `config`.

    `init(params, masks, opt_state or None, steps [S]) -> Carry` sets the counters of learning-rate schedules to `steps`
    (those of a given state only where they are behind);
    `advance(carry, masks, index [S, T, B], step, teachers) -> (carry, row)` trains T steps, evaluates on validation and
    updates the best weights, `row` a dict of [S] arrays;
    `test(carry) -> dict of [S] arrays` is the only place where the test set is read.
    """
    # The sets are arguments of the jitted functions: captured as constants they would be folded into the program, which
    # takes XLA ten times as long to compile.
    data = (jnp.asarray(splits.train.images), jnp.asarray(splits.train.labels))
    validation, test = batched(splits.validation), batched(splits.test)
    one_step = step_config
    if one_step is None:
        one_step = StepConfig(apply, train or plain_train(apply), optimizer, config.distil, config.temperature)

    def init_one(args):
        params, masks, opt_state, step = args
        # Masks the first state; where moments are masked in a step (`train_block`) makes no difference to `init`.
        opt_state = sparse(optimizer, masks).init(params) if opt_state is None else opt_state
        return Carry(params, at_step(opt_state, step), Best(jnp.float32(jnp.inf), jnp.int32(0), params))

    def advance_one(args, step, data, validation):
        carry, masks, index_TB, teacher = args
        carry, train_loss = train_block(carry, masks, index_TB, *data, teacher, config=one_step)
        loss, accuracy = evaluate(carry.params, validation, apply)
        better = loss < carry.best.loss
        now = Best(loss, step, carry.params)
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), now, carry.best)
        row = {"train_loss": train_loss, "validation_loss": loss, "validation_accuracy": accuracy}
        return carry._replace(best=best), row

    def test_one(carry, test):
        _, early = evaluate(carry.best.params, test, apply)
        loss, final = evaluate(carry.params, test, apply)
        return {"early_stop_test_accuracy": early, "final_test_accuracy": final, "final_test_loss": loss}

    def lift(function):
        return lambda stacked, *shared: over_stack(lambda one: function(one, *shared), config.stack)(stacked)

    def advance(carry, masks, index, step, teachers, data, validation):
        return lift(advance_one)((carry, masks, index, teachers), step, data, validation)

    init_stack, test_stack = jax.jit(lift(init_one)), jax.jit(lift(test_one))
    advance_stack = jax.jit(advance, donate_argnums=0)

    def init(params, masks, opt_state=None, steps=0):
        size = len(jax.tree.leaves(params)[0])
        return init_stack((params, masks, opt_state, jnp.broadcast_to(jnp.asarray(steps, jnp.int32), (size,))))

    return Programs(
        init=init,
        advance=lambda carry, masks, index, step, teachers=None: advance_stack(
            carry, masks, index, jnp.int32(step), teachers, data, validation
        ),
        test=lambda carry: test_stack(carry, test),
    )
