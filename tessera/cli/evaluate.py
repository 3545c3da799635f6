"""Score texts with a model: `tessera evaluate --config.model.dir=runs/lm --config.texts=tinyshakespeare`."""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from sharding.errors import PlanError
from sharding.plan import Plan
from tessera.cli.main import Invocation
from tessera.data.text import TextConfig, read_texts
from tessera.infra.checkpoint import CheckpointDamaged
from tessera.infra.config import ConfigError, build, checked
from tessera.infra.logger import Progress, write_text
from tessera.infra.schema import Group, Schema
from tessera.serving.load import SourceConfig, make_engine
from tessera.serving.programs import ServeConfig
from tessera.serving.scoring import perplexity


@dataclass(frozen=True)
class EvaluateSettings:
    """What stands at the top of the config.

    Attributes:
      texts: what is scored, each a row of the table: names, files or globs as `data.name` of a training has them.
      plan: how the work is split over devices, like "tp=4, dp=2"; "" is one device.
      length: tokens of a window, the first of them context only; 0 is what `sizes.length` holds.
      stride: tokens that each window after the first scores, so that every other token has at least length - stride
        before it; 0 scores all but one, the fastest.
      max_bytes: at most so much of a text, whole documents; 0 is all.
      out: file for the table as JSON; "" writes none.
    """

    texts: tuple[str, ...] = ("tinyshakespeare",)
    plan: str = ""
    length: int = 0
    stride: int = 0
    max_bytes: int = 0
    out: str = ""


SCHEMA = Schema(
    EvaluateSettings,
    model=SourceConfig,
    sizes=ServeConfig,
    data=Group(TextConfig, without=("name", "tokenizer", "vocab_size", "max_bytes", "validation", "test")),
)
ERRORS = (FileNotFoundError, CheckpointDamaged, PlanError, ImportError)


def main(invocation: Invocation) -> int:
    """Config -> one line of a table per text. Returns the exit status."""
    c, console = invocation.config, Console()
    if not c.texts:
        raise ConfigError("config.texts=(): name at least one text, such as config.texts=tinyshakespeare")
    sizes = build(ServeConfig, c.sizes, "config.sizes")
    length = c.length or sizes.length - 1
    if not 2 <= length < sizes.length:
        raise ConfigError(f"config.length={c.length}: with config.sizes.length={sizes.length} in 2..{sizes.length - 1}")
    texts = {}
    for name in c.texts:  # first: a name that is not there is told before the model is loaded
        settings = build(TextConfig, c.data, "config.data", name=name, max_bytes=c.max_bytes)
        texts[name] = checked("config.texts", read_texts, settings)
    source = build(SourceConfig, c.model, "config.model")
    plan = build(Plan, {}, "config", axes=c.plan)
    engine, loaded = checked("config.model", make_engine, source, plan, sizes)
    head = ("text", "documents", "bytes", "tokens", "nats per token", "perplexity", "bits per byte")
    console.print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", soft_wrap=True)
    rows = []
    for name, documents in texts.items():
        tokens = [loaded.tokenizer.encode(document).tolist() for document in documents]
        size = sum(len(document.encode()) for document in documents)
        with Progress(sum(map(len, tokens)), name, begins="compiling") as progress:
            options = {"length": length, "stride": c.stride, "progress": progress.advance}
            found = checked("config.stride", perplexity, engine, tokens, size, loaded.begin, **options)
        values = [len(documents), found.bytes, found.tokens, found.loss, found.perplexity, found.bits_per_byte]
        rows.append(dict(zip(head, [name, *values], strict=True)))
        shown = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in values]
        console.print(f"| {' | '.join([name, *shown])} |", soft_wrap=True)
    if c.out:
        write_text(Path(c.out), json.dumps(rows, indent=2) + "\n")
    return 0
