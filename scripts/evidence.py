"""Run the commands of a page of docs/results again, and say number by number what lies outside the page's interval.

`python scripts/evidence.py weight_movement`, or `make evidence PAGE=weight_movement`; without a page all that take at
most ten minutes. docs/results/evidence.toml has every page's commands. What a run wrote (`tables.md` in its directory)
is compared with the page's own tables: "96.29 ± 0.14" and "0.514 (0.476 to 0.553)" by their intervals, other numbers
digit by digit. Sentences and pictures are not compared. `--index` writes the table of all pages into README.md there.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
MARKS = ("<!-- evidence -->", "<!-- end of evidence -->")
LONGEST = 600  # seconds of a page that runs without being named
NUMBER = r"[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"


class MarkdownTable(NamedTuple):
    """Headings and rows of cells, as text."""

    columns: list[str]
    rows: list[list[str]]

    @property
    def names(self) -> list[str]:
        """The headings as they are compared, without signs and spaces."""
        return [re.sub(r"\W+", "", name.lower()) for name in self.columns]


class Range(NamedTuple):
    """A number of a cell and its interval; a number without one is known to half a unit of its last digit."""

    value: float
    low: float
    high: float
    measured: bool

    def holds(self, other: "Range") -> bool:
        """Whether another number lies in the interval; without one, whether both are one number, rounded."""
        slack = 1e-9 * abs(self.value)  # 0.1 + 0.2 is 0.30000000000000004
        if not self.measured:
            slack += max(0.0, (other.high - other.low - self.high + self.low) / 2)  # as many digits as the coarser has
        return self.low - slack <= other.value <= self.high + slack


class Compared(NamedTuple):
    """Numbers of a page: how many it has, how many were compared, a line for each that lies outside."""

    numbers: int
    compared: int
    outside: list[str]


def pages() -> dict[str, dict[str, Any]]:
    """Every page's entry of evidence.toml."""
    return tomllib.loads((RESULTS / "evidence.toml").read_text(encoding="utf-8"))


def read_tables(text: str) -> list[MarkdownTable]:
    """The tables of a Markdown text."""
    found = []
    for block in re.findall(r"(?:^\|.*\|[ ]*\n)+", text, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in block.splitlines()]
        found.append(MarkdownTable(head, rows))
    return found


def read_number(text: str) -> Range:
    """A number as it stands, known to half a unit of its last digit."""
    text = text.replace(",", "").replace("−", "-")
    digits, _, exponent = text.partition("e")
    half = 0.5 * 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return Range(float(text), float(text) - half, float(text) + half, False)


def read_cell(text: str) -> list[Range]:
    """The number of "a ± b" or "a (b to c)" with its interval, or all numbers of another cell."""
    text = text.replace("*", "")
    if match := re.match(rf"({NUMBER}) ± ({NUMBER})", text):
        value, half = read_number(match[1]).value, read_number(match[2]).value
        return [Range(value, value - half, value + half, True)]
    if match := re.match(rf"({NUMBER})\S* \(({NUMBER})\S* to ({NUMBER})\S*\)", text):
        value, low, high = (read_number(one).value for one in match.groups())
        return [Range(value, low, high, True)]
    return [read_number(one) for one in re.findall(rf"(?<![\w.]){NUMBER}(?![\w.])", text)]


def partner(table: MarkdownTable, others: Sequence[MarkdownTable]) -> MarkdownTable | None:
    """The table that shares most headings, two at least, with this one and has as many rows."""
    shared = lambda other: len(set(table.names) & set(other.names))  # noqa: E731
    found = [other for other in others if len(other.rows) == len(table.rows) and shared(other) >= 2]
    return max(found, key=shared, default=None)


def compare(page: Sequence[MarkdownTable], run: Sequence[MarkdownTable]) -> Compared:
    """Compare the tables of a run with those of a page: same headings, row by row.

    A cell without a number must be equal.
    """
    numbers = compared = 0
    outside, free = [], list(run)
    for table in page:
        numbers += sum(len(read_cell(cell)) for row in table.rows for cell in row)
        other = partner(table, free)
        if other is None:
            continue
        free.remove(other)
        places = [(i, other.names.index(name)) for i, name in enumerate(table.names) if name and name in other.names]
        for mine, theirs in zip(table.rows, other.rows, strict=True):
            for i, j in places:
                name, said, found = table.columns[i], mine[i], theirs[j]
                if said in ("", "–"):  # left out of the page
                    continue
                ours, values = read_cell(said), read_cell(found)
                compared += len(ours)
                inside = bool(ours) and len(ours) == len(values) and all(map(Range.holds, ours, values))
                if not inside and said.replace("*", "") != found:
                    outside.append(f"{' | '.join(mine[:3])} | {name}: {found} is outside the page's {said}")
    return Compared(numbers, compared, outside)


def words_of(command: str) -> list[str]:
    """A page's command as it runs here: this Python, this checkout, the data where they are."""
    data = os.environ.get("TESSERA_DATA", "")
    words = []
    for word in shlex.split(command):
        setting, equals, value = word.partition("=")
        if value == "DATA":
            words += [f"{setting}={Path(data).resolve()}"] if data else []  # without it the command downloads
        elif value == "RUNS.csv":
            words.append(f"{setting}={Path(data).resolve() / 'scaling' / 'chinchilla_figure4.csv'}")
        elif word.startswith("scripts/"):
            words.append(str(ROOT / word))
        elif word.startswith("configs/"):
            words.append(str(ROOT / word))
        elif value.startswith((".cache/", "configs/")):
            words.append(f"{setting}={','.join(str(ROOT / p) if '/' in p else p for p in value.split(','))}")
        else:
            words.append(word)
    if words[0] == "python":
        return [sys.executable, *words[1:]]
    return [sys.executable, "-m", "tessera.cli.main", *words[1:]] if words[0] == "tessera" else words


def run_page(name: str, entry: Mapping[str, Any], root: Path) -> int:
    """Run a page's commands in an empty directory and print what is outside. Returns 0 where nothing is."""
    directory = root / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    began = time.monotonic()
    for command in entry["commands"]:
        print(f"{name}: {command}", flush=True)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with (directory / "output.txt").open("a", encoding="utf-8") as output:
            done = subprocess.run(words_of(command), cwd=directory, env=environment, stdout=output, stderr=output)
        if done.returncode:
            print(f"{name}: failed with status {done.returncode}; see {directory / 'output.txt'}")
            return 1
    took = time.monotonic() - began
    if "compared" in entry:
        print(f"{name}: ran in {took:.0f} s; no number is compared: {entry['compared']}")
        return 0
    written = sorted(directory.rglob("tables.md"), key=lambda path: path.stat().st_mtime)
    run = [table for path in written for table in read_tables(path.read_text(encoding="utf-8"))]
    found = compare(read_tables((RESULTS / f"{name}.md").read_text(encoding="utf-8")), run)
    for line in found.outside:
        print(f"{name}: {line}")
    print(
        f"{name}: {took:.0f} s; of the {found.numbers} numbers in the page's tables {found.compared} were compared, "
        f"{len(found.outside)} are outside"
    )
    return 1 if found.outside or not found.compared else 0


def index() -> str:
    """The table of all pages: command, time, seeds, commit, what is compared."""
    lines = ["| page | made by | time | seeds | commit | compared |", "|---" * 6 + "|"]
    for name, entry in pages().items():
        commands = "<br>".join(f"`{shorter(command)}`" for command in entry["commands"])
        seconds = f"{entry['seconds']:,} s" if entry["seconds"] else "not noted"
        compared = f"no: {entry['compared']}" if "compared" in entry else "numbers of tables"
        cells = (f"[{name}]({name}.md)", commands, seconds, entry["seeds"], entry["commit"], compared)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shorter(command: str) -> str:
    """The command without its directories, which the page itself has."""
    words = [word for word in command.split() if not re.match(r"--workdir=|--config\.data\.(text\.)?dir=", word)]
    return " ".join(words)


def write_index(text: str) -> str:
    """README.md of the results with the table in it."""
    head, _, rest = text.partition(MARKS[0])
    return f"{head}{MARKS[0]}\n{index()}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"


def main() -> int:
    """Returns the exit status: 1 where a command failed or a number lies outside."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help=f"names of pages; all of at most {LONGEST} seconds by default")
    parser.add_argument("--root", type=Path, default=ROOT / "runs" / "evidence", help="where the runs go")
    parser.add_argument("--index", action="store_true", help="write the table of all pages into README.md, run nothing")
    options = parser.parse_args()
    entries, readme = pages(), RESULTS / "README.md"
    if options.index:
        readme.write_text(write_index(readme.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    for name in options.pages:
        if name not in entries:
            parser.error(f"no page {name!r} in docs/results; the pages are {', '.join(entries)}")
    short = [name for name, one in entries.items() if 0 < one["seconds"] <= LONGEST and "needs" not in one]
    status = [run_page(name, entries[name], options.root) for name in options.pages or short]
    return max(status)


if __name__ == "__main__":
    sys.exit(main())
