"""How fast a decoder is served: by plan and number of slots, beside what memory bandwidth allows.

What: random weights of a decoder, decoded in slots that are all in use: milliseconds per step (p50, p99), tokens per
second and device, time to first token, and the roofline: the time in which a device's memory could deliver the weights
and keys that a step reads. Then the same requests through one engine of many slots, all at once, and through an engine
of one slot, one after the other. Writes a table and JSON.
Cost: under three minutes on two CPU cores once compiled.
Expected: docs/results/inference.md has the table of two CPU cores: continuous batching in 16 slots 5.3 times the tokens
per second of one request at a time. On a GPU, not measured; the goal is 60% of the bandwidth roofline in bfloat16.
Command: python scripts/benchmarks/run.py --config=bench_inference
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """One benchmark."""
    config = ConfigDict({"suite": "inference"})
    config.model = ConfigDict(
        {"vocab_size": 2048, "layers": 6, "width": 512, "heads": 8, "kv_heads": 4, "ff": 1536, "dtype": "float32"}
    )
    return config
