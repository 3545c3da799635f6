"""Time of the grouped and block-sparse kernels next to their rivals.

What: forward, input gradient and weight gradient of the grouped matmul on random uneven groups, against a dense matmul
of equal FLOPs, `jax.lax.ragged_dot` and the grouped kernels inside JAX for the platform; block-sparse products against
the dense product; a whole layer, router to combine, forward and backward, against a dense layer. All in turns in one
process.
Cost: "cpu" 42 seconds on two cores, most of it `ragged_dot`; "hopper" not measured.
Expected: docs/kernels.md has what was measured ("cpu": 25 to 28 times `ragged_dot` at 64 experts) and the goals.
Command: python scripts/benchmarks/kernels.py --config=configs/bench_kernels.py:cpu
"""

from ml_collections import ConfigDict


def get_config(arg: str = "cpu") -> ConfigDict:
    """`cpu` (small, float32), or `hopper` (the shapes that MoE models have, bfloat16; for TPUs too)."""
    if arg not in ("cpu", "hopper"):
        raise ValueError(f"bench_kernels.py:{arg}: choose cpu or hopper")
    config = ConfigDict()
    config.seed = 0
    # Random sizes from a Dirichlet distribution: 1 is as uneven as uniform shares get.
    config.concentration = 1.0
    if arg == "cpu":
        config.rounds = 5
        # Calls of a round: launches overlap on accelerators.
        config.repeat = 1
        config.dtype = "float32"
        # rows, d, ff, experts
        config.grouped = ((8192, 256, 512, 8), (8192, 256, 512, 64))
        # rows, d, ff, block, density
        config.blocks = ((4096, 1024, 1024, 128, 0.1), (4096, 1024, 1024, 64, 0.1))
        # tokens, d, ff, experts, choices
        config.layers = ((4096, 256, 512, 8, 2),)
    else:
        config.rounds = 10
        config.repeat = 10
        config.dtype = "bfloat16"
        config.grouped = (
            (8192, 4096, 14336, 8),
            (65536, 4096, 14336, 8),
            (32768, 2048, 1024, 64),
            (131072, 7168, 2048, 256),
        )
        config.blocks = ((16384, 4096, 14336, 128, 0.1), (16384, 4096, 14336, 64, 0.1))
        config.layers = ((16384, 4096, 14336, 8, 2), (16384, 2048, 1024, 64, 8))
    # A rival that takes longer than this many seconds a call has one round.
    config.patience = 1.0
    # Rivals left out, by name: `ragged_dot` is a masked dense product on some platforms.
    config.without = ()
    return config
