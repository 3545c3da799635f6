"""Every module and name of the glossary exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    [cell.strip() for cell in line.strip("|\n").split(" | ")]
    for line in (ROOT / "docs" / "glossary.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| term ")
]
NAMES = sorted({name for row in ROWS for name in re.findall(r"`([\w.]+)`", row[2])})


def defined(path):
    """Names that a module's own source binds at its top level."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def exists(name):
    *parents, last = name.split(".")
    whole = ROOT.joinpath(*parents, last)
    if whole.with_suffix(".py").exists() or (whole / "__init__.py").exists():
        return True
    module = ROOT.joinpath(*parents)
    path = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
    return path.exists() and last in {*defined(path), *re.findall(r'"(\w+)"', path.read_text())}


def test_every_term_has_a_line_a_place_and_its_paper_or_none():
    assert len(ROWS) > 60
    for row in ROWS:
        assert len(row) == 4 or (len(row) == 3 and row[2].endswith("|")), row
        assert "`" in row[2], f"{row[0]}: no place in the code"
    terms = [row[0] for row in ROWS]
    assert len(set(terms)) == len(terms)


@pytest.mark.parametrize("name", NAMES)
def test_the_place_exists(name):
    assert exists(name)


def new_names():
    """Names in the right column of the changelog's tables; `.name` is beside the last whole name."""
    for line in (ROOT / "CHANGELOG.md").read_text().splitlines():
        cells = line.strip("| ").split(" | ")
        if len(cells) == 2 and line.startswith("| `"):
            package = ""
            for name in re.findall(r"`(\.?[a-z][\w.]+)`", cells[1]):
                package = package if name.startswith(".") else name.rpartition(".")[0]
                yield package + name if name.startswith(".") else name


@pytest.mark.parametrize("name", sorted(set(new_names())))
def test_where_the_changelog_sends_readers_exists(name):
    assert exists(name)
