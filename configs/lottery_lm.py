"""Lottery tickets of the decoder transformer: attention, feed-forward and expert weights; embeddings stay.

What: a small decoder on text (bytes), late rewinding, every kernel of the blocks pruned by magnitude over the whole
network; `:moe` has four routed experts in every block, whose kernels are pruned too (routers stay; a search trains on
the plain cross-entropy, without the balance loss of `scripts/train.py`).
`:tiny` is a minute on Python's own sources.
Cost: not measured.
Expected: next-token accuracy of the ticket close to the dense model's at a third of the weights; not measured.
Command: python scripts/find_ticket.py --config=configs/lottery_lm.py --config.data.text.dir=DATA --workdir=runs/lm-find
"""

from ml_collections import ConfigDict

VARIANTS = {
    "": "a dense decoder on tinyshakespeare",
    "moe": "the same with routed experts",
    "tiny": "a very small decoder on Python's sources: a minute",
}


def get_config(variant: str = "") -> ConfigDict:
    """The search."""
    tiny = variant == "tiny"
    config = ConfigDict()
    config.seeds = (0, 1) if tiny else (0, 1, 2)
    config.lr = 3e-3
    source = {"name": "stdlib", "max_bytes": 200_000} if tiny else {"name": "tinyshakespeare"}
    config.data = ConfigDict({"kind": "text", "length": 16 if tiny else 64, "test_limit": 32 if tiny else 256})
    config.data.text = ConfigDict(source)
    size = {"layers": 1, "width": 16, "heads": 2, "ff": 32}
    config.model = ConfigDict({"name": "decoder", **(size if tiny else {"layers": 4, "width": 128, "heads": 4})})
    if variant == "moe":
        config.model.mlp = "routed"
        config.model.moe = ConfigDict({"router": ConfigDict({"name": "top_k", "experts": 4, "k": 2})})
    config.optimizer = ConfigDict({"name": "adamw", "schedule": "cosine", "warmup": 10 if tiny else 100, "final": 0.1})
    config.train = ConfigDict(
        {
            "steps": "30it" if tiny else "3000it",
            "batch_size": 8 if tiny else 32,
            "eval_every": 15 if tiny else 300,
        }
    )
    config.search = ConfigDict(
        {
            "levels": 2 if tiny else 10,
            "rate": 0.3,
            "output": "",
            "scope": "global",
            "arms": ("ticket", "random_mask"),
            "rewind": "5it" if tiny else "300it",
            # Routers decide who is used; they are small and stay whole.
            "rules": (("/router/", False),) if variant == "moe" else (),
        }
    )
    return config
