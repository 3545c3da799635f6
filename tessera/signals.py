"""How a run stops before its end: a loss that is not finite, or a signal."""

import collections
import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tessera.infra.checkpoint import Checkpoints
from tessera.infra.logger import Logger


class NonFiniteLoss(ArithmeticError):
    """The loss or its gradient was not finite.

    `step` counts from 1, `ids` are the rows of its batch, `checkpoint` is the step of the last good one (or None).
    """

    def __init__(self, step: int, loss: float, ids: Any, checkpoint: int | None):
        self.step, self.loss, self.ids, self.checkpoint = step, loss, ids, checkpoint
        rows = "unknown (the batches carry no ids)" if ids is None else str([int(i) for i in np.ravel(ids)])
        kept = (
            "no checkpoint was saved before it"
            if checkpoint is None
            else f"the last good checkpoint is step {checkpoint}"
        )
        super().__init__(
            f"the loss or its gradient is not finite at step {step} (loss {loss}), batch ids {rows}; {kept}. "
            "A lower learning rate, more warmup or gradient clipping usually helps"
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


class Watch:
    """Looks at the `finite` flags of past steps as they become ready, so no step waits for the one before it."""

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

    def _check(self, step: int, ids: Any, metrics: dict[str, jax.Array]) -> None:
        if bool(metrics["finite"]):
            return
        self._logger.write(
            step, {name: float(value) for name, value in sorted(metrics.items()) if name != "finite"}, "failed"
        )
        self._checkpoints.wait()
        raise NonFiniteLoss(step, float(metrics["loss"]), ids, max(self._checkpoints.steps(), default=None))


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
