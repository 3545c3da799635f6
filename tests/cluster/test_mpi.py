"""A training started by Open MPI's mpirun: two processes that JAX joins by itself, equal to one process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tessera.infra.logger import METRICS, read_rows

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
TRAIN = [
    "--config=configs/lm.py:tiny",
    "--config.steps=40",
    "--config.batch_size=8",
    "--config.length=16",
    "--config.model.layers=2",
    "--config.model.width=16",
    "--config.model.heads=4",
    "--config.model.kv_heads=4",
    "--config.optimizer.warmup=2",
    "--config.log.every=10",
    "--config.eval.every=20",
    "--config.eval.batches=2",
    "--config.data.max_bytes=200000",
    "--config.plan=dp=2",
]


def train(workdir, devices, *launcher):
    cache = str(ROOT / ".cache" / f"jax-{jax.__version__}-scripts")
    variables = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "JAX_COMPILATION_CACHE_DIR": cache}
    run = subprocess.run(
        [*launcher, sys.executable, "-m", "scripts.train", *TRAIN, f"--workdir={workdir}"],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return {(row["kind"], row["step"]): row["loss"] for row in read_rows(workdir / METRICS) if "loss" in row}


def test_two_processes_of_mpirun_train_as_one_does(tmp_path):
    if not shutil.which("mpirun"):
        pytest.skip("Open MPI is not here: apt-get install openmpi-bin")
    start = ["mpirun", "-n", "2", "--oversubscribe", *(["--allow-run-as-root"] if os.getuid() == 0 else [])]
    found = train(tmp_path / "two", 1, *start)
    assert max(step for _, step in found) == 40
    assert found == pytest.approx(train(tmp_path / "one", 2), abs=1e-5)
