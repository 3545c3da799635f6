"""A sweep as it goes: a live table on a terminal, plain lines elsewhere, with progress and the time left."""

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from scaling.sweeps.sweep import Status

STYLES = {"running": "bold", "done": "green", "failed": "red", "waiting": "dim", "not needed": "dim"}


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, status: Status) -> None:
        """Show where the sweep stands."""
        now = time.monotonic()
        if self._live is not None:
            self._live.update(self.table(status, now))
            return
        ended = sum(state in ("done", "failed", "not needed") for state in status.states)
        if ended != self._ended or now - self._spoke >= self.every:
            self._ended, self._spoke = ended, now
            print(self.line(status, now), file=self._stream, flush=True)

    def share(self, status: Status) -> float:
        """Share of the sweep's FLOPs that is done; runs that are not needed or failed count as done."""
        total = sum(run.cost for run in status.runs)
        return self._done(status) / total if total else 1.0

    def _done(self, status: Status) -> float:
        ended = ("done", "failed", "not needed")
        return sum(
            run.cost if state in ended else steps * run.flops_per_step
            for run, state, steps in zip(status.runs, status.states, status.steps, strict=True)
        )

    def left(self, status: Status, now: float) -> str:
        """Time left in words; "" while nothing has been done since the first call."""
        done, total = self._done(status), sum(run.cost for run in status.runs)
        if self._began is None:
            self._began = (now, done)
        began, before = self._began
        if done <= before or done >= total:
            return ""
        seconds = (now - began) / (done - before) * (total - done)
        minutes, second = divmod(int(seconds), 60)
        hours, minute = divmod(minutes, 60)
        return f"{hours}:{minute:02d}:{second:02d} left" if hours else f"{minute}:{second:02d} left"

    def line(self, status: Status, now: float) -> str:
        """One line: runs done, share of the FLOPs, time left, and what runs."""
        done, failed = status.states.count("done"), status.states.count("failed")
        parts = [f"runs {done}/{len(status.runs)}", f"{self.share(status):.1%} of FLOPs"]
        parts += [f"{failed} failed"] * bool(failed)
        parts += [text for text in [self.left(status, now)] if text]
        going = [
            f"{run.name} {steps / run.steps:.0%}"
            for run, state, steps in zip(status.runs, status.states, status.steps, strict=True)
            if state == "running"
        ]
        parts += [f"running: {', '.join(going[:8])}"] * bool(going)
        return "  ".join(parts)

    def table(self, status: Status, now: float) -> Table:
        """Runs under way first, then failed, waiting and finished ones, in the order of the plan."""
        order = ("running", "failed", "waiting", "not needed", "done")
        ranked = sorted(range(len(status.runs)), key=lambda i: (order.index(status.states[i]), i))
        shown = sorted(ranked[: self.rows])
        caption = self.line(status, now)
        if len(shown) < len(ranked):
            caption += f"  ({len(ranked) - len(shown)} runs not shown)"
        table = Table(caption=caption, caption_justify="left", box=None)
        for heading in ("run", "parameters", "FLOPs", "state", "progress", "loss"):
            table.add_column(heading, justify="left" if heading in ("run", "state") else "right")
        for i in shown:
            run, state, loss = status.runs[i], status.states[i], status.losses[i]
            again = f" (try {status.tries[i]})" if status.tries[i] > 1 else ""
            table.add_row(
                run.name,
                f"{run.columns.get('params', 0):,}",
                f"{run.cost:.2g}",
                state + again,
                f"{status.steps[i] / run.steps:.0%}",
                "" if loss is None else f"{loss:.4f}",
                style=STYLES[state],
            )
        return table
