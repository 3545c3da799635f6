"""How good are tickets, and how heavy is their tail, over a grid of widths and depths, on MNIST?

What: for every width and depth, many fully connected networks are trained, pruned once by magnitude to 80% and to 20%
of each layer, rewound and trained again; how many are as accurate as their own dense network, the spread of accuracy,
and the extreme value index of minus the test loss at several thresholds with its measured coverage and power.
`:tiny` is a minute on digits.
Cost: see docs/results/ticket_distribution_mnist.md.
Expected: at 80% of the weights about half of the tickets or more win, at 20% none; the median rises and the spread
falls with width.
Command: python scripts/study.py --config=configs/study_distribution.py --config.data.dir=DATA --workdir=runs/grid
"""

from ml_collections import ConfigDict

VARIANTS = {"mnist": "the experiment, on MNIST", "tiny": "a minute on digits, no files needed"}


def get_config(variant: str = "mnist") -> ConfigDict:
    """The experiment."""
    tiny = variant == "tiny"
    config = ConfigDict()
    config.name = "distribution"
    config.seeds = (0,)
    config.lr = 2e-3
    config.data = ConfigDict({"name": "digits" if tiny else "mnist"})
    config.data.validation = 100
    config.data.shrink = 1 if tiny else 2
    config.train = ConfigDict({"steps": "40it" if tiny else "400it", "eval_every": 40 if tiny else 400})
    config.search = ConfigDict({"levels": 0})
    config.study = ConfigDict(
        {
            "widths": (4, 8) if tiny else (8, 16, 32, 64),
            "depths": (1, 2),
            "tickets": 12 if tiny else 80,
            "densities": (0.8, 0.2),
            "tails": (0.25, 0.5) if tiny else (0.1, 0.25, 0.5),
            "trials": 20 if tiny else 200,
        }
    )
    return config
