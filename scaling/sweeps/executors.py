"""Executors of sweep runs: local processes, SLURM job arrays by submitit (extra `slurm`), Ray tasks (extra `ray`).

An executor starts calls (a picklable function and its arguments) as jobs. A job returns nothing but success or an
error: what a run produces, it writes to a directory that every host sees.
"""

import getpass
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

Call = tuple[Callable[..., Any], tuple[Any, ...]]
# After which a job that has left the queue without a result has failed: a shared file system may show results late.
GONE_SECONDS = 20.0

# One thread each: products of a tiny model gain nothing from a second one, a second run does.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}


@dataclass(frozen=True)
class ExecutorConfig:
    """Where runs are carried out.

    Attributes:
      name: processes of this machine, SLURM arrays, Ray tasks, or submitit's local and debug executors.
      slots: runs at a time; 0, for "local" only, is one per core.
      retries: how often a failed run is started again.
      options: submitit's parameters (timeout_min, slurm_partition ...), Ray's address, or environment variables of
        local processes, as (name, value) pairs.

    Example:
      >>> from scaling.sweeps import ExecutorConfig
      >>> ExecutorConfig("slurm", slots=8, options=(("timeout_min", 60),)).retries
      1
    """

    name: Literal["local", "slurm", "ray", "submitit-local", "submitit-debug"] = "local"
    slots: int = 0
    retries: int = 1
    options: tuple[tuple[str, Any], ...] = ()


@runtime_checkable
class Job(Protocol):
    """A running call."""

    def done(self) -> bool:
        """Whether it has ended."""
        ...

    def error(self) -> str:
        """Why it failed, "" if it did not; valid once it is done."""
        ...


@runtime_checkable
class Executor(Protocol):
    """Runs calls; `slots` is how many may be submitted at a time."""

    slots: int

    def submit(self, calls: Sequence[Call]) -> Sequence[Job]:
        """Start calls."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait until the state of a job may have changed."""
        ...

    def stop(self, jobs: Sequence[Job]) -> None:
        """Cancel jobs."""
        ...


@dataclass
class Process:
    """A call in a process of its own."""

    process: subprocess.Popen
    log: Path

    def done(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def error(self) -> str:
        """The last line it wrote, or the signal that ended it."""
        code = self.process.returncode
        if code == 0:
            return ""
        if code < 0:
            return f"killed by {signal.Signals(-code).name} (log: {self.log})"
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else f'exit status {code}'} (log: {self.log})"


class Local:
    """Processes on this machine, one call each, one thread each.

    A process ends when its parent does, so a kill leaves nothing running.

    Args:
      slots: processes at a time; 0 for one per core.
      directory: of the processes' logs.
      environment: further environment variables of the processes.

    Raises:
      ValueError: on submitting a function defined in the script that runs.
    """

    def __init__(self, slots: int, directory: Path | str, environment: Mapping[str, str] | None = None):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.slots = slots or cores
        self.directory = Path(directory)
        self.environment = dict(environment or {})
        self._count = 0

    def submit(self, calls: Sequence[Call]) -> list[Process]:
        """Start a process for every call."""
        return [self._start(call) for call in calls]

    def _start(self, call: Call) -> Process:
        payload = pickle.dumps(call)
        if b"__main__" in payload:
            raise ValueError(
                "the training function is defined in the script itself, which other processes cannot import: "
                "move it to a module"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        self._count += 1
        log = self.directory / f"{os.getpid()}-{self._count}.log"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD['XLA_FLAGS']}".strip()
        # The child finds what the parent finds, however the parent was started.
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment = os.environ | ONE_THREAD | {"XLA_FLAGS": flags, "PYTHONPATH": paths} | self.environment
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "scaling.sweeps.worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        assert process.stdin is not None
        with process.stdin as pipe:
            pipe.write(payload)
        return Process(process, log)

    def wait(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def stop(self, jobs: Sequence[Job]) -> None:
        """Kill them and wait until they are gone."""
        for job in jobs:
            if isinstance(job, Process):
                job.process.kill()
                job.process.wait()


@dataclass
class Submitted:
    """A job of submitit."""

    job: Any
    queue: "SlurmQueue | None" = None
    _gone_since: float | None = field(default=None, init=False)

    def done(self) -> bool:
        """Whether it has ended.

        submitit learns of a cancelled job from SLURM's accounting only. Where there is none, a job that is neither in
        the queue nor, some seconds later, has a result has ended too.
        """
        if self.job.done():
            return True
        if self.queue is None or self.job.state != "UNKNOWN" or self.queue.has(self.job.job_id):
            self._gone_since = None
            return False
        now = time.monotonic()
        self._gone_since = now if self._gone_since is None else self._gone_since
        return now - self._gone_since > GONE_SECONDS

    def error(self) -> str:
        """What it raised."""
        if not self.job.done():
            return f"job {self.job.job_id} left the queue without a result: cancelled or killed"
        found = self.job.exception()
        if found is None:
            return ""
        # submitit puts the job's traceback between lines of dashes, and the paths of its logs below them.
        parts = str(found).split("-" * 22)
        return _last_line(parts[1]) if len(parts) > 2 else _last_line(found)


class SlurmQueue:
    """The numbers of this user's jobs that wait or run, looked up every few seconds."""

    def __init__(self) -> None:
        self._jobs: set[str] = set()
        self._read = -math.inf

    def has(self, job: str) -> bool:
        """Whether a job (12_3 of an array) waits or runs; also True where the queue cannot be read."""
        if time.monotonic() - self._read > GONE_SECONDS / 4:
            command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={getpass.getuser()}"]
            try:
                found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            except (OSError, subprocess.SubprocessError):
                return True
            self._jobs, self._read = set(found.stdout.split()), time.monotonic()
        return job in self._jobs


class Submitit:
    """SLURM job arrays by submitit, or its own local and debug executors.

    Args:
      slots: jobs at a time (for SLURM, the array's parallelism).
      directory: submitit's own, on a file system every host sees.
      cluster: "slurm", "local" or "debug"; None lets submitit find out.
      parameters: for `AutoExecutor.update_parameters` (timeout_min, slurm_partition ...).

    Raises:
      ImportError: without the extra `slurm`.
    """

    def __init__(
        self,
        slots: int,
        directory: Path | str,
        cluster: str | None = None,
        parameters: Mapping[str, Any] | None = None,
    ):
        try:
            import submitit
        except ImportError as error:
            raise ImportError("runs on SLURM need the extra: pip install 'tessera-jax[slurm]'") from error
        self.executor = submitit.AutoExecutor(folder=str(directory), cluster=cluster)
        self.executor.update_parameters(slurm_array_parallelism=slots, cpus_per_task=1, **dict(parameters or {}))
        # The scheduler has the queue: an array is submitted at once.
        self.slots = slots if self.executor.cluster in ("local", "debug") else 10_000
        self._queue = SlurmQueue() if self.executor.cluster == "slurm" else None

    def submit(self, calls: Sequence[Call]) -> list[Submitted]:
        """Submit calls as one array."""
        with self.executor.batch():
            jobs = [self.executor.submit(function, *arguments) for function, arguments in calls]
        return [Submitted(job, self._queue) for job in jobs]

    def wait(self, seconds: float) -> None:
        """Sleep; a scheduler is not polled more often than every few seconds."""
        time.sleep(seconds if self.executor.cluster in ("local", "debug") else max(seconds, 5.0))

    def stop(self, jobs: Sequence[Job]) -> None:
        """Cancel them."""
        for job in jobs:
            if isinstance(job, Submitted):
                job.job.cancel(check=False)


class RayJobs:
    """Tasks on a Ray cluster.

    Args:
      slots: tasks at a time.
      address: of the cluster; "" starts Ray on this machine.

    Raises:
      ImportError: without the extra `ray`.
    """

    def __init__(self, slots: int, address: str = ""):
        try:
            import ray
        except ImportError as error:
            raise ImportError("runs on a Ray cluster need the extra: pip install 'tessera-jax[ray]'") from error
        self.slots, self._ray = slots, ray
        if not ray.is_initialized():
            ray.init(address=address or None, num_cpus=None if address else slots, runtime_env={"env_vars": ONE_THREAD})
        # The sweep retries a run and counts; Ray would do it silently.
        self._call = ray.remote(num_cpus=1, max_retries=0, max_calls=1)(_invoke)

    def submit(self, calls: Sequence[Call]) -> list["RayJob"]:
        """Start a task for every call."""
        return [RayJob(self._ray, self._call.remote(*call)) for call in calls]

    def wait(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def stop(self, jobs: Sequence[Job]) -> None:
        """Cancel them."""
        for job in jobs:
            if isinstance(job, RayJob):
                self._ray.cancel(job.reference, force=True)


@dataclass
class RayJob:
    """A task on a Ray cluster."""

    ray: Any
    reference: Any

    def done(self) -> bool:
        """Whether it has ended."""
        return bool(self.ray.wait([self.reference], timeout=0)[0])

    def error(self) -> str:
        """What it raised."""
        try:
            self.ray.get(self.reference)
        except Exception as error:  # whatever the call raised, or Ray about it
            return _last_line(error)
        return ""


def _invoke(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    function(*arguments)


def _last_line(error: BaseException | str) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def make_executor(
    config: ExecutorConfig, directory: Path | str, environment: Mapping[str, str] | None = None
) -> Executor:
    """Make an executor.

    Args:
      config: which.
      directory: for logs.
      environment: of local processes, besides that of `config.options`.

    Raises:
      ValueError: no number of slots where one is needed.
      ImportError: the extra is not installed.

    Example:
      >>> from scaling.sweeps import ExecutorConfig, make_executor
      >>> make_executor(ExecutorConfig("local", slots=2), "logs").slots
      2
    """
    name, slots, options = config.name, config.slots, dict(config.options)
    if name == "local":
        return Local(slots, directory, {**(environment or {}), **options})
    if slots < 1:
        raise ValueError(f"executor {name!r} needs the number of runs at a time: slots = {slots} must be at least 1")
    if name == "ray":
        return RayJobs(slots, **options)
    return Submitit(slots, directory, name.removeprefix("submitit-"), options)
