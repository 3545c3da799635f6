"""Serve a model over HTTP: `tessera serve --config.model.dir=runs/lm` (extra `serve`)."""

import os
import signal

from absl import logging
from rich.console import Console

from sharding.errors import PlanError
from sharding.plan import Plan
from tessera.cli.main import Invocation
from tessera.infra.checkpoint import CheckpointDamaged
from tessera.infra.config import ConfigError, build, checked
from tessera.serving import schema
from tessera.serving.load import DraftConfig, SourceConfig, make_engine
from tessera.serving.multi_lora import named
from tessera.serving.programs import ServeConfig

SCHEMA = schema.SCHEMA
ERRORS = (FileNotFoundError, CheckpointDamaged, PlanError, ImportError)
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def main(invocation: Invocation) -> int:
    """Config -> engine -> server until SIGINT or SIGTERM. Returns the exit status."""
    try:
        from tessera.serving.app import make_app
        from tessera.serving.process import bind, make_server
        from tessera.serving.service import Service
    except ImportError as error:
        raise ImportError("the server needs the extra `serve`: pip install 'tessera-jax[serve]'") from error
    c = invocation.config
    source = build(SourceConfig, c.model, "config.model")
    sizes = build(ServeConfig, c.sizes, "config.sizes")
    if c.batch_invariant and sizes.pages:
        raise ConfigError(
            f"config.batch_invariant with config.sizes.pages={sizes.pages}: a text that lost its pages is read again "
            "in other chunks; pages of 0 are slots of its own"
        )
    prefix_cache = 0 if c.batch_invariant else c.prefix_cache
    plan = build(Plan, {}, "config", axes=c.plan)
    key = os.environ.get(c.api_key_variable, "").strip()
    settings = build(schema.AppConfig, c.app, "config.app", api_key=key)
    draft = build(DraftConfig, c.draft, "config.draft")
    adapters = checked("config.adapters", named, c.adapters, settings.model)
    console = Console()
    with bind(c.host, c.port) as socket:  # first: a port in use is told before the model is loaded
        host, port = socket.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        given = source, plan, sizes, c.queue, draft, prefix_cache, adapters
        engine, loaded = checked("config.model", make_engine, *given)
        if c.host not in LOOPBACK and not key:
            logging.warning(
                "%s is reachable from elsewhere and %s is not set: anybody may ask", c.host, c.api_key_variable
            )
        service = Service(engine, warm_up=settings.warm_up, model=settings.model)
        app = make_app(service, loaded.tokenizer, settings, loaded.format)

        def ready() -> None:
            names = ", ".join((settings.model, *adapters))
            console.print(f"serving {names} from {source.dir} on {address}", soft_wrap=True)

        server = make_server(app, service, settings, ready)
        if settings.warm_up:
            console.print("compiling the programs of all prompt lengths; /health is 503 until it is done")
        server.run(sockets=[socket])
    return 1 if server.failed else 128 + signal.SIGINT if server.signum == signal.SIGINT else 0
