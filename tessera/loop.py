"""The training loop: restore, step, log, evaluate, save; and stop well, whatever stops it."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from absl import logging
from jaxtyping import PyTree

from tessera.infra.artifacts import abstract
from tessera.infra.checkpoint import Checkpoints
from tessera.infra.logger import Logger
from tessera.infra.progress import Progress
from tessera.signals import Interrupted, Signals, Watch, metrics_row


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
      init: makes the first state; its shardings hold for the whole run.
      batches: the data; an "ids" entry names the rows and is not given to the step. Each process passes its own part.
      config: how long, how often.
      key: constant; `step_fn` folds in the step.
      logger: only the first process should be active.
      checkpoints: where the state goes.
      evaluate: state -> validation metrics; "loss" ranks checkpoints.
      schedule: step -> learning rate, for the log.
      place: host batch -> device batch.

    Raises:
      NonFiniteLoss: found without waiting for each step's result, so a few steps later, but naming the right step.
      Interrupted: SIGTERM or SIGINT (a second one ends at once).
      CheckpointDamaged, CheckpointMismatch: from the checkpoints.
    """
    state, start, evaluation = _restore(init, batches, checkpoints, logger)
    step_jit = jax.jit(step_fn, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))
    watch = Watch(checkpoints, logger)
    with Signals() as signals, Progress(config.steps, "train", start=start, active=logger.active) as progress:
        clock, timed = time.perf_counter(), start
        for step in range(start + 1, config.steps + 1):
            batch = dict(next(batches))
            ids = batch.pop("ids", None)
            state, metrics = step_jit(state, place(batch), key)
            watch.add(step, ids, metrics)
            progress.advance()

            last, stop = step == config.steps, signals.reached(step)
            save = last or stop or bool(checkpoints.config.every and step % checkpoints.config.every == 0)
            validation = None
            if step % config.log_every == 0 or last:
                watch.drain()
                row = metrics_row(metrics)
                row |= {"lr": float(schedule(step - 1))} if schedule else {}
                logger.write(step, row)
                seconds = (time.perf_counter() - clock) / (step - timed)
                speed = {"steps_per_second": 1 / seconds}
                speed |= {"tokens_per_second": config.tokens / seconds} if config.tokens else {}
                logger.write(step, speed, kind="time")
                progress.advance(0, loss=row["loss"])
            if evaluate and not last and config.eval_every and step % config.eval_every == 0:
                watch.drain()
                validation = evaluation = evaluate(state)
                logger.write(step, validation, kind="eval")
            if save:
                watch.drain()  # nothing that is not finite is ever saved
                if last:
                    evaluation = {}  # of this state it is not known yet: saved first, it outlives a failure to evaluate
                extra = {"evaluation": evaluation}
                checkpoints.save(step, state, data=batches.get_state(), extra=extra, metrics=validation)
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
    # The first state is made for its shapes and shardings and freed before the saved arrays take its place.
    restored = checkpoints.restore_latest(abstract(init())) if checkpoints.steps() else None
    logger.truncate(restored.step if restored else 0)
    if restored is None:
        return init(), 0, {}
    batches.set_state(restored.data)
    logging.info("going on from step %d", restored.step)
    return restored.state, restored.step, restored.extra["evaluation"] or checkpoints.measured(restored.step)


def evaluate(
    eval_fn: Callable[[PyTree, Any], Mapping[str, jax.Array]], params: PyTree, batches: Iterable[Any]
) -> dict[str, float]:
    """Mean over batches of the metrics of each.

    Args:
      eval_fn: (params, batch) -> metrics, scalars that are means over the batch; jit it outside.
      params: parameters.
      batches: equal-sized batches. The sums stay on device until the end, so batches overlap.

    Raises:
      ValueError: there was no batch.
    """
    total: Any = None
    count = 0
    for batch in batches:
        metrics = dict(eval_fn(params, batch))
        total = metrics if total is None else jax.tree.map(lambda a, b: a + b, total, metrics)
        count += 1
    if not count:
        raise ValueError("no batch to evaluate on: the split is smaller than one batch, or eval.batches is 0")
    return {name: float(value) / count for name, value in sorted(jax.device_get(total).items())}
