"""Engines of many hosts: SLURM job arrays by submitit (extra `slurm`), tasks on a Ray cluster (extra `ray`).

What a run produces, it writes to the store's directory: that must be on a file system every host sees.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling.sweeps.executors import ONE_THREAD, Call, Job


@dataclass
class Submitted:
    """A job of submitit."""

    job: Any

    def done(self) -> bool:
        """Whether it has ended."""
        return bool(self.job.done())

    def error(self) -> str:
        """What it raised."""
        found = self.job.exception()
        return "" if found is None else _last_line(found)


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
        # The scheduler keeps the queue: an array is handed in whole.
        self.slots = slots if self.executor.cluster in ("local", "debug") else 10_000

    def submit(self, calls: Sequence[Call]) -> list[Submitted]:
        """Hand calls in as one array."""
        with self.executor.batch():
            jobs = [self.executor.submit(function, *arguments) for function, arguments in calls]
        return [Submitted(job) for job in jobs]

    def wait(self, seconds: float) -> None:
        """Sleep; a scheduler is not asked more than every few seconds."""
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
        # A run is tried again by the sweep, which counts; Ray would do it silently.
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


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
