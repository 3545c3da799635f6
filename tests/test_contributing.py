"""The guides of CONTRIBUTING.md are short, and their code does what they say."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from lottery import criteria
from moe import gate
from tessera.optim import optimizer

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
GUIDES = {
    name: guide
    for name, guide in re.findall(r"^## How to add a (\w+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
}


def blocks(guide):
    return re.findall(r"```python\n(.*?)```", guide, re.DOTALL)


def test_the_guides_are_there_and_short():
    assert list(GUIDES) == ["router", "criterion", "law", "schedule", "config"]
    assert all(guide.count("\n") < 60 for guide in GUIDES.values())


@pytest.mark.parametrize("name", ["router", "criterion", "law", "schedule"])
def test_the_worked_example_runs(name, monkeypatch):
    # The examples register what they make; the tables are copies here.
    monkeypatch.setattr(gate, "ROUTERS", dict(gate.ROUTERS))
    monkeypatch.setattr(criteria, "CRITERIA", dict(criteria.CRITERIA))
    monkeypatch.setattr(optimizer, "SCHEDULES", dict(optimizer.SCHEDULES))
    code = "\n".join(blocks(GUIDES[name]))
    assert "assert" in code
    exec(compile(code, f"CONTRIBUTING.md: {name}", "exec"), {"__name__": "contributing"})


def test_the_worked_config_is_one(tmp_path):
    (source,) = blocks(GUIDES["config"])
    space: dict = {}
    exec(compile(source, "CONTRIBUTING.md: config", "exec"), space)
    assert space["get_config"]("wide").model.width == 256 and set(space["VARIANTS"]) == {"", "wide"}
    assert all(word in ast.get_docstring(ast.parse(source)) for word in ("What:", "Cost:", "Expected:", "Command:"))
    if importlib.util.find_spec("tessera.infra.config_files"):
        from tessera.infra.config_files import load_config

        path = tmp_path / "untied.py"
        path.write_text(source)
        assert load_config(f"{path}:wide")[0]["model"]["width"] == 256


@pytest.mark.parametrize("name", ["AGENTS.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(name):
    named = re.findall(r"`([\w./-]+/[\w./-]*)`", (ROOT / name).read_text())
    missing = [path for path in named if not (ROOT / path).exists()]
    assert named and not missing
