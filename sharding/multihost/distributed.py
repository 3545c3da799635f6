"""Join the processes of a run on several hosts by `jax.distributed`, in bounded time and with errors of one line.

JAX itself detects the coordinator and this process's number under SLURM, Open MPI, Cloud TPU, GKE and Kubernetes (with
the package `kubernetes`), and ends a process when another one sends no heartbeat any more. Added here: flags for
launchers that JAX does not know, single processes that join nobody, and a deadline that raises an exception where JAX
would abort the process.
"""

import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import jax

PORT = 8482
"""Of a coordinator given without one; any port that is free on the first host will do."""
AUTO = "auto"
"""As the coordinator: JAX detects everything, also where no environment variable tells of several processes."""
GRACE = 60
"""Seconds between our error and JAX's own timeout, which aborts the process from C++."""


class DistributedError(RuntimeError):
    """Processes that do not find each other; the message has the address, the deadline and what to check.

    Example:
      >>> from sharding.multihost import DistributedError, initialize
      >>> try:
      ...     initialize(coordinator="localhost", processes=2, index=2)
      ... except DistributedError as error:
      ...     print(error)
      process 2 of 2 cannot be; processes count from 0 to 1
    """


@dataclass(frozen=True)
class Limits:
    """Seconds after which a process gives up.

    Attributes:
      join: for all processes to appear.
      silence: heartbeat timeout: a process that sends no heartbeat for so long counts as dead, and the others end.
      leave: for all processes to reach the end.

    Example:
      >>> from sharding.multihost import Limits
      >>> Limits(join=600).silence
      100
    """

    join: int = 300
    silence: int = 100
    leave: int = 300

    def __post_init__(self) -> None:
        for name in ("join", "silence", "leave"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} seconds must be at least 1")


def initialize(limits: Limits = Limits(), *, coordinator: str = "", processes: int = 0, index: int = -1) -> bool:
    """Join the processes of a run by `jax.distributed.initialize`; call it once, before anything else of JAX.

    Args:
      limits: how long to wait.
      coordinator: host:port (or host) of the first process; "auto" lets JAX detect everything. "" is "auto" where the
        environment tells of several processes (SLURM's `srun`, MPI, TPU hosts), and else a single process.
      processes: their number; 0 lets JAX detect it.
      index: of this process, from 0; -1 lets JAX detect it.

    Returns:
      Whether this process joined others; False for one that is alone.

    Raises:
      DistributedError: not all processes appeared in time, or flags that do not fit. A process that dies later ends the
        others: within seconds where a collective notices, after `limits.silence` at most.

    Example:
      >>> from sharding.multihost import initialize
      >>> initialize()  # alone; on several hosts: srun, mpirun, or coordinator="host", processes=4, index=0
      False
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    _check_flags(coordinator, processes, index)
    if not coordinator and not launched(os.environ):
        return False
    address = coordinator if coordinator != AUTO else ""
    if address and not re.search(r":\d+$", address):
        address = f"{address}:{PORT}"
    method = None
    if processes:
        method = "deactivate"
    elif "PMI_SIZE" in os.environ and "OMPI_COMM_WORLD_SIZE" not in os.environ:
        method = "mpi4py"  # MPICH and Intel MPI
    failures: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                coordinator_address=address or None,
                num_processes=processes or None,
                process_id=index if index >= 0 else None,
                cluster_detection_method=method,
                initialization_timeout=limits.join + GRACE,
                heartbeat_timeout_seconds=limits.silence,
                shutdown_timeout_seconds=limits.leave,
            )
        except Exception as error:
            failures.append(error)

    # JAX aborts the process from C++ when others are missing. Waiting for a thread can raise instead.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(limits.join)
    if thread.is_alive() or failures:
        raise _error(address, processes, index, limits, failures)
    if method is None and _one_process_per_host(os.environ):
        # Under SLURM and Open MPI JAX shows a process the one GPU of its number on the host.
        for platform in ("cuda", "rocm"):
            jax.config.update(f"jax_{platform}_visible_devices", "all")
    if processes and (found := jax.process_count()) != processes:  # JAX goes by what process 0 was told
        raise DistributedError(
            f"process {index} was told of {processes} processes, process 0 of {found}: start all with the same number"
        )
    return True


def launched(environment: Mapping[str, str]) -> bool:
    """Whether environment variables tell that this process is one of several.

    Raises:
      DistributedError: a number of processes that is not one.
    """
    tasks = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", *(("SLURM_NTASKS",) if "SLURM_STEP_NODELIST" in environment else ()))
    for name in tasks:
        if not environment.get(name, "1").isdecimal():
            raise DistributedError(f"{name}={environment[name]!r} in the environment should be an integer")
    return (
        any(int(environment.get(name, "1")) > 1 for name in tasks)
        or any("," in environment.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))
        or bool(environment.get("MEGASCALE_COORDINATOR_ADDRESS"))
    )


def _check_flags(coordinator: str, processes: int, index: int) -> None:
    if not processes and index < 0:
        return
    if coordinator in ("", AUTO):
        raise DistributedError(f"process {index} of {processes} without a coordinator: give --coordinator=host:port")
    if not processes or index < 0:
        missing = "--process" if processes else "--processes"
        raise DistributedError(
            f"coordinator {coordinator}: give --processes and --process, or neither; {missing} is missing"
        )
    if not 0 <= index < processes:
        raise DistributedError(f"process {index} of {processes} cannot be; processes count from 0 to {processes - 1}")


def _error(address: str, processes: int, index: int, limits: Limits, failures: list[Exception]) -> DistributedError:
    who = f"process {index} of {processes}" if processes else "this process"
    where = address or "the coordinator that JAX detected"
    if failures:
        line = next(iter(str(failures[0]).strip().splitlines()), type(failures[0]).__name__)
        error = DistributedError(
            f"{who} cannot join the others at {where}: {line.rstrip('.')}. Without detection: "
            "--coordinator=host:port --processes=N --process=0 (and 1, 2, ...)"
        )
        error.__cause__ = failures[0]
        return error
    others = "some of the others did not come" if index == 0 else "process 0 does not answer, or others are missing"
    return DistributedError(
        f"{who} did not meet the others at {where} within {limits.join} s: {others}. Start every process with the same "
        "coordinator and number of processes, and check that every host reaches this address"
    )


def _one_process_per_host(environment: Mapping[str, str]) -> bool:
    """Whether the launcher started one process on every host, which then takes all of its devices."""
    if environment.get("JAX_LOCAL_DEVICE_IDS"):
        return False
    slurm = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return bool(slurm) or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
