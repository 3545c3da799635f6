"""Training iterations per second and ticket, next to the same step written in PyTorch.

What: LeNet-300-100 under a mask, batch 60, Adam; stacks of tickets by `lax.map` and by `vmap`; PyTorch (if installed)
with fused Adam, with the mask on the gradients and without any mask; all in turns in one process on `cores` cores.
Cost: three minutes.
Expected: on one CPU core at least 1.5 times the PyTorch loop that does the same work.
Command: python scripts/benchmarks/run.py --config=bench_lottery
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """One benchmark."""
    return ConfigDict({"suite": "lottery"})
