"""Measure what 8 and 4 bits cost: `tessera quantize --config.model.dir=runs/lm`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from rich.console import Console

from sharding.inference.quantize import QuantConfig, stored_bytes
from tessera.cli.main import Invocation
from tessera.data.text import TextConfig, load_text
from tessera.infra.checkpoint import CheckpointDamaged
from tessera.infra.config import ConfigError, build, checked
from tessera.infra.schema import Schema
from tessera.infra.workdir import read_settings
from tessera.models.lm_loss import lm_loss
from tessera.models.transformer import Decoder
from tessera.parallel.decoder import dequantize_layer
from tessera.serving.load import SourceConfig, load
from tessera.serving.quantized import quantise_decoder


@dataclass(frozen=True)
class QuantizeSettings:
    """What stands at the top of the config.

    Attributes:
      variants: (bits, method, group) of each row of the table; group 0 is one scale per output.
      calibration: sequences of training text.
      validation: sequences of validation text.
      length: tokens of a sequence.
      seed: of the sequences that are drawn.
    """

    variants: tuple[tuple[int, str, int], ...] = ((8, "rtn", 0), (4, "rtn", 32))
    calibration: int = 32
    validation: int = 256
    length: int = 128
    seed: int = 0


SCHEMA = Schema(QuantizeSettings, model=SourceConfig)
ERRORS = (FileNotFoundError, CheckpointDamaged, ImportError)


def main(invocation: Invocation) -> int:
    """Config -> one line of a table per variant. Returns the exit status."""
    c, console = invocation.config, Console()
    source = build(SourceConfig, c.model, "config.model")
    loaded = checked("config.model", load, source)
    settings = checked("config.model.dir", read_settings, source.dir)
    where = f"{source.dir}/config.json: data"
    splits = checked(where, load_text, build(TextConfig, settings.get("data"), where))
    shortest = min(len(splits.train), len(splits.validation))
    if not 1 <= c.length <= shortest - 2:
        raise ConfigError(
            f"config.length={c.length}: the run's shorter text of train and validation has {shortest} tokens; "
            f"between 1 and {shortest - 2} can be cut from it"
        )
    rng = np.random.default_rng(c.seed)

    def cut(tokens, count):
        starts = rng.integers(0, len(tokens) - c.length - 1, count)
        return np.stack([tokens[start : start + c.length + 1] for start in starts]).astype(np.int32)

    calibration, held_out = cut(splits.train, c.calibration)[:, :-1], cut(splits.validation, c.validation)
    loss_fn = jax.jit(lm_loss(Decoder(loaded.config)))

    exact = mean_loss(loss_fn, loaded.params, held_out)
    console.print(f"validation text, {c.validation} sequences of {c.length} tokens; cross-entropy in nats per token\n")
    console.print(
        "| bits | method | group | kernels, MB | cross-entropy | above unrounded |\n|---|---|---|---|---|---|"
    )
    console.print(f"| 32 | | | {stored_bytes(loaded.params['blocks']) / 1e6:.2f} | {exact:.4f} | |")
    for bits, method, group in c.variants:
        how = checked("config.variants", QuantConfig, bits, method, group)
        small = checked("config.variants", quantise_decoder, loaded.params, loaded.config, how, calibration)
        found, size = (
            mean_loss(loss_fn, dequantize_layer(small, "float32"), held_out),
            stored_bytes(small["blocks"]) / 1e6,
        )
        console.print(f"| {bits} | {method} | {group or 'all'} | {size:.2f} | {found:.4f} | {found - exact:+.4f} |")
    return 0


def mean_loss(loss_fn: Callable[..., Any], params: PyTree, rows: np.ndarray, size: int = 32) -> float:
    """The mean cross-entropy of rows of tokens, `size` at a time; a last smaller part counts by its rows."""
    parts = np.split(rows, range(size, len(rows), size))
    losses = [loss_fn(params, {"tokens": part})[1]["cross_entropy"] for part in parts]
    return float(np.average(losses, weights=[len(part) for part in parts]))
