"""Read tables of runs from files: CSV and other separated text, JSON lines, JSON, Parquet."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scaling.rows import RowError, Rows, _number, make_rows

SEPARATORS = ",;\t|"


def read_csv(
    path: Path | str, columns: Mapping[str, str] | None = None, units: Mapping[str, float] | None = None
) -> Rows:
    """Load rows from a file of separated text whose first line that is not empty names the columns.

    Separators are commas, semicolons, tabs or bars, whichever the header has most of.

    Args:
      path: of the file, UTF-8 (or UTF-16 with its mark).
      columns: our name of a column -> the file's; a unit at its end is read, see `make_rows`.
      units: factors of numbers without a unit of their own, by our name of the column.

    Raises:
      FileNotFoundError: no such file.
      RowError, ValueError: see `scaling.rows.make_rows`; text that is not UTF-8; a column named twice or not there; a
        line with too few or too many values.

    Example:
      >>> import pathlib, tempfile, scaling
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "runs.csv"
      >>> _ = path.write_text("parameter_count,tokens,loss\\n1M,1e8,3.0\\n2M,1e8,2.9\\n")
      >>> scaling.read_csv(path, {"params": "parameter_count"})["params"].tolist()
      [1000000.0, 2000000.0]
    """
    path = _found(path)
    lines = _text(path).splitlines(keepends=True)
    # What a spreadsheet or a logger puts above the header.
    above = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    head = lines[above] if above < len(lines) else ""
    separator = max(SEPARATORS, key=head.count)
    reader = csv.reader(io.StringIO("".join(lines[above:])), delimiter=separator)
    try:
        header = [name.strip() for name in next(reader, [])]
        found = [(line, above + reader.line_num) for line in reader if any(value.strip() for value in line)]
    except csv.Error as error:
        raise ValueError(f"{path.name}, line {above + reader.line_num}: not separated text ({error})") from error
    if len(header) > 1 and all(_number(name, units=True) is not None for name in header):
        raise ValueError(
            f"{path.name}, line {above + 1}: {', '.join(header[:4])} are numbers where names of columns are wanted: "
            "the file has no header. Put a first line above it, such as params,tokens,loss"
        )
    if "" in header[:-1]:
        raise ValueError(f"{path.name}: column {header.index('') + 1} of {len(header)} has no name")
    if header and not header[-1] and all(len(line) == len(header) and not line[-1] for line, _ in found):
        # A separator at the end of every line.
        header, found = header[:-1], [(line[:-1], number) for line, number in found]
    if len(set(header)) != len(header):
        raise ValueError(f"{path.name}: a column name is given twice: {', '.join(header)}")
    where = np.array([number for _, number in found], int)
    ragged = [
        (i + 1, header[min(len(line), len(header) - 1)], f"{len(line)} values where the header has {len(header)}")
        for i, (line, _) in enumerate(found)
        if len(line) != len(header)
    ]
    if ragged:
        raise RowError(ragged, path.name, where)
    table = {name: [line[i] for line, _ in found] for i, name in enumerate(header)}
    return make_rows(_renamed(table, columns or {}, path.name), path.name, where, names=columns, units=units)


def read_rows(
    path: Path | str, columns: Mapping[str, str] | None = None, units: Mapping[str, float] | None = None
) -> Rows:
    """Load rows from a file: Parquet (extra `data`), JSON lines or JSON by its suffix, else `read_csv`.

    Args:
      path: of the file.
      columns: our name of a column -> the file's; a unit at its end is read, see `make_rows`.
      units: factors of numbers without a unit of their own, by our name of the column.

    Raises:
      FileNotFoundError, RowError, ValueError: see `read_csv`.
      ImportError: a Parquet file without pyarrow.

    Example:
      >>> import pathlib, tempfile, scaling
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "runs.jsonl"
      >>> _ = path.write_text('{"params": 1e6, "tokens": 1e8, "val_loss": 3.0}\\n')
      >>> scaling.read_rows(path, {"loss": "val_loss"})["loss"].tolist()
      [3.0]
    """
    path = _found(path)
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        table, lines = _read_json(path)
    elif path.suffix in (".parquet", ".pq"):
        table, lines = _read_parquet(path), None
    elif path.suffix in (".xlsx", ".xls", ".ods", ".feather", ".arrow", ".pkl", ".npz", ".gz", ".zip"):
        raise ValueError(f"{path.name}: {path.suffix} is not read; save it as CSV, Parquet or JSON lines")
    else:
        return read_csv(path, columns, units)
    return make_rows(_renamed(table, columns or {}, path.name), path.name, lines, names=columns, units=units)


def _found(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        what = "is a directory, not a file" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {what}; give a table with loss and two of params, tokens, flops")
    return path


def _text(path: Path) -> str:
    raw = path.read_bytes()
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        what = f"byte 0x{raw[error.start]:02x} in line {line} is not UTF-8"
        raise ValueError(f"{path.name}: {what}; save the file as UTF-8 text") from error


def _read_json(path: Path) -> tuple[dict[str, list[Any]], np.ndarray | None]:
    """The columns of a file of JSON objects, one a line or in one list, and the line of every row."""
    text, number, numbers, found = _text(path), 0, None, []
    try:
        if path.suffix == ".json":
            found = json.loads(text)
        else:
            lines = {i + 1: line for i, line in enumerate(text.splitlines()) if line.strip()}
            numbers = np.array(list(lines), int)
            while len(found) < len(lines):
                number = int(numbers[len(found)])
                found.append(json.loads(lines[number]))
    except (ValueError, RecursionError) as error:  # the latter of brackets in brackets
        place = f"line {getattr(error, 'lineno', 1) if numbers is None else number}"
        raise ValueError(f"{path.name}, {place}: not JSON ({getattr(error, 'msg', error)})") from error
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{path.name}: a JSON object a line, or a list of them, is wanted: a row each")
    names = list(dict.fromkeys(name for row in found for name in row))
    return {name: [row.get(name) for row in found] for name in names}, numbers


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"{path.name}: Parquet needs the extra `data` (pip install -e '.[data]')") from error
    try:
        return parquet.read_table(path).to_pydict()
    except (ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path.name}: not a Parquet file ({' '.join(str(error).split())})") from error


def _renamed(table: Mapping[str, list[Any]], columns: Mapping[str, str], source: str) -> dict[str, list[Any]]:
    """The table under our names; a column of the file that had the name of a mapped one is left out."""
    absent = [(0, name, f"columns names {theirs!r} for it") for name, theirs in columns.items() if theirs not in table]
    if absent:
        missing = absent[0][2] + f", which is not there; there are {', '.join(table) or 'none'}"
        raise RowError([(0, absent[0][1], missing)], source)
    ours = {theirs: name for name, theirs in columns.items()}
    return {ours.get(name, name): values for name, values in table.items() if name in ours or name not in columns}
