"""Explain what plans cost a served model: `tessera explain-serving --config.model.dir=runs/lm --devices=8`."""

from collections.abc import Sequence

import jax
from rich.console import Console

from sharding.analysis import hardware
from sharding.errors import PlanError
from sharding.inference.quantize import QuantConfig
from sharding.plan import Plan
from tessera.cli.main import Invocation
from tessera.infra.checkpoint import CheckpointDamaged
from tessera.infra.config import ConfigError, build, checked
from tessera.infra.remote import local
from tessera.serving import huggingface, schema
from tessera.serving.explain import HEAD, TokenCost, filled, serving_plans, table, token_cost
from tessera.serving.load import SourceConfig, read_architecture
from tessera.serving.programs import ServeConfig

SCHEMA = schema.SCHEMA
ERRORS = (FileNotFoundError, CheckpointDamaged, PlanError, ImportError)


def main(invocation: Invocation) -> int:
    """Config -> a table of plans, the fastest first. Returns the exit status."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs on what is explained
    c, values, console = invocation.config, invocation.flags, Console()
    device = checked("--hardware", hardware.find_hardware, values["hardware"])
    if values["devices"] < 1:
        raise ConfigError(f"--devices={values['devices']} must be at least 1")
    source = build(SourceConfig, c.model, "config.model")
    sizes = build(ServeConfig, c.sizes, "config.sizes")
    config = checked("config.model.dir", read_architecture, source)
    options = {"context": values["context"], "latency": values["latency"] * 1e-6, "dtype": source.dtype}
    options["weights"] = weights_of(source)
    refused: dict[str, str] = {}
    if c.plan:
        plan = build(Plan, {}, "config", axes=c.plan)
        plan = checked("config.plan", plan.fill, max(plan.devices, 1))
        found = [checked("config.plan", token_cost, config, plan, sizes, device, **options)]
    else:
        found, refused = checked("config.model", serving_plans, config, values["devices"], sizes, device, **options)
    show(console, found, device)
    fitting = [one for one in found if one.fits(device)]
    full = [filled(one, config, sizes, device, **options) for one in fitting]
    full = sorted((one for one in full if one.fits(device)), key=lambda one: -one.tokens_per_second)
    if full:
        console.print("\nWith as many texts at a time as the memory holds:\n")
        show(console, full, device)
        console.print(
            f"\nlowest latency: {name(fitting[0])}, {fitting[0].seconds * 1e3:.3f} ms a token of {sizes.slots} texts; "
            f"most tokens: {name(full[0])}, {full[0].tokens_per_second:,.0f} a second of {full[0].slots} texts "
            f"({device.name} at its datasheet's peaks, {values['latency']:g} us a collective; not measured)",
            soft_wrap=True,
        )
    for plan_text, why in refused.items():
        console.print(f"{plan_text}: {why}", soft_wrap=True, highlight=False, style="dim")
    return 0 if fitting else 3


def weights_of(source: SourceConfig) -> QuantConfig | None:
    """How a model's weights are quantized when it is served; None for not at all.

    Raises:
      ConfigError: bits that are none; a directory whose weights are quantized, which config.json describes in part.
    """
    if source.bits:
        named = {name: getattr(source, name) for name in ("bits", "method", "group")}
        return build(QuantConfig, {}, "config.model", **named)
    path = local(source.dir)
    if huggingface.is_directory(path) and huggingface.read_settings(path).get("quantization_config"):
        raise ConfigError(
            f"config.model.dir={source.dir}: its weights are quantized; say how they are to be counted, such as "
            "--config.model.bits=4 --config.model.group=128"
        )
    return None


def show(console: Console, found: Sequence[TokenCost], device: hardware.Hardware) -> None:
    """Print a table of plans."""
    console.print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", soft_wrap=True)
    for row in table(found, device):
        console.print(f"| {' | '.join(row)} |", soft_wrap=True)


def name(cost: TokenCost) -> str:
    """A plan in text."""
    return cost.plan.axes or "one device"
