"""How fast a real model reads prompts and decodes, beside transformers and llama.cpp.

What: SmolLM2-135M-Instruct (`make smollm2`), tokens per second of processor time of a prompt and of 1 and 8 texts at
once, each engine in a process of its own, taking turns.
Cost: docs/results/inference.md says what it took; environments with the other engines are yours to make and to name.
Expected: docs/results/inference.md.
Command: python scripts/benchmarks/run.py --config=bench_decode --config.transformers=PYTHON --config.llama=PYTHON
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """One benchmark."""
    return ConfigDict({"suite": "decode"})
