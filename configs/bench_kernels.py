"""Time of the grouped and block-sparse kernels beside other implementations.

What: forward, input gradient and weight gradient of the grouped matmul on random uneven groups, against a dense matmul
of equal FLOPs, `jax.lax.ragged_dot` and the grouped kernels inside JAX for the platform; block-sparse products against
the dense product; a whole layer, router to combine, forward and backward, against a dense layer. All in turns in one
process.
Cost: "cpu" 42 seconds on two cores, most of it `ragged_dot`; "hopper" not measured.
Expected: docs/kernels.md has what was measured ("cpu": 25 to 28 times `ragged_dot` at 64 experts) and the goals.
Command: python scripts/benchmarks/run.py --config=bench_kernels:cpu
"""

from ml_collections import ConfigDict

VARIANTS = {"cpu": "small shapes in float32", "hopper": "the shapes that MoE models have, bfloat16; for TPUs too"}


def get_config(variant: str = "cpu") -> ConfigDict:
    """One benchmark."""
    config = ConfigDict({"suite": "kernels"})
    if variant == "hopper":
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
    return config
