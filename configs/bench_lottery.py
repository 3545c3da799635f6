"""Training iterations per second and ticket, next to the same step written in PyTorch.

What: LeNet-300-100 under a mask, batch 60, Adam; stacks of tickets by `lax.map` and by `vmap`; PyTorch (if installed)
with fused Adam, with the mask on the gradients and without any mask; all in turns in one process on `cores` cores.
Cost: three minutes.
Expected: on one CPU core at least 1.5 times the PyTorch loop that does the same work.
Command: python scripts/benchmarks/lottery.py --config=configs/bench_lottery.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """One benchmark."""
    config = ConfigDict()
    config.name = "lottery"
    config.cores = 1
    config.lr = 1.2e-3
    config.batch_size = 60
    config.steps = 300
    config.rounds = 7
    config.tickets = (1, 5, 20)
    config.density = 0.2
    config.inputs = 784
    config.images = 20_000
    config.hidden = (300, 100)
    return config
