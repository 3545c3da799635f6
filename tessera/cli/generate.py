"""Continue a text: `tessera generate --config.model.dir=runs/lm --config.prompt='def '`."""

import sys

from sharding.errors import PlanError
from sharding.plan import Plan
from tessera.cli.main import Invocation
from tessera.infra.checkpoint import CheckpointDamaged
from tessera.infra.config import build, checked
from tessera.serving import schema
from tessera.serving.load import DraftConfig, SourceConfig, make_engine
from tessera.serving.multi_lora import named
from tessera.serving.programs import ServeConfig
from tessera.serving.requests import Sampling
from tessera.serving.text import TextStream

SCHEMA = schema.SCHEMA
ERRORS = (FileNotFoundError, CheckpointDamaged, PlanError, ImportError)


def main(invocation: Invocation) -> int:
    """Config -> engine -> text on standard output, as it is drawn. Returns the exit status."""
    c = invocation.config
    source = build(SourceConfig, c.model, "config.model")
    sizes = build(ServeConfig, c.sizes, "config.sizes")
    sampling = build(Sampling, c.sampling, "config.sampling")
    plan, draft = build(Plan, {}, "config", axes=c.plan), build(DraftConfig, c.draft, "config.draft")
    adapters = checked("config.adapters", named, c.adapters)
    engine, loaded = checked("config.model", make_engine, source, plan, sizes, draft=draft, adapters=adapters)
    prompt = checked("config.prompt", loaded.tokenizer.encode, c.prompt).tolist()
    stream, given = TextStream(loaded.tokenizer, prompt=prompt), 0

    def show(text):
        nonlocal given
        tokens, logprobs, _, finish = text.since(given)
        given += len(tokens)
        sys.stdout.write(stream.feed(tokens, logprobs, final=bool(finish)).text)
        sys.stdout.flush()

    sys.stdout.write(c.prompt)
    checked("config.prompt", engine.submit, prompt, sampling, show)
    engine.run()
    sys.stdout.write("\n")
    return 0
