"""A layer of routed experts next to a dense one of equal active FLOPs, and to `jax.lax.ragged_dot`.

What: `tokens` tokens through router, dispatch, experts and combine, forward and forward + backward, float32; the dense
layer is `k` experts wide. All in turns in one process; ratios are of the same round.
Cost: not measured; `--config.ragged=True` costs more (there it computes every expert on every row).
Expected: not measured on an idle machine. The goal on CPU: within 1.6 times the dense layer at 8 experts, 2.2 times at
64, and 20 times faster than ragged_dot at 64.
Command: python scripts/bench_moe.py --config=configs/bench_moe.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """One benchmark."""
    config = ConfigDict()
    config.tokens = 4096
    config.width = 256
    config.ff = 512
    config.k = 2
    config.experts = (8, 64)
    config.cores = 0  # 0 is all there are
    config.rounds = 7
    config.ragged = False
    return config
