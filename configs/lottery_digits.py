"""A winning ticket on scikit-learn's 1,797 real handwritten digits, no network needed.

What: Frankle & Carbin (2019), section 2 on a small set: LeNet-300-100 is trained, 20% of the smallest weights of each
layer are removed (10% of the output layer), the rest goes back to its initial values, and again. Beside the ticket run
its controls: the same mask with fresh weights, and a random mask with as many weights in every layer.
Cost: about 90 seconds of processor time.
Expected: at 3.9% of the weights the ticket is ahead of both controls in test accuracy and within about a point of the
dense network (98.9%); with 300 test images and three seeds the intervals are wide.
Command: python scripts/find_ticket.py --config=configs/lottery_digits.py --workdir=runs/digits
"""

from ml_collections import ConfigDict

VARIANTS = {
    "": "three seeds, about 90 seconds of processor time",
    "oneshot": "one-shot pruning beside it",
    "long": "ten seeds, twice as many steps",
    "demo": "six seeds, five rounds down to 5% of the weights: a part of `tessera demo`",
}


def get_config(variant: str = "") -> ConfigDict:
    """The search on digits."""
    config = ConfigDict()
    config.seeds = tuple(range(10 if variant == "long" else 3))
    config.lr = 1.2e-3
    config.data = ConfigDict({"name": "digits"})
    config.train = ConfigDict(
        {
            "steps": "2000it" if variant == "long" else "1000it",
            "eval_every": 20,
            "save_seconds": 5.0,
        }
    )
    config.search = ConfigDict(
        {
            "levels": 15,
            "arms": ("ticket", "reinit", "random_mask") + (("oneshot",) if variant == "oneshot" else ()),
        }
    )
    if variant == "demo":
        # A round removes 45% of a layer: few rounds lead to where a ticket and its controls differ by points.
        config.seeds, config.train.steps = tuple(range(6)), "400it"
        config.search.levels, config.search.rate, config.search.output_rate = 5, 0.45, 0.3
    return config
