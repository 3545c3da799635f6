"""Where arrays go under plain data parallelism: the state on every device, the batch split over them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from sharding.multihost.distributed import Limits, initialize


def join_processes(hosts: Mapping[str, Any]) -> None:
    """Join the other processes of a run, if there are any; call it before anything else of JAX.

    Args:
      hosts: values of the flags `tessera.cli.main.HOSTS`; JAX detects what they leave out, see
        `sharding.multihost.distributed.initialize`.

    Raises:
      DistributedError: the others did not appear in time.
    """
    limits = Limits(join=hosts["join_seconds"], silence=hosts["silence_seconds"])
    initialize(limits, coordinator=hosts["coordinator"], processes=hosts["processes"], index=hosts["process"])


class Placement(NamedTuple):
    """Shardings of the state (one for all of it, or a tree like it) and of a batch's leading axis."""

    state: PyTree
    batch: NamedSharding

    def place(self, batch: PyTree) -> PyTree:
        """This process's rows of a batch (NumPy arrays [b, ...]) as part of the global device arrays [B, ...]."""
        return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(self.batch, rows), batch)

    def share(self) -> tuple[int, int]:
        """(index, count): which of how many parts of every batch this process feeds to its devices.

        Under a plan whose tensor-parallel devices (say) span processes, these processes feed the same part.

        Raises:
          ValueError: the processes' parts overlap without being the same.
        """
        axes = self.batch.spec[0] if len(self.batch.spec) else ()
        names = (axes,) if isinstance(axes, str) else axes or ()
        parts = int(np.prod([self.batch.mesh.shape[name] for name in names], dtype=int))
        owned: dict[int, set[int]] = {}
        blocks: Mapping[Any, Any] = self.batch.devices_indices_map((parts,))
        for device, (rows,) in blocks.items():
            owned.setdefault(device.process_index, set()).add(rows.start or 0)
        return batch_share(owned, jax.process_index())


def batch_share(owned: Mapping[int, set[int]], process: int) -> tuple[int, int]:
    """Index of a process's part among the distinct parts, and their number; `owned` are the row blocks by process.

    Raises:
      ValueError: two processes have some blocks in common and not all.
    """
    parts = sorted({tuple(sorted(blocks)) for blocks in owned.values()})
    if sum(len(part) for part in parts) != len(set().union(*parts)):
        raise ValueError(
            f"rows of the batch by process are {dict(owned)}: two processes must feed the same rows or none in common; "
            "make the product of the axes that do not split the batch a multiple or a divisor of a process's devices"
        )
    return parts.index(tuple(sorted(owned[process]))), len(parts)


def data_parallel(batch_size: int) -> Placement:
    """Placement over all devices; on a single process over as many of them as divide the batch.

    Raises:
      ValueError: several processes and a batch that does not divide by their devices.
    """
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    if jax.process_count() > 1 and count != len(devices):
        raise ValueError(f"batch_size={batch_size} does not divide by the {len(devices)} devices of all processes")
    mesh = Mesh(np.array(devices[:count]), ("data",))
    return Placement(NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data")))
