"""What else are tickets good for: corrupted and adversarial images, wrong labels, calibration, ensembles?

What: tickets, the same masks on fresh weights, random masks and dense networks under noise, blur, shift, occlusion,
FGSM and PGD, trained with wrong labels, and their calibration error; then ensembles of k tickets or k small dense
networks against one dense network of equal live weights, trained for equal FLOPs. `:mnist` is LeNet on MNIST at 14 x
14 pixels, `:tiny` two minutes on digits.
Cost: `:mnist` 1,435 s on a CPU core shared with much else (processor time not noted).
Expected: the ticket is ahead of the dense network of as many steps by 0.4 points on unchanged images, by up to 4 on
changed ones, not told apart under strong blur and occlusion, and no better calibrated; five tickets are behind one
dense network trained five times as long by 0.97 points (docs/results/reliability_mnist.md).
Command: python scripts/study.py --config=configs/study_reliability.py --config.data.dir=DATA --workdir=runs/reliability
"""

from ml_collections import ConfigDict

VARIANTS = {"mnist": "the experiment", "tiny": "two minutes on digits, no files needed"}


def get_config(variant: str = "mnist") -> ConfigDict:
    """The experiment."""
    tiny = variant == "tiny"
    config = ConfigDict()
    config.name = "reliability"
    # Groups of k seeds make an ensemble: k = 5 at 20% of the weights, five groups.
    config.seeds = tuple(range(4 if tiny else 25))
    config.lr = 1.2e-3
    config.data = ConfigDict({"name": "digits", "validation": 100} if tiny else {"name": "mnist", "shrink": 2})
    config.model = ConfigDict({"hidden": (32, 16) if tiny else (300, 100)})
    config.train = ConfigDict({"steps": "60it" if tiny else "1000it", "eval_every": 60 if tiny else 200})
    config.search = ConfigDict({"levels": 1 if tiny else 3, "rate": 0.5 if tiny else 0.415, "output_rate": 0.2})
    config.search.arms = ("ticket", "reinit", "random_mask")
    if tiny:
        config.study = ConfigDict({"noise": (0.2,), "blur": (1.0,), "shift": (1,), "occlusion": (3,), "radii": (0.1,)})
        config.study.update({"wrong_labels": (0.4,), "examples": 100, "attack_steps": 5})
    return config
