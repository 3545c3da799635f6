"""A token file of 4 GB: time to the first batch, resident memory, the loader beside `lm:tiny`, and kills.

What: a file of random tokens in documents is made, and removed afterwards. A process of its own opens it and reads
windows in a random order; another takes steps of `lm:tiny`. Then 1, 2 and 3 hosts read 600 batches and are killed
(SIGKILL) at ten moments each; what they read is compared with one host that was not killed.
Cost: 4 GB of disk; three minutes on two cores, most of it starting processes.
Expected: a first batch within seconds of the imports, at most 0.32 GB of resident memory more, and all batches equal;
docs/data.md has what was measured.
Command: python scripts/benchmarks/run.py --config=bench_data
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """One benchmark."""
    return ConfigDict({"suite": "data"})
