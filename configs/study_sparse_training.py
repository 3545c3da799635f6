"""Every way to a sparse network at equal compute, LeNet on MNIST: tickets, sparse training, supermasks.

What: five seeds; iterative magnitude pruning, random masks and pruning at initialization (SNIP's criterion is one
setting away: --config.search.score=snip) from one search, then SET, RigL, straight-through magnitude training, the
cubic schedule, early-bird tickets and edge-popup from the same initializations, all to the same number of weights, once
in one run and once with the steps of the whole search. `config.study.methods` says which. `:tiny` is minutes on digits.
Cost: see docs/results/sparse_training_mnist.md.
Expected: at 5% and equal training FLOPs straight-through and the cubic schedule have 97.6% test accuracy, tickets by
one pruning and RigL 96.1%, SET 95.5%, iterative tickets 95.2%, edge-popup 66%; dense networks 98.1%.
Command: python scripts/study.py --config=configs/study_sparse_training.py --config.data.dir=DATA --workdir=runs/sparse
"""

from ml_collections import ConfigDict

VARIANTS = {"mnist": "the experiment, on MNIST", "tiny": "minutes on digits, no files needed"}


def get_config(variant: str = "mnist") -> ConfigDict:
    """The experiment."""
    tiny = variant == "tiny"
    config = ConfigDict()
    config.name = "sparse_training"
    config.seeds = (0, 1) if tiny else (0, 1, 2, 3, 4)
    config.lr = 1.2e-3
    config.data = ConfigDict({"name": "digits" if tiny else "mnist"})
    config.data.update({"validation": 100 if tiny else 1000, "shrink": 1 if tiny else 2})
    config.model = ConfigDict({"hidden": (32, 16) if tiny else (300, 100)})
    config.train = ConfigDict({"steps": "120it" if tiny else "1000it", "eval_every": 100})
    config.search = ConfigDict(
        {
            "levels": 2 if tiny else 6,
            "scope": "erk",
            "schedule": "geometric",
            "density": 0.2 if tiny else 0.05,
            "arms": ("ticket", "random_mask", "at_init"),
        }
    )
    names = ("set", "rigl", "straight_through", "gradual", "early_bird", "popup")
    config.study = ConfigDict({"methods": names, "moves": 20 if tiny else 50, "every": 20})
    return config
