"""Train a stack of tickets together: one compiled program for many seeds and arms of a lottery search.

A stack is a pytree whose leaves have a leading axis S (one entry per seed and arm). The data set is small enough to
live on the device, so a whole stretch of training is one `lax.scan` over a block of batch indices and the host is only
woken to evaluate, to report progress and to save.
"""

import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lottery import criteria
from lottery.imp import Starts, Trained
from tessera.data.loader import index_block
from tessera.tickets.programs import Carry, Programs, TicketConfig


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
    late = np.asarray(starts.late or (False,) * len(starts.names))
    counters = np.where(late, config.steps, start)
    carry = programs.init(starts.params, starts.masks, starts.opt_state, counters)
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
        carry, row = programs.advance(carry, starts.masks, index, step, starts.teachers)
        rows.append({"step": step} | {name: np.asarray(value).tolist() for name, value in row.items()})
        _check_finite(rows[-1], starts)
        if step == config.rewind:
            # Copied, since the next block donates the carry's buffers.
            snapshot = jax.tree.map(jnp.copy, {"params": carry.params, "opt_state": carry.opt_state})
        report(step - start, {name: float(np.mean(value)) for name, value in rows[-1].items() if name != "step"})
        start = step
        # After the last step too: a failure in the test below then costs no training.
        if unfinished and time.monotonic() - last_save >= config.save_seconds:
            unfinished.save(step, {"carry": carry, "snapshot": snapshot or blank}, rows)
            last_save = time.monotonic()
    tests = {name: np.asarray(value).tolist() for name, value in programs.test(carry).items()}
    return Trained(carry.params, _ticket_rows(carry, rows, tests), snapshot, _movement(carry.opt_state))


def _movement(opt_state: PyTree) -> PyTree | None:
    """The scores of `criteria.track_movement`, if the optimizer has it."""
    try:
        return criteria.movement(opt_state)
    except ValueError:
        return None


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
