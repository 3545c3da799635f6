"""The search script, killed at random moments in processes of its own."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import run_here

from tessera.cli import find_ticket
from tessera.infra.artifacts import load_extra

ROOT = Path(__file__).parents[2]
SMALL = [
    "--config=configs/lottery_digits.py",
    "--config.seeds=(0, 3)",
    "--config.model.hidden=(12, 8)",
    "--config.train.steps=20it",
    "--config.train.eval_every=10",
    "--config.train.save_seconds=0.0",
    "--config.search.levels=2",
    "--config.search.rewind=10it",
]


def search(workdir, *more):
    return run_here("find-ticket", *SMALL, f"--workdir={workdir}", *more)


def start(workdir, *more):
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    cpu = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.find_ticket", *SMALL, f"--workdir={workdir}", *more],
        cwd=ROOT,
        env=os.environ | cache | cpu,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, timeout=300):
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, output
    return output


def levels(workdir):
    """Path -> contents of what a finished search keeps: the table, and each level's rows."""
    rows = {path.name: load_extra(path)["rows"] for path in sorted((workdir / "levels").iterdir())}
    return rows | {"csv": (workdir / "tickets.csv").read_bytes()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("search") / "whole"
    status, output = search(workdir)
    assert status == 0, output
    return workdir, output


@pytest.mark.long
def test_a_search_ends_with_a_table_a_csv_and_a_page(reference):
    workdir, output = reference
    assert str(workdir / "report.html") in output.replace("\n", "")
    page = (workdir / "report.html").read_text()
    assert "Lottery tickets" in page and "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")
    table = np.genfromtxt(workdir / "tickets.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    assert len(table) == 2 + 2 * 3 * 2  # dense, then levels x arms x seeds
    assert set(table["arm"]) == {"dense", "ticket", "reinit", "random_mask"}
    assert {path.name for path in (workdir / "levels").iterdir()} == {"00", "01", "02"}


def test_a_finished_search_is_not_done_again(reference):
    workdir, _ = reference
    before = {path: path.stat().st_mtime_ns for path in (workdir / "levels").rglob("*") if path.is_file()}
    status, output = search(workdir)
    assert status == 0, output
    assert {path: path.stat().st_mtime_ns for path in (workdir / "levels").rglob("*") if path.is_file()} == before


def kill_until_done(workdir, kills, *more):
    """Start and kill the search `kills` times, between its first file and its last; returns how often it was alive."""
    rng, died = random.Random(kills), 0
    while died < kills and not (workdir / "report.html").exists():
        process = start(workdir, *more)
        while process.poll() is None and not (workdir / "config.json").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 8.0))
        died += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return died


@pytest.mark.long
def test_killed_once_it_ends_the_same(reference, tmp_path, monkeypatch):
    process = start(tmp_path)
    while process.poll() is None and not (tmp_path / "levels" / "00").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "tickets.csv").exists()
    monkeypatch.setattr(find_ticket, "print_report", lambda *_: None)  # the page of these rows has its test
    status, output = search(tmp_path)
    assert status == 0, output
    assert levels(tmp_path) == levels(reference[0])


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_ends_the_same(tmp_path):
    # 420 saves: on a busy machine they alone take minutes.
    longer = ("--config.train.steps=600it", "--config.search.levels=6")
    finish(start(tmp_path / "whole", *longer), timeout=1800)
    assert kill_until_done(tmp_path / "killed", 20, *longer) == 20
    finish(start(tmp_path / "killed", *longer), timeout=1800)
    assert levels(tmp_path / "killed") == levels(tmp_path / "whole")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.search.ratee=0.3", "rate"),
        pytest.param("--config.search.arms=('winner',)", "winner", marks=pytest.mark.slow),
        ("--config.train.steps=40 minutes", "40 minutes"),
        pytest.param("--config.data.name=mnits", "mnist", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_setting_is_one_clear_line(tmp_path, argument, message):
    status, output = search(tmp_path / "bad", argument)
    assert status != 0
    assert message in output and "Traceback" not in output


@pytest.mark.long
def test_a_workdir_made_with_another_config_is_refused(reference):
    status, output = search(reference[0], "--config.lr=0.5")
    assert status != 0
    assert "lr" in output and "0.5" in output and "Traceback" not in output
