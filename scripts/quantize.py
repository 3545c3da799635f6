"""What 8 and 4 bits cost: `python scripts/quantize.py --config.model.dir=runs/lm`."""

import json
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from sharding.inference.quantize import QuantConfig, stored_bytes
from tessera.data.text import TextConfig, load_text
from tessera.infra.checkpoint import CheckpointDamaged
from tessera.infra.config import ConfigError, Invocation, build, checked, run
from tessera.models.lm_loss import lm_loss
from tessera.models.transformer import Decoder
from tessera.parallel.decoder import dequantize_layer
from tessera.serving.load import SourceConfig, load
from tessera.serving.quantized import quantise_decoder

ERRORS = (FileNotFoundError, CheckpointDamaged, ImportError)


def main(invocation: Invocation) -> int:
    """Config -> one line of a table per variant. Returns the exit status."""
    c, console = invocation.config, Console()
    source = build(SourceConfig, c.model, "config.model")
    loaded = checked("config.model", load, source)
    settings = json.loads((Path(source.dir) / "config.json").read_text(encoding="utf-8"))
    where = f"{source.dir}/config.json: data"
    splits = checked(where, load_text, build(TextConfig, settings["data"], where))
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

    def loss(params):
        parts = np.split(held_out, max(1, len(held_out) // 32))
        return float(np.mean([loss_fn(params, {"tokens": part})[1]["cross_entropy"] for part in parts]))

    exact = loss(loaded.params)
    console.print(
        "| bits | method | group | kernels, MB | cross-entropy | above unrounded |\n|---|---|---|---|---|---|"
    )
    console.print(f"| 32 | | | {stored_bytes(loaded.params['blocks']) / 1e6:.2f} | {exact:.4f} | |")
    for bits, method, group in c.variants:
        how = checked("config.variants", QuantConfig, bits, method, group)
        small = checked("config.variants", quantise_decoder, loaded.params, loaded.config, how, calibration)
        found, size = loss(dequantize_layer(small, "float32")), stored_bytes(small["blocks"]) / 1e6
        console.print(f"| {bits} | {method} | {group or 'all'} | {size:.2f} | {found:.4f} | {found - exact:+.4f} |")
    return 0


if __name__ == "__main__":
    run(main, config_file="quantize.py", errors=ERRORS)
