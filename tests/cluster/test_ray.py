"""A sweep on a Ray cluster of two nodes in one machine, one of which is killed on the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy_sweep

from scaling.sweeps.store import Store
from scaling.sweeps.sweep import run_sweep

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
# In a process of its own, as a connection to Ray is the process's.
SWEEP = """
import sys
from pathlib import Path

import ray
import toy_sweep
from ray.cluster_utils import Cluster

from scaling.sweeps.executors import ExecutorConfig, make_executor
from scaling.sweeps.store import Store
from scaling.sweeps.sweep import run_sweep

if __name__ == "__main__":
    out = Path(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    engine = make_executor(ExecutorConfig("ray", slots=2, options=(("address", cluster.address),)), out)
    lost = []

    def watch(status):
        if not lost and sum(step > 0 for step in status.steps) >= 2:
            cluster.remove_node(second, allow_graceful=False)
            lost.append(second)

    run_sweep(
        toy_sweep.runs(), toy_sweep.train, Store(out / "runs"), engine, out / "runs.csv", toy_sweep.FAST, watch=watch
    )
    print("nodes lost:", len(lost))
    ray.shutdown()
    cluster.shutdown()
"""


def test_a_sweep_goes_on_when_a_node_is_killed(tmp_path):
    pytest.importorskip("ray", reason="Ray is not here: pip install -e '.[ray]'")
    (tmp_path / "sweep_on_ray.py").write_text(SWEEP)
    # Ray hashes the environment of its workers; the repository and the toy come by PYTHONPATH.
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "scaling"), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, str(tmp_path / "sweep_on_ray.py"), str(tmp_path / "ray")],
        env=os.environ | {"PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0 and "nodes lost: 1" in run.stdout, run.stdout + run.stderr
    whole = tmp_path / "whole"
    run_sweep(toy_sweep.runs(), toy_sweep.train, Store(whole), toy_sweep.Inside(), whole / "runs.csv", toy_sweep.FAST)
    assert (tmp_path / "ray" / "runs.csv").read_bytes() == (whole / "runs.csv").read_bytes()
