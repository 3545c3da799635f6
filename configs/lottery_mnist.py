"""Winning tickets on MNIST: figures 1, 3 and 4 of Frankle & Carbin (2019), arXiv:1803.03635.

What: LeNet-300-100, Gaussian Glorot, Adam 1.2e-3, batch 60; every round removes 20% of each layer's smallest weights
(10% of the output layer) and sets the rest back to its initial values; random reinitialization and random masks as
controls.
`:short` trains 10,000 iterations per round with 3 seeds, `:paper` 50,000 (as the paper) with 5.
Cost: `:short` 33 minutes on one CPU core; `:paper` about eight times that (not run).
Expected: dense about 98%; the ticket at 21.1% of the weights at least as accurate; tickets ahead of reinitialized ones
in accuracy and early stop at 21.1%, 13.5% and 3.6%. See docs/results/lottery_mnist.md.
Command: python scripts/find_ticket.py --config=configs/lottery_mnist.py --config.data.dir=DATA --workdir=runs/mnist
"""

from ml_collections import ConfigDict

VARIANTS = {"short": "10,000 steps and three seeds, for a CPU", "paper": "50,000 steps and five seeds, as in the paper"}
LENGTHS = {"short": ("10000it", 3), "paper": ("50000it", 5)}


def get_config(variant: str = "short") -> ConfigDict:
    """The search."""
    steps, seeds = LENGTHS[variant]
    config = ConfigDict()
    config.seeds = tuple(range(seeds))
    config.lr = 1.2e-3
    config.data = ConfigDict({"name": "mnist"})
    config.train = ConfigDict({"steps": steps, "eval_every": 200})
    config.search = ConfigDict({"levels": 16})
    return config
