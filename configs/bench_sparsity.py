"""Which sparsity saves time on which hardware: masks, blocks, neurons cut and CSR beside the dense layer.

What: a feed-forward layer forward, with 8 rows (decoding) and with gradients, in turns with the dense layer in one
process on `cores` cores; then floors of the same by roofline for accelerators, which are counted and not measured.
Cost: a minute.
Expected: docs/results/sparse_speed.md has what was measured.
Command: python scripts/benchmarks/run.py --config=bench_sparsity
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """One benchmark."""
    return ConfigDict({"suite": "sparsity"})
