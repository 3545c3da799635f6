"""What makes a ticket, LeNet on MNIST: the ablations of Zhou et al. 2019 (arXiv:1905.01067).

What: five seeds; one-shot masks from the trained dense networks by eight criteria and at random, trained from the
rewound initialization; and, under the masks of the largest final weights, weights drawn anew, shuffled or made
constant, with their initial signs and without, and pruned weights frozen at their initial values in place of zero. The
accuracy before any training is in the table too: masks alone do something. `:tiny` is a minute on digits.
Cost: 4 minutes on one CPU core.
Expected: with the initial signs, new or constant values train nearly as well as the ticket; with random signs they lose
2 to 3 points, random masks 3.4 (docs/results/ablations_mnist.md).
Command: python scripts/study.py --config=configs/study_ablations.py --config.data.dir=DATA --workdir=runs/ablations
"""

from ml_collections import ConfigDict

VARIANTS = {"mnist": "the experiment, on MNIST", "tiny": "a minute on digits, no files needed"}


def get_config(variant: str = "mnist") -> ConfigDict:
    """The experiment."""
    tiny = variant == "tiny"
    config = ConfigDict()
    config.name = "ablations"
    config.seeds = (0, 1) if tiny else (0, 1, 2, 3, 4)
    config.lr = 1.2e-3
    config.data = ConfigDict({"name": "digits" if tiny else "mnist"})
    config.data.update({"validation": 100 if tiny else 1000, "shrink": 1 if tiny else 2})
    config.model = ConfigDict({"hidden": (32, 16) if tiny else (300, 100)})
    config.train = ConfigDict({"steps": "120it" if tiny else "1000it", "eval_every": 100})
    config.search = ConfigDict({"levels": 1 if tiny else 2, "scope": "layer", "schedule": "geometric"})
    config.search.density = 0.2 if tiny else 0.04
    config.study = ConfigDict()
    config.study.criteria = (
        *("large_final", "small_final", "large_init", "small_init", "large_init_large_final"),
        *("small_init_small_final", "magnitude_increase", "movement"),
    )
    config.study.treatments = (
        *("rewind", "rewind, rest frozen", "reinit", "reinit, signs kept", "shuffle", "shuffle, signs kept"),
        *("constant", "constant, signs kept"),
    )
    return config
