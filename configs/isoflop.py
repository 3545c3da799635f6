"""An IsoFLOP sweep of tiny language models on the sources of Python's standard library.

What: decoders over bytes, a width family under the maximal-update parametrization, every size trained once and read out
at all budgets (warmup, stable learning rate, decays branched off); IsoFLOP minima, their power law with an interval,
and a parametric fit. `tiny` has smaller budgets; `transfer` is a grid of learning rates over three widths, `batch` one
of learning rates and batch sizes at two.
Cost: the full sweep took 10.5 minutes on a 2-core machine that was running other work; `tiny` 63 seconds on two cores.
Expected: five budgets from 2.5e10 to 4e11 FLOPs with their minima inside, at 9,500 to 42,000 parameters, which grow as
C^0.53; `tiny` refuses its smallest budget (docs/results/isoflop.md).
Command: python scripts/sweep.py --config=configs/isoflop.py --workdir=runs/isoflop
"""

from ml_collections import ConfigDict

VARIANTS = {
    "full": "ten widths and five budgets: 10 minutes on two cores",
    "tiny": "seven widths and four small budgets: a minute",
    "demo": "six widths and three small budgets: a part of `tessera demo`",
    "transfer": "a grid of learning rates over three widths",
    "batch": "a grid of learning rates and batch sizes over two widths",
}
PLANS: dict[str, dict] = {
    "full": {
        "widths": (8, 12, 16, 20, 24, 32, 40, 48, 56, 72),
        "budgets": (2.5e10, 5e10, 1e11, 2e11, 4e11),
        "batch": 16.0,
        "warmup": 25,
        "least_steps": 100,
        "eval_tokens": 131072,
        "noise_batches": 32,
    },
    "tiny": {
        "widths": (8, 12, 16, 20, 24, 32, 40),
        "budgets": (5e9, 1e10, 2e10, 4e10),
        "batch": 8.0,
        "warmup": 15,
        "least_steps": 60,
        "eval_tokens": 65536,
        "noise_batches": 16,
    },
    "demo": {
        "widths": (8, 12, 16, 20, 26, 34),
        "budgets": (8e9, 1.6e10, 3.2e10),
        "batch": 8.0,
        "warmup": 15,
        "least_steps": 60,
        "eval_tokens": 65536,
        "noise_batches": 0,
    },
    "transfer": {
        "widths": (12, 24, 48),
        "tokens": (2e5,),
        "lr_factors": (0.25, 0.5, 1.0, 2.0, 4.0),
        "batch": 16.0,
        "warmup": 15,
        "least_steps": 60,
        "eval_tokens": 131072,
        "noise_batches": 0,
    },
    "batch": {
        "widths": (12, 24),
        "tokens": (4e5,),
        "lr_factors": (0.25, 0.5, 1.0, 2.0, 4.0),
        "batch_factors": (0.25, 0.5, 1.0, 2.0, 4.0),
        "batch": 16.0,
        "warmup": 15,
        "least_steps": 60,
        "eval_tokens": 131072,
        "noise_batches": 32,
    },
}


def get_config(variant: str = "full") -> ConfigDict:
    """The settings of one variant."""
    plan = PLANS[variant]
    config = ConfigDict()
    config.plan = ConfigDict(
        {
            "widths": plan["widths"],
            "budgets": plan.get("budgets", ()),
            "tokens": plan.get("tokens", ()),
            # Of the base width; the rules are powers of the number of parameters.
            "lr": {"value": 2e-2},
            "batch": {"value": plan["batch"], "multiple": 1},
            "lr_factors": plan.get("lr_factors", (1.0,)),
            "batch_factors": plan.get("batch_factors", (1.0,)),
            "warmup": plan["warmup"],
            "least_steps": plan["least_steps"],
            "tokens_per_parameter": (1.5, 1500.0),
        }
    )
    config.train = ConfigDict({"eval_tokens": plan["eval_tokens"], "noise_batches": plan["noise_batches"]})
    return config
