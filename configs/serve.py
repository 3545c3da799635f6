"""A model to be served, from Python, the command line or over HTTP.

What: loads a run of `scripts/train.py` (`--config.model.dir=runs/lm`), a ticket of it (`--config.model.ticket=FILE`)
or a Hugging Face directory, places it under `--config.plan` (any, whatever plan it was trained under)
and continues text: `scripts/generate.py` prints it as it comes, `scripts/serve.py` speaks OpenAI's protocol.
`--config.sizes.pages=N` has a KV cache of N pages in place of slots of full length (docs/inference.md, "Pages").
Cost: loading and compiling, some ten seconds for a small model on a CPU; not measured for large ones.
Expected: text in the manner of what the model was trained on.
Command: python scripts/generate.py --config=configs/serve.py --config.model.dir=runs/lm --config.prompt='def '
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The settings of both scripts."""
    config = ConfigDict()
    config.model = ConfigDict({"dir": "runs/lm"})
    config.sizes = ConfigDict({"length": 512})
    config.sampling = ConfigDict({"temperature": 0.8, "top_p": 0.95, "max_tokens": 200})
    return config
