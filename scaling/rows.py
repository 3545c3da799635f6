"""Tables of finished runs: load, check, and complete params, tokens and FLOPs from each other.

A row needs a loss and any two of params, tokens and flops; the third follows from FLOPs = 6 x params x tokens
(Kaplan et al. 2020, section 2.1). Other columns are passed on to laws that use them (experts, sparsity, epochs ...).
Files are read by `scaling.tables`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

SIZES = ("params", "tokens", "flops")
PER_PARAMETER_AND_TOKEN = 6.0
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
# Other names of the four columns, as tables have them; compared in small letters and digits alone.
SYNONYMS = {
    "params": "n nparams numparams parameters parametercount numparameters nparameters modelsize size "
    "nonembeddingparams paramsnoembed nonzeroparams",
    "tokens": "d ntokens numtokens trainingtokens traintokens tokensseen tokencount",
    "flops": "c compute flop trainingflops trainflops computebudget budget c6nd",
    "loss": "l valloss validationloss evalloss testloss finalloss trainloss crossentropy nll lossnats",
}


class RowError(ValueError):
    """Rows that cannot be used; the message names every wrong row and column.

    Attributes:
      problems: (row, column, what is wrong), rows counted from 1 after the header; 0 for a full column.

    Args:
      problems: see there.
      source: of the rows.
      lines: the line of every row in its file, which the message then gives.

    Example:
      >>> import scaling
      >>> try:
      ...     scaling.make_rows({"params": [1e6, -1.0], "tokens": [1e8, 1e8], "loss": [3.0, 3.1]})
      ... except scaling.RowError as error:
      ...     print(error.problems)
      [(2, 'params', '-1.0 is not positive')]
    """

    def __init__(
        self,
        problems: Sequence[tuple[int, str, str]],
        source: str = "rows",
        lines: Sequence[int] | np.ndarray | None = None,
    ):
        self.problems = list(problems)

        def place(row: int) -> str:
            # Row 0 is the header: the full column.
            return "" if not row else f"row {row}, " if lines is None else f"line {lines[row - 1]}, "

        shown = [f"  {place(row)}column {column!r}: {what}" for row, column, what in self.problems[:20]]
        if len(self.problems) > len(shown):
            shown.append(f"  ... and {len(self.problems) - len(shown)} more")
        count = "1 value" if len(self.problems) == 1 else f"{len(self.problems)} values"
        counted = "rows count from 1 after the header; " if lines is None else ""
        super().__init__(
            f"{source}: {count} cannot be used ({counted}wanted: positive finite numbers)\n" + "\n".join(shown)
        )


@dataclass(frozen=True)
class Rows:
    """Checked rows.

    Attributes:
      columns: column name -> values [R]; params, tokens, flops and loss are always there, float64, positive and finite.
        A column with other than numbers has strings.
      source: where they come from, for messages.
      lines: the line of every row in its file [R]; None for rows that come from no file.

    Example:
      >>> import scaling
      >>> rows = scaling.make_rows({"params": [1e6, 2e6], "tokens": [1e8, 1e8], "loss": [3.2, 3.0]})
      >>> len(rows), rows["flops"].tolist(), len(rows.take(rows["loss"] < 3.1))
      (2, [600000000000000.0, 1200000000000000.0], 1)
    """

    columns: Mapping[str, np.ndarray]
    source: str = "rows"
    lines: Int[np.ndarray, " R"] | None = None

    def __len__(self) -> int:
        return len(self.columns["loss"])

    def __getitem__(self, name: str) -> np.ndarray:
        """A column [R]; a missing one raises KeyError with the existing ones."""
        if name not in self.columns:
            raise KeyError(f"{self.source}: no column {name!r}; there are {', '.join(self.columns)}")
        return self.columns[name]

    def take(self, which: Bool[np.ndarray, " R"] | Int[np.ndarray, " K"]) -> "Rows":
        """Select rows by a boolean mask or by indices (which may repeat)."""
        lines = None if self.lines is None else self.lines[which]
        return Rows({name: values[which] for name, values in self.columns.items()}, self.source, lines)

    def thin(self, most: int) -> Int[np.ndarray, " K"]:
        """Choose at most `most` rows, by index: one at random of each of as many equal parts by rising FLOPs.

        Example:
          >>> import numpy as np, scaling
          >>> rows = scaling.make_rows({"params": np.arange(1.0, 101), "tokens": np.ones(100), "loss": np.ones(100)})
          >>> len(rows.thin(10)), len(rows.thin(1000))
          (10, 100)
        """
        if len(self) <= most:
            return np.arange(len(self))
        edges = np.linspace(0, len(self), most + 1).astype(int)
        order = np.argsort(self["flops"], kind="stable")
        return np.sort(order[np.random.default_rng(0).integers(edges[:-1], edges[1:])])

    def places(self, which: Sequence[int] | np.ndarray, most: int = 10) -> str:
        """Name rows by index for a message: "lines 3 and 7 of runs.csv", by number where they come from no file."""
        found = np.arange(1, len(self) + 1) if self.lines is None else self.lines
        shown = [str(number) for number in found[np.asarray(which, int)]]
        shown = [*shown[:most], "others"] if len(shown) > most else shown
        word = "row" if self.lines is None else "line"
        text = " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))
        return f"{word}{'s' * (len(shown) > 1)} {text}" + (f" of {self.source}" if self.lines is not None else "")

    def without_highest_losses(self, count: int) -> "Rows":
        """Drop the `count` rows with the highest losses; the others stay in order."""
        if not 0 <= count < len(self):
            raise ValueError(f"{self.source}: cannot drop {count} of {counted(len(self), 'row')}")
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
            column = self.columns[name]
            if column.dtype.kind in "fiu" and np.isfinite(column).all():
                found[name] = column.astype(np.float64)
                continue
            values = [_number(value) for value in column.tolist()]
            problems += [
                (i + 1, name, _complaint(raw, positive=False))
                for i, (raw, value) in enumerate(zip(column.tolist(), values, strict=True))
                if value is None
            ]
            found[name] = np.array([math.nan if v is None else v for v in values])
        if problems:
            raise RowError(problems, self.source, self.lines)
        return found


def counted(number: int, what: str) -> str:
    """A count with its noun, as in "1 row" and "2 rows"."""
    return f"{number} {what}{'s' * (number != 1)}"


def _number(value: Any, units: bool = False) -> float | None:
    """A finite number, or None; `units`: 1.2B is 1.2e9."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        found = re.fullmatch(r"\s*([\d.]+(?:e[+-]?\d+)?)\s*([kmbgt])\s*", str(value), re.IGNORECASE)
        if not (units and found):
            return None
        number = float(found[1]) * UNITS[found[2].lower()]
    return number if math.isfinite(number) else None


def _complaint(value: Any, *, positive: bool = True) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        return "empty"
    try:
        number = float(value)
    except (TypeError, ValueError):
        text = str(value).strip()
        if re.fullmatch(r"\d{1,3}([,_ ']\d{3})+(\.\d*)?", text):
            plain = re.sub(r"[,_ ']", "", text)
            return f"{value!r} is not a number: separators of thousands? write {plain}"
        if re.fullmatch(r"-?\d+,\d+(e[+-]?\d+)?", text, re.IGNORECASE):
            return f"{value!r} is not a number: a decimal comma? write {text.replace(',', '.')}"
        if found := re.fullmatch(r"([-+.\de]*\d)\s*[a-zA-Z%/ ]+", text):
            return f"{value!r} is not a number: a unit? write {found[1]}, in the unit wanted"
        return f"{value!r} is not a number"
    if math.isfinite(number) and positive:
        return f"{value} is not positive"
    return f"{value} is not finite"


def make_rows(
    columns: Mapping[str, Sequence[Any] | np.ndarray],
    source: str = "rows",
    lines: Int[np.ndarray, " R"] | None = None,
) -> Rows:
    """Check columns and complete them.

    Args:
      columns: name -> values of equal length; `loss` (nats per token) and at least two of `params`, `tokens`, `flops`.
        Sizes may have units: "1.2B".
      source: for messages.
      lines: the line of every row in its file, for messages.

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
    there = f"there are {', '.join(columns) or 'none'}"
    guess = "".join(_guesses([name for name in ("loss", *SIZES) if name not in columns], columns))
    missing = [] if "loss" in columns else [(0, "loss", f"the column is missing; {there}")]
    if len(sizes) < 2:
        wanted = ", ".join(name for name in SIZES if name not in columns)
        missing.append((0, wanted, f"two of params, tokens and flops are needed; {there}"))
    if missing:
        missing[-1] = (*missing[-1][:2], missing[-1][2] + guess)
    if missing:
        raise RowError(missing, source)
    if not lengths["loss"]:
        raise ValueError(f"{source}: no rows")
    checked, problems = {}, []
    for name in ("loss", *sizes):
        raw = list(columns[name])
        numbers = [_number(value, units=name != "loss") for value in raw]
        bad = [i for i, number in enumerate(numbers) if number is None or number <= 0]
        problems += [(i + 1, name, _complaint(raw[i])) for i in bad]
        checked[name] = np.array([math.nan if number is None else number for number in numbers])
    if problems:
        raise RowError(sorted(problems), source, lines)
    return Rows(_complete(checked) | _others(columns), source, lines)


def _guesses(wanted: Sequence[str], there: Mapping[str, Any]) -> list[str]:
    """For each wanted column that a column by another name may be: how to say so."""
    plain = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in there}
    found = []
    for name in wanted:
        same = [plain[word] for word in (name, *SYNONYMS[name].split()) if word in plain]
        near = same or [there_ for word, there_ in plain.items() if name in word]
        found += [f"; is {near[0]!r} the {name}? Say so with --config.columns.{name}={near[0]!r}"] if near else []
    return found


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
            numbers = [_number(value, units=re.search("tokens|params", name) is not None) for value in raw]
            numeric = all(number is not None for number in numbers)
            others[name] = np.array(numbers, float) if numeric else np.array([str(value) for value in raw])
    return others
