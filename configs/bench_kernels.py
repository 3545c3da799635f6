"""Time of the grouped and block-sparse kernels next to their rivals.

What: forward, input gradient and weight gradient of the grouped matmul on random uneven groups, against a dense matmul
of equal FLOPs, `jax.lax.ragged_dot` and the grouped kernels inside JAX for the platform; block-sparse products against
the dense product. All in turns in one process.
Cost: not measured: no run of either has ended. Most of "cpu" is `ragged_dot`.
Expected: the goal on a CPU is 20 times `ragged_dot` at 64 experts; docs/kernels.md has what was measured.
Command: python scripts/benchmark_kernels.py --config=configs/bench_kernels.py:cpu
"""

from ml_collections import ConfigDict


def get_config(arg: str = "cpu") -> ConfigDict:
    """`cpu` (small, float32), or `hopper` (the shapes that MoE models have, bfloat16; for TPUs too)."""
    if arg not in ("cpu", "hopper"):
        raise ValueError(f"bench_kernels.py:{arg}: choose cpu or hopper")
    config = ConfigDict()
    config.rounds = 5 if arg == "cpu" else 20
    config.seed = 0
    # Random sizes from a Dirichlet distribution: 1 is as uneven as uniform shares get.
    config.concentration = 1.0
    if arg == "cpu":
        config.dtype = "float32"
        # rows, d, ff, experts
        config.grouped = ((8192, 256, 512, 8), (8192, 256, 512, 64))
        # rows, d, ff, block, density
        config.blocks = ((4096, 1024, 1024, 128, 0.1), (4096, 1024, 1024, 64, 0.1))
    else:
        config.dtype = "bfloat16"
        config.grouped = (
            (8192, 4096, 14336, 8),
            (65536, 4096, 14336, 8),
            (32768, 2048, 1024, 64),
            (131072, 7168, 2048, 256),
        )
        config.blocks = ((16384, 4096, 14336, 128, 0.1), (16384, 4096, 14336, 64, 0.1))
    # Rivals left out, by name: `ragged_dot` is a masked dense product on some platforms.
    config.without = ()
    return config
