"""How many untrained subnetworks of a random network are as good as the trained network, by width and depth?

What: five random networks of every width and depth on 4 x 4 images of three digits; each is trained, then its strong
tickets (Malach et al. 2020, Pensia et al. 2020) are counted by annealed importance sampling over masks, and laws of
growth are compared. `:tiny` is two minutes.
Cost: see docs/results/strong_tickets_digits.md.
Expected: every weight doubles the number; the share of all masks is 10^-11 to 10^-14, at any width and depth.
Command: python scripts/study.py --config=configs/study_strong.py --workdir=runs/strong
"""

from ml_collections import ConfigDict

VARIANTS = {"digits": "the experiment", "tiny": "two minutes"}


def get_config(variant: str = "digits") -> ConfigDict:
    """The experiment."""
    tiny = variant == "tiny"
    config = ConfigDict()
    config.name = "strong"
    config.seeds = (0, 1) if tiny else (0, 1, 2, 3, 4)
    config.lr = 1e-2
    # Validation and test images together are those that subnetworks are counted on.
    config.data = ConfigDict({"name": "digits", "validation": 300, "shrink": 2})
    config.train = ConfigDict({"steps": "200it" if tiny else "2000it", "eval_every": 200 if tiny else 1000})
    config.search = ConfigDict({"levels": 0})
    config.study = ConfigDict({"widths": (2, 4, 6) if tiny else (4, 8, 12, 20), "depths": (1,) if tiny else (1, 2, 3)})
    if tiny:
        config.study.update({"steps": 20, "population": 32, "populations": 2, "less": 0.3})
    return config
