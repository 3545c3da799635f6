"""Peaks of named accelerators, each with its source, and TPU topologies to compile for ahead of time.

Peaks are from datasheets; no program reaches them. Times computed from them are lower bounds.
"""

import difflib
import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies

from sharding.errors import PlanError

GIB = 2.0**30
CLOUD_TPU = "https://docs.cloud.google.com/tpu/docs/"


@dataclass(frozen=True)
class Hardware:
    """One device (a TPU chip, a GPU).

    Attributes:
      name: as in `HARDWARE`.
      flops: bfloat16 floating-point operations per second of dense matrix products, a multiply-add being two.
      memory: bytes of HBM.
      bandwidth: bytes per second between HBM and the chip.
      links: bytes per second one device sends over all its fast links together (ICI, NVLink), one direction.
      torus: dimensions of the torus of the fast links; 0 is a switch, where any group uses all links.
      domain: devices joined by the fast links.
      network: bytes per second one device sends beyond that, through the data-center network (DCN).
      sources: of the numbers.

    Example:
      >>> from sharding.analysis import find_hardware
      >>> v5p = find_hardware("v5p")
      >>> round(v5p.ridge), v5p.speed(group=8)
      (166, 200000000000.0)
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    links: float
    torus: int
    domain: int
    network: float
    sources: tuple[str, ...]

    @property
    def platform(self) -> str:
        """JAX's name of the platform."""
        return "tpu" if self.torus else "gpu"

    @property
    def ridge(self) -> float:
        """Ridge point of the roofline: FLOPs per byte of HBM above which a program is compute-bound."""
        return self.flops / self.bandwidth

    def speed(self, group: int, *, crosses: bool = False) -> float:
        """Compute the peak bytes per second that one device of a group sends in a collective.

        On a torus a group of neighbors spans as many dimensions as its size needs, and uses only their links:
        a group of n on a torus of d dimensions with N devices needs ceil(d log n / log N) of them (a group as wide as
        one side uses two of 2 d links). A group larger than the domain sends through the network.

        Args:
          group: devices.
          crosses: the group spans several slices (a `dcn.` axis).
        """
        if crosses or group > self.domain:
            return self.network
        if not self.torus:
            return self.links
        side = self.domain ** (1 / self.torus)
        used = min(self.torus, max(1, math.ceil(math.log(group) / math.log(side) - 1e-9)))
        return self.links * used / self.torus


# Links of a TPU: half of the documented bidirectional ICI bandwidth per chip. The network's share per chip is the pod's
# or the host's documented bandwidth over its chips. NVLink: half of the 900 GB/s of both directions; a DGX H100 / H200
# has one 400 Gbit/s adapter per GPU. NVIDIA's tables give tensor FLOPs with 2:4 sparsity; dense is half.
HARDWARE: Mapping[str, Hardware] = {
    "v5e": Hardware(
        "v5e", 197e12, 16 * GIB, 819e9, 200e9, 2, 256, 3.125e9, (CLOUD_TPU + "v5e (16 GB, 819 GB/s, ICI 1600 Gbit/s)",)
    ),
    "v5p": Hardware(
        "v5p",
        459e12,
        95 * GIB,
        2765e9,
        600e9,
        3,
        8960,
        6.25e9,
        (CLOUD_TPU + "v5p (95 GiB, 2765 GB/s, ICI 1200 GB/s both ways, DCN 50 Gbit/s)",),
    ),
    "v6e": Hardware(
        "v6e",
        918e12,
        32 * GIB,
        1638e9,
        400e9,
        2,
        256,
        12.5e9,
        (CLOUD_TPU + "v6e (32 GB, 1638 GB/s, ICI 800 GB/s both ways, DCN 25.6 Tbit/s a pod)",),
    ),
    "H100": Hardware(
        "H100",
        989.4e12,
        80e9,
        3350e9,
        450e9,
        0,
        8,
        50e9,
        ("https://www.nvidia.com/en-us/data-center/h100/ (SXM)", "NVIDIA DGX H100/H200 user guide"),
    ),
    "H200": Hardware(
        "H200",
        989.4e12,
        141e9,
        4800e9,
        450e9,
        0,
        8,
        50e9,
        ("https://www.nvidia.com/en-us/data-center/h200/ (SXM)", "NVIDIA DGX H100/H200 user guide"),
    ),
}


def find_hardware(name: str) -> Hardware:
    """Find the device called `name`, or the one of a topology such as "v5p:8x8x8".

    Raises:
      PlanError: no such device; the message lists them.

    Example:
      >>> from sharding.analysis import find_hardware
      >>> find_hardware("H100").platform
      'gpu'
    """
    device = name.partition(":")[0]
    if device not in HARDWARE:
        near = difflib.get_close_matches(device.lower(), [known.lower() for known in HARDWARE], n=1, cutoff=0.3)
        hint = next((f"did you mean {known!r}? " for known in HARDWARE if near and known.lower() == near[0]), "")
        raise PlanError(f"no hardware {device!r}; {hint}One of {', '.join(HARDWARE)}")
    return HARDWARE[device]


def chips(topology: str) -> int:
    """Count the devices of a topology: 512 of "v5p:8x8x8".

    Raises:
      PlanError: it does not read NAME:AxB or NAME:AxBxC.
    """
    name, colon, shape = topology.partition(":")
    find_hardware(name)
    try:
        sizes = [int(size) for size in shape.split("x")]
    except ValueError:
        sizes = []
    if not colon or not sizes or min(sizes) < 1:
        raise PlanError(f"topology {topology!r} should read like 'v5p:8x8x8' or 'v5e:16x16'")
    return math.prod(sizes)


# Environment variables that libtpu reads before it describes a topology; compiling needs none of them.
SURROUNDINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_devices(name: str) -> list[Any]:
    """Make the devices of a TPU slice such as "v5p:8x8x8" (512 chips), to compile for ahead of time.

    Sets the environment variables of `SURROUNDINGS` where they are not set: libtpu reads them when it is loaded.

    Raises:
      PlanError: the name is no topology, or libtpu knows no such slice.
      ImportError: libtpu is not installed.
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
