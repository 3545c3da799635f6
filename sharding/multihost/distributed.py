"""Many hosts, one program: who the processes of a run are, and joining them once, in bounded time.

Every launcher says it in its own way. `detect` reads them all from a process's flags and environment; `initialize`
hands what it found to `jax.distributed`, which also notices hosts that die later.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from sharding.multihost.rendezvous import roll_call

PORT = 8482
"""Of the coordinator where the launcher names none; any port that is free on the first host will do."""


class DistributedError(RuntimeError):
    """Processes that do not find each other; says who waited for whom, and how long."""


@dataclass(frozen=True)
class Cluster:
    """One process's place among all.

    Attributes:
      kind: the launcher: "flags", "slurm", "mpi", "kubernetes" or "tpu".
      coordinator: host:port of the first process. None (Cloud TPU alone): JAX asks the machine's metadata.
      processes: their number.
      index: of this process.
      local: device of this process on its host, where the launcher starts a process for every device; else None.
    """

    kind: str
    coordinator: str | None = None
    processes: int | None = None
    index: int | None = None
    local: int | None = None


@dataclass(frozen=True)
class Limits:
    """Seconds after which a process gives up.

    `join`: for all processes to appear. `silence`: without a sign of life from a process before the others end with an
    error. `leave`: for all processes to reach the end.
    """

    join: int = 300
    silence: int = 100
    leave: int = 300

    def __post_init__(self) -> None:
        for name in ("join", "silence", "leave"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} seconds must be at least 1")


def detect(
    environment: Mapping[str, str],
    *,
    coordinator: str = "",
    processes: int = 0,
    index: int = -1,
) -> Cluster | None:
    """This process's cluster, or None if it is alone.

    Looked for in this order; the first that is there counts:

    1. flags: `coordinator`, `processes`, `index`, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID;
    2. Kubernetes: an indexed Job or a JobSet with TESSERA_COORDINATOR, TESSERA_PROCESSES and the pod's index (see
       scripts/launch/jobset.yaml);
    3. Cloud TPU and GKE TPU: TPU_WORKER_HOSTNAMES of more than one host, or MEGASCALE_COORDINATOR_ADDRESS;
    4. SLURM: SLURM_NTASKS > 1 inside `srun`;
    5. MPI: the ranks of Open MPI (`mpirun`) or of PMI (MPICH, Intel MPI); the coordinator is given by
       JAX_COORDINATOR_ADDRESS where the launcher does not name its host.

    Args:
      environment: of the process.
      coordinator: host:port (or host) of the first process.
      processes: their number.
      index: of this process.

    Raises:
      DistributedError: something is named and the rest is missing, or cannot be.
    """
    found = _flags(environment, coordinator, processes, index)
    for read in (_kubernetes, _tpu, _slurm, _mpi):
        found = read(environment) if found is None else found
    return None if found is None else _checked(found)


def initialize(
    limits: Limits = Limits(), *, coordinator: str = "", processes: int = 0, index: int = -1
) -> Cluster | None:
    """Join the processes of a run, if there are several; call it once, before anything else of JAX.

    Args:
      limits: how long to wait.
      coordinator: see `detect`.
      processes: see `detect`.
      index: see `detect`.

    Returns:
      What was detected; None for a process that is alone.

    Raises:
      DistributedError: not all processes appeared in time, or the launcher's words do not make sense. A process that
        dies later ends the others: within seconds where a collective notices, after `limits.silence` at most.
    """
    cluster = detect(os.environ, coordinator=coordinator, processes=processes, index=index)
    if cluster is None:
        return None
    try:
        if cluster.coordinator is not None and cluster.processes is not None and cluster.index is not None:
            roll_call(cluster.coordinator, cluster.processes, cluster.index, limits.join)
        jax.distributed.initialize(
            coordinator_address=cluster.coordinator,
            num_processes=cluster.processes,
            process_id=cluster.index,
            local_device_ids=cluster.local,
            cluster_detection_method=None if cluster.coordinator is None else "deactivate",
            initialization_timeout=limits.join,
            heartbeat_timeout_seconds=limits.silence,
            shutdown_timeout_seconds=limits.leave,
        )
    except (RuntimeError, ValueError, OSError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        who = "this process" if cluster.index is None else f"process {cluster.index} of {cluster.processes}"
        raise DistributedError(
            f"{who} ({cluster.kind}) did not meet the others at {cluster.coordinator or 'the first TPU host'} within "
            f"{limits.join} s: {line}. Start every process, with the same coordinator and number of processes"
        ) from error
    return cluster


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise DistributedError(f"{name}={text!r} in the environment should be a whole number") from None


def _address(host: str, port: int = PORT) -> str:
    return host if re.search(r":\d+$", host) else f"{host}:{port}"


def _checked(cluster: Cluster) -> Cluster:
    """Refuse a cluster whose numbers do not fit."""
    if cluster.coordinator is None:
        return cluster
    missing = [name for name in ("processes", "index") if getattr(cluster, name) is None]
    if missing:
        raise DistributedError(
            f"{cluster.kind}: the coordinator is {cluster.coordinator}, and the {' and '.join(missing)} of this "
            "process is not said: give --processes and --process (or JAX_NUM_PROCESSES and JAX_PROCESS_ID)"
        )
    count, index = cluster.processes, cluster.index
    if count < 1 or not 0 <= index < count:  # type: ignore[operator]
        raise DistributedError(
            f"{cluster.kind}: process {index} of {count} cannot be; processes count from 0 to {max(0, count - 1)}"  # type: ignore[operator]
        )
    return cluster


def _flags(environment: Mapping[str, str], coordinator: str, processes: int, index: int) -> Cluster | None:
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS", "")
    if not coordinator:
        if processes > 1 or index >= 0:
            raise DistributedError(
                f"process {index} of {processes} without a coordinator: give --coordinator=host:port"
            )
        return None
    if not processes and index < 0:
        # An address alone leaves the rest to the launcher.
        for read in (_slurm, _mpi):
            found = read(dict(environment) | {"JAX_COORDINATOR_ADDRESS": coordinator})
            if found is not None:
                return found
    count = processes or _number(environment, "JAX_NUM_PROCESSES")
    mine = index if index >= 0 else _number(environment, "JAX_PROCESS_ID")
    return Cluster("flags", _address(coordinator), count, mine)


def _kubernetes(environment: Mapping[str, str]) -> Cluster | None:
    coordinator = environment.get("TESSERA_COORDINATOR")
    if coordinator is None:
        return None
    # JOB_COMPLETION_INDEX is the pod's place in its Job; a JobSet of several Jobs also says which Job.
    inside = _number(environment, "JOB_COMPLETION_INDEX")
    job, pods = _number(environment, "TESSERA_JOB_INDEX") or 0, _number(environment, "TESSERA_PODS_PER_JOB") or 0
    index = None if inside is None else job * pods + inside
    return Cluster("kubernetes", _address(coordinator), _number(environment, "TESSERA_PROCESSES"), index)


def _tpu(environment: Mapping[str, str]) -> Cluster | None:
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if len(hosts) > 1 or environment.get("MEGASCALE_COORDINATOR_ADDRESS") or environment.get("TESSERA_TPU"):
        return Cluster("tpu")
    return None


def _slurm(environment: Mapping[str, str]) -> Cluster | None:
    count, index = _number(environment, "SLURM_NTASKS"), _number(environment, "SLURM_PROCID")
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    if count is None or count < 2 or index is None or not nodes:
        return None
    # node[007-009,012],other -> node007. A port that two jobs on a host do not share: JAX's own rule.
    head = re.match(r"([^\[,]+)(?:\[([^,\-\]]+))?", nodes)
    host = "".join(filter(None, head.groups())) if head else nodes
    port = 65536 - 4096 + (_number(environment, "SLURM_JOB_ID") or 0) % 4096
    coordinator = environment.get("JAX_COORDINATOR_ADDRESS") or host
    several = (_number(environment, "SLURM_NTASKS_PER_NODE") or 1) > 1
    return Cluster(
        "slurm",
        _address(coordinator, port),
        count,
        index,
        _number(environment, "SLURM_LOCALID") if several else None,
    )


def _mpi(environment: Mapping[str, str]) -> Cluster | None:
    for size, rank, local in (
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    ):
        count, index = _number(environment, size), _number(environment, rank)
        if count is None or count < 2 or index is None:
            continue
        launcher = re.search(r"tcp6?://\[?([^,:\]]+)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
        coordinator = environment.get("JAX_COORDINATOR_ADDRESS") or (launcher[1] if launcher else "")
        if not coordinator:
            raise DistributedError(
                f"mpi: rank {index} of {count} does not know rank 0's host; export JAX_COORDINATOR_ADDRESS=host:port"
            )
        several = (_number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE") or 1) > 1
        return Cluster("mpi", _address(coordinator), count, index, _number(environment, local) if several else None)
    return None
