"""The house's one-way imports, read off the source of every module."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOUR = ("lottery", "moe", "sharding", "scaling")
ROOMS = (*FOUR, "training", "configs", "scripts", "tests")

# Which rooms a room may import from, itself aside.
ALLOWED = {
    "lottery": {"moe.kernels"},
    "moe": {"sharding"},
    "sharding": set(),
    "scaling": set(),
    "training": {*FOUR},
    "scripts": {*FOUR, "training"},
    "configs": set(),
}
ORBAX = ("tessera/infra/artifacts.py", "tessera/infra/checkpoint.py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> list[Path]:
    return sorted(path for room in ALLOWED for path in (ROOT / room).rglob("*.py"))


def test_there_are_modules_to_check():
    assert len(modules()) > 20


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    room = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        target = name.split(".")[0]
        if target in ROOMS and target != room:
            allowed = any(name == arrow or name.startswith(arrow + ".") for arrow in ALLOWED[room])
            assert allowed, (
                f"{path.relative_to(ROOT)} imports {name}; {room} may import {sorted(ALLOWED[room]) or 'none'}"
            )
        if target == "orbax":
            assert path.relative_to(ROOT).as_posix() in ORBAX, f"only {ORBAX} import orbax"
        assert name != "jax.sharding.sharding" and name != "jax.sharding", (
            "import names from jax.sharding, not the module"
        )
        if room == "configs":
            assert target in ("ml_collections", "configs", "__future__"), (
                f"configs import ml_collections only, not {name}"
            )


def test_every_config_says_what_it_costs_and_how_to_run_it():
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.name == "__init__.py":
            continue
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        for word in ("What:", "Cost:", "Expected:", "Command:"):
            assert word in docstring, f"{path.name}: the docstring lacks {word!r}"
