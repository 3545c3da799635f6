"""Tile sizes of the kernels and their autotuning tables, one per device kind.

`tilings/<device kind>.json` is a list of rows {"kernel", "rows_per_group", "k", "n", "dtype", "tiling": {...},
"seconds"}, written by `scripts/benchmarks/tune_kernels.py`. A lookup returns the row of the same kernel and dtype
nearest in shape (sum of squared log ratios). A device without a table, or without such a row, has the safe default and
a warning, once; so has one whose table says "not tuned" in place of seconds.
"""

import dataclasses
import json
import math
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

TABLES = Path(__file__).parent / "tilings"


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Tile sizes of one step: `rows` of x (M), `inner` of the contraction (K) and `cols` of the output (N)."""

    rows: int = 128
    inner: int = 512
    cols: int = 512

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"Tiling.{field.name}={getattr(self, field.name)}: at least 1 is needed")


T = TypeVar("T")


def slug(device_kind: str) -> str:
    """Make the file name of a device kind: lower case, runs of other characters than letters and digits as dashes."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")


@cache
def read_table(device_kind: str) -> tuple[dict[str, Any], ...]:
    """Read the tuning table of a device kind; empty if there is none (warns, once a kind)."""
    path = TABLES / f"{slug(device_kind)}.json"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in TABLES.glob("*.json"))) or "none"
        warnings.warn(
            f"no measured tile sizes for device kind {device_kind!r} (tables: {known}); using safe defaults. "
            "Measure with: python scripts/benchmarks/tune_kernels.py",
            stacklevel=2,
        )
        return ()
    rows = tuple(json.loads(path.read_text(encoding="utf-8")))
    if any(row["seconds"] == "not tuned" for row in rows):
        warnings.warn(
            f"tile sizes for device kind {device_kind!r} are not tuned. Measure with: "
            "python scripts/benchmarks/tune_kernels.py",
            stacklevel=2,
        )
    return rows


def lookup(device_kind: str, kernel: str, *, rows_per_group: float | int, k: int, n: int, dtype: str, default: T) -> T:
    """Look up the tile sizes for a shape on a device kind.

    Args:
      device_kind: `jax.devices()[0].device_kind`.
      kernel: name in the table: "grouped", "contraction", "block", "block_contraction".
      rows_per_group: M / G (for blocks: M).
      k, n: contraction and output columns.
      dtype: name of x's dtype.
      default: a frozen dataclass; returned with the fields that the table gives replaced.
    """
    rows = [row for row in read_table(device_kind) if row["kernel"] == kernel and row["dtype"] == dtype]
    if not rows:
        return default

    def distance(row: dict[str, Any]) -> float:
        pairs = ((row["rows_per_group"], rows_per_group), (row["k"], k), (row["n"], n))
        return sum(math.log(max(there, 1) / max(here, 1)) ** 2 for there, here in pairs)

    return dataclasses.replace(default, **min(rows, key=distance)["tiling"])  # type: ignore[type-var]
