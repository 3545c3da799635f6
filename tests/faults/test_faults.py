"""A few of every fault that `make test-faults` counts, in a process that has not used JAX."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_nothing_is_lost():
    disks = "--disks=2" if os.geteuid() == 0 else "--disks=0"
    counts = ["--kills=6", disks, "--files=40", "--pairs=2", "--requests=100", "--fuzz=0", "--schemathesis=0"]
    found = subprocess.run(
        [sys.executable, str(HERE / "faults.py"), *counts, "--only=train, dense;search;study;export"],
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert found.returncode == 0 and "lost: 0" in found.stdout, found.stdout + found.stderr


def test_every_moment_of_a_kill_is_in_the_code():
    """A renamed function would be a kill that never comes."""
    calls = re.findall(r'Moment\("([\w.]+):([\w.]+)"', (HERE / "faults.py").read_text())
    assert len(calls) > 10
    for module, path in calls:
        owner = importlib.import_module(module)
        for part in path.split("."):
            owner = getattr(owner, part)
