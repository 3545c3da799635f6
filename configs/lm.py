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


def get_config(arg: str = "tiny") -> ConfigDict:
    """The settings of one size: tiny, small or base."""
    if arg not in SIZES:
        raise ValueError(f"configs/lm.py:{arg}: choose one of {', '.join(SIZES)}")
    size = SIZES[arg]
    config = ConfigDict()
    config.seed = 0
    config.steps = size["steps"]
    config.batch_size = size["batch_size"]  # sequences per step over all devices
    config.length = size["length"]  # tokens per sequence
    config.lr = size["lr"]
    config.z_loss = 1e-4
    # How the work is split over devices, like "fsdp=4, tp=2"; "" is data parallelism over the devices there are.
    config.plan = ""
    config.sharding = ConfigDict(
        {
            "schedule": "1f1b",
            "microbatches": 0,
            "virtual": 1,
            "sequence": False,
            "zero": 3,
            "context": "ring",
        }
    )
    # Weights to start from: those of another run's directory; "" is random. See `tessera.lm.warm_start.StartConfig`.
    config.start = ConfigDict(
        {
            "workdir": "",
            "router_scale": 0.02,
            "noise": 0.0,
            "method": "mean",
            "density": 0.2,
            "scale": 1.0,
            "base": "",
        }
    )
    config.data = ConfigDict(
        {
            "name": "stdlib",
            "dir": "",
            "tokenizer": "bytes",
            "vocab_size": 256,
            "max_bytes": 0,
            "validation": 0.05,
            "test": 0.05,
        }
    )
    config.model = ConfigDict(
        size["model"] | {"head_dim": 0, "ff": 0, "tied": True, "rope_theta": 1e4, "scan": True, "init_scale": 1.0}
    )
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "schedule": "cosine",
            "warmup": size["steps"] // 20,
            "final": 0.1,
            "weight_decay": 0.1,
            "decay_mask": "matrices",
            "clip_norm": 1.0,
            "agc": 0.0,
            "ema": 0.0,
            "options": ConfigDict(),  # of the optimizer: --config.optimizer.options="{'b2': 0.95}"
        }
    )
    config.step = ConfigDict({"grad_accum_steps": 1, "noise_scale": False})
    config.checkpoint = ConfigDict({"every": size["steps"] // 10, "keep": 3, "best": 1, "asynchronous": True})
    config.log = ConfigDict({"every": 10, "tensorboard": False, "wandb": False})
    config.eval = ConfigDict({"every": size["steps"] // 10, "batches": 16})
    return config
