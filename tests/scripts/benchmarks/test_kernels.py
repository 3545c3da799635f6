import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts.benchmarks import kernels

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("groups", [1, 8, 64])
def test_group_sizes_are_uneven_and_sum_to_the_rows(groups):
    sizes = kernels.uneven_sizes(1000, groups, concentration=1.0, seed=0)
    assert sizes.sum() == 1000 and len(sizes) == groups and (sizes >= 0).all()
    assert groups == 1 or len(set(sizes.tolist())) > groups // 8


def test_contestants_compute_the_same_products():
    calls = kernels.grouped_calls((40, 12, 8, 3), dtype="float32", concentration=1.0, seed=0)
    for product in kernels.PRODUCTS:
        ours, theirs = (calls[product][name]() for name in ("tessera", "jax.lax.ragged_dot"))
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, theirs)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def run(script, *flags):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [
        sys.executable,
        f"scripts/benchmarks/{script}",
        *flags,
        "--config=bench_kernels",
        "--config.rounds=1",
        "--config.grouped=((64,16,8,4),)",
    ]
    command += ["--config.blocks=((32,128,192,64,0.5),)", "--config.layers=((16,8,16,4,2),)"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=600, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_the_benchmark_writes_a_row_per_contestant(tmp_path):
    run("run.py", f"--out={tmp_path / 'rows.json'}")
    found = json.loads((tmp_path / "rows.json").read_text())
    assert len(found["rows"]) == 3 * 3 + 3 * 2 + 2 and found["machine"]["allocator"] and found["machine"]["cores"]
    assert all(row["seconds"] > 0 for row in found["rows"])
    assert {row["baseline"] for row in found["rows"]} == {"", "dense, equal FLOPs", "dense, whole weight"}


@pytest.mark.slow
def test_tuning_writes_a_table(tmp_path):
    run("tune_kernels.py", f"--out={tmp_path / 'table.json'}", "--rows=16,32")
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["kernel"] for row in table] == ["grouped", "contraction", "block", "block_contraction"]
    assert all(row["tiling"]["rows"] in (16, 32) for row in table)
