"""Real runs on several processes: one is killed, and the run goes on with another number of them under another plan."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from tessera.infra.logger import METRICS, read_rows

ROOT = Path(__file__).parents[2]
SMALL = [
    "--config=configs/lm.py:tiny",
    "--config.steps=200",
    "--config.batch_size=8",
    "--config.length=16",
    "--config.model.layers=2",
    "--config.model.width=16",
    "--config.model.heads=4",
    "--config.model.kv_heads=4",
    "--config.optimizer.warmup=2",
    "--config.checkpoint.every=50",
    "--config.log.every=10",
    "--config.eval.every=100",
    "--config.eval.batches=2",
    "--config.data.max_bytes=200000",
    "--silence_seconds=60",
    "--join_seconds=120",
]
SLOWLY = ["--config.steps=4000"]  # long enough to be killed on the way


@pytest.fixture
def start():
    """Starts runs; what a failed test leaves running is killed."""
    begun = []

    def run(*arguments):
        begun.extend(processes := launch(*arguments))
        return processes

    yield run
    for process in begun:
        if process.poll() is None:
            process.kill()


def launch(workdir, plan, processes, *more):
    """The processes of one run, four devices in all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / f"jax-{jax.__version__}-scripts")}
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(4 // processes)}
    several = [f"--coordinator={address}", f"--processes={processes}"] if processes > 1 else []
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "scripts.train",
                *SMALL,
                f"--workdir={workdir}",
                f"--config.plan={plan}",
                *several,
                *([f"--process={index}"] if several else []),
                *more,
            ],
            cwd=ROOT,
            env=os.environ | cache | devices,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(processes)
    ]


def finish(processes, timeout=900):
    return [(process.communicate(timeout=timeout)[0], process.returncode) for process in processes]


def losses(workdir):
    rows = [row for row in read_rows(workdir / METRICS) if "loss" in row]
    return {(row["kind"], row["step"]): row["loss"] for row in rows}


def wait_for(processes, done, timeout=900):
    limit = time.monotonic() + timeout
    while not done():
        assert all(process.poll() is None for process in processes), finish(processes)
        assert time.monotonic() < limit, "it did not get there"
        time.sleep(0.05)


# Processes and plan before the kill, and after it, and further flags.
CHANGES = {
    "two": (2, "fsdp=2, tp=2", 1, "dp=2, cp=2", ()),
    "four": (4, "fsdp=4", 2, "pp=2, tp=2", ()),
    "one": (1, "dp=4", 2, "fsdp=2, tp=2", ()),
    "packed": (2, "dp=2, cp=2", 2, "pp=2, dp=2", ("--config.data.packing=best_fit",)),
}


@pytest.mark.slow
@pytest.mark.multihost
@pytest.mark.parametrize("processes, plan, then, other, more", CHANGES.values(), ids=CHANGES)
def test_a_run_with_a_killed_process_goes_on_on_other_processes(start, tmp_path, processes, plan, then, other, more):
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    [(output, status)] = finish(start(whole, "dp=4", 1, *more))
    assert status == 0, output
    expected = losses(whole)
    running = start(workdir, plan, processes, *more)
    wait_for(running, lambda: (workdir / "checkpoints" / "50").exists())
    running[-1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    results = finish(running)
    assert results[-1][1] == -signal.SIGKILL, results
    assert time.monotonic() - began < 180
    assert all(status != 0 for _, status in results), results  # none of them thinks it is done, and none hangs
    results = finish(start(workdir, other, then, *more))
    assert [status for _, status in results] == [0] * then, results
    assert losses(workdir) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.multihost
def test_a_preemption_notice_to_one_process_saves_on_all(start, tmp_path):
    workdir = tmp_path / "run"
    running = start(workdir, "fsdp=4", 2, *SLOWLY, "--config.checkpoint.every=0")
    wait_for(running, lambda: len(losses(workdir)) > 4 if (workdir / METRICS).exists() else False)
    running[1].send_signal(signal.SIGTERM)
    results = finish(running)
    assert [status for _, status in results] == [128 + signal.SIGTERM] * 2, results
    saved = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert len(saved) == 1 and f"interrupted at step {saved[0]}" in results[0][0]
