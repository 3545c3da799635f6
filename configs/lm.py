"""A decoder-only language model on plain text.

What: next-token prediction on bytes with a pre-norm transformer (RMSNorm, rotary positions, SwiGLU, grouped-query
attention), AdamW, linear warmup and cosine decay; by default on the sources of the running Python's standard library,
so no download is needed. `--config.data.name` takes a path or a glob of your own text.
Cost: `tiny` about 90 seconds of processor time; `small` and `base` (85 million parameters) are for accelerators,
untimed.
Expected: `tiny` ends near 1.55 nats per byte on validation text, from 5.5 = ln 256.
Command: python scripts/train.py --config=configs/lm.py:tiny --workdir=runs/lm
"""

from ml_collections import ConfigDict

VARIANTS = {
    "tiny": "two layers of width 128: about 90 seconds of processor time",
    "small": "eight layers of width 512, for an accelerator",
    "base": "85 million parameters, for an accelerator",
}
SIZES: dict[str, dict] = {
    "tiny": {
        "steps": 400,
        "batch_size": 16,
        "length": 128,
        "lr": 3e-3,
        "model": {"layers": 2, "width": 128, "heads": 4, "kv_heads": 2, "dtype": "float32", "remat": "none"},
    },
    "small": {
        "steps": 5000,
        "batch_size": 64,
        "length": 512,
        "lr": 1e-3,
        "model": {"layers": 8, "width": 512, "heads": 8, "kv_heads": 4, "dtype": "bfloat16", "remat": "none"},
    },
    "base": {
        "steps": 50000,
        "batch_size": 256,
        "length": 1024,
        "lr": 6e-4,
        "model": {"layers": 12, "width": 768, "heads": 12, "kv_heads": 12, "dtype": "bfloat16", "remat": "dots"},
    },
}


def get_config(variant: str = "tiny") -> ConfigDict:
    """The settings of one size."""
    size = SIZES[variant]
    config = ConfigDict()
    config.steps = size["steps"]
    config.batch_size = size["batch_size"]
    config.length = size["length"]
    config.lr = size["lr"]
    config.model = ConfigDict(size["model"])
    config.optimizer = ConfigDict(
        {
            "schedule": "cosine",
            "warmup": 0.05,
            "final": 0.1,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
        }
    )
    config.checkpoint = ConfigDict({"every": size["steps"] // 10})
    config.log = ConfigDict({"every": 10})
    config.eval = ConfigDict({"every": size["steps"] // 10, "batches": 16})
    return config
