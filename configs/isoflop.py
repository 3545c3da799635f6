"""An IsoFLOP sweep of tiny language models on the sources of Python's standard library.

What: decoders over bytes, a width family under the maximal-update parametrisation, every size trained once and read out
at all budgets (warmup, stable learning rate, decays branched off); IsoFLOP minima, their power law with an interval,
and a parametric fit. `tiny` has smaller budgets; `transfer` is a grid of learning rates over three widths, `batch` one
of learning rates and batch sizes at two.
Cost: the full sweep took 10.5 minutes on a 2-core machine that was running other work; `tiny` 63 seconds on two cores.
Expected: five budgets from 2.5e10 to 4e11 FLOPs with their minima inside, at 9,500 to 42,000 parameters, which grow as
C^0.53; `tiny` refuses its smallest budget (docs/results/isoflop.md).
Command: python scripts/sweep.py --config=configs/isoflop.py --workdir=runs/isoflop
"""

from ml_collections import ConfigDict

VARIANTS: dict[str, dict] = {
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


def get_config(arg: str = "full") -> ConfigDict:
    """The settings of one variant: full, tiny, transfer or batch."""
    if arg not in VARIANTS:
        raise ValueError(f"configs/isoflop.py:{arg}: choose one of {', '.join(VARIANTS)}")
    variant = VARIANTS[arg]
    config = ConfigDict()
    config.family = ConfigDict(
        {"length": 64, "aspect": 32.0, "least_layers": 2, "head_dim": 8, "ff_ratio": 8 / 3, "ff_multiple": 4}
    )
    config.plan = ConfigDict(
        {
            "widths": variant["widths"],
            "budgets": variant.get("budgets", ()),
            "tokens": variant.get("tokens", ()),
            # Of the base width; the rules are powers of the number of parameters.
            "lr": {"value": 2e-2, "at": 1e4, "exponent": 0.0, "multiple": 0},
            "batch": {"value": variant["batch"], "at": 1e4, "exponent": 0.0, "multiple": 1},
            "lr_factors": variant.get("lr_factors", (1.0,)),
            "batch_factors": variant.get("batch_factors", (1.0,)),
            "seeds": (0,),
            "warmup": variant["warmup"],
            "decay": 0.2,
            "least_steps": variant["least_steps"],
            "tokens_per_parameter": (1.5, 1500.0),
            "convention": "6ND",
        }
    )
    config.train = ConfigDict(
        {
            "parametrisation": "mup",
            "base_width": 16,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "decay_shape": "sqrt",
            "eval_tokens": variant["eval_tokens"],
            "noise_batches": variant["noise_batches"],
        }
    )
    config.data = ConfigDict(
        {"name": "stdlib", "dir": "", "tokenizer": "bytes", "max_bytes": 0, "validation": 0.05, "test": 0.05}
    )
    # Where runs are carried out; not part of what they are. slots 0: one run per core.
    config.engine = ConfigDict({"name": "local", "slots": 0, "retries": 1, "options": ConfigDict()})
    # begin: budgets, the cheapest first, that are read out before the planner chooses runs, `at_once` at a time, until
    # the interval is as narrow as report.stop_at asks, `flops` are spent or nothing is left; 0: the whole plan.
    config.planner = ConfigDict({"begin": 0, "at_once": 2, "flops": 0.0})
    # stop_at: half the interval of log N*(target) at which the sweep ends; 0 carries out the whole plan. target 0: ten
    # times the largest budget.
    config.report = ConfigDict({"resamples": 1000, "level": 0.95, "seed": 42, "target": 0.0, "stop_at": 0.0})
    return config
