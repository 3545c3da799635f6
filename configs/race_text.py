"""The language models of the race: bits per byte of the standard library's sources for 2e12 or 2e13 training FLOP.

What: as lm.py, with as many steps as the budget allows, counted as 6 N D (docs/leaderboard.md).
Cost: `2e12` about three minutes of processor time a seed, on a core shared with much else; `2e13` not measured.
Expected: not measured; where five seeds have run, docs/leaderboard.md has the record.
Command: python scripts/train.py --config=configs/race_text.py:2e12 --workdir=runs/race_text
"""

from ml_collections import ConfigDict

VARIANTS = {"2e12": "at most 2e12 FLOP", "2e13": "at most 2e13 FLOP"}
SIZES: dict[str, dict] = {
    "2e12": {"steps": 764, "batch_size": 8, "lr": 3e-3, "model": {"layers": 2, "width": 128}},
    "2e13": {"steps": 1947, "batch_size": 8, "lr": 3e-3, "model": {"layers": 4, "width": 192}},
}


def get_config(variant: str = "2e12") -> ConfigDict:
    """The settings of one budget."""
    size = SIZES[variant]
    config = ConfigDict({"steps": size["steps"], "batch_size": size["batch_size"], "length": 128, "lr": size["lr"]})
    config.model = ConfigDict(size["model"] | {"heads": 4, "kv_heads": 2, "dtype": "float32", "remat": "none"})
    config.optimizer = ConfigDict(
        {"schedule": "cosine", "warmup": 0.05, "final": 0.1, "weight_decay": 0.1, "clip_norm": 1.0}
    )
    config.eval = ConfigDict({"every": size["steps"] // 4, "batches": 16})
    config.checkpoint = ConfigDict({"every": size["steps"] // 4})
    return config
