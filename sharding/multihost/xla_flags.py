"""XLA flags that overlap collectives with matrix products, by backend.

`python -m sharding.multihost.xla_flags tpu` prints them. They are read from the environment when a backend starts, so
they belong into a launch file, not into a program; a run records its flags in run.json. Their effect was not measured
here.
"""

import sys
from collections.abc import Mapping, Sequence

from sharding.errors import PlanError, choice

VARIABLES: Mapping[str, str] = {"tpu": "LIBTPU_INIT_ARGS", "gpu": "XLA_FLAGS"}
"""Environment variable of each backend's flags."""

FLAGS: Mapping[str, tuple[str, ...]] = {
    "tpu": (
        # Splits a collective into steps that are fused with the products around it.
        "--xla_tpu_enable_async_collective_fusion=true",
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
        "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
        "--xla_tpu_overlap_compute_collective_tc=true",
        "--xla_enable_async_all_gather=true",
    ),
    "gpu": (
        # Starts a collective as early and waits for it as late as possible; the others do so across steps of a scan.
        "--xla_gpu_enable_latency_hiding_scheduler=true",
        "--xla_gpu_enable_pipelined_all_gather=true",
        "--xla_gpu_enable_pipelined_reduce_scatter=true",
        "--xla_gpu_enable_pipelined_all_reduce=true",
    ),
}


def flags(backend: str) -> str:
    """Join the flags of a backend to one string for the variable `VARIABLES[backend]`.

    Raises:
      PlanError: no flags are known for it.
    """
    if backend not in FLAGS:
        raise PlanError(f"no overlap flags for backend {backend!r}: {choice(backend, FLAGS)}")
    return " ".join(FLAGS[backend])


def main(arguments: Sequence[str]) -> int:
    """Print the flags of the backend named on the command line."""
    try:
        print(flags(arguments[0] if arguments else ""))
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
