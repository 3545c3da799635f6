"""The training loop: restore, step, log, evaluate, save; and stop well, whatever stops it."""

import collections
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
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
      tokens: of one row of a batch (or whatever the data count in), for the throughput; 0 reports none.
      devices: of the run, for the throughput of one.
      flops: that training on one row takes, see `tessera.models.lm_loss.training_flops`; 0 reports no utilization.
      peak: FLOPs per second of all devices together, of which MFU is a share; 0 reports no utilization.
    """

    steps: int
    log_every: int = 10
    eval_every: int = 0
    tokens: int = 0
    devices: int = 1
    flops: float = 0.0
    peak: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.log_every < 1 or self.eval_every < 0:
            raise ValueError(f"steps >= 0, log_every >= 1, eval_every >= 0 expected, got {self}")

    def speed(self, steps: int, rows: int, seconds: float) -> dict[str, float]:
        """Throughput and model FLOPs utilization (MFU) of some steps, with their rows in all: values of the log."""
        found = {"steps_per_second": steps / seconds}
        if self.tokens:
            found["tokens_per_second"] = rows * self.tokens / seconds
            found["tokens_per_second_per_device"] = found["tokens_per_second"] / self.devices
        if self.flops and self.peak:
            found["mfu"] = rows * self.flops / seconds / self.peak
        return found


@dataclass(frozen=True)
class Profile:
    """Steps to trace, first and last, and the directory that TensorBoard's profile plugin or xprof opens.

    Raises:
      ValueError: no such steps.
    """

    first: int
    last: int
    directory: Path

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last:
            raise ValueError(f"steps {self.first}:{self.last}: the first is at least 1, the last not before it")

    @classmethod
    def parse(cls, text: str, directory: Path) -> "Profile | None":
        """Read "10:12" (steps 10 to 12) or "10"; None for "".

        Raises:
          ValueError: another text.
        """
        if not text:
            return None
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        if match is None:
            raise ValueError(f"{text!r}: write the first and the last step to trace, such as 10:12")
        return cls(int(match[1]), int(match[2] or match[1]), directory)


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
    profile: Profile | None = None,
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
      profile: steps to trace (`jax.profiler`), those of them that this process trains.

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
    with Signals() as signals, bar as progress, Tracer(profile) as tracer:
        clock, timed, rows = time.perf_counter(), start, 0
        for step in range(start + 1, config.steps + 1):
            batch = dict(next(batches))
            ids = batch.pop("ids", None)
            placed = place(batch)
            with tracer.step(step):
                state, metrics = step_jit(state, placed, key)
            tracer.after(step, state)
            rows += jax.tree.leaves(placed)[0].shape[0]
            guard.add(step, ids, metrics)
            progress.advance()

            last, stop = step == config.steps, signals.reached(step)
            save = last or stop or bool(checkpoints.config.every and step % checkpoints.config.every == 0)
            validation = None
            if step % config.log_every == 0 or last:
                guard.drain()
                row = metrics_row(metrics)
                if schedule:  # steps that were skipped before this one have not moved it
                    skipped = row.get("skipped_steps", 0.0) - row.get("skipped", 0.0)
                    row["lr"] = float(schedule(step - 1 - int(skipped)))
                logger.write(step, row)
                speed = config.speed(step - timed, rows, time.perf_counter() - clock)
                logger.write(step, speed, kind="time")
                shown = {"MFU": f"{speed['mfu']:.1%}"} if "mfu" in speed else {}
                name = "cross_entropy" if "cross_entropy" in row else "loss"  # the total has further terms
                progress.advance(0, **{name: row[name]}, **shown)
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
                clock, timed, rows = time.perf_counter(), step, 0  # evaluation and saving are not part of a step's time
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
    """Raises `NonFiniteLoss` from the `finite` flags of past steps as they become ready; no step waits for another.

    Of steps that were skipped it writes a row of kind "skipped".
    """

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
            if bool(metrics.get("skipped", False)):
                row = {name: float(metrics[name]) for name in ("grad_norm", "loss", "skipped_steps")}
                self._logger.write(step, row, "skipped")
                said = "step %d was skipped: loss %.4g or gradient norm %.4g is a spike (%d skipped so far)"
                logging.warning(said, step, row["loss"], row["grad_norm"], row["skipped_steps"])
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


class Tracer:
    """Traces the steps of a `Profile`, each under the name "train" with its number; ends the trace on the way out."""

    def __init__(self, profile: Profile | None):
        self._profile, self._active = profile, False

    def __enter__(self) -> "Tracer":
        return self

    def step(self, step: int) -> Any:
        """Begin the trace if it is time, and name what is done in this step."""
        profile = self._profile
        if profile and not self._active and profile.first <= step <= profile.last:
            jax.profiler.start_trace(str(profile.directory))
            self._active = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, state: PyTree) -> None:
        """End the trace after the last step, when the devices have done it."""
        if self._active and self._profile and step == self._profile.last:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        self._active, self._profile, done = False, None, self._profile
        jax.profiler.stop_trace()
        if done:
            logging.info("the trace of steps %d to %d is in %s", done.first, done.last, done.directory)

    def __exit__(self, *_: Any) -> None:
        if self._active:
            self._stop()


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
