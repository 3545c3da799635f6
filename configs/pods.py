"""Models for a TPU pod, with the plans they train under there.

What: `dense_7b`, the 6.7-billion-parameter shape of Touvron et al. (2023), table 2, and `moe_141b`, the shape of
Mixtral 8x22B (eight experts, two per token, every block routed), each with a plan for 512 chips.
Cost: of the pod; `scripts/explain.py` says what a step needs before anything runs.
Expected: docs/results/pods.md has memory, collectives and compile time of both steps for v5p:8x8x8; neither was run.
Command: python scripts/explain.py --config=configs/pods.py:dense_7b --compile=v5p:8x8x8 --workdir=runs/pods-dense
"""

from ml_collections import ConfigDict

from . import moe_lm

VARIANTS = {"dense_7b": "a dense decoder of 7 billion parameters", "moe_141b": "Mixtral 8x22B's shape"}

MODELS: dict[str, dict] = {
    "dense_7b": {
        "plan": "dp=4, fsdp=128",
        "batch_size": 2048,
        "vocab_size": 32000,
        "model": {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 32, "ff": 11008, "mlp": "swiglu"},
    },
    "moe_141b": {
        "plan": "fsdp=64, ep=8",
        "batch_size": 1024,
        "vocab_size": 32768,
        "model": {"layers": 56, "width": 6144, "heads": 48, "kv_heads": 8, "ff": 16384, "mlp": "routed"},
    },
}


def get_config(variant: str = "dense_7b") -> ConfigDict:
    """The settings of one model."""
    chosen = MODELS[variant]
    config = moe_lm.get_config("mixtral")
    config.plan = chosen["plan"]
    config.batch_size = chosen["batch_size"]
    config.length = 2048
    config.lr = 3e-4
    config.data = ConfigDict({"tokenizer": "bpe", "vocab_size": chosen["vocab_size"]})
    config.model.update(chosen["model"])
    config.model.update({"dtype": "bfloat16", "remat": "full", "tied": False})
    return config
