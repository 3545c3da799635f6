"""The training script under a plan, and a run that goes on under another one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tessera.infra.logger import METRICS, read_rows

ROOT = Path(__file__).parents[2]
SMALL = [
    "--config=configs/lm.py:tiny",
    "--config.steps=12",
    "--config.batch_size=8",
    "--config.length=16",
    "--config.model.layers=2",
    "--config.model.width=16",
    "--config.model.heads=4",
    "--config.model.kv_heads=4",
    "--config.optimizer.warmup=2",
    "--config.checkpoint.every=6",
    "--config.log.every=3",
    "--config.eval.every=6",
    "--config.eval.batches=2",
    "--config.data.max_bytes=200000",
]


def train(workdir, *more):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / f"jax-{jax.__version__}-scripts")}
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-m", "scripts.train", *SMALL, f"--workdir={workdir}", *more]
    run = subprocess.run(
        command, cwd=ROOT, env=os.environ | cache | devices, capture_output=True, text=True, timeout=900
    )
    return run.returncode, run.stdout + run.stderr


def losses(workdir):
    rows = [row for row in read_rows(workdir / METRICS) if "loss" in row]
    return {(row["kind"], row["step"]): row["loss"] for row in rows}


@pytest.mark.slow
def test_a_run_under_a_plan_and_on_under_another_has_the_losses_of_no_plan(tmp_path):
    plain, planned = tmp_path / "plain", tmp_path / "planned"
    for workdir, *more in (
        (plain, "--config.plan="),
        (planned, "--config.plan=fsdp=2, tp=2, cp=2", "--config.sharding.sequence=True"),
    ):
        status, output = train(workdir, *more)
        assert status == 0, output
    expected = losses(plain)
    assert len(expected) == 6 and losses(planned) == pytest.approx(expected, abs=1e-5)
    shutil.rmtree(planned / "checkpoints" / "12")
    status, output = train(planned, "--config.plan=dp=4, tp=2", "--config.sharding.zero=1")
    assert status == 0, output
    assert losses(planned) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan, words",
    [
        ("--config.plan=tp=3", "makes 3 devices and there are 8; nearest valid: tp=8"),
        ("--config.plan=tq=8", "there is no axis 'tq'; did you mean 'tp'?"),
        ("--config.plan=tp=8", "does not divide by tp=8; nearest valid size: 4"),
        ("--config.sharding.context=rng", "did you mean 'ring'?"),
    ],
)
def test_a_bad_plan_is_one_message(tmp_path, plan, words):
    status, output = train(tmp_path / "run", plan)
    assert status == 2 and words in output and len(output.splitlines()) == 1
    assert not (tmp_path / "run").exists()
