"""Launch files: shells can read them, and they say what the program understands."""

import re
import subprocess
from pathlib import Path

import pytest

from tessera.cli.main import HOSTS

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "scripts" / "launch").iterdir())


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix != ".yaml"], ids=lambda path: path.name)
def test_a_shell_can_read_it(path):
    run = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=30)
    assert run.returncode == 0 and not run.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_flags_and_variables_are_those_of_the_program(path):
    text = path.read_text()
    command = text.partition("train.py")[2]
    flags = set(re.findall(r"--(\w+_seconds|coordinator|process\w*)\b", command))
    assert flags and flags <= {flag.name for flag in HOSTS}
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists()
