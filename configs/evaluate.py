"""Perplexity and bits per byte of any texts under a trained language model.

What: a run of `scripts/train.py`, a Hugging Face directory or a GGUF file (`--config.model.dir`), rounded to 8 or 4
bits if asked for, under any plan, scores every token of `--config.texts`, window by window.
Cost: SmolLM2-135M, 41,777 tokens: 185 s of processor time on one core.
Expected: the perplexity of transformers (SmolLM2: docs/inference.md); bits per byte compare models of any tokenizer.
Command: python scripts/evaluate.py --config=configs/evaluate.py --config.model.dir=runs/lm --config.texts='*.md'
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """One table."""
    config = ConfigDict()
    config.model = ConfigDict({"dir": "runs/lm"})
    config.sizes = ConfigDict({"length": 512, "slots": 4})
    return config
