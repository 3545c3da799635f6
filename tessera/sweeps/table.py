"""A sweep as it goes: a live table on a terminal, plain lines elsewhere, with progress and the time left."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from scaling.sweeps.sweep import Status
from tessera.infra.logger import clock

# In the order in which runs are shown.
STYLES = {
    **{"running": "bold", "failed": "red", "diverged": "yellow"},
    **{"waiting": "dim", "not needed": "dim", "done": "green"},
}
ENDED = ("done", "diverged", "failed", "not needed")


class SweepTable:
    """Context manager; call it with the sweep's status.

    On a terminal a table of the runs that matter now, redrawn in place; in a file or a pipe a line whenever a run ends,
    and every `every` seconds. The time left follows from the FLOPs done since the first call.
    """

    def __init__(self, *, every: float = 30.0, rows: int = 24, stream: Any = None):
        self.every, self.rows = every, rows
        self._stream = stream or sys.stderr
        self._live: Live | None = None
        self._began: tuple[float, float] | None = None
        self._spoke, self._ended = -1e9, -1

    def __enter__(self) -> "SweepTable":
        if self._stream.isatty():
            self._live = Live(console=Console(file=self._stream), refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, status: Status) -> None:
        """Show where the sweep stands."""
        now = time.monotonic()
        if self._live is not None:
            self._live.update(self.table(status, now))
            return
        ended = sum(state in ENDED for state in status.states)
        if ended != self._ended or now - self._spoke >= self.every:
            self._ended, self._spoke = ended, now
            print(self.line(status, now), file=self._stream, flush=True)

    def share(self, status: Status) -> float:
        """Share of the sweep's FLOPs that is done; runs that are not needed, failed or diverged count as done."""
        progress = zip(status.runs, status.states, status.steps, strict=True)
        done = sum(run.cost if state in ENDED else steps * run.flops_per_step for run, state, steps in progress)
        total = sum(run.cost for run in status.runs)
        return done / total if total else 1.0

    def left(self, status: Status, now: float) -> str:
        """Time left as text; "" while nothing has been done since the first call."""
        done = self.share(status)
        self._began = began, before = self._began or (now, done)
        return f"{clock((now - began) / (done - before) * (1 - done))} left" if before < done < 1 else ""

    def line(self, status: Status, now: float) -> str:
        """One line: runs done, share of the FLOPs, time left, and the runs under way."""
        done = status.states.count("done")
        lost = [(status.states.count(state), state) for state in ("failed", "diverged")]
        progress = zip(status.runs, status.states, status.steps, strict=True)
        going = [f"{run.name} {steps / run.steps:.0%}" for run, state, steps in progress if state == "running"]
        parts = [f"runs {done}/{len(status.runs)}", f"{self.share(status):.1%} of FLOPs"]
        parts += [*(f"{count} {state}" for count, state in lost if count), self.left(status, now)]
        parts += [f"running: {', '.join(going[:8])}" if going else ""]
        return "  ".join(part for part in parts if part)

    def table(self, status: Status, now: float) -> Table:
        """Runs under way first, then failed, waiting and finished ones, in the order of the plan."""
        ranked = sorted(range(len(status.runs)), key=lambda i: (list(STYLES).index(status.states[i]), i))
        shown = sorted(ranked[: self.rows])
        hidden = f"  ({len(ranked) - len(shown)} runs not shown)" if len(shown) < len(ranked) else ""
        table = Table(caption=self.line(status, now) + hidden, caption_justify="left", box=None)
        for heading in ("run", "parameters", "FLOPs", "state", "progress", "loss"):
            table.add_column(heading, justify="left" if heading in ("run", "state") else "right")
        for i in shown:
            run, state, loss = status.runs[i], status.states[i], status.losses[i]
            again = f" (try {status.tries[i]})" if status.tries[i] > 1 else ""
            cells = [run.name, f"{run.columns.get('params', 0):,}", f"{run.cost:.2g}", state + again]
            cells += [f"{status.steps[i] / run.steps:.0%}", "" if loss is None else f"{loss:.4f}"]
            table.add_row(*cells, style=STYLES[state])
        return table
