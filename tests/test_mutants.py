"""The runner of planted bugs, on a package of three lines; and the list, against the code as it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RUNNER = ROOT / "tests" / "mutants.py"

TOY = """
import toy.numbers


def mean(values):
    return sum(values) / len(values)


def largest(values):
    best = values[0]
    for value in values:
        if value > best:
            best = value
    return best


def forever(values):
    values = list(values)
    while values:
        values.pop()
    return values
"""

TESTS = """
import subprocess, sys
from toy import sums
def test_mean():
    assert sums.mean([1, 2, 6]) == 3
def test_largest():
    assert sums.largest([1, 3, 2]) == 3
def test_empty():
    assert sums.forever([1]) == []
def test_process():
    code = "from toy import numbers; print(numbers.answer())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "42\\n"
"""

LIST = """
[[mutant]]
file = "toy/sums.py"
old = "sum(values) / len(values)"
new = "sum(values)"
breaks = "the mean is the sum"

[[mutant]]
file = "toy/sums.py"
old = "value > best"
new = "value >= best"
breaks = "nothing: equal numbers are the same number"

[[mutant]]
file = "toy/numbers.py"
old = "42"
new = "41"
breaks = "seen in a process that a test starts"

[[mutant]]
file = "toy/sums.py"
old = "best = values[0]"
new = "best = values[-1]"
breaks = "nothing"
equivalent = "any element is a start"

[[mutant]]
file = "toy/sums.py"
old = "a text of last year"
new = "x"
breaks = "stale"
"""


@pytest.fixture
def toy(tmp_path):
    files = {
        "toy/__init__.py": "",
        "toy/sums.py": TOY,
        "toy/numbers.py": "def answer():\n    return 42\n",
        "tests/toy/test_sums.py": TESTS,
        "tests/mutants.toml": LIST,
        "pytest.ini": "[pytest]\npythonpath = .\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def run(root, *options):
    command = [sys.executable, str(RUNNER), f"--root={root}", "--preload=pytest", *options]
    plain = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
    assert not done.stderr, done.stderr
    return done, json.loads((root / "runs" / "mutants" / "report.json").read_text())


def test_killed_survived_equivalent_and_resumed(toy):
    done, report = run(toy)
    row = report["packages"]["all"]
    counts = {name: row[name] for name in ("planted", "killed", "survived", "equivalent", "stale", "not run")}
    assert counts == {"planted": 5, "killed": 2, "survived": 1, "equivalent": 1, "stale": 1, "not run": 0}, done.stdout
    assert row["score"] == pytest.approx(2 / 3, abs=1e-3) and done.returncode == 1
    assert [entry["new"] for entry in report["survived"]] == ["value >= best"]
    assert "test_sums.py::test_mean" in done.stdout and "test_sums.py::test_process" in done.stdout
    # The checkout is as it was, also its bytecode.
    assert (toy / "toy" / "sums.py").read_text() == TOY
    code = "from toy import numbers, sums; print(numbers.answer(), sums.mean([1, 3]))"
    assert subprocess.run([sys.executable, "-c", code], cwd=toy, capture_output=True).stdout == b"42 2.0\n"

    # What is finished is not run again; survivors are, once a test of theirs changed.
    results = toy / "runs" / "mutants" / "results.jsonl"
    lines = len(results.read_text().splitlines())
    run(toy)
    assert len(results.read_text().splitlines()) == lines
    (toy / "tests" / "toy" / "test_sums.py").write_text(
        TESTS + "def test_first():\n    assert str(sums.largest([1.0, 1])) == '1.0'\n"
    )
    _, report = run(toy, "--only", "toy/sums")
    assert report["packages"]["all"]["survived"] == 0


def test_a_mutant_that_never_ends_is_stopped(toy):
    code = f"""if 1:
        import pathlib, sys
        sys.path.insert(0, {str(RUNNER.parent)!r})
        import mutants
        root = pathlib.Path({str(toy)!r})
        mutant = mutants.Mutant("toy/sums.py", "values.pop()", "pass", "never ends")
        tests = [str(test) for test in mutants.tests_of(root, mutant)]
        print([found.code for _, found in mutants.pool(root, [mutants.Task(tests, mutant, limit=2)])])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[-1]"


def test_the_list_fits_the_code(monkeypatch):
    monkeypatch.syspath_prepend(RUNNER.parent)
    import mutants

    listed = mutants.load(ROOT / "tests" / "mutants.toml")
    assert len({mutant[:3] for mutant in listed}) == len(listed)
    stale = [m for m in listed if not (ROOT / m.file).exists() or (ROOT / m.file).read_text().count(m.old) != 1]
    assert len(listed) - len(stale) >= 300, stale
    assert len(stale) <= 0.1 * len(listed), stale
