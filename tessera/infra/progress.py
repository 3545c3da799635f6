"""A progress bar with rate and time left on a terminal, a log line every few seconds elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any

from rich import progress as bars
from rich.console import Console


class Progress:
    """Context manager around `total` units of work; bars may be nested.

    On a terminal this is a rich bar. In a file or a pipe it prints one line every `every` seconds and one at the end.
    """

    def __init__(
        self,
        total: int,
        description: str = "",
        *,
        start: int = 0,
        every: float = 10.0,
        active: bool = True,
        parent: "Progress | None" = None,
        stream: Any = None,
    ):
        self.total, self.description, self.done = total, description, start
        self._start, self._every, self._active = start, every, active
        self._stream = stream or sys.stderr
        self._parent = parent
        self._bars: bars.Progress | None = None
        self._said = start
        self._counted = False
        self._postfix = ""

    def __enter__(self) -> "Progress":
        self._began = self._spoke = time.monotonic()
        if self._active and self._stream.isatty():
            shared = self._parent._bars if self._parent is not None else None
            self._bars = shared or bars.Progress(
                bars.TextColumn("{task.description}"),
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                bars.TextColumn("{task.fields[rate]}"),
                bars.TimeElapsedColumn(),
                bars.TimeRemainingColumn(),
                bars.TextColumn("{task.fields[postfix]}"),
                console=Console(file=self._stream),
            )
            if shared is None:
                self._bars.start()
            self._task = self._bars.add_task(
                self.description, total=self.total, completed=self._start, rate="", postfix=""
            )
        return self

    def advance(self, n: int = 1, **postfix: float | str) -> None:
        """Count `n` more units; `postfix` values (such as loss) are shown next to the bar until replaced."""
        self.done += n
        if postfix:
            self._postfix = " ".join(f"{key} {_short(value)}" for key, value in postfix.items())
        if not self._active:
            return
        now = time.monotonic()
        if not self._counted:  # the first unit holds compilation: the rate is that of those after it
            self._counted, self._start, self._began = True, self.done, now
        if self._bars is not None:
            self._bars.update(self._task, completed=self.done, rate=self._rate(now), postfix=self._postfix)
        elif now - self._spoke >= self._every:
            self._spoke = now
            self._say(now)

    def skip(self, n: int) -> None:
        """Count `n` units that an earlier process did: they are part of the total, not of the rate."""
        self._start += n
        self.advance(n)

    def _rate(self, now: float) -> str:
        rate = (self.done - self._start) / max(now - self._began, 1e-9)
        return f"{rate:.1f}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s each" if rate else ""

    def _say(self, now: float) -> None:
        done = self.done - self._start
        left = (now - self._began) / done * (self.total - self.done) if done else float("nan")
        parts = [f"{self.description} {self.done}/{self.total}", self._rate(now), self._postfix]
        if self.done < self.total and done:
            parts.append(f"{clock(left)} left")
        self._said = self.done
        print("  ".join(part for part in parts if part), file=self._stream, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            if self._parent is None or self._parent._bars is None:
                self._bars.stop()
            else:
                self._bars.remove_task(self._task)
        elif self._active and self.done > self._said:
            self._say(time.monotonic())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def clock(seconds: float) -> str:
    """A duration as [hours:]minutes:seconds."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
