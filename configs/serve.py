"""A model to be served, from Python, the command line or over HTTP.

What: loads a run of `scripts/train.py` (`--config.model.dir=runs/lm`), a ticket of it (`--config.model.ticket=FILE`)
or a Hugging Face Llama or Mixtral directory, places it under `--config.plan` (any, whatever plan it was trained under)
and continues text: `scripts/generate.py` prints it as it comes, `scripts/serve.py` speaks OpenAI's protocol.
Cost: loading and compiling, some ten seconds for a small model on a CPU; not measured for large ones.
Expected: text in the manner of what the model was trained on.
Command: python scripts/generate.py --config=configs/serve.py --config.model.dir=runs/lm --config.prompt='def '
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The settings of both scripts."""
    config = ConfigDict()
    # How the work is split over devices, like "tp=4, dp=2"; "" is one device. The other devices stay idle.
    config.plan = ""
    # See `tessera.serving.load.SourceConfig`.
    config.model = ConfigDict(
        {
            "dir": "runs/lm",
            "ticket": "",
            "tokenizer": "",
            "dtype": "",
            "bits": 0,
            "group": 0,
            "method": "rtn",
            "calibration": "",
        }
    )
    # A small model of the same vocabulary that drafts for it; without a dir nothing is drafted. See
    # `tessera.serving.load.DraftConfig`.
    config.draft = ConfigDict(
        {"dir": "", "ticket": "", "dtype": "", "bits": 0, "group": 0, "plan": "same", "tokens": 4}
    )
    # See `tessera.serving.programs.ServeConfig`.
    config.sizes = ConfigDict(
        {
            "slots": 8,
            "length": 512,
            "cache_dtype": "",
            "groups": 0,
            "steps": 1,
            "chunk": 128,
            "rows": 1,
            "candidates": 128,
        }
    )
    config.queue = 64  # requests that may wait for a slot
    # For scripts/generate.py; see `tessera.serving.requests.Sampling`.
    config.prompt = "def "
    config.sampling = ConfigDict(
        {
            "temperature": 0.8,
            "top_k": 0,
            "top_p": 0.95,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": 0,
            "max_tokens": 200,
        }
    )
    # For scripts/serve.py; see `tessera.serving.app.AppConfig`.
    config.host = "127.0.0.1"  # reachable from this machine only
    config.port = 8000
    config.api_key_variable = "TESSERA_API_KEY"  # environment variable with the key; none set, none asked for
    config.app = ConfigDict(
        {
            "model": "tessera",
            "timeout": 300.0,
            "max_tokens": 64,
            "max_choices": 16,
            "max_body": 2**20,
            "patience": 10.0,
        }
    )
    return config
