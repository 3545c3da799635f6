"""Prune a trained language model on calibration text.

What: a Hugging Face directory, a GGUF file or a run of `scripts/train.py` (`--config.model.dir`), pruned by magnitude,
Fisher information, Wanda or SparseGPT, in single weights, 2:4, blocks, or by cutting out neurons, heads, experts or
layers; perplexity before and after, every layer's error, a report, and a Hugging Face directory of the result.
Cost: SmolLM2-135M on 4,096 tokens, with 16,000 tokens scored, 200 s of processor time by SparseGPT, 106 s by Wanda.
Expected: on text like the calibration text SparseGPT loses least, then Wanda, and magnitude far more
(docs/results/prune_smollm2.md).
Command: python scripts/prune.py --config=configs/prune.py --config.model.dir=models/smollm2 --workdir=runs/pruned
"""

from ml_collections import ConfigDict

VARIANTS = {"": "half of the weights by SparseGPT", "wanda": "by Wanda", "2of4": "2:4 by SparseGPT"}


def get_config(variant: str = "") -> ConfigDict:
    """One model."""
    config = ConfigDict()
    config.model = ConfigDict({"dir": "runs/lm"})
    config.prune = ConfigDict({"method": "wanda" if variant == "wanda" else "sparsegpt"})
    if variant == "2of4":
        config.prune.structure = "2:4"
    return config
