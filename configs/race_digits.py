"""The ticket of the race: test accuracy on scikit-learn's digits with at most 2,000 live weights.

What: as lottery_digits.py, one arm, down to so many weights that they and the biases are at most 2,000
(docs/leaderboard.md).
Cost: about two minutes of processor time, on cores shared with much else.
Expected: 97.9% test accuracy (docs/leaderboard.md).
Command: python scripts/find_ticket.py --config=configs/race_digits.py --workdir=runs/race_digits
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The search."""
    config = ConfigDict({"seeds": tuple(range(5)), "lr": 1.2e-3})
    config.data = ConfigDict({"name": "digits"})
    config.train = ConfigDict({"steps": "1000it", "eval_every": 100})
    config.search = ConfigDict({"levels": 15, "density": 0.0284, "arms": ("ticket",)})
    return config
