"""Tables of finished runs: load, check, and complete params, tokens and FLOPs from each other.

A row needs a loss and any two of params, tokens and flops; the third follows from FLOPs = 6 x params x tokens
(Kaplan et al. 2020, section 2.1). Other columns are passed on to laws that use them (experts, sparsity, epochs ...).
Files are read by `scaling.tables`.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

SIZES = ("params", "tokens", "flops")
PER_PARAMETER_AND_TOKEN = 6.0
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
WORDS = UNITS | {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
# A unit at the end of a column's name: "(M)", "[1e9]", "(in billions)"; "in millions"; "_M", which may be no unit.
HEADER_UNITS = (
    r"(.+?)\s*[(\[]\s*(?:in |x ?)?\s*([a-z]+?|1e\d\d?|10\^\d\d?)s?(?: (?:params|parameters|tokens|flops))?\s*[)\]]",
    r"(.+?)[\s,_-]+(?:in[\s_])?(thousand|million|billion|trillion)s",
    r"(.+)_([KMBT])",
)
# No run had more: a median above it has a unit twice.
MOST = {"params": 1e13, "tokens": 1e14, "flops": 1e28}
# Other names of the four columns, as tables have them; compared in small letters and digits alone.
SYNONYMS = {
    "params": "n nparams numparams parameters parametercount numparameters nparameters modelsize size "
    "weights nweights numweights nonembeddingparams paramsnoembed nonzeroparams",
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
      names: our name of a column -> the file's, which the message then gives too.

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
        names: Mapping[str, str] | None = None,
    ):
        names = names or {}
        self.problems = list(problems)

        def place(row: int) -> str:
            # Row 0 is the header: the full column.
            return "" if not row else f"row {row}, " if lines is None else f"line {lines[row - 1]}, "

        def called(column: str) -> str:
            other = names.get(column, column)
            return f"column {column!r}" + (f" (the file's {other!r})" if other != column else "")

        shown = [f"  {place(row)}{called(column)}: {what}" for row, column, what in self.problems[:20]]
        if len(self.problems) > len(shown):
            shown.append(f"  ... and {len(self.problems) - len(shown)} more")
        count = "1 value" if len(self.problems) == 1 else f"{len(self.problems)} values"
        counted = "rows count from 1 after the header; " if lines is None else ""
        head = f"{count} cannot be used ({counted}wanted: positive finite numbers)"
        if not any(row for row, *_ in self.problems):
            head = "columns cannot be used"
        super().__init__(f"{source}: {head}\n" + "\n".join(shown))


@dataclass(frozen=True)
class Rows:
    """Checked rows.

    Attributes:
      columns: column name -> values [R]; params, tokens, flops and loss are always there, float64, positive and finite.
        A column with other than numbers has strings.
      source: where they come from, for messages.
      lines: the line of every row in its file [R]; None for rows that come from no file.
      names: our name of a column -> the file's, where it has another.
      notes: what was read from the names of columns, for messages.
      completed: the one of params, tokens and flops that follows from the other two; "" where all were given.

    Example:
      >>> import scaling
      >>> rows = scaling.make_rows({"params": [1e6, 2e6], "tokens": [1e8, 1e8], "loss": [3.2, 3.0]})
      >>> len(rows), rows["flops"].tolist(), len(rows.take(rows["loss"] < 3.1))
      (2, [600000000000000.0, 1200000000000000.0], 1)
    """

    columns: Mapping[str, np.ndarray]
    source: str = "rows"
    lines: Int[np.ndarray, " R"] | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    completed: str = ""

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
        return replace(self, columns={name: values[which] for name, values in self.columns.items()}, lines=lines)

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
            raise RowError(problems, self.source, self.lines, self.names)
        return found


def counted(number: int, what: str) -> str:
    """A count with its noun, as in "1 row" and "2 rows"."""
    return f"{number} {what}{'s' * (number != 1)}"


def _number(value: Any, units: bool = False, times: float = 1.0) -> float | None:
    """A finite number, or None; `units`: 1.2B is 1.2e9; `times`: the factor of one without a unit."""
    try:
        number = float(value) * times
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
    *,
    names: Mapping[str, str] | None = None,
    units: Mapping[str, float] | None = None,
) -> Rows:
    """Check columns and complete them.

    Args:
      columns: name -> values of equal length; `loss` (nats per token) and at least two of `params`, `tokens`, `flops`.
        Sizes may have units: "1.2B".
      source: for messages.
      lines: the line of every row in its file, for messages.
      names: our name of a column -> the file's. A unit at its end, as in "weights (M)", is read.
      units: factors of numbers that have no unit of their own, by column; they go before those of names.

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
    names, units = names or {}, units or {}
    sizes = [name for name in SIZES if name in columns]
    own = [names.get(name, name) for name in columns]
    there = f"there are {', '.join(own) or 'none'}"
    absent = [name for name in ("loss", *SIZES) if name not in columns]
    for name in names:
        if near := difflib.get_close_matches(name.lower(), absent, 1, 0.7):
            said = f"columns.{name} is none of ours; did you mean {near[0]}? "
            raise RowError([(0, name, said + f"--config.columns.{near[0]}={names[name]!r}")], source)
    guess = "".join(_guesses(absent, own))
    if own and absent and not guess:
        guess = f"; say which is the {absent[0]} with --config.columns.{absent[0]}=NAME"
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
    strange = [(0, name, f"units names it, which is not there; there are {', '.join(columns)}") for name in units]
    if strange := [problem for problem in strange if problem[1] not in columns]:
        raise RowError(strange, source)
    read, asked = _units_of_names(columns, names, units)
    factors = read | dict(units)
    checked, problems = {}, asked
    for name in ("loss", *sizes):
        raw = list(columns[name])
        numbers = [_number(value, name != "loss", factors.get(name, 1.0)) for value in raw]
        if name in read and np.median([number or 0.0 for number in numbers]) > MOST[name]:
            problems.append((0, name, _ask(name, names[name], read[name], "these look like counts")))
        bad = [i for i, number in enumerate(numbers) if number is None or number <= 0]
        problems += [(i + 1, name, _complaint(raw[i])) for i in bad]
        checked[name] = np.array([math.nan if number is None else number for number in numbers])
    if problems:
        raise RowError(sorted(problems), source, lines, names)
    notes = [
        f"{name}: numbers without a unit are taken times {_power(factor)}, as the column's name {names[name]!r} says; "
        f"--config.units.{name}=1 takes them as they are."
        for name, factor in read.items()
    ]
    completed = next((name for name in SIZES if name not in sizes), "")
    named = {name: theirs for name, theirs in names.items() if theirs != name}
    return Rows(_complete(checked) | _others(columns, factors), source, lines, named, tuple(notes), completed)


def _units_of_names(
    columns: Mapping[str, Sequence[Any] | np.ndarray], names: Mapping[str, str], given: Mapping[str, float]
) -> tuple[dict[str, float], list[tuple[int, str, str]]]:
    """Factors of numbers without a unit by what the file calls a column, and the problems of those that may be none."""
    read, asked = {}, []
    for name, theirs in names.items():
        stem, factor, sure = _header_unit(theirs)
        sized = re.search("params|tokens|flops", name)
        if not (factor and sized) or name in given or all(_number(value) is None for value in columns[name]):
            continue
        plain = re.sub("[^a-z0-9]", "", stem.lower())
        if sure or sized[0] in plain or sized[0][:-1] in plain or plain in SYNONYMS[sized[0]].split():
            read[name] = factor
        else:
            asked.append((0, name, _ask(name, theirs, factor, "the name does not say of what")))
    return read, asked


def _header_unit(header: str) -> tuple[str, float, bool]:
    """The name before a unit at its end, the unit's factor (0: none), and whether it can be nothing else."""
    for i, pattern in enumerate(HEADER_UNITS):
        found = re.fullmatch(pattern, header.strip(), re.IGNORECASE if i < 2 else 0)
        word = found[2].lower() if found else ""
        factor = float(word.replace("10^", "1e")) if word[:1] == "1" else WORDS.get(word, 0.0)
        if found and factor:
            return found[1], factor, i < 2
    return header, 0.0, False


def _ask(name: str, theirs: str, factor: float, why: str) -> str:
    unit = _power(factor)
    text = f"is {theirs!r} in units of {unit} ({why})? Say --config.units.{name}={unit} if it is, "
    return text + f"--config.units.{name}=1 if it is not"


def _power(factor: float) -> str:
    return f"1e{round(math.log10(factor))}"


def _guesses(wanted: Sequence[str], there: Sequence[str]) -> list[str]:
    """For each wanted column that a column by another name may be: how to say so."""
    plain = {re.sub(r"[^a-z0-9]", "", _header_unit(name)[0].lower()): name for name in there}
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


def _others(columns: Mapping[str, Sequence[Any] | np.ndarray], factors: Mapping[str, float]) -> dict[str, np.ndarray]:
    others = {}
    for name, raw in columns.items():
        if name not in (*SIZES, "loss"):
            sized, times = re.search("tokens|params", name) is not None, factors.get(name, 1.0)
            numbers = [_number(value, sized, times) for value in raw]
            numeric = all(number is not None for number in numbers)
            others[name] = np.array(numbers, float) if numeric else np.array([str(value) for value in raw])
    return others
