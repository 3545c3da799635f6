"""A language model with routed experts, and the dense one beside it.

What: `configs/lm.py` with the feed-forward layer of every n-th block replaced by experts. `tiny` and `small`: eight
experts half as wide as the dense layer, two per token, so that a token costs what it costs in the dense model
(`dense_tiny`, `dense_small`: the same settings without experts). `mixtral`: eight full-width experts, two per token
(Jiang et al. 2024). `deepseek`: 64 fine-grained experts, eight per token out of four of eight groups, one shared,
sigmoid scores, loss-free balancing (DeepSeek-AI 2024). `switch`: 32 experts, one per token, in every other block, with
a capacity (Fedus et al. 2021).
Cost: `tiny` 105 seconds of processor time; the others are for accelerators, untimed.
Expected: `tiny` ends near 1.53 nats per byte on validation text. configs/moe_vs_dense.py asks over seeds whether
experts end below a dense model of equal active FLOPs, and whether the load collapses without a balance term.
Command: python scripts/train.py --config=configs/moe_lm.py:tiny --workdir=runs/moe
"""

from ml_collections import ConfigDict

from . import lm

# What differs from the defaults of `moe.layer.MoEConfig`, by the size of `configs/lm.py` it is put in.
VARIANTS = {
    "tiny": "two layers of eight experts",
    "small": "eight layers, every second routed",
    "mixtral": "Mixtral's router and balance",
    "deepseek": "DeepSeek-V3's router: groups, a bias per expert, a shared expert; the first layer dense",
    "switch": "Switch Transformer: one expert a token, capacity",
    "dense_tiny": "the dense decoder beside `tiny`",
    "dense_small": "the dense decoder beside `small`",
    "demo": "the routed model of `tessera demo`: 16 narrow experts",
}
MODELS: dict[str, tuple[str, dict]] = {
    "tiny": ("tiny", {"granularity": 2}),
    "small": ("small", {"granularity": 2, "every": 2}),
    "mixtral": ("small", {"balance": 0.02}),
    "deepseek": (
        "small",
        {
            "first_k_dense_replace": 1,
            "granularity": 8,
            "shared": 1,
            "balance": 1e-4,
            "balance_scope": "sequence",
            "bias_rate": 1e-3,
            "router": {"name": "sigmoid", "experts": 64, "k": 8, "groups": 8, "top_groups": 4, "scale": 2.5},
        },
    ),
    "switch": (
        "small",
        {
            "every": 2,
            "z": 1e-3,
            "router_scale": 0.1,
            "router": {"name": "switch", "experts": 32, "k": 1, "jitter": 0.01},
            "mixture": {"dispatch": "capacity", "capacity_factor": 1.25},
        },
    ),
    "dense_tiny": ("tiny", {}),
    "dense_small": ("small", {}),
    "demo": ("tiny", {"ff": 96, "router": {"name": "top_k", "experts": 16, "k": 2}}),
}


def get_config(variant: str = "tiny") -> ConfigDict:
    """The settings of one variant."""
    size, changes = MODELS[variant]
    config = lm.get_config(size)
    config.model.mlp = "swiglu" if variant.startswith("dense") else "routed"
    config.model.moe = ConfigDict({"router": {"name": "top_k", "experts": 8, "k": 2}})
    config.model.moe.update(changes)
    if variant == "demo":
        config.steps, config.length = 300, 64
        config.model.update({"width": 64, "heads": 2, "kv_heads": 2})
        config.eval.every, config.eval.batches, config.checkpoint.every = 75, 16, 150
        config.data = ConfigDict({"overlap": 0})  # counting it takes longer than a hundred steps
    return config
