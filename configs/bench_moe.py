"""A layer of routed experts next to a dense one of equal active FLOPs, and to `jax.lax.ragged_dot`.

What: `tokens` tokens through router, dispatch, experts and combine, forward and forward + backward, float32; the dense
layer is `k` experts wide. All in turns in one process; ratios are of the same round.
Cost: 35 seconds on two CPU cores, most of it `ragged_dot`, which computes every expert on every row (leave it out by
--config.ragged='()').
Expected: on two CPU cores 1.05 times the dense layer's time forward and 1.42 forward + backward at 8 experts, 1.39 and
2.09 at 64 (goals: within 1.6 and 2.2), and ragged_dot 38 and 52 times slower than that at 64. See docs/moe.md.
Command: python scripts/benchmarks/run.py --config=bench_moe
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """One benchmark."""
    return ConfigDict({"suite": "moe"})
