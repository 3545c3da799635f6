"""The sweep script: an end-to-end sweep, killed in processes of its own, and settings that are wrong."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import run_here

from scaling.tables import read_csv

ROOT = Path(__file__).parents[2]
SMALL = [
    "--config=configs/isoflop.py:tiny",
    "--config.plan.widths=(8, 12, 16, 20)",
    "--config.plan.budgets=(5e8, 1e9)",
    "--config.plan.least_steps=10",
    "--config.plan.tokens_per_parameter=(0.1, 1e4)",
    "--config.plan.warmup=4",
    "--config.train.eval_tokens=4096",
    "--config.train.noise_batches=2",
    "--config.report.resamples=20",
]


def flags_of(workdir, *more):
    given = {flag.split("=")[0] for flag in more}  # a flag may be given once
    return [*(flag for flag in SMALL if flag.split("=")[0] not in given), f"--workdir={workdir}", *more]


def start(workdir, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.sweep", *flags_of(workdir, *more)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_a_sweep_killed_at_random_moments_ends_the_same(tmp_path):
    output = finish(start(tmp_path / "whole"))
    assert str(tmp_path / "whole" / "report.html") in output.replace("\n", "")
    rows = read_csv(tmp_path / "whole" / "runs.csv")
    assert len(rows) == 8 and len(set(rows["params"])) == 4
    rng = random.Random(0)
    for _ in range(4):
        process = start(tmp_path / "killed")
        while process.poll() is None and not (tmp_path / "killed" / "runs.csv").exists():
            time.sleep(0.05)
        time.sleep(rng.uniform(0.0, 20.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(tmp_path / "killed"))
    assert (tmp_path / "killed" / "runs.csv").read_bytes() == (tmp_path / "whole" / "runs.csv").read_bytes()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.plan.tokens_per_parameter=(1e9, 2e9)", "no width of"),
        ("--config.plan.lr.expnent=0.1", "exponent"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(tmp_path, argument, message):
    status, output = run_here("sweep", *flags_of(tmp_path / "bad", argument))
    assert status == 2
    assert message in output and "Traceback" not in output
