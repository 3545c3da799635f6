"""How fast a decoder is served: by plan and number of slots, beside what memory bandwidth allows.

What: random weights of a decoder, decoded in slots that are all in use: milliseconds per step (p50, p99), tokens per
second and device, time to first token, and the roofline: the time in which a device's memory could deliver the weights
and keys that a step reads. Then the same requests through one engine of many slots, all at once, and through an engine
of one slot, one after the other. Writes a table, a plot and JSON.
Cost: under three minutes on two CPU cores once compiled.
Expected: docs/results/inference.md has the table of two CPU cores: continuous batching in 16 slots 5.3 times the tokens
per second of one request at a time. On a GPU, not measured; the goal is 60% of the bandwidth roofline in bfloat16.
Command: python scripts/benchmarks/inference.py --config=configs/bench_inference.py --workdir=runs/bench-inference
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """One benchmark."""
    config = ConfigDict()
    config.model = ConfigDict(
        {"vocab_size": 2048, "layers": 6, "width": 512, "heads": 8, "kv_heads": 4, "ff": 1536, "dtype": "float32"}
    )
    config.plans = ("", "tp=2", "dp=2", "pp=2")
    config.slots = (1, 4, 16)  # those that a plan's data axes divide
    config.prompt = 32  # tokens
    config.length = 160  # room for a text
    config.steps = 40  # timed decode steps of every plan and number of slots
    config.first = 10  # timed prefills
    config.cpu_devices = 2  # devices a CPU is made to look like; more than the plans need stay idle
    # Requests of the comparison with one request at a time, the most tokens each draws (at least half of it), slots,
    # and prompts read in one call where there are many.
    config.compare = ConfigDict({"requests": 64, "tokens": 64, "slots": 16, "rows": 4})
    config.seed = 0
    return config
