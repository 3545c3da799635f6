"""A ticket's mask on weights it was not found for, LeNet on MNIST.

What: `:mnist` five seeds search for tickets; every seed then trains under the next seed's mask, as it is and permuted
to match its own dense network by weight matching and activation matching (Ainsworth et al. 2023), beside its own
ticket's mask and random masks of equal density in every layer. `:tiny` is a minute on digits. `:sources` five seeds
search on MNIST averaged to 8 x 8 pixels, and again with other data (scikit-learn's digits), another optimizer
(momentum) and another width (half as many hidden units); all those masks then go on the weights of the first search.
`config.sources` says what a source changes. `:sources-tiny` is a minute on digits.
Cost: see docs/results/mask_transfer_mnist.md.
Expected: `:mnist` the own mask leads; alignment gives about a point over the other seed's mask as it is. `:sources`
masks of another optimizer are as good as the own; those of other data and another width are worth about another seed's.
Command: python scripts/study.py --config=configs/study_transfer.py --config.data.dir=DATA --workdir=runs/transfer
"""

from ml_collections import ConfigDict

VARIANTS = {
    "mnist": "masks of other seeds, aligned and not",
    "tiny": "a minute on digits, no files needed",
    "sources": "masks of another optimizer, other data and another width",
    "sources-tiny": "the same on digits: a minute",
}


def get_config(variant: str = "mnist") -> ConfigDict:
    """The experiment."""
    tiny = variant.endswith("tiny")
    config = ConfigDict()
    config.name = "transfer"
    config.seeds = (0, 1) if tiny else (0, 1, 2, 3, 4)
    config.lr = 1.2e-3
    config.data = ConfigDict({"name": "digits" if tiny else "mnist"})
    config.data.validation = 100 if tiny else 1000
    config.model = ConfigDict({"hidden": (32, 16) if tiny else (300, 100)})
    config.train = ConfigDict({"steps": "100it" if tiny else "800it", "eval_every": 100})
    config.search = ConfigDict({"levels": 2 if tiny else 6, "rate": 0.4, "output_rate": 0.2, "arms": ("ticket",)})
    config.study = ConfigDict({"levels": (2,) if tiny else (4, 6)})
    return with_sources(config, tiny) if variant.startswith("sources") else config


def with_sources(config: ConfigDict, tiny: bool) -> ConfigDict:
    """The same network on 8 x 8 pixels, and what the other searches change."""
    config.name = "sources"
    if not tiny:
        config.data.update({"crop": 2, "shrink": 3})
    digits = {"name": "digits", "validation": 100, "crop": 0, "shrink": 1}
    config.sources = ConfigDict(
        {
            # The tiny one has digits already: another split of them.
            "other data": {"data": {"seed": 1} if tiny else digits},
            "another optimizer": {"optimizer": {"name": "momentum"}, "lr": 0.05},
            "half the width": {"model": {"hidden": (16, 8) if tiny else (150, 50)}},
        }
    )
    return config
