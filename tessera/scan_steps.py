"""Training of models whose data fit in memory: blocks of optimizer steps, each block one compiled program.

Ticket searches, sparse training and sweeps share it. The data set lies on the device and `scan_steps` takes many steps
in one call; between calls, in `run_blocks`, the host checks that losses are finite, reports and saves.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

Row = dict[str, Any]


def scan_steps(
    step_fn: Callable[[Any, Int[Array, " B"]], tuple[Any, Float[Array, ""]]],
    state: Any,
    index_TB: Int[Array, "T B"],
    count: Int[Array, ""] | int | None = None,
) -> tuple[Any, Float[Array, ""]]:
    """Take one optimizer step for each row of a block of batch indices, as a loop inside one program.

    Args:
      step_fn: (state, indices of the batch) -> (state, loss); e.g. around `tessera.step.make_train_step`.
      state: before the first step, a `tessera.step.TrainState`.
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
