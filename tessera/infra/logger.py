"""What a run reports while it works: rows of measurements, and a progress bar.

Rows go to JSON lines always, to TensorBoard and Weights & Biases on request.

`metrics.jsonl` holds what the run computed and nothing else, so two runs of one config, interrupted or not, write the
same bytes. Wall-clock measurements (kind "time") go to `timing.jsonl`.
"""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich import progress as bars
from rich.console import Console

Rows = Sequence[Mapping[str, Any]]

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    """Read JSON lines; "nan", "inf" and "-inf" come back as floats, an unfinished last line is left out.

    So is everything from the first line on that is no row, an object with a `step` and a `kind`: it was written while
    the process was killed, and nothing after it can be trusted.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("kind"), str):
            break
        rows.append({key: float(v) if v in ("nan", "inf", "-inf") else v for key, v in row.items()})
    return rows


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON file of one object.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is damaged, or holds something else.
    """
    try:
        found = json.loads(Path(path).read_bytes().decode())
    except RecursionError:
        raise ValueError(f"{path} is damaged: a JSON object is needed, and it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: a JSON object is needed ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: a JSON object is needed, and it holds a {type(found).__name__}")
    return found


def load_history(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Expert load over training: steps [S] and loads [S, L, E] (shares of the choices) of the rows that have them."""
    found = [row for row in rows if row.get("kind") == "train" and "router/load" in row]
    if not found:
        return np.zeros(0), np.zeros((0, 0, 0))
    return np.array([row["step"] for row in found]), np.array([row["router/load"] for row in found], float)


class Logger:
    """Writes rows to a working directory; `active=False` (any process but the first) writes nothing."""

    def __init__(self, workdir: Path | str, *, tensorboard: bool = False, wandb: bool = False, active: bool = True):
        self.workdir = Path(workdir)
        self.active = active
        self._tensorboard, self._wandb = tensorboard and active, wandb and active
        self._purge: int | None = None
        self._writer: Any = None
        self._run: Any = None
        self._files: dict[str, Any] = {}
        if self._tensorboard:
            self._new_writer = _summary_writer()
        if self._wandb:
            self._run = _start_wandb(self.workdir)
        if active:
            self.workdir.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, values: Mapping[str, Any], kind: str = "train") -> None:
        """Append one row and flush it: it survives the death of the process.

        Floats are written with `repr`, so float32 values come back exactly; NaN and infinities as strings (valid JSON).
        """
        if not self.active:
            return
        row: dict[str, Any] = {"step": int(step), "kind": kind} | {key: _safe(value) for key, value in values.items()}
        file = self._open(TIMING if kind == "time" else METRICS)
        file.write(json.dumps(row) + "\n")
        file.flush()
        if self._tensorboard:
            if self._writer is None:
                purge = {} if self._purge is None else {"purge_step": self._purge}
                self._writer = self._new_writer(str(self.workdir / "tensorboard"), **purge)
            for key, value in values.items():
                if not isinstance(value, list):  # lists are for the report
                    self._writer.add_scalar(f"{kind}/{key}", value, step)
        if self._run is not None:
            self._run.log({f"{kind}/{key}": value for key, value in values.items()}, step=int(step))

    def rows(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl` so far."""
        return read_rows(self.workdir / METRICS)

    def truncate(self, step: int) -> None:
        """Drop every row after `step`, which the run restored at `step` is about to compute again."""
        if not self.active:
            return
        self._close_files()
        self._purge = step + 1
        for name in (METRICS, TIMING):
            path = self.workdir / name
            if path.exists():
                rows = [row for row in read_rows(path) if row["step"] <= step]
                text = "".join(json.dumps({k: _safe(v) for k, v in row.items()}) + "\n" for row in rows)
                write_text(path, text)

    def close(self) -> None:
        """Close files and writers."""
        self._close_files()
        if self._writer is not None:
            self._writer.close()
        if self._run is not None:
            self._run.finish()

    def _open(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = (self.workdir / name).open("a", encoding="utf-8")
        return self._files[name]

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> "Logger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader, or a kill at any moment, sees the old text or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _safe(value: Any) -> Any:
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, list):
        return [_safe(each) for each in value]
    value = float(value)
    return value if math.isfinite(value) else str(value)


def _summary_writer() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "logging to TensorBoard needs the extra `tensorboard`: pip install 'tessera-jax[tensorboard]' "
            "(or log.tensorboard=False)"
        ) from error
    return SummaryWriter


def _start_wandb(workdir: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "logging to Weights & Biases needs the extra `wandb`: pip install 'tessera-jax[wandb]' (or log.wandb=False)"
        ) from error
    # One workdir is one run there too, and another one's of the same name another: a resumed run goes on in its curves.
    place = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project="tessera", id=place, name=workdir.name, dir=str(workdir), resume="allow")


class Progress:
    """Context manager around `total` units of work; bars may be nested.

    On a terminal this is a rich bar. In a file or a pipe it prints one line every `every` seconds and one at the end.
    `begins` says what goes on before the first unit is done, such as compiling.
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
        begins: str = "",
    ):
        self.total, self.description, self.done = total, description, start
        self._start, self._every = start, every
        self._active: bool = active and (parent is None or parent._active)
        self._stream = stream or sys.stderr
        self._parent = parent
        self._bars: bars.Progress | None = None
        self._said = start
        self._counted = False
        self._postfix = self._begins = begins

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
                self.description, total=self.total, completed=self._start, rate="", postfix=self._begins
            )
        elif self._active and self._begins and self.done < self.total:
            print(f"{self.description} {self.done}/{self.total}  {self._begins}", file=self._stream, flush=True)
        return self

    def advance(self, n: int = 1, **postfix: float | str) -> None:
        """Count `n` more units; `postfix` values (such as loss) are shown next to the bar until replaced."""
        self.done += n
        if n and self._postfix == self._begins:
            self._postfix = ""
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
