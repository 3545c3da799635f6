"""Who the processes of a run are, in the words of every launcher; a missing one is an error in bounded time."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sharding.multihost.distributed import Cluster, DistributedError, Limits, detect
from sharding.multihost.rendezvous import Missing, roll_call

ROOT = Path(__file__).parents[3]
SLURM = {"SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_JOB_ID": "4099", "SLURM_LOCALID": "1"}

CASES = {
    "alone": ({}, {}, None),
    "flags": ({}, {"coordinator": "a:1", "processes": 2, "index": 1}, Cluster("flags", "a:1", 2, 1)),
    "flags without a port": ({}, {"coordinator": "a", "processes": 2, "index": 0}, Cluster("flags", "a:8482", 2, 0)),
    "variables": (
        {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
        {},
        Cluster("flags", "a:1", 4, 3),
    ),
    "flags over variables": (
        {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
        {"coordinator": "b:2", "processes": 2, "index": 0},
        Cluster("flags", "b:2", 2, 0),
    ),
    # 65536 - 4096 + 4099 mod 4096 = 61443: the port JAX itself would take.
    "slurm": (SLURM | {"SLURM_STEP_NODELIST": "node[007-009,012],other"}, {}, Cluster("slurm", "node007:61443", 16, 9)),
    "slurm, a process per device": (
        SLURM | {"SLURM_STEP_NODELIST": "gpu1,gpu2", "SLURM_NTASKS_PER_NODE": "8"},
        {},
        Cluster("slurm", "gpu1:61443", 16, 9, 1),
    ),
    "slurm with an address": (
        SLURM | {"SLURM_STEP_NODELIST": "gpu1", "JAX_COORDINATOR_ADDRESS": "fast:5"},
        {},
        Cluster("slurm", "fast:5", 16, 9),
    ),
    "slurm outside srun": ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16"}, {}, None),
    "one task": (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a"}, {}, None),
    "open mpi": (
        {
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_RANK": "2",
            "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
        },
        {},
        Cluster("mpi", "10.96.0.1:8482", 4, 2),
    ),
    "intel mpi": (
        {"PMI_SIZE": "4", "PMI_RANK": "2", "JAX_COORDINATOR_ADDRESS": "a:1"},
        {},
        Cluster("mpi", "a:1", 4, 2),
    ),
    "kubernetes": (
        {"TESSERA_COORDINATOR": "t-workers-0-0.t:8482", "TESSERA_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"},
        {},
        Cluster("kubernetes", "t-workers-0-0.t:8482", 4, 3),
    ),
    "kubernetes, two jobs": (
        {
            "TESSERA_COORDINATOR": "t-workers-0-0.t",
            "TESSERA_PROCESSES": "8",
            "JOB_COMPLETION_INDEX": "3",
            "TESSERA_JOB_INDEX": "1",
            "TESSERA_PODS_PER_JOB": "4",
        },
        {},
        Cluster("kubernetes", "t-workers-0-0.t:8482", 8, 7),
    ),
    "tpu hosts": ({"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_WORKER_ID": "1"}, {}, Cluster("tpu")),
    "one tpu host": ({"TPU_WORKER_HOSTNAMES": "localhost"}, {}, None),
    "tpu pod": ({"TESSERA_TPU": "1"}, {}, Cluster("tpu")),
}


@pytest.mark.parametrize("environment, flags, expected", CASES.values(), ids=CASES)
def test_every_launcher_is_understood(environment, flags, expected):
    assert detect(environment, **flags) == expected


REFUSED = {
    "no coordinator": ({}, {"processes": 2, "index": 1}, "without a coordinator"),
    "no number": ({}, {"coordinator": "a:1", "index": 1}, "the processes of this process"),
    "no index": ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, {}, "the index of this process"),
    "too high": ({}, {"coordinator": "a:1", "processes": 2, "index": 2}, "process 2 of 2 cannot be; .* 0 to 1"),
    "no word": ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two"}, {}, "'two' .* whole number"),
    "mpi alone": ({"PMI_SIZE": "4", "PMI_RANK": "2"}, {}, "export JAX_COORDINATOR_ADDRESS"),
}


@pytest.mark.parametrize("environment, flags, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(environment, flags, message):
    with pytest.raises(DistributedError, match=message):
        detect(environment, **flags)


def test_limits_are_seconds():
    with pytest.raises(ValueError, match="silence=0"):
        Limits(silence=0)


JOIN = """
import sys, time
from sharding.multihost.distributed import DistributedError, Limits, initialize
try:
    initialize(Limits(join=int(sys.argv[2]), silence=int(sys.argv[3])), coordinator=sys.argv[1], processes=2,
               index=int(sys.argv[4]))
except DistributedError as error:
    print("refused:", error, flush=True)
    sys.exit(3)
print("joined", flush=True)
time.sleep(600)
"""


def join(address, index, *, seconds=2, silence=10):
    return subprocess.Popen(
        [sys.executable, "-c", JOIN, address, str(seconds), str(silence), str(index)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


@pytest.mark.multihost
@pytest.mark.parametrize(
    "index, words",
    [
        pytest.param(0, "process 1 of 2 did not come", id="first"),
        pytest.param(1, "process 0 is not at localhost:", id="second", marks=pytest.mark.slow),
    ],
)
def test_a_missing_host_is_an_error_that_names_it(index, words):
    start = time.monotonic()
    process = join(free_address(), index)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3 and words in output, output
    assert "within 2 s" in output and time.monotonic() - start < 40


def test_those_who_came_hear_who_did_not():
    address = free_address()
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(roll_call, address, 4, index, 1.0) for index in (0, 2)]
        for call in calls:
            with pytest.raises(Missing, match=r"processes 1, 3 \(2\) of 4 did not come"):
                call.result()
        for call in [threads.submit(roll_call, address, 3, index, 30.0) for index in (2, 0, 1)]:
            call.result()


@pytest.mark.slow
@pytest.mark.multihost
def test_a_host_that_dies_ends_the_others_in_bounded_time():
    address = free_address()
    processes = [join(address, index, seconds=60) for index in range(2)]
    assert [process.stdout.readline() for process in processes] == ["joined\n"] * 2
    processes[1].send_signal(signal.SIGKILL)
    start = time.monotonic()
    output, _ = processes[0].communicate(timeout=90)
    assert processes[0].returncode != 0 and time.monotonic() - start < 60, output
    processes[1].communicate()
