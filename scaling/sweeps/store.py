"""Artifacts of a sweep: one file per readout, in a directory named by the hash of the run's settings."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from scaling.sweeps.plan import PlannedRun, Readout

TrainFn = Callable[[PlannedRun, Path, Callable[[int], None]], Iterable[tuple[Readout, Mapping[str, Any]]]]
"""(run with its missing readouts, its directory, report(steps)) -> pairs of readout and measured columns, one by one.

It must be picklable, may be killed at any moment, and is called again for the readouts that are missing. A
FloatingPointError, or a loss that is not finite, is the result of a run that diverged: it is stored, not tried again.
"""

Row = dict[str, Any]


class DamagedRow(ValueError):
    """A file of a row that holds none."""


def read_row(path: Path) -> Row | None:
    """Read the row in a file of a `Store`, None if there is no file.

    Raises:
      DamagedRow: it holds no row.
    """
    if not path.exists():
        return None
    try:
        row = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise DamagedRow(f"{path} is damaged ({error}); delete it to have it computed again") from error
    if not isinstance(row, dict) or type(row.get("steps")) is not int:
        raise DamagedRow(f"{path} is damaged: a row with its steps is needed; delete it to have it computed again")
    return row


class Store:
    """Artifacts of a sweep.

    Args:
      directory: of all runs.

    Example:
      >>> import tempfile
      >>> from scaling.sweeps import PlannedRun, Readout, Store
      >>> run = PlannedRun("w16", {"width": 16}, (Readout(100, 80, 102_400, 6e9, 6e9),))
      >>> store = Store(tempfile.mkdtemp())
      >>> store.save(run, run.readouts[0], {"loss": 2.5})
      >>> store.missing(run), store.rows(run)[0]["loss"]
      ((), 2.5)
    """

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)

    def path(self, run: PlannedRun) -> Path:
        """Path of a run's directory."""
        return self.directory / f"{run.name}-{run.key[:12]}"

    def row(self, run: PlannedRun, readout: Readout) -> Row | None:
        """Read the row of a readout, None if it does not exist yet; DamagedRow as of `read_row`."""
        return read_row(self._readout(run, readout))

    def rows(self, run: PlannedRun) -> list[Row]:
        """Read the existing rows, by rising step."""
        return [row for readout in run.readouts if (row := self.row(run, readout)) is not None]

    def missing(self, run: PlannedRun) -> tuple[Readout, ...]:
        """List the readouts without a file that the run has not diverged before."""
        found = self.divergence(run)
        last = found["steps"] if found else math.inf
        return tuple(r for r in run.readouts if r.steps < last and not self._readout(run, r).exists())

    def divergence(self, run: PlannedRun) -> Row | None:
        """Read how a run diverged: steps of the first readout that it did not reach, error; None if it did not."""
        return read_row(self.path(run) / "diverged.json")

    def save_divergence(self, run: PlannedRun, readout: Readout, error: str) -> None:
        """Write that a run diverged before a readout."""
        row = {"run": run.name, **run.columns, "budget": readout.budget, "steps": readout.steps, "error": error}
        write_text(self.path(run) / "diverged.json", json.dumps(row) + "\n")

    def save(self, run: PlannedRun, readout: Readout, measured: Mapping[str, Any]) -> None:
        """Write a readout: the run's columns, the readout's, and the measured ones."""
        own = {"budget": readout.budget, "steps": readout.steps, "tokens": readout.tokens, "flops": readout.flops}
        row = {"run": run.name, **run.columns, **own, **measured}
        write_text(self._readout(run, readout), json.dumps(row) + "\n")

    def describe(self, run: PlannedRun) -> None:
        """Write the settings behind the hash."""
        path = self.path(run) / "settings.json"
        if not path.exists():
            write_text(path, json.dumps(run.settings, indent=1, sort_keys=True) + "\n")

    def steps_done(self, run: PlannedRun) -> int:
        """Steps that a run has reported since its last start; 0 without a report."""
        try:
            return int((self.path(run) / "progress").read_text())
        except (OSError, ValueError):
            return 0

    def _readout(self, run: PlannedRun, readout: Readout) -> Path:
        return self.path(run) / "readouts" / f"{readout.steps}.json"


def write_text(path: Path, text: str) -> None:
    """Atomically write a text file, creating its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def carry_out(train: TrainFn, run: PlannedRun, directory: Path) -> None:
    """Train and save a run's missing readouts, one by one; the call that executors run.

    Args:
      train: the training function.
      run: with all its readouts.
      directory: of the store.
    """
    store = Store(directory)
    store.describe(run)
    missing = store.missing(run)
    if not missing:
        return
    rest = replace(run, readouts=missing)
    done, wrote, progress = run.steps - rest.steps, 0.0, store.path(run) / "progress"

    def report(steps: int) -> None:
        nonlocal done, wrote
        done += steps
        if time.monotonic() - wrote > 1.0:
            wrote = time.monotonic()
            write_text(progress, str(done))

    left = list(rest.readouts)
    try:
        for readout, measured in train(rest, store.path(run), report):
            if not math.isfinite(measured.get("loss", 0.0)):
                raise FloatingPointError(f"the loss at step {readout.steps} is {measured['loss']}")
            store.save(run, readout, measured)
            left.remove(readout)
    except FloatingPointError as error:
        store.save_divergence(run, left[0], str(error) or "the loss is not finite")
