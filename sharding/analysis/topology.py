"""Devices of a TPU slice that is not there, to compile programs for it ahead of time."""

import importlib.util
import os
from typing import Any

from jax.experimental import topologies

from sharding.analysis.hardware import chips
from sharding.errors import PlanError

# What libtpu asks of its machine before it describes a topology; none of it is needed to compile.
SURROUNDINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_devices(name: str) -> list[Any]:
    """The devices of a slice such as "v5p:8x8x8" (512 chips); nothing can run on them.

    Sets the environment variables of `SURROUNDINGS` where they are not set: libtpu reads them when it is loaded.

    Raises:
      PlanError: the name does not read like a topology, or libtpu knows no such slice.
      ImportError: libtpu is not installed; names the extra.
    """
    count = chips(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"compiling for {name} needs libtpu, which needs no TPU: pip install 'tessera-jax[tpu]' "
            "(and JAX_PLATFORMS=cpu in the environment of every other program)"
        )
    for variable, value in SURROUNDINGS.items():
        os.environ.setdefault(variable, value)
    try:
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # libtpu's own, of no public kind
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PlanError(f"topology {name!r}: libtpu refuses it ({line})") from error
    if len(devices) != count:
        raise PlanError(f"topology {name!r} has {len(devices)} devices, not {count}")
    return devices
