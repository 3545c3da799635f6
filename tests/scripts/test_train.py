"""The training script, killed and told to stop at random moments in processes of its own."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import run_here

from sharding.rules import path_name
from tessera.infra.checkpoint import Checkpoints
from tessera.infra.logger import METRICS, read_rows

ROOT = Path(__file__).parents[2]
SMALL = [
    "--config=configs/lm.py:tiny",
    "--config.steps=60",
    "--config.batch_size=11",  # divides over no more than one device: the same numbers wherever there are eight
    "--config.length=16",
    "--config.model.layers=1",
    "--config.model.width=16",
    "--config.model.heads=2",
    "--config.model.kv_heads=1",
    "--config.optimizer.warmup=5",
    "--config.optimizer.ema=0.9",
    "--config.checkpoint.every=6",
    "--config.checkpoint.keep=2",
    "--config.log.every=3",
    "--config.eval.every=12",
    "--config.eval.batches=2",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = random.Random(0).choices("the tile token ticket routes experts in parallel and scales well".split(), k=4000)
    path.write_text("\n".join(" ".join(words[i : i + 9]) for i in range(0, len(words), 9)))
    return path


def flags_of(workdir, text, *more):
    given = {flag.split("=")[0] for flag in more}  # a flag may be given once
    small = [flag for flag in SMALL if flag.split("=")[0] not in given]
    return [*small, f"--config.data.name={text}", f"--workdir={workdir}", *more]


def start(workdir, text, *more, environment=None):
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    cpu = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    flags = flags_of(workdir, text, *more)
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.train", *flags],
        cwd=ROOT,
        env=os.environ | cache | cpu | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, timeout=300):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def arrays(workdir):
    """Every array of the last checkpoint, by path, without knowing the model."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        step = max(checkpoints.steps())
        tree = checkpoints.restore(step).state
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)} | {"at": step}


def assert_same_run(workdir, reference):
    assert (workdir / METRICS).read_bytes() == (reference / METRICS).read_bytes()
    found, expected = arrays(workdir), arrays(reference)
    assert found.keys() == expected.keys() and len(found) > 20
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name


def wait_for_rows(process, workdir, count, timeout=240):
    """Wait until the run wrote `count` rows; False if it ended before."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        if len(read_rows(workdir / METRICS)) >= count:
            return True
        time.sleep(0.002)
    pytest.fail(f"no {count} rows after {timeout} s")


def interrupt(process, workdir, count, signum, delay):
    reached = wait_for_rows(process, workdir, count)
    time.sleep(delay)
    if process.poll() is None:
        process.send_signal(signum)
    return reached, *finish(process)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, text):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    status, output = run_here("train", *flags_of(workdir, text))
    assert status == 0, output
    return workdir, output


@pytest.fixture(scope="module")
def reference(whole_run):
    return whole_run[0]


def test_a_whole_run(whole_run):
    workdir, output = whole_run
    assert "validation" in output and "test" in output
    assert "tokens that the last weights go on with" in (workdir / "report.html").read_text()
    rows = read_rows(workdir / METRICS)
    assert rows[-1]["kind"] == "eval" and rows[-1]["step"] == 60 and rows[-1]["loss"] < rows[0]["loss"]
    settings = json.loads((workdir / "config.json").read_text())
    assert settings["model"]["width"] == 16 and len(settings["data_sha256"]) == 64


@pytest.mark.long
def test_killed_once(reference, text, tmp_path):
    killed = tmp_path / "run"
    _, status, _ = interrupt(start(killed, text), killed, 12, signal.SIGKILL, 0.0)
    assert status == -signal.SIGKILL
    assert len(read_rows(killed / METRICS)) < len(read_rows(reference / METRICS))
    status, output = run_here("train", *flags_of(killed, text))
    assert status == 0, output
    assert_same_run(killed, reference)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(text, tmp_path):
    moments = random.Random(0)
    longer, whole, run = "--config.steps=600", tmp_path / "whole", tmp_path / "run"
    status, output = finish(start(whole, text, longer))
    assert status == 0, output
    kills = 0
    while kills < 20 and not (run / "report.html").exists():
        process = start(run, text, longer)
        rows = len(read_rows(run / METRICS))
        count = rows + moments.randrange(1, 5) if moments.random() < 0.7 else 0
        # Without a row to wait for, anywhere from the start of Python to the middle of training.
        delay = moments.uniform(0, 0.05 if count else 4.0)
        _, status, output = interrupt(process, run, count, signal.SIGKILL, delay)
        assert status in (0, -signal.SIGKILL), output
        kills += status != 0
    status, output = finish(start(run, text, longer))
    assert status == 0, output
    assert kills == 20  # fewer: the run was over before, and more steps are needed
    assert_same_run(run, whole)


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(reference, text, tmp_path):
    workdir = tmp_path / "run"
    _, status, output = interrupt(start(workdir, text), workdir, 8, signal.SIGTERM, 0.01)
    assert status == 128 + signal.SIGTERM and "run the same command again" in output
    step = int(output.split("interrupted at step ")[1].split(";")[0])
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        assert step in checkpoints.steps()
    status, output = finish(start(workdir, text))
    assert status == 0, output
    assert_same_run(workdir, reference)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_reported(reference, text, tmp_path):
    workdir = tmp_path / "run"
    interrupt(start(workdir, text), workdir, 20, signal.SIGTERM, 0.0)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        step = max(checkpoints.steps())
    largest = max((workdir / "checkpoints" / str(step) / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    status, output = finish(start(workdir, text))
    assert status == 0 and f"checkpoint {step} in" in output and "is damaged" in output
    assert_same_run(workdir, reference)


FOUR = "--config.batch_size=4"  # a part for each of two devices


def start_two(workdir, text):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    alone = {"JAX_NUM_CPU_DEVICES": "1", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [start(workdir, text, FOUR, environment=alone | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]


@pytest.mark.slow
@pytest.mark.multihost
def test_two_processes_are_one_run(text, tmp_path):
    status, output = finish(start(tmp_path / "one", text, FOUR, environment={"JAX_NUM_CPU_DEVICES": "2"}))
    assert status == 0, output
    workdir = tmp_path / "two"
    first, second = start_two(workdir, text)
    reached = wait_for_rows(first, workdir, 8)
    first.send_signal(signal.SIGTERM)
    results = [finish(process) for process in (first, second)]
    assert reached and [status for status, _ in results] == [128 + signal.SIGTERM] * 2, results
    for status, output in [finish(process) for process in start_two(workdir, text)]:
        assert status == 0, output
    found, expected = read_rows(workdir / METRICS), read_rows(tmp_path / "one" / METRICS)
    assert [(row["step"], row["kind"]) for row in found] == [(row["step"], row["kind"]) for row in expected]
    np.testing.assert_allclose([row["loss"] for row in found], [row["loss"] for row in expected], rtol=1e-4)


@pytest.mark.slow
def test_another_config_in_the_same_directory_is_refused(reference, text):
    status, output = finish(start(reference, text, "--config.lr=0.5"))
    assert status == 1 and "lr: 0.003 there, 0.5 now" in output and "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    "argument",
    [
        "--config.lrr=3",
        "--config.lr=abc",
        "--config.model.widht=3",
        "--config.model.heads=3",
        "--config.optimizer.name=adm",
        "--config.optimizer.options={'b3': 1.0}",
        "--config.data.name=/nowhere/*.txt",
        "--config.log.every=0",
    ],
)
def test_a_wrong_flag_is_one_message(text, tmp_path, argument):
    status, output = finish(start(tmp_path / "run", text, argument))
    assert status == 2 and output.splitlines()[-1].startswith("error: ") and "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_wild_learning_rate_stops_with_step_and_rows(text, tmp_path):
    wild = ["--config.lr=1e30", "--config.optimizer.name=sgd", "--config.optimizer.clip_norm=0.0"]
    status, output = finish(start(tmp_path / "run", text, *wild))
    assert status == 1 and "not finite at step" in output and "batch ids [" in output and "Traceback" not in output
