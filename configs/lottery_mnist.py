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

LENGTHS = {"short": ("10000it", 3), "paper": ("50000it", 5)}


def get_config(arg: str = "short") -> ConfigDict:
    """The search; `arg` is "short" or "paper"."""
    if arg not in LENGTHS:
        raise ValueError(f"configs/lottery_mnist.py:{arg}: choose one of {', '.join(LENGTHS)}")
    steps, seeds = LENGTHS[arg]
    config = ConfigDict()
    config.seeds = tuple(range(seeds))
    config.lr = 1.2e-3
    config.data = ConfigDict({"name": "mnist", "dir": ""})
    config.model = ConfigDict({"hidden": (300, 100)})
    config.optimizer = ConfigDict({"name": "adam"})
    config.train = ConfigDict(
        {"steps": steps, "batch_size": 60, "eval_every": 200, "stack": "auto", "save_seconds": 20.0}
    )
    config.search = ConfigDict(
        {
            "levels": 16,
            "rate": 0.2,
            "output_rate": 0.1,
            "scope": "layer",
            "score": "magnitude",
            "arms": ("ticket", "reinit", "random_mask"),
            "rewind": "0it",
            "rewind_optimizer": False,
        }
    )
    return config
