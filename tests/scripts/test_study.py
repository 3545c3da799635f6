"""Experiments and the analysis of a finished search, end to end on digits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]


def script(name, *arguments):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / f"jax-{jax.__version__}-scripts")}
    cpu = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.run(
        [sys.executable, "-m", f"scripts.{name}", *arguments],
        cwd=ROOT,
        env=os.environ | cache | cpu,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "instability:tiny",
        "transfer:tiny",
        "transfer:sources-tiny",
        "movement:tiny",
        "population:tiny",
        "distribution:tiny",
        "reasons:tiny",
        "reliability:tiny",
        "rewinding:tiny",
        "sparse_training:tiny",
        "strong:tiny",
        "ablations:tiny",
    ],
)
def test_a_study_writes_its_page_and_goes_on_from_its_memo(name, tmp_path):
    command = ("study", f"--config=configs/study_{name.replace(':', '.py:')}", f"--workdir={tmp_path / 'run'}")
    first = script(*command)
    assert first.returncode == 0, first.stderr
    table = (tmp_path / "run" / "table.md").read_text()
    assert table.count("|") > 20 and (tmp_path / "run" / "figures" / "picture.png").stat().st_size < 300_000
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()
    memo = sorted((tmp_path / "run" / "memo").rglob("*.json"))
    stamps = [path.stat().st_mtime_ns for path in memo]
    again = script(*command)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "table.md").read_text() == table
    assert [path.stat().st_mtime_ns for path in memo] == stamps, "nothing is computed twice"


@pytest.mark.slow
def test_a_finished_search_is_analysed(tmp_path):
    search = script(
        "find_ticket",
        "--config=configs/lottery_digits.py",
        "--config.seeds=(0, 3)",
        "--config.model.hidden=(12, 8)",
        "--config.train.steps=40it",
        "--config.train.eval_every=20",
        "--config.search.levels=2",
        "--config.search.score=snip",
        "--config.search.scope=erk",
        "--config.search.arms=('ticket', 'large_init', 'at_init')",
        f"--workdir={tmp_path / 'run'}",
    )
    assert search.returncode == 0, search.stderr
    found = script("analyze_ticket", "--config=configs/analyze.py", f"--config.search={tmp_path / 'run'}")
    assert found.returncode == 0, found.stderr
    out = tmp_path / "run" / "analysis"
    page = (out / "report.html").read_text()
    for part in ("Connectivity", "Overlap over seeds", "Sharpness"):
        assert f"<h2>{part}</h2>" in page
    rows = json.loads((out / "memo" / "level2_ticket_sharpness.json").read_text())
    assert {row["seed"] for row in rows} == {0, 3} and all(row["residual"] >= 0 for row in rows)
    header = (out / "overlap.csv").read_text().splitlines()[0]
    assert "expected" in header and "ratio" in header


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("analyze_ticket", "--config.search="), "config.search: the workdir of a finished search is needed"),
        (("analyze_ticket", "--config.search=/nowhere"), "has no config.json"),
        (("study", "--config.name=stability"), "config.name='stability': no such setting; did you mean 'instability'?"),
        (
            ("study", "--config=configs/study_sparse_training.py:tiny", "--config.search.scope=global"),
            "config.search.scope: 'global' gives layers no counts to share",
        ),
        (("find_ticket", "--config.search.structure=7x7"), "dense0/kernel: blocks of 7 x 7 do not divide a 64 x 300"),
    ],
)
def test_wrong_settings_end_in_one_line(arguments, message, tmp_path):
    name, *rest = arguments
    found = script(name, *rest, f"--workdir={tmp_path / 'run'}")
    assert found.returncode == 2 and message in found.stderr and "Traceback" not in found.stderr
