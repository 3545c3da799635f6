"""The example in docs/sweeps.md runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

from scaling.sweeps import plan, store

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")


def test_a_sweep_of_your_own_training(tmp_path):
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        (tmp_path / re.match(r"# (\w+\.py)", code)[1]).write_text(code)
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    command = [sys.executable, "my_sweep.py"]
    environment = os.environ | {"PYTHONPATH": paths}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("6 ") and len((tmp_path / "out" / "runs.csv").read_text().splitlines()) == 7


def test_the_page_speaks_of_what_there_is():
    for name in re.findall(r"`plan\.(\w+)`", PAGE):
        assert hasattr(plan.PlanConfig((8,), (1.0,)), name), name
    assert "readouts" in PAGE and hasattr(store.Store, "missing")
