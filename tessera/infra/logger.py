"""Rows of measurements: JSON lines always, TensorBoard and Weights & Biases on request.

`metrics.jsonl` holds what the run computed and nothing else, so two runs of one config, interrupted or not, write the
same bytes. Wall-clock measurements (kind "time") go to `timing.jsonl`.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    """Read JSON lines; "nan", "inf" and "-inf" come back as floats, an unfinished last line is left out."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # written while the process was killed: nothing after it can be trusted
        rows.append({key: float(v) if v in ("nan", "inf", "-inf") else v for key, v in row.items()})
    return rows


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
                kept = [row for row in read_rows(path) if row["step"] <= step]
                text = "".join(json.dumps({k: _safe(v) for k, v in row.items()}) + "\n" for row in kept)
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
    # One workdir is one run there too: a resumed run goes on in the same curves.
    return wandb.init(project="tessera", id=workdir.resolve().name, name=workdir.name, dir=str(workdir), resume="allow")
