"""A training started by Open MPI's mpirun: two processes that JAX joins by itself, equal to one process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from small_runs import TRAIN

from tessera.infra.logger import METRICS, read_rows

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
SHORT = [*TRAIN, "--config.steps=40", "--config.eval.every=20"]


def train(workdir, devices, *launcher):
    cache = str(ROOT / ".cache" / f"jax-{jax.__version__}-scripts")
    variables = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "JAX_COMPILATION_CACHE_DIR": cache}
    run = subprocess.run(
        [*launcher, sys.executable, "-m", "scripts.train", *SHORT, f"--workdir={workdir}"],
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
