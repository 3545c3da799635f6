"""Optimizer steps: one as a pure function, and many in one program for data that fit in memory.

`make_train_step` is gradient, update, moving average and metrics. Ticket searches, sparse training and sweeps keep the
data set on the device and take many such steps in one call (`scan_steps`), their batches in the order of `index_block`;
between calls, in `run_blocks`, the host checks that losses are finite, reports and saves.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, PyTree

from moe.metrics import of_token_means, token_means
from tessera.infra.config import check_seed
from tessera.optim.noise_scale import noise_scale

Row = dict[str, Any]
Metrics = dict[str, PyTree]  # mostly scalars
ROUTER_MEANS = ("load", "entropy", "confidence", "choices", "drop_fraction")
"""Metrics of `moe.metrics.token_means`."""

LossFn = Callable[..., tuple[jax.Array, Metrics]]
"""(params, batch, key) -> (mean loss [] float32, metrics: dict of scalars)."""


@flax.struct.dataclass
class TrainState:
    """All that a step reads and writes.

    `ema` mirrors `params`; None without a moving average. `frozen` is read and never changed, nor saved with the rest:
    the model that adapters belong to, a teacher.
    """

    step: Any  # int32 [], but a sharding or a ShapeDtypeStruct in a mapped state
    params: PyTree
    opt_state: PyTree
    ema: PyTree = None
    frozen: PyTree = None


class SpikeState(NamedTuple):
    """Loss and gradient norm of the last steps, by step modulo their number W, and how many were skipped so far."""

    losses: Float32[Array, " W"]
    grad_norms: Float32[Array, " W"]
    skipped: Int32[Array, ""]


class WatchedState(NamedTuple):
    """The optimizer's state where spikes are skipped: its own, and what is known of the last steps.

    Not a field of `TrainState`, so that checkpoints of runs without it stay what they were.
    """

    inner: PyTree
    spikes: SpikeState


@dataclass(frozen=True)
class StepConfig:
    """Gradient accumulation, moving average, noise scale and skipped spikes of the training step.

    Attributes:
      grad_accum_steps: gradient accumulation: parts a batch is cut into, one after the other, whose gradients are
        averaged (activation memory of one part).
      ema: decay of the exponential moving average of the parameters; 0 for none.
      noise_scale: report the gradient noise scale from the parts (McCandlish et al. 2018); needs at least 2.
      skip_step_on_spikes: leave parameters, optimizer and moving average as they are in a step whose loss or gradient
        norm (before clipping) is above its mean over the last steps by skip_step_scaling_factor standard deviations
        (OLMo 2, arXiv:2501.00656).
      skip_step_interval: steps that mean and deviation are over, skipped ones too; until half of them are there, none
        is skipped.
      skip_step_scaling_factor: see skip_step_on_spikes.
    """

    grad_accum_steps: int = 1
    ema: float = 0.0
    noise_scale: bool = False
    skip_step_on_spikes: bool = False
    skip_step_interval: int = 128
    skip_step_scaling_factor: float = 6.0

    def __post_init__(self) -> None:
        if self.skip_step_interval < 4 or self.skip_step_scaling_factor <= 0:
            raise ValueError(
                f"skip_step_interval={self.skip_step_interval} and skip_step_scaling_factor="
                f"{self.skip_step_scaling_factor}: at least 4 steps and a positive factor are needed"
            )
        if self.grad_accum_steps < 1:
            raise ValueError(f"grad_accum_steps={self.grad_accum_steps} must be at least 1")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is a decay in [0, 1), got {self.ema}")
        if self.noise_scale and self.grad_accum_steps < 2:
            raise ValueError("noise_scale compares a batch with its parts: set grad_accum_steps to 2 or more")


def init_state(params: PyTree, tx: optax.GradientTransformation, config: StepConfig = StepConfig()) -> TrainState:
    """Make the state before the first step; `ema` starts at the parameters."""
    # A copy: the state is donated to the step, and one buffer cannot be donated twice.
    ema = jax.tree.map(jnp.copy, params) if config.ema else None
    opt_state = tx.init(params)
    if config.skip_step_on_spikes:
        size = config.skip_step_interval
        spikes = SpikeState(jnp.zeros(size), jnp.zeros(size), jnp.zeros((), jnp.int32))
        opt_state = WatchedState(opt_state, spikes)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, ema)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformationExtraArgs,
    config: StepConfig = StepConfig(),
    *,
    adjust: Callable[[PyTree, Metrics], PyTree] | None = None,
    join: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> Callable[[TrainState, PyTree, Key[Array, ""]], tuple[TrainState, Metrics]]:
    """Make `step(state, batch, key) -> (state, metrics)`, pure and not jitted.

    Each step draws its own key by folding in `state.step`, so a resumed run draws what an uninterrupted one would. The
    weights of a batch, if it has some, are those of `tessera.step.with_mean_weights`. The
    optimizer is always given `value=` and `grad_fn=` (the gradient of this batch at other parameters, for SAM).

    `adjust(params, metrics)`, if given, changes parameters after the optimizer from the metrics of `loss_fn`: what
    moves outside the gradient, such as the biases of balanced routers.

    `join(params, frozen)`, if given, makes what `loss_fn` takes in place of the parameters, from those that are trained
    and those of `TrainState.frozen`.

    Metrics: those of `loss_fn` (means over the parts of a batch, but for what follows from the routers' load), loss,
    grad_norm, update_norm (float32 scalars) and finite (bool: loss and gradient norm are); with `noise_scale` also
    noise_signal and noise_trace, the two estimates to average over steps and divide; with `skip_step_on_spikes` also
    skipped (1.0 where this step was) and skipped_steps (how many were so far).
    """
    tx = optax.with_extra_args_support(tx)

    def step(state: TrainState, batch: PyTree, key: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        if config.grad_accum_steps > 1:  # before the batch is cut into parts, which may have more weight or less
            batch = with_mean_weights(batch)
        loss_of = loss_fn if join is None else lambda params, *rest: loss_fn(join(params, state.frozen), *rest)
        gradient = _make_gradient(loss_of, batch, key, config.grad_accum_steps)
        loss, metrics, grads, parts_squared = gradient(state.params)
        old_state = state.opt_state.inner if config.skip_step_on_spikes else state.opt_state
        updates, opt_state = tx.update(
            grads, old_state, state.params, value=loss, grad_fn=lambda params, _: gradient(params)[2]
        )
        params = optax.apply_updates(state.params, updates)
        if adjust is not None:
            params = adjust(params, metrics)
        ema = None
        if config.ema:
            ema = optax.incremental_update(params, state.ema, 1.0 - config.ema)
        grad_norm = optax.global_norm(grads)
        update_norm = optax.global_norm(updates)
        if config.skip_step_on_spikes:
            past = state.opt_state.spikes
            skip = is_spike(past, state.step, loss, grad_norm, config.skip_step_scaling_factor)
            before, after = (state.params, old_state, state.ema), (params, opt_state, ema)
            params, opt_state, ema = jax.tree.map(partial(jnp.where, skip), before, after)
            spikes = noted(past, state.step, loss, grad_norm, skip)
            opt_state, update_norm = WatchedState(opt_state, spikes), jnp.where(skip, 0.0, update_norm)
            metrics = metrics | {"skipped": skip.astype(jnp.float32)}
            metrics |= {"skipped_steps": spikes.skipped.astype(jnp.float32)}
        if config.noise_scale:
            size = jax.tree.leaves(batch)[0].shape[0]
            estimate = noise_scale(parts_squared, grad_norm**2, size // config.grad_accum_steps, size)
            metrics = metrics | {"noise_signal": estimate.signal, "noise_trace": estimate.noise}
        metrics = metrics | {
            "loss": loss,
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "finite": jnp.isfinite(loss) & jnp.isfinite(grad_norm),
        }
        return replace(state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics

    return step


def is_spike(
    past: SpikeState,
    step: Int32[Array, ""],
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
    factor: float,
) -> Bool[Array, ""]:
    """Whether a loss or a gradient norm is above the mean of the last ones by `factor` standard deviations (n - 1).

    Args:
      past: of the steps before.
      step: their number.
      loss, grad_norm: of this step.
      factor: see `StepConfig`.
    """
    size = past.losses.shape[0]
    known = jnp.minimum(step, size)
    there = jnp.arange(size) < known

    def above(values: jax.Array, value: jax.Array) -> jax.Array:
        mean = jnp.where(there, values, 0.0).sum() / jnp.maximum(known, 1)
        squares = jnp.where(there, (values - mean) ** 2, 0.0).sum()
        return value - mean > factor * jnp.sqrt(squares / jnp.maximum(known - 1, 1))

    return (known >= size // 2) & (above(past.losses, loss) | above(past.grad_norms, grad_norm))


def noted(past: SpikeState, step: Array, loss: Array, grad_norm: Array, skip: Array) -> SpikeState:
    """The state after a step, whose numbers take the place of the oldest."""
    at = step % past.losses.shape[0]
    losses, norms = past.losses.at[at].set(loss), past.grad_norms.at[at].set(grad_norm)
    return SpikeState(losses, norms, past.skipped + skip)


def router_metrics(metrics: Metrics) -> Metrics:
    """The metrics with those of routers made from their means over all tokens, see `moe.metrics.token_means`."""
    return _of_routers(metrics, of_token_means)


def router_means(metrics: Metrics) -> Metrics:
    """The inverse of `router_metrics`: what is averaged over parts of a batch."""
    return _of_routers(metrics, token_means)


def _of_routers(metrics: Metrics, convert: Callable[[dict[str, Array]], dict[str, Array]]) -> Metrics:
    found = {name: metrics[f"router/{name}"] for name in ROUTER_MEANS if f"router/{name}" in metrics}
    return metrics | {f"router/{name}": value for name, value in convert(found).items()} if found else metrics


def _make_gradient(loss_fn: LossFn, batch: PyTree, key: Key[Array, ""], parts: int) -> Callable[[PyTree], Any]:
    """`params -> (loss, metrics, gradient, mean squared norm of the parts' gradients)`."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def at_once(params: PyTree) -> Any:
        (loss, metrics), grads = value_and_grad(params, batch, key)
        return loss, metrics, grads, jnp.zeros(())

    def split(x: Any) -> jax.Array:
        if x.shape[0] % parts:
            raise ValueError(f"a batch of {x.shape[0]} does not divide into grad_accum_steps={parts}")
        # Row i goes to part i % parts: every device keeps its own rows when the batch is sharded.
        return jnp.moveaxis(jnp.reshape(x, (x.shape[0] // parts, parts, *x.shape[1:])), 1, 0)

    def whole_batch(params: PyTree, xs: Any) -> dict[str, jax.Array]:
        """Of routers with losses of the whole batch, the mean of the parts' sums, by a forward pass of all parts."""
        first = jax.tree.map(lambda x: x[0], xs[0])
        if not isinstance(first, Mapping):
            return {}
        ask = lambda part, index: loss_fn(params, {**part, "router_sums": None}, jax.random.fold_in(key, index))[1]  # noqa: E731
        shape = jax.eval_shape(ask, first, 0).get("router/sums")
        if shape is None:
            return {}

        def add(total: jax.Array, part_and_index: Any) -> tuple[jax.Array, None]:
            return total + ask(*part_and_index)["router/sums"] / parts, None

        return {"router_sums": jax.lax.scan(add, jnp.zeros(shape.shape, shape.dtype), xs)[0]}

    def accumulated(params: PyTree) -> Any:
        def body(total: Any, part_and_index: Any) -> tuple[Any, None]:
            part, index = part_and_index
            part = {**part, **whole} if whole else part
            (loss, metrics), grads = value_and_grad(params, part, jax.random.fold_in(key, index))
            one = (loss, router_means(metrics), grads, optax.global_norm(grads) ** 2)
            return jax.tree.map(lambda a, b: a + b / parts, total, one), None

        xs = (jax.tree.map(split, batch), jnp.arange(parts))
        whole = jax.lax.stop_gradient(whole_batch(params, xs))
        first, _ = jax.tree.map(lambda x: x[0], xs)
        first = {**first, **whole} if whole else first
        (loss, metrics), grads = jax.eval_shape(value_and_grad, params, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, metrics, grads))
        (loss, metrics, *rest), _ = jax.lax.scan(body, (*zeros, jnp.zeros(())), xs)
        return loss, router_metrics(metrics), *rest

    return at_once if parts == 1 else accumulated


def index_block(*, seed: int, start: int, steps: int, batch_size: int, size: int) -> Int32[np.ndarray, "steps batch"]:
    """Example indices of the steps [start, start + steps) over a set of `size` examples kept in memory.

    The order is one stream: a fresh permutation of the set for every epoch, one after the other, cut into batches. A
    batch may straddle two epochs, so no example is ever left out, and blocks cut from the stream at any steps agree.

    Raises:
      ValueError: for a `seed` out of range, a negative `start` or `steps`, or a `batch_size` or `size` below 1.
    """
    check_seed("seed", seed)
    given = {"start": (start, 0), "steps": (steps, 0), "batch_size": (batch_size, 1), "size": (size, 1)}
    for name, (value, least) in given.items():
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    begin, end = start * batch_size, (start + steps) * batch_size
    first, last = begin // size, -(-end // size)
    # Not grain's shuffle, which maps one index at a time: about 4 us each, a quarter of a small training step's time.
    epochs = [_permutation(seed, epoch, size) for epoch in range(first, last)]
    stream = np.concatenate([np.zeros(0, np.int32), *epochs])
    return stream[begin - first * size :][: end - begin].reshape(steps, batch_size)


def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.random.Generator(bits).permutation(size).astype(np.int32)


def scan_steps(
    step_fn: Callable[[Any, Int[Array, " B"]], tuple[Any, Float[Array, ""]]],
    state: Any,
    index_TB: Int[Array, "T B"],
    count: Int[Array, ""] | int | None = None,
) -> tuple[Any, Float[Array, ""]]:
    """Take one optimizer step for each row of a block of batch indices, as a loop inside one program.

    Args:
      step_fn: (state, indices of the batch) -> (state, loss); e.g. around `make_train_step`.
      state: before the first step, a `TrainState`.
      index_TB: the rows of the data set that make up each batch.
      count: how many rows to use, may be traced: one program serves blocks of every length up to T. None uses all.

    Returns:
      (state after the last step, mean loss of the steps float32 []).
    """
    if count is None:
        state, loss_T = jax.lax.scan(step_fn, state, index_TB)
        return state, loss_T.mean()

    def body(i: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
        new, loss = step_fn(carry[0], index_TB[i])
        return new, carry[1] + loss

    state, total = jax.lax.fori_loop(0, count, body, (state, jnp.zeros(())))
    return state, total / count


def run_blocks(
    advance: Callable[[Any, int, int], tuple[Any, dict[str, Array]]],
    state: PyTree,
    marks: Iterable[int],
    *,
    start: int = 0,
    names: Sequence[str] = (),
    after: Callable[[int, Any, Row], bool | None] = lambda step, state, row: None,
    save: Callable[[int, Any], None] | None = None,
    save_seconds: float = 20.0,
) -> tuple[int, Any]:
    """Train from mark to mark, with the host awake in between.

    Args:
      advance: (state, from step, to step) -> (state, measurements: scalars, or arrays [S] of a stack); the state given
        may be donated.
      state: at step `start`, of one network or of a stack.
      marks: steps, rising, after which the host wakes; the last one is the end.
      start: finished steps.
      names: of the networks of the stack, or of the one, for messages.
      after: (step, state, measurements as JSON's own types and "step"), called after each block; True stops early. The
        state goes into the next block: copy what must outlive it.
      save: (step, state) -> None, called after a block if `save_seconds` have passed since the last save; after the
        last one too, so that a failure in what follows costs no training.
      save_seconds: between saves; 0 saves after every block.

    Returns:
      (step, state) of the end, or of where `after` stopped.

    Raises:
      FloatingPointError: a measurement with "loss" in its name is not finite, naming network and step.
    """
    saved = time.monotonic()
    for stop in marks:
        state, measured = advance(state, start, stop)
        row = {"step": stop} | {name: np.asarray(value).tolist() for name, value in measured.items()}
        _check_finite(row, names)
        start = stop
        if after(stop, state, row):
            break
        if save and time.monotonic() - saved >= save_seconds:
            save(stop, state)
            saved = time.monotonic()
    return start, state


def _check_finite(row: Row, names: Sequence[str]) -> None:
    for key, values in row.items():
        if "loss" not in key:
            continue
        for i, value in enumerate(np.ravel(values)):
            if not np.isfinite(value):
                who = f" ({names[i]})" if i < len(names) else ""
                raise FloatingPointError(
                    f"{key} is {value} at step {row['step']}{who}: a lower learning rate usually helps"
                )


def with_mean_weights(batch: Any) -> Any:
    """Scale the weights of a whole batch of targets to mean one, so that plain means over its parts are weighted means.

    sum(w nll) / sum(w) over a batch is then the mean of w nll over its targets, and so the mean over equal parts,
    whether microbatches, steps of gradient accumulation or devices. Weights that are all zero stay zero.

    Args:
      batch: with "weights" float32 [B, T] of the targets and, where documents are packed, "positions" int32 [B, T] (-1
        for padding). Another batch, also one that was scaled before, is returned as it is.

    Returns:
      The batch with "mean_weights" in place of "weights", and with "mean_live", 1 for tokens and 0 for padding, scaled
      likewise, for means over tokens.
    """
    if not (isinstance(batch, Mapping) and "weights" in batch):
        return batch
    found = {name: value for name, value in batch.items() if name != "weights"}
    live_BT = jnp.ones(batch["weights"].shape) if "positions" not in batch else (batch["positions"] >= 0).astype(float)
    for name, weights_BT in (("mean_weights", batch["weights"]), ("mean_live", live_BT)):
        weights_BT = weights_BT.astype(jnp.float32)
        total = weights_BT.sum()
        found[name] = weights_BT * (weights_BT.size / jnp.where(total == 0, 1.0, total))
    return found


def padding_share(batch: Mapping[str, Any]) -> dict[str, Float[Array, ""]]:
    """The metric "padding" of packed documents, the share of padding among a batch's inputs; none for another batch."""
    return {"padding": (batch["positions"] < 0).mean(dtype=jnp.float32)} if "positions" in batch else {}
