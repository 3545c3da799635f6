"""Tables of finished runs: load, check, and complete params, tokens and FLOPs from each other.

A row needs a loss and any two of params, tokens and flops; the third follows from FLOPs = 6 x params x tokens
(Kaplan et al. 2020, section 2.1). Other columns are passed on to laws that use them (experts, sparsity, epochs ...).
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

SIZES = ("params", "tokens", "flops")
PER_PARAMETER_AND_TOKEN = 6.0


class RowError(ValueError):
    """Rows that cannot be used; the message names every wrong row and column.

    Attributes:
      problems: (row, column, what is wrong), rows counted from 1 after the header; 0 for a full column.

    Example:
      >>> import scaling
      >>> try:
      ...     scaling.make_rows({"params": [1e6, -1.0], "tokens": [1e8, 1e8], "loss": [3.0, 3.1]})
      ... except scaling.RowError as error:
      ...     print(error.problems)
      [(2, 'params', '-1.0 is not positive')]
    """

    def __init__(self, problems: Sequence[tuple[int, str, str]], source: str = "rows"):
        self.problems = list(problems)
        # Row 0 is the header: the full column.
        shown = [
            f"  {f'row {row}, ' if row else ''}column {column!r}: {what}" for row, column, what in self.problems[:20]
        ]
        if len(self.problems) > len(shown):
            shown.append(f"  ... and {len(self.problems) - len(shown)} more")
        count = "1 value" if len(self.problems) == 1 else f"{len(self.problems)} values"
        super().__init__(
            f"{source}: {count} cannot be used (rows count from 1 after the header; wanted: positive finite numbers)\n"
            + "\n".join(shown)
        )


@dataclass(frozen=True)
class Rows:
    """Checked rows.

    Attributes:
      columns: column name -> values [R]; params, tokens, flops and loss are always there, float64, positive and finite.
        A column with other than numbers has strings.
      source: where they come from, for messages.

    Example:
      >>> import scaling
      >>> rows = scaling.make_rows({"params": [1e6, 2e6], "tokens": [1e8, 1e8], "loss": [3.2, 3.0]})
      >>> len(rows), rows["flops"].tolist(), len(rows.take(rows["loss"] < 3.1))
      (2, [600000000000000.0, 1200000000000000.0], 1)
    """

    columns: Mapping[str, np.ndarray]
    source: str = "rows"

    def __len__(self) -> int:
        return len(self.columns["loss"])

    def __getitem__(self, name: str) -> np.ndarray:
        """A column [R]; a missing one raises KeyError with the existing ones."""
        if name not in self.columns:
            raise KeyError(f"{self.source}: no column {name!r}; there are {', '.join(self.columns)}")
        return self.columns[name]

    def take(self, which: Bool[np.ndarray, " R"] | Int[np.ndarray, " K"]) -> "Rows":
        """Select rows by a boolean mask or by indices (which may repeat)."""
        return Rows({name: values[which] for name, values in self.columns.items()}, self.source)

    def without_highest_losses(self, count: int) -> "Rows":
        """Drop the `count` rows with the highest losses; the others stay in order."""
        if not 0 <= count < len(self):
            raise ValueError(f"{self.source}: cannot drop {count} of {len(self)} rows")
        keep = np.ones(len(self), bool)
        keep[np.argsort(self["loss"], kind="stable")[len(self) - count :]] = False
        return self.take(keep)

    def need(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Read columns as finite float64 [R].

        Raises:
          RowError: a column that is missing or holds anything else, by row and column.
        """
        problems, found = [], {}
        for name in names:
            if name not in self.columns:
                problems.append((0, name, f"the column is missing; there are {', '.join(self.columns)}"))
                continue
            values = [_number(value) for value in self.columns[name].tolist()]
            problems += [
                (i + 1, name, _complaint(raw, positive=False))
                for i, (raw, value) in enumerate(zip(self.columns[name].tolist(), values, strict=True))
                if value is None
            ]
            found[name] = np.array([math.nan if v is None else v for v in values])
        if problems:
            raise RowError(problems, self.source)
        return found


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _complaint(value: Any, *, positive: bool = True) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        return "empty"
    try:
        number = float(value)
    except (TypeError, ValueError):
        return f"{value!r} is not a number"
    if math.isfinite(number) and positive:
        return f"{value} is not positive"
    return f"{value} is not finite"


def make_rows(columns: Mapping[str, Sequence[Any] | np.ndarray], source: str = "rows") -> Rows:
    """Check columns and complete them.

    Args:
      columns: name -> values of equal length; `loss` (nats per token) and at least two of `params`, `tokens`, `flops`.
      source: for messages.

    Raises:
      RowError: empty, non-positive, infinite, NaN or textual values among those four, or missing columns.
      ValueError: columns of different lengths, or no rows.

    Example:
      >>> import scaling
      >>> rows = scaling.make_rows({"params": [1e6], "flops": [6e14], "loss": [3.0]})
      >>> rows["tokens"].tolist()
      [100000000.0]
    """
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{source}: columns have different lengths: {lengths}")
    sizes = [name for name in SIZES if name in columns]
    missing = [] if "loss" in columns else [(0, "loss", f"the column is missing; there are {_names(columns)}")]
    if len(sizes) < 2:
        wanted = ", ".join(name for name in SIZES if name not in columns)
        missing.append((0, wanted, f"two of params, tokens and flops are needed; there are {_names(columns)}"))
    if missing:
        raise RowError(missing, source)
    if not lengths["loss"]:
        raise ValueError(f"{source}: no rows")
    checked, problems = {}, []
    for name in ("loss", *sizes):
        raw = list(columns[name])
        numbers = [_number(value) for value in raw]
        bad = [i for i, number in enumerate(numbers) if number is None or number <= 0]
        problems += [(i + 1, name, _complaint(raw[i])) for i in bad]
        checked[name] = np.array([math.nan if number is None else number for number in numbers])
    if problems:
        raise RowError(sorted(problems), source)
    return Rows(_complete(checked) | _others(columns), source)


def _names(columns: Mapping[str, Any]) -> str:
    return ", ".join(columns) or "none"


def _complete(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    done = {name: found.get(name) for name in SIZES}
    params, tokens, flops = done["params"], done["tokens"], done["flops"]
    if flops is None and params is not None and tokens is not None:
        done["flops"] = PER_PARAMETER_AND_TOKEN * params * tokens
    elif tokens is None and params is not None and flops is not None:
        done["tokens"] = flops / (PER_PARAMETER_AND_TOKEN * params)
    elif params is None and tokens is not None and flops is not None:
        done["params"] = flops / (PER_PARAMETER_AND_TOKEN * tokens)
    return {name: values for name, values in done.items() if values is not None} | {"loss": found["loss"]}


def _others(columns: Mapping[str, Sequence[Any] | np.ndarray]) -> dict[str, np.ndarray]:
    others = {}
    for name, raw in columns.items():
        if name not in (*SIZES, "loss"):
            numbers = [_number(value) for value in raw]
            numeric = all(number is not None for number in numbers)
            others[name] = np.array(numbers, float) if numeric else np.array([str(value) for value in raw])
    return others


def read_csv(path: Path | str) -> Rows:
    """Load rows from a CSV file whose first line names the columns.

    Raises:
      FileNotFoundError: no such file.
      RowError, ValueError: see `make_rows`; a line with too few or too many values is reported by its row.

    Example:
      >>> import pathlib, tempfile, scaling
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "runs.csv"
      >>> _ = path.write_text("params,tokens,loss\\n1e6,1e8,3.0\\n2e6,1e8,2.9\\n")
      >>> scaling.read_csv(path)["loss"].tolist()
      [3.0, 2.9]
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give a CSV with loss and two of params, tokens, flops")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        lines = [line for line in reader if line]
    if len(set(header)) != len(header):
        raise ValueError(f"{path.name}: a column name is given twice: {', '.join(header)}")
    ragged = [
        (i + 1, header[min(len(line), len(header) - 1)], f"{len(line)} values where the header has {len(header)}")
        for i, line in enumerate(lines)
        if len(line) != len(header)
    ]
    if ragged:
        raise RowError(ragged, path.name)
    return make_rows({name: [line[i] for line in lines] for i, name in enumerate(header)}, path.name)
