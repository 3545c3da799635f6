"""Train a pruned or masked language model on, several ways over seeds: recovery, and the question of tickets.

What: runs from a Hugging Face directory (`config.run.start.dir`), every arm with the same seeds, data order and tokens.
`:recover` a pruned model (`config.run.start.dir`) with its zeros kept: adapters, full fine-tuning, and both
towards the dense model (`config.run.distill.dir`). `:tickets` does a mask that was found on a trained model
(`config.run.start.mask`, a directory of `tessera prune`) train better than a random mask of the same layer densities,
from the trained weights and from random ones (Chen et al. 2020, arXiv:2007.12223)? `dense` is the model without a mask.
Cost: not measured; 512,000 tokens an arm and seed of `:recover`, 1,000,000 of `:tickets`.
Expected: not measured.
Command: python scripts/compare.py --config=configs/adapt.py:recover --config.run.start.dir=models/pruned \
  --config.run.distill.dir=models/dense --workdir=runs/recover
"""

from ml_collections import ConfigDict

from . import lm

VARIANTS = {
    "recover": "a pruned model by adapters, full fine-tuning and distillation",
    "tickets": "a found mask and a random one, on trained and on random weights",
}
LORA = {"rank": 16, "alpha": 32.0}


def get_config(variant: str = "recover") -> ConfigDict:
    """The comparison."""
    run = lm.get_config("tiny")
    run.batch_size, run.length = 8, 256
    run.steps = 250 if variant == "recover" else 488
    run.lr = 2e-5
    run.optimizer.weight_decay = 0.0
    run.eval.every, run.eval.batches = run.steps // 5, 16
    run.checkpoint.update({"every": run.steps // 5, "keep": 1})
    config = ConfigDict()
    config.run = run
    if variant == "recover":
        run.start = ConfigDict({"dir": "models/pruned", "keep_zeros": True})
        run.distill = ConfigDict({"dir": "models/dense"})
        config.title, config.against = "Recovery of a pruned model", "full"
        # Adapters take a larger learning rate than the weights themselves; each arm says its own.
        config.arms = ConfigDict(
            {
                "full": {"distill": {"dir": ""}},
                "lora": {"lr": 3e-4, "lora": LORA, "distill": {"dir": ""}},
                "distill": {"distill": {"weight": 0.5, "temperature": 2.0}},
                "lora_distill": {"lr": 3e-4, "lora": LORA, "distill": {"weight": 0.5, "temperature": 2.0}},
            }
        )
        return config
    run.start = ConfigDict({"dir": "models/dense", "mask": "models/pruned"})
    config.title, config.against = "A mask found on a trained model", "random_mask"
    fresh = {"random_weights": True}
    config.arms = ConfigDict(
        {
            "ticket": {"start": {"shuffle_mask": False}},
            "random_mask": {"start": {"shuffle_mask": True}},
            "dense": {"start": {"mask": ""}},
            "ticket_random_weights": {"lr": 1e-3, "start": fresh},
            "random_mask_random_weights": {"lr": 1e-3, "start": {"shuffle_mask": True, **fresh}},
        }
    )
    return config
