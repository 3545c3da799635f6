"""The artefacts of a sweep: every readout of every run a file, under the hash of the run's settings."""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from scaling.sweeps.plan import Readout, Run

TrainFn = Callable[[Run, Path, Callable[[int], None]], Iterable[tuple[Readout, Mapping[str, Any]]]]
"""(run with the readouts still wanted, its directory, report(steps)) -> readouts and what was measured, one by one.

It must be picklable, may be killed at any moment, and is called again for what is missing.
"""

Row = dict[str, Any]


class Store:
    """The artefacts of a sweep."""

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)

    def path(self, run: Run) -> Path:
        """A run's directory."""
        return self.directory / f"{run.name}-{run.key[:12]}"

    def row(self, run: Run, readout: Readout) -> Row | None:
        """The row of a readout, None if it is not there yet."""
        path = self._readout(run, readout)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def rows(self, run: Run) -> list[Row]:
        """The rows that are there, by rising step."""
        return [row for readout in run.readouts if (row := self.row(run, readout)) is not None]

    def missing(self, run: Run) -> tuple[Readout, ...]:
        """The readouts that are not there."""
        return tuple(readout for readout in run.readouts if not self._readout(run, readout).exists())

    def save(self, run: Run, readout: Readout, measured: Mapping[str, Any]) -> None:
        """Keep a readout: the run's columns, the readout's, and what was measured."""
        own = {"budget": readout.budget, "steps": readout.steps, "tokens": readout.tokens, "flops": readout.flops}
        row = {"run": run.name, **run.columns, **own, **measured}
        write_text(self._readout(run, readout), json.dumps(row) + "\n")

    def describe(self, run: Run) -> None:
        """Write down what the hash stands for."""
        path = self.path(run) / "settings.json"
        if not path.exists():
            write_text(path, json.dumps(run.settings, indent=1, sort_keys=True) + "\n")

    def steps_done(self, run: Run) -> int:
        """Steps a run says it has taken since it was last started; 0 if it never said."""
        try:
            return int((self.path(run) / "progress").read_text())
        except (OSError, ValueError):
            return 0

    def _readout(self, run: Run, readout: Readout) -> Path:
        return self.path(run) / "readouts" / f"{readout.steps}.json"


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step; its directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def carry_out(train: TrainFn, run: Run, directory: Path) -> None:
    """Train what a run still lacks and keep it, readout by readout; this is what an engine runs, anywhere.

    Args:
      train: the training function.
      run: the whole run.
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

    for readout, measured in train(rest, store.path(run), report):
        store.save(run, readout, measured)
