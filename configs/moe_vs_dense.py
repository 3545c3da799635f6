"""Routed experts against a dense decoder of equal active FLOPs, with and without a balance term.

What: three arms, every one with the same seeds, data order and steps. `dense`: a decoder of `configs/lm.py`. `moe`: its
feed-forward layers replaced by 16 experts, two per token, together so wide that a token costs what it costs in the
dense model with the router counted (the dense layer is a little wider for that). `unbalanced`: the same without the
load-balance loss. `:tiny` is a minute's check that everything runs.
Cost: 23 minutes of processor time for the 15 runs.
Expected: after a million tokens `moe` ends at 1.414 nats per byte, `dense` at 1.454, every seed of the first below all
of the second; without a balance term 7.6 of the 16 experts are in use, with it 15.8. See docs/results/moe_lm.md.
Command: python scripts/compare.py --config=configs/moe_vs_dense.py --workdir=runs/moe_vs_dense
"""

from ml_collections import ConfigDict

from . import moe_lm

VARIANTS = {
    "short": "five seeds of 1,000 steps",
    "demo": "dense and balanced experts of `moe_lm:demo`, two seeds: a part of `tessera demo`",
    "tiny": "two seeds of 40 steps, to try it",
}


def get_config(variant: str = "short") -> ConfigDict:
    """The comparison."""
    if variant == "demo":
        arms = ConfigDict(
            {"dense": {"model": {"mlp": "swiglu", "ff": 198}}, "moe": {"model": {"moe": {"balance": 1e-2}}}}
        )
        title = "Routed experts beside a dense decoder"
        run = moe_lm.get_config("demo")
        return ConfigDict({"title": title, "seeds": (0, 1), "run": run, "arms": arms, "against": "dense"})
    run = moe_lm.get_config("tiny")
    run.steps = 1000 if variant == "short" else 40
    run.batch_size = 16 if variant == "short" else 4
    run.length = 64 if variant == "short" else 32
    run.lr = 3e-3
    run.optimizer.warmup = run.steps // 20
    run.log.every = 10
    run.eval.every, run.eval.batches = run.steps // 8, 40 if variant == "short" else 2
    run.checkpoint.every, run.checkpoint.keep, run.checkpoint.best = run.steps // 8, 1, 0
    run.model.update({"layers": 4 if variant == "short" else 2, "width": 64, "heads": 2, "kv_heads": 2})
    run.model.moe.granularity = 1
    run.model.moe.ff = 96
    run.model.moe.router.experts = 16
    config = ConfigDict()
    config.title = "Routed experts against a dense decoder"
    config.seeds = (0, 1, 2, 3, 4) if variant == "short" else (0, 1)
    config.run = run
    # What each arm changes in `run`. 3 x 198 >= 2 x 3 x 96 + 16: products per token and channel, router and all.
    config.arms = ConfigDict(
        {
            "dense": {"model": {"mlp": "swiglu", "ff": 198}},
            "moe": {"model": {"moe": {"balance": 1e-2}}},
            "unbalanced": {"model": {"moe": {"balance": 0.0}}},
        }
    )
    # Arms compared with this one, seed by seed.
    config.against = "dense"
    return config
