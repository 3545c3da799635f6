"""How fast a real model reads prompts and decodes, beside transformers and llama.cpp.

What: SmolLM2-135M-Instruct (`make smollm2`), tokens per second of processor time of a prompt and of 1 and 8 texts at
once, each engine in a process of its own, taking turns; with `--config.texts=200` also drafts looked up in the text.
Cost: four to ten minutes on one core that others share (3 rounds of 8 tokens, six engines); the environments with the
other engines are yours to make and to name.
Expected: docs/results/speed.md has the table of one CPU core.
Command: python scripts/benchmarks/run.py --config=bench_decode --config.transformers=PYTHON --config.llama=PYTHON
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """One benchmark."""
    return ConfigDict({"suite": "decode"})
