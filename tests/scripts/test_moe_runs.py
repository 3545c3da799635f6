"""Training with routed experts by the scripts: killed and continued, started from a dense run, compared over seeds."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from sharding.rules import path_name
from tessera.infra.checkpoint import Checkpoints
from tessera.infra.logger import METRICS, read_rows

ROOT = Path(__file__).parents[2]
SMALL = [
    "--config.steps=24",
    "--config.batch_size=4",
    "--config.length=16",
    "--config.model.layers=2",
    "--config.model.width=16",
    "--config.model.heads=2",
    "--config.model.kv_heads=1",
    "--config.model.ff=32",
    "--config.optimizer.warmup=5",
    "--config.checkpoint.every=3",
    "--config.log.every=2",
    "--config.eval.every=12",
    "--config.eval.batches=2",
]
BALANCED = [
    "--config=configs/moe_lm.py:tiny",
    "--config.model.moe.router.name=sigmoid",
    "--config.model.moe.bias_rate=0.01",
]
SMALL_BALANCED = [BALANCED[0], *SMALL, *BALANCED[1:]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = random.Random(0).choices("the tile token ticket routes experts in parallel and scales well".split(), k=4000)
    path.write_text("\n".join(" ".join(words[i : i + 9]) for i in range(0, len(words), 9)))
    return path


def start(script, workdir, *flags):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / f"jax-{jax.__version__}-scripts")}
    cpu = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [sys.executable, "-m", f"scripts.{script}", *flags, f"--workdir={workdir}"],
        cwd=ROOT,
        env=os.environ | cache | cpu,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train(workdir, text, config, *flags):
    process = start("train", workdir, config, *SMALL, f"--config.data.name={text}", *flags)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def arrays(workdir, step=None):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        tree = checkpoints.restore(max(checkpoints.steps()) if step is None else step).state
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def test_a_killed_run_goes_on_with_the_same_router_biases(tmp_path, text):
    train(tmp_path / "whole", text, *BALANCED)
    killed = start("train", tmp_path / "killed", *SMALL_BALANCED, f"--config.data.name={text}")
    deadline = time.monotonic() + 240
    while killed.poll() is None and time.monotonic() < deadline:
        if len(read_rows(tmp_path / "killed" / METRICS)) >= 4:
            killed.kill()
        time.sleep(0.02)
    killed.communicate()
    assert killed.returncode != 0, "the run ended before it was killed"
    train(tmp_path / "killed", text, *BALANCED)
    whole, again = arrays(tmp_path / "whole"), arrays(tmp_path / "killed")
    assert whole.keys() == again.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(again[name], array, name)
    (bias,) = (array for name, array in whole.items() if name.endswith("router/bias") and name.startswith("params"))
    assert np.abs(bias).max() > 0.02
    assert (tmp_path / "whole" / METRICS).read_bytes() == (tmp_path / "killed" / METRICS).read_bytes()
    rows = read_rows(tmp_path / "whole" / METRICS)
    last = [row for row in rows if row["kind"] == "train"][-1]
    assert np.array(last["router/load"]).shape == (2, 8) and len(last["router/max_violation"]) == 2
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "Load of the experts" in page and "Specialization" in page


def test_a_dense_run_is_upcycled_trained_on_and_merged_back(tmp_path, text):
    dense, moe, merged = (tmp_path / name for name in ("dense", "moe", "merged"))
    train(dense, text, "--config=configs/lm.py:tiny")
    loss = [row for row in read_rows(dense / METRICS) if row["kind"] == "eval"][-1]["loss"]
    begin = [f"--config.start.workdir={dense}", "--config.eval.every=1", "--config.lr=1e-4"]
    wide = ["--config=configs/moe_lm.py:tiny", "--config.model.moe.granularity=1", *begin]
    train(moe, text, *wide)
    rows = [row for row in read_rows(moe / METRICS) if row["kind"] == "eval"]
    # One step at a small rate after the start: still the dense run's loss, and then it goes on.
    assert abs(rows[0]["loss"] - loss) < 0.02 and rows[-1]["loss"] < rows[0]["loss"]
    train(moe, text, *wide)  # finished: nothing to do, and the dense run is not read again
    back = ["--config=configs/lm.py:tiny", f"--config.start.workdir={moe}", f"--config.start.base={dense}"]
    train(merged, text, *back, "--config.start.method=ties", "--config.eval.every=1", "--config.lr=1e-4")
    first = next(row for row in read_rows(merged / METRICS) if row["kind"] == "eval")
    assert first["loss"] < rows[0]["loss"] + 0.1


def test_the_idlest_experts_are_cut_out_and_the_run_goes_on(tmp_path, text):
    train(tmp_path / "eight", text, "--config=configs/moe_lm.py:tiny")
    loss = [row for row in read_rows(tmp_path / "eight" / METRICS) if row["kind"] == "eval"][-1]["loss"]
    fewer = ["--config.model.moe.router.experts=6", "--config.eval.every=1", "--config.lr=1e-4"]
    train(
        tmp_path / "six",
        text,
        "--config=configs/moe_lm.py:tiny",
        f"--config.start.workdir={tmp_path / 'eight'}",
        *fewer,
    )
    rows = [row for row in read_rows(tmp_path / "six" / METRICS) if row["kind"] == "eval"]
    assert abs(rows[0]["loss"] - loss) < 0.2 and rows[-1]["loss"] < rows[0]["loss"]
    before, after = (arrays(tmp_path / name) for name in ("eight", "six"))
    (name,) = (name for name in after if name.startswith("params") and name.endswith("experts/up/kernel"))
    assert before[name].shape[1] == 8 and after[name].shape[1] == 6


def test_a_comparison_is_never_redone(tmp_path, text):
    flags = ["--config=configs/moe_vs_dense.py:tiny", f"--config.run.data.name={text}", "--config.run.steps=20"]

    def compare():
        process = start("compare", tmp_path / "all", *flags)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        return output

    compare()
    runs = sorted(path.parent.name for path in (tmp_path / "all").glob("*/report.html"))
    assert runs == sorted(f"{arm}-{seed}" for arm in ("dense", "moe", "unbalanced") for seed in (0, 1))
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "all").glob("*/report.html")}
    os.remove(tmp_path / "all" / "moe-1" / "report.html")  # as if killed while the last one was finishing
    compare()
    changed = {path.parent.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {"moe-1"}
    page = (tmp_path / "all" / "report.html").read_text()
    assert "Load maps" in page and "unbalanced" in page
    table = (tmp_path / "all" / "runs.csv").read_text().splitlines()
    assert len(table) == 7 and table[0].startswith("arm,seed,validation_loss")
    settings = json.loads((tmp_path / "all" / "moe-0" / "config.json").read_text())
    assert settings["model"]["moe"]["balance"] == 0.01
