import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.bench_kernels import get_config
from scripts.benchmarks import kernel_rivals

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("groups", [1, 8, 64])
def test_group_sizes_are_uneven_and_sum_to_the_rows(groups):
    sizes = kernel_rivals.uneven_sizes(1000, groups, concentration=1.0, seed=0)
    assert sizes.sum() == 1000 and len(sizes) == groups and (sizes >= 0).all()
    assert groups == 1 or len(set(sizes.tolist())) > groups // 8


def test_rivals_compute_the_same_products():
    rivals = kernel_rivals.grouped_rivals((40, 12, 8, 3), dtype="float32", concentration=1.0, seed=0)
    for product in kernel_rivals.PRODUCTS:
        ours, theirs = (rivals[product][name]() for name in ("tessera", "jax.lax.ragged_dot"))
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, theirs)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_config_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="choose cpu or hopper"):
        get_config("tpu")


def run(script, *flags):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, f"scripts/{script}", *flags, "--config.rounds=1", "--config.grouped=((64,16,8,4),)"]
    command += ["--config.blocks=((32,128,192,64,0.5),)", "--config.layers=((16,8,16,4,2),)"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=600, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_the_benchmark_writes_a_row_per_rival(tmp_path):
    run("benchmark_kernels.py", f"--out={tmp_path / 'rows.csv'}")
    with open(tmp_path / "rows.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 + 3 * 2 + 2
    assert all(float(row["ms (median)"]) > 0 for row in rows)


@pytest.mark.slow
def test_tuning_writes_a_table(tmp_path):
    run("tune_kernels.py", f"--out={tmp_path / 'table.json'}", "--rows=16,32")
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["kernel"] for row in table] == ["grouped", "contraction", "block", "block_contraction"]
    assert all(row["tiling"]["rows"] in (16, 32) for row in table)
