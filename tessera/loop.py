"""The training loop: restore, step, log, evaluate, save; and stop well, whatever stops it."""

import collections
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from tessera.infra.checkpoint import Checkpoints, abstract
from tessera.infra.logger import Logger, Progress


@runtime_checkable
class Batches(Protocol):
    """An endless iterator of dicts of NumPy arrays whose position can be saved as JSON (grain's iterators are such)."""

    def __next__(self) -> Mapping[str, np.ndarray]:
        """Give the next batch."""
        ...

    def get_state(self) -> Any:
        """Return the position as JSON values."""
        ...

    def set_state(self, state: Any) -> None:
        """Go to a position."""
        ...


@dataclass(frozen=True)
class LoopConfig:
    """How long, and how often.

    Attributes:
      steps: in all.
      log_every: steps between two rows of the log.
      eval_every: steps between two evaluations; 0 evaluates after the last step only.
      tokens: per step over all processes (or whatever the data count in), for the throughput; 0 reports none.
    """

    steps: int
    log_every: int = 10
    eval_every: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.log_every < 1 or self.eval_every < 0:
            raise ValueError(f"steps >= 0, log_every >= 1, eval_every >= 0 expected, got {self}")


@dataclass(frozen=True)
class Result:
    """The state after the last step, its metrics at the last evaluation, and the step this process started from."""

    state: PyTree
    evaluation: dict[str, float]
    start: int


def train(
    step_fn: Callable[[Any, Any, jax.Array], tuple[Any, dict[str, jax.Array]]],
    init: Callable[[], Any],
    batches: Batches,
    config: LoopConfig,
    *,
    key: jax.Array,
    logger: Logger,
    checkpoints: Checkpoints,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    schedule: Callable[[int], Any] | None = None,
    place: Callable[[Any], Any] = jax.device_put,
) -> Result:
    """Train to `config.steps`, from the newest sound checkpoint if there is one.

    However often the process is killed and started again, the weights, the rows of `metrics.jsonl` and the order of
    the data are those of one uninterrupted run: a checkpoint holds the position in the data, and rows after it are
    dropped and made again. (As far as the backend computes the same numbers twice: CPU does, GPU may need
    XLA_FLAGS=--xla_gpu_deterministic_ops=true.)

    The last state is saved before it is evaluated: if that fails, the same command only evaluates.

    Args:
      step_fn: from `make_train_step`; jitted here, the state donated.
      init: makes the first state; its shardings hold for all of the run.
      batches: the data; an "ids" entry names the rows and is not given to the step. Each process passes its own part.
      config: how long, how often.
      key: constant; `step_fn` folds in the step.
      logger: only the first process should be active.
      checkpoints: where the state goes.
      evaluate: state -> validation metrics; "loss" ranks checkpoints.
      schedule: step -> learning rate, for the log.
      place: host batch -> device batch.

    Raises:
      NonFiniteLoss: found without waiting for each step's result, so a few steps later, but naming the right step; or,
        before a save, in the state.
      Interrupted: SIGTERM or SIGINT (a second one ends at once).
      CheckpointDamaged, CheckpointMismatch: from the checkpoints.
    """
    state, start, evaluation = _restore(init, batches, checkpoints, logger)
    step_jit = jax.jit(step_fn, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))
    guard = NanGuard(checkpoints, logger)
    bar = Progress(config.steps, "train", start=start, active=logger.active, begins="compiling")
    with Signals() as signals, bar as progress:
        clock, timed = time.perf_counter(), start
        for step in range(start + 1, config.steps + 1):
            batch = dict(next(batches))
            ids = batch.pop("ids", None)
            state, metrics = step_jit(state, place(batch), key)
            guard.add(step, ids, metrics)
            progress.advance()

            last, stop = step == config.steps, signals.reached(step)
            save = last or stop or bool(checkpoints.config.every and step % checkpoints.config.every == 0)
            validation = None
            if step % config.log_every == 0 or last:
                guard.drain()
                row = metrics_row(metrics)
                row |= {"lr": float(schedule(step - 1))} if schedule else {}
                logger.write(step, row)
                seconds = (time.perf_counter() - clock) / (step - timed)
                speed = {"steps_per_second": 1 / seconds}
                speed |= {"tokens_per_second": config.tokens / seconds} if config.tokens else {}
                logger.write(step, speed, kind="time")
                progress.advance(0, loss=row["loss"])
            if evaluate and not last and config.eval_every and step % config.eval_every == 0:
                guard.drain()
                validation = evaluation = evaluate(state)
                logger.write(step, validation, kind="eval")
            if save:
                guard.drain()  # nothing that is not finite is ever saved: neither what went into an update,
                guard.check_state(step, ids, state)  # nor what came out of it
                if last:
                    evaluation = {}  # of this state it is not known yet: saved first, it outlives a failure to evaluate
                extra = {"evaluation": evaluation}
                checkpoints.save(step, without_frozen(state), data=batches.get_state(), extra=extra, metrics=validation)
            if save or step % config.log_every == 0 or validation is not None:
                clock, timed = time.perf_counter(), step  # evaluation and saving are not part of a step's time
            if stop and not last:
                checkpoints.wait()
                raise Interrupted(step, signals.signum)
        end = max(start, config.steps)
        if evaluate and end and not evaluation:
            evaluation = evaluate(state)
            if not any(row["step"] == end and row["kind"] == "eval" for row in logger.rows()):
                logger.write(end, evaluation, kind="eval")
            checkpoints.rank(end, evaluation)
        checkpoints.wait()
    return Result(state, evaluation, start)


def _restore(
    init: Callable[[], Any], batches: Batches, checkpoints: Checkpoints, logger: Logger
) -> tuple[Any, int, dict]:
    """State, step and last evaluation to go on from; the data and the log are wound to the same point."""
    first = init()
    if not checkpoints.steps():
        logger.truncate(0)
        return first, 0, {}
    # The first state is made for its shapes and shardings and freed before the saved arrays take its place.
    shapes, frozen = abstract(without_frozen(first)), getattr(first, "frozen", None)
    del first
    restored = checkpoints.restore_latest(shapes)
    logger.truncate(restored.step if restored else 0)
    if restored is None:
        return init(), 0, {}
    batches.set_state(restored.data)
    logging.info("going on from step %d", restored.step)
    state = restored.state if frozen is None else replace(restored.state, frozen=frozen)
    return state, restored.step, restored.extra["evaluation"] or checkpoints.measured(restored.step)


def without_frozen(state: Any) -> Any:
    """The state without what no step changes, as it is saved."""
    return replace(state, frozen=None) if getattr(state, "frozen", None) is not None else state


def evaluate(
    eval_fn: Callable[[PyTree, Any], Mapping[str, jax.Array]], params: PyTree, batches: Iterable[tuple[Any, float]]
) -> dict[str, float]:
    """Weighted mean over batches of the metrics of each.

    Args:
      eval_fn: (params, batch) -> metrics, scalars that are means over the batch; jit it outside. A metric "weight" is
        what the batch counts, times the weight that comes with it.
      params: parameters.
      batches: equal-sized batches with their weights, see `tessera.data.loader.held_out_batches`. The sums stay on
        device until the end, so batches overlap.

    Raises:
      ValueError: there was no batch, or none with weight.
    """
    total: Any = None
    for batch, times in batches:
        metrics = dict(eval_fn(params, batch))
        weight = times * metrics.pop("weight", 1.0)
        one = {name: value * weight for name, value in metrics.items()} | {"weight": weight}
        total = one if total is None else jax.tree.map(lambda a, b: a + b, total, one)
    if total is None:
        raise ValueError("no batch to evaluate on: the split is smaller than one batch, or eval.batches is 0")
    found = {name: float(value) for name, value in jax.device_get(total).items()}
    if not (weight := found.pop("weight")):
        raise ValueError("nothing to evaluate on: no target of the split has weight")
    return {name: value / weight for name, value in sorted(found.items())}


class NonFiniteLoss(ArithmeticError):
    """The loss, its gradient or the state after an update was not finite.

    `step` counts from 1, `ids` are the rows of its batch, `checkpoint` is the step of the last good one (or None).
    """

    def __init__(self, step: int, loss: float | None, ids: Any, checkpoint: int | None):
        self.step, self.loss, self.ids, self.checkpoint = step, loss, ids, checkpoint
        rows = "unknown (the batches carry no ids)" if ids is None else str([int(i) for i in np.ravel(ids)])
        saved = (
            "no checkpoint was saved before it"
            if checkpoint is None
            else f"the last good checkpoint is step {checkpoint}"
        )
        what = f"the loss or its gradient is not finite at step {step} (loss {loss})"
        if loss is None:
            what = f"the weights or the optimizer's state are not finite after step {step}"
        super().__init__(
            f"{what}, batch ids {rows}; {saved}. A lower learning rate, more warmup or gradient clipping usually helps"
        )


class Interrupted(Exception):
    """A signal asked the run to end; its state is saved at `step` and the same command goes on from there."""

    def __init__(self, step: int, signum: int):
        self.step, self.signum = step, signum
        super().__init__(f"interrupted at step {step}; run the same command again to continue")


def metrics_row(metrics: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Metrics of a step as floats, arrays as lists of them, in alphabetical order without the `finite` flag.

    Waits for the step.
    """
    found = sorted(jax.device_get(dict(metrics)).items())
    return {name: np.asarray(value, np.float64).tolist() for name, value in found if name != "finite"}


class NanGuard:
    """Raises `NonFiniteLoss` from the `finite` flags of past steps as they become ready; no step waits for another."""

    def __init__(self, checkpoints: Checkpoints, logger: Logger):
        self._checkpoints, self._logger = checkpoints, logger
        self._pending: collections.deque[tuple[int, Any, dict[str, jax.Array]]] = collections.deque()

    def add(self, step: int, ids: Any, metrics: dict[str, jax.Array]) -> None:
        """Note a step that was started, and check those that are finished."""
        self._pending.append((step, ids, metrics))
        while self._pending and self._pending[0][2]["finite"].is_ready():  # type: ignore[attr-defined]
            self._check(*self._pending.popleft())

    def drain(self) -> None:
        """Wait for every noted step and check it."""
        while self._pending:
            self._check(*self._pending.popleft())

    def check_state(self, step: int, ids: Any, state: PyTree) -> None:
        """Raise `NonFiniteLoss` unless all floating-point numbers of the state after a step are finite."""
        if not bool(_finite(state)):
            self._checkpoints.wait()
            raise NonFiniteLoss(step, None, ids, max(self._checkpoints.steps(), default=None))

    def _check(self, step: int, ids: Any, metrics: dict[str, jax.Array]) -> None:
        if bool(metrics["finite"]):
            return
        self._logger.write(
            step, {name: float(value) for name, value in sorted(metrics.items()) if name != "finite"}, "failed"
        )
        self._checkpoints.wait()
        raise NonFiniteLoss(step, float(metrics["loss"]), ids, max(self._checkpoints.steps(), default=None))


@jax.jit
def _finite(tree: PyTree) -> jax.Array:
    """Whether all floating-point numbers of a tree are finite, bool []."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all() if floats else jnp.array(True)


class Signals:
    """Turns SIGTERM and SIGINT into a question the loop asks between steps; a second signal acts at once."""

    signum = 0

    def __enter__(self) -> "Signals":
        self._before: dict[int, Any] = {}
        # With several processes JAX's own service listens to SIGTERM and makes them agree on a step. Python allows
        # handlers in the main thread only.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`; all processes get the same answer."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signum = signal.SIGTERM
        return bool(self.signum)

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def __exit__(self, *_: Any) -> None:
        self._restore()
