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

from configs import lm

# What differs from the defaults of `moe.layer.MoEConfig`, by the size of `configs/lm.py` it is put in.
VARIANTS: dict[str, tuple[str, dict]] = {
    "tiny": ("tiny", {"granularity": 2}),
    "small": ("small", {"granularity": 2, "every": 2}),
    "mixtral": ("small", {"balance": 0.02}),
    "deepseek": (
        "small",
        {
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
}


def get_config(arg: str = "tiny") -> ConfigDict:
    """The settings of one variant, a key of `VARIANTS`."""
    if arg not in VARIANTS:
        raise ValueError(f"configs/moe_lm.py:{arg}: choose one of {', '.join(VARIANTS)}")
    size, changes = VARIANTS[arg]
    config = lm.get_config(size)
    config.model.mlp = "swiglu" if arg.startswith("dense") else "routed"
    router = {
        "name": "top_k",
        "experts": 8,
        "k": 2,
        "softmax": "after",
        "jitter": 0.0,
        "groups": 1,
        "top_groups": 1,
        "scale": 1.0,
        "capacity_factor": 2.0,
        "slots": 1,
        "seed": 0,
    }
    mixture = {
        "activation": "swiglu",
        "dispatch": "dropless",
        "backend": "auto",
        "capacity_factor": 1.25,
        "groups": 1,
        "drop": "position",
        "movement": "gather",
        "dropout": 0.0,
        "deterministic": True,
    }
    config.model.moe = ConfigDict(
        {
            "every": 1,
            "ff": 0,
            "granularity": 1,
            "shared": 0,
            "biases": False,
            "balance": 1e-2,
            "balance_scope": "batch",
            "importance": 0.0,
            "load": 0.0,
            "z": 0.0,
            "bias_rate": 0.0,
            "router_scale": 1.0,
        }
        | changes
        | {"router": router | changes.get("router", {}), "mixture": mixture | changes.get("mixture", {})}
    )
    return config
