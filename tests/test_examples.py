"""The examples are short programs without `tessera` or configs, and run as they stand to their last assertion."""

import ast
import re
import runpy
from pathlib import Path

import jax
import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_there_are_five():
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_stands_alone(path):
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    imported = {
        (alias.name if isinstance(node, ast.Import) else node.module).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not imported & {"tessera", "configs", "scripts", "ml_collections"}
    assert source.count("\n") <= 100
    assert isinstance(tree.body[-1], ast.Assert)
    assert f"Run: python examples/{path.name}" in ast.get_docstring(tree)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, monkeypatch, capsys):
    # Set and taken back here, as an example may set it for the devices it pretends to have.
    monkeypatch.setenv("XLA_FLAGS", "")
    with jax.numpy_rank_promotion("allow"):  # JAX's default, which its user has
        runpy.run_path(str(path), run_name="__main__")
    assert re.search(r"\d", capsys.readouterr().out)
