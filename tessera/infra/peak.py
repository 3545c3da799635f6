"""The peak FLOPs per second that a run's utilization (MFU) is a share of: of a named accelerator, or measured."""

import contextlib
import json
import os
import time

import jax
import jax.numpy as jnp

from sharding.analysis.hardware import HARDWARE, find_hardware
from tessera.infra.logger import write_text
from tessera.infra.workdir import cache_dir, compiled_dir

# What JAX calls the accelerators of `HARDWARE`, by a part of the name in lower case; the first that fits.
KINDS = {"v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "tpu v5": "v5p", "v6": "v6e", "h100": "H100", "h200": "H200"}
SIDE = 1024  # of the matrices whose product is timed


def peak_flops(name: str, dtype: str, count: int) -> tuple[float, str]:
    """Find the peak of all devices of a run together.

    Args:
      name: of the accelerator, see `sharding.analysis.find_hardware`; "auto" goes by the devices there are, which on
        CPUs are timed, and "none" asks for none.
      dtype: of the products, for what is timed. Datasheets' peaks are those of bfloat16 whatever it is.
      count: devices of the run.

    Returns:
      FLOPs per second, 0 where they are unknown, and a sentence on where they are from.

    Raises:
      PlanError: no such accelerator.
    """
    kind, platform = jax.devices()[0].device_kind, jax.default_backend()
    if name == "none":
        return 0.0, ""
    if name == "auto" and platform == "cpu":
        measured = measured_peak(dtype) * jax.process_count()  # of a whole machine, however many devices it is split in
        return (
            measured,
            f"MFU: of {measured / 1e9:,.0f} GFLOP/s, measured ({dtype} products of {SIDE} x {SIDE}, all cores)",
        )
    if name == "auto":
        name = next((known for part, known in KINDS.items() if part in kind.lower()), "")
    if not name:
        return 0.0, f"MFU: the peak of {kind!r} is not known; name one of {', '.join(HARDWARE)} as config.log.hardware"
    each = find_hardware(name).flops
    return count * each, f"MFU: of {count} x {each / 1e12:,.0f} TFLOP/s ({name}, bfloat16, datasheet)"


def measured_peak(dtype: str) -> float:
    """FLOPs per second of a large matrix product on this machine's cores, cached in the user's directory.

    The file is matmul_peak.json in the cache directory; without it, it is timed again.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    path, key = cache_dir() / "matmul_peak.json", f"{compiled_dir().name}/{dtype}"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if not isinstance(known.get(key), float):
        known[key] = time_product(dtype)
        with contextlib.suppress(OSError):  # a cache that cannot be written is none
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(known))
    return cores * known[key]


def time_product(dtype: str, rounds: int = 10) -> float:
    """FLOPs per second of processor time of a product of two square matrices with float32 sums, the best of `rounds`.

    Of processor time, which other programs on the machine take none of.
    """
    x = jnp.ones((SIDE, SIDE), dtype)
    product = jax.jit(lambda x: jnp.einsum("ij,jk->ik", x, x, preferred_element_type=jnp.float32))
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        product(x).block_until_ready()
        best = min(best, time.process_time() - start)
    return 2.0 * SIDE**3 / best
