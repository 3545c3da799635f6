"""Why a ticket trains better than a random mask: gradients, regularization or data? Three explanations, measured.

What: five seeds search for tickets; ticket, the ticket's mask on fresh weights, the largest initial weights, random
masks and the dense network are trained again and measured on the way: gradient flow, the tangent kernel, the gap
between test and training loss where the training loss is equal, and the inputs that the first layer's mask is connected
to. `:mnist` is LeNet on MNIST at 14 x 14 pixels, `:conv` a Conv-2 on MNIST at 7 x 7, `:tiny` a minute on digits.
Cost: `:mnist` 737 to 874 s, `:conv` 811 s of wall time on a core shared with much else (processor time not noted).
Expected: the ticket's gradients are many times the random mask's at first and less at the end; it does not generalize
better at equal training loss; it is connected to inputs that vary and tell the label (docs/results/why_tickets.md).
Command: python scripts/study.py --config=configs/study_reasons.py --config.data.dir=DATA --workdir=runs/reasons
"""

from ml_collections import ConfigDict

VARIANTS = {
    "mnist": "LeNet on MNIST at 14 x 14 pixels",
    "conv": "a small convolutional network on MNIST at 7 x 7 pixels",
    "tiny": "a minute on digits, no files needed",
}


def get_config(variant: str = "mnist") -> ConfigDict:
    """The experiment."""
    tiny = variant == "tiny"
    config = ConfigDict()
    config.name = "reasons"
    config.seeds = (0, 1) if tiny else (0, 1, 2, 3, 4)
    config.lr = 1.2e-3
    config.data = ConfigDict({"name": "digits", "validation": 100} if tiny else {"name": "mnist", "shrink": 2})
    config.model = ConfigDict({"hidden": (32, 16) if tiny else (300, 100)})
    config.train = ConfigDict({"steps": "100it" if tiny else "1000it", "eval_every": 100})
    config.search = ConfigDict({"levels": 2 if tiny else 5, "rate": 0.4, "output_rate": 0.2})
    config.search.arms = ("ticket", "reinit", "large_init", "random_mask")
    config.study = ConfigDict({"steps": (0, 20) if tiny else (0, 10, 30, 100, 300)})
    if tiny:
        config.study.update({"examples": 20, "losses": 200})
    if variant == "conv":
        config.data.shrink = 4
        config.model = ConfigDict({"name": "conv2", "blocks": ((8, 8),), "dense": (64,)})
    return config
