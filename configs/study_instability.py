"""The instability curve of LeNet on MNIST: Frankle et al. (2020), arXiv:1912.05671, figure 2.

What: three seeds are trained to step k, and from there twice to the end in other data orders; the rise of test error
and loss on the line between the two ends, over k, for the dense network and for 10% of its weights (magnitude, once).
`:tiny` is a minute on digits.
Cost: see docs/results/instability_mnist.md.
Expected: both are stable from step 0 on, as the paper has it for this network.
Command: python scripts/study.py --config=configs/study_instability.py --config.data.dir=DATA --workdir=runs/instability
"""

from ml_collections import ConfigDict

VARIANTS = {"mnist": "the experiment, on MNIST", "tiny": "a minute on digits, no files needed"}


def get_config(variant: str = "mnist") -> ConfigDict:
    """The experiment."""
    tiny = variant == "tiny"
    config = ConfigDict()
    config.name = "instability"
    config.seeds = (0, 1) if tiny else (0, 1, 2)
    config.lr = 1.2e-3
    config.data = ConfigDict({"name": "digits" if tiny else "mnist"})
    config.data.validation = 100 if tiny else 1000
    config.model = ConfigDict({"hidden": (32, 16) if tiny else (300, 100)})
    config.train = ConfigDict({"steps": "200it" if tiny else "1200it", "eval_every": 100})
    config.search = ConfigDict({"levels": 0})
    config.study = ConfigDict(
        {
            "steps": (0, 50, 100) if tiny else (0, 100, 200, 400, 800),
            "densities": (1.0, 0.1),
            "orders": 2,
            "analysis": ConfigDict({"points": 9}),
        }
    )
    return config
