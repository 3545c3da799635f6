"""Joining the processes of a run: what JAX is asked for, what is refused, and missing hosts as errors in time."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from sharding.multihost.distributed import DistributedError, Limits, initialize, launched

ROOT = Path(__file__).parents[3]
SLURM = {
    "SLURM_JOB_ID": "4099",
    "SLURM_STEP_NODELIST": "node[007-009,012],other",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
LAUNCHERS = {
    "alone": ({}, False),
    "slurm": (SLURM, True),
    "slurm outside srun": ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16"}, False),
    "one task": (SLURM | {"SLURM_NTASKS": "1"}, False),
    "open mpi": ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
    "intel mpi": ({"PMI_SIZE": "4"}, True),
    "tpu hosts": ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, True),
    "one tpu host": ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    "tpu slices": ({"MEGASCALE_COORDINATOR_ADDRESS": "t-0"}, True),
}


@pytest.mark.parametrize("environment, expected", LAUNCHERS.values(), ids=LAUNCHERS)
def test_launchers_of_several_processes_are_noticed(environment, expected):
    assert launched(environment) is expected


@pytest.fixture
def asked(monkeypatch):
    """What `jax.distributed.initialize` was called with; nothing is joined, and no launcher is in the environment."""
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "TPU_", "JAX_COORDINATOR", "MEGASCALE_")):
            monkeypatch.delenv(name)
    calls = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.update(arguments))
    monkeypatch.setattr(jax, "process_count", lambda: calls["num_processes"])
    return calls


CALLS = {
    "flags": ({}, {"coordinator": "a:1", "processes": 2, "index": 1}, ("a:1", 2, 1, "deactivate")),
    "no port": ({}, {"coordinator": "a", "processes": 2, "index": 0}, ("a:8482", 2, 0, "deactivate")),
    "address in the environment": (
        {"JAX_COORDINATOR_ADDRESS": "a:1"},
        {"processes": 2, "index": 1},
        ("a:1", 2, 1, "deactivate"),
    ),
    "detected": ({}, {"coordinator": "auto"}, (None, None, None, None)),
    "slurm": (SLURM, {}, (None, None, None, None)),
    "slurm with an address": (SLURM, {"coordinator": "fast:5"}, ("fast:5", None, None, None)),
    "intel mpi": ({"PMI_SIZE": "4"}, {}, (None, None, None, "mpi4py")),
    "open mpi": ({"OMPI_COMM_WORLD_SIZE": "4", "PMI_SIZE": "4"}, {}, (None, None, None, None)),
}


@pytest.mark.parametrize("environment, flags, expected", CALLS.values(), ids=CALLS)
def test_what_jax_is_asked_for(asked, monkeypatch, environment, flags, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert initialize(Limits(join=5, silence=7, leave=9), **flags)
    names = ("coordinator_address", "num_processes", "process_id", "cluster_detection_method")
    assert tuple(asked[name] for name in names) == expected
    assert asked["initialization_timeout"] > 5  # an exception comes before JAX aborts the process
    assert (asked["heartbeat_timeout_seconds"], asked["shutdown_timeout_seconds"]) == (7, 9)


def test_a_single_process_joins_nobody(asked):
    assert not initialize() and not asked


@pytest.mark.parametrize("tasks, every", [("1(x4)", True), ("1", True), ("8(x2)", False), ("", False)])
def test_the_only_process_of_a_host_uses_all_its_gpus(asked, monkeypatch, tasks, every):
    for name, value in (SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks}).items():
        monkeypatch.setenv(name, value)
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    initialize()
    names = ("jax_cuda_visible_devices", "jax_rocm_visible_devices")
    assert updates == (dict.fromkeys(names, "all") if every else {})


REFUSED = {
    "no coordinator": ({"processes": 2, "index": 1}, "without a coordinator"),
    "no number": ({"coordinator": "a:1", "index": 1}, "--processes is missing"),
    "no index": ({"coordinator": "a:1", "processes": 2}, "--process is missing"),
    "too high": ({"coordinator": "a:1", "processes": 2, "index": 2}, "process 2 of 2 cannot be; .* 0 to 1"),
}


@pytest.mark.parametrize("flags, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(asked, flags, message):
    with pytest.raises(DistributedError, match=message):
        initialize(**flags)
    assert not asked


def test_a_launcher_that_jax_does_not_know_is_one_message(asked, monkeypatch):
    def fail(**arguments):
        raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(
        DistributedError, match="at a:1: Number of processes must be defined. Without detection: --coord"
    ):
        initialize(coordinator="a:1")
    with pytest.raises(DistributedError, match="'two' .* integer"):
        launched({"PMI_SIZE": "two"})


def test_limits_are_seconds():
    with pytest.raises(ValueError, match="silence=0"):
        Limits(silence=0)


JOIN = """
import sys, time
from sharding.multihost.distributed import DistributedError, Limits, initialize
try:
    initialize(Limits(join=int(sys.argv[2]), silence=int(sys.argv[3]), leave=5), coordinator=sys.argv[1],
               processes=int(sys.argv[5]), index=int(sys.argv[4]))
except DistributedError as error:
    print("refused:", error, flush=True)
    sys.exit(3)
print("joined", flush=True)
time.sleep(600)
"""


def join(address, index, *, seconds=2, silence=10, processes=2):
    return subprocess.Popen(
        [sys.executable, "-c", JOIN, address, str(seconds), str(silence), str(index), str(processes)],
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
    "index, text",
    [
        pytest.param(0, "some of the others did not come", id="first"),
        pytest.param(1, "process 0 does not answer", id="second", marks=pytest.mark.slow),
    ],
)
def test_a_missing_host_is_an_error_that_names_it(index, text):
    start = time.monotonic()
    process = join(free_address(), index)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3 and text in output, output
    assert "within 2 s" in output and time.monotonic() - start < 40


@pytest.mark.slow
@pytest.mark.multihost
def test_another_number_of_processes_is_refused_by_the_one_that_was_told_it():
    address = free_address()
    first, second = join(address, 0, seconds=60), join(address, 1, seconds=60, processes=3)
    output, _ = second.communicate(timeout=90)
    expected = "refused: process 1 was told of 3 processes, process 0 of 2: start all with the same number"
    assert expected in output.splitlines() and second.returncode != 0, output
    first.kill()
    first.communicate()


@pytest.mark.slow
@pytest.mark.multihost
def test_strangers_at_the_coordinators_port_keep_nobody_out():
    address = free_address()
    first = join(address, 0, seconds=60)
    host, port = address.split(":")
    sockets, limit = [], time.monotonic() + 30
    while len(sockets) < 20 and time.monotonic() < limit:
        try:
            sockets.append(socket.create_connection((host, int(port)), 1))
            sockets[-1].sendall(bytes(range(256)) if len(sockets) % 2 else b"")  # some say nothing at all
        except OSError:
            time.sleep(0.1)
    assert len(sockets) == 20
    second = join(address, 1, seconds=60)
    assert [process.stdout.readline() for process in (first, second)] == ["joined\n"] * 2
    for process in (first, second):
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.multihost
def test_a_stranger_in_the_coordinators_place_is_an_error_in_time():
    with socket.create_server(("localhost", 0)) as stranger:  # takes connections and never answers
        process = join(f"localhost:{stranger.getsockname()[1]}", 1)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 3 and "process 0 does not answer" in output and output.count("\n") == 1, output


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
