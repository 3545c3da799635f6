"""Serve a model over HTTP: `tessera serve --config.model.dir=runs/lm` (extra `serve`)."""

import os

from absl import logging
from rich.console import Console

from sharding.errors import PlanError
from sharding.plan import Plan
from tessera.cli.main import Invocation
from tessera.infra.checkpoint import CheckpointDamaged
from tessera.infra.config import build, checked
from tessera.serving import schema
from tessera.serving.app import AppConfig, make_app
from tessera.serving.load import DraftConfig, SourceConfig, make_engine
from tessera.serving.programs import ServeConfig
from tessera.serving.service import Service

SCHEMA = schema.SCHEMA
ERRORS = (FileNotFoundError, CheckpointDamaged, PlanError, ImportError)
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def main(invocation: Invocation) -> int:
    """Config -> engine -> server until SIGINT or SIGTERM. Returns the exit status."""
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError("the server needs the extra `serve`: pip install 'tessera-jax[serve]'") from error
    c = invocation.config
    source = build(SourceConfig, c.model, "config.model")
    sizes = build(ServeConfig, c.sizes, "config.sizes")
    plan = build(Plan, {}, "config", axes=c.plan)
    settings = build(AppConfig, c.app, "config.app", api_key=os.environ.get(c.api_key_variable, ""))
    draft = build(DraftConfig, c.draft, "config.draft")
    engine, loaded = checked("config.model", make_engine, source, plan, sizes, c.queue, draft)
    if c.host not in LOOPBACK and not settings.api_key:
        logging.warning("%s is reachable from elsewhere and %s is not set: anybody may ask", c.host, c.api_key_variable)
    app = make_app(Service(engine), loaded.tokenizer, settings)
    Console().print(f"serving {settings.model} from {source.dir} on http://{c.host}:{c.port}/v1", soft_wrap=True)
    patience = int(settings.patience) + 1
    uvicorn.run(app, host=c.host, port=c.port, log_level="warning", timeout_graceful_shutdown=patience)
    return 0
