"""What a plan costs a served model per token on named hardware: memory, collectives, time at best; the best plans.

Collectives and products are counted in the traced programs of `tessera.serving.programs`, nothing is compiled and no
array is made. Weights and KV cache are added up from their shards. Times are lower bounds by datasheet peaks, plus a
latency for each collective, which is a number given and not measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding.analysis.collectives import Collective, count_collectives
from sharding.analysis.hardware import Hardware
from sharding.analysis.roofline import placements, step_roofline
from sharding.errors import PlanError
from sharding.inference.kv_cache import CacheConfig
from sharding.inference.quantize import QuantConfig
from sharding.inference.sample import greedy
from sharding.mesh import abstract_mesh
from sharding.plan import MESH_AXES, Plan, factorings
from tessera.models.transformer import TransformerConfig, param_shapes
from tessera.parallel.decoder import ShardedDecoder
from tessera.planning.costs import count_plain_products, expert_flops
from tessera.serving.programs import Programs, Rows, ServeConfig
from tessera.serving.quantized import quantized_shapes, quantized_specs
from tessera.serving.served import serve

HEADROOM = 0.92  # share of a device's memory that weights and KV cache may fill


@dataclass(frozen=True)
class TokenCost:
    """What one decode step, a token of every slot, costs one device under a plan.

    Attributes:
      plan: how the model is split.
      weights, cache: bytes on a device; the cache with room for texts of full length in all slots.
      flops: of matrix products.
      traffic: bytes read from HBM: weights, and the KV cache of texts of `context` tokens.
      collectives: how often devices exchange something, one after the other.
      moved: bytes that a device sends.
      seconds: of a step at best: arithmetic or memory, then communication.
      slots: texts that the step advances.
      prefill: seconds at best that a token of a prompt takes, read in full chunks.
    """

    plan: Plan
    weights: int
    cache: int
    flops: float
    traffic: float
    collectives: int
    moved: float
    seconds: float
    slots: int
    prefill: float

    @property
    def tokens_per_second(self) -> float:
        """Of all slots together."""
        return self.slots / self.seconds

    def fits(self, hardware: Hardware) -> bool:
        """Whether weights and KV cache leave room for what a step computes."""
        return self.weights + self.cache <= HEADROOM * hardware.memory


def token_cost(
    config: TransformerConfig,
    plan: Plan,
    sizes: ServeConfig,
    hardware: Hardware,
    *,
    context: int = 0,
    latency: float = 5e-6,
    dtype: str = "",
    weights: QuantConfig | None = None,
) -> TokenCost:
    """Explain one plan.

    Args:
      config: the model.
      plan: all its sizes known.
      sizes: slots, length and KV cache.
      hardware: the devices.
      context: tokens of every text in the KV cache; 0 is half of the length.
      latency: seconds that a collective takes beside its bytes.
      dtype: of weights and activations; "" is the model's.
      weights: how kernels are quantized, None for not at all. Their bytes are read from memory once, as they are, and
        made float on the way to the products.

    Raises:
      PlanError: a plan that does not fit the model or the sizes.
      ValueError: a group that does not divide a kernel's inputs.
    """
    decoder, programs, params, counted = _traced(config, plan, sizes, dtype, weights)
    context = context or sizes.length // 2
    placed = placements(params, quantized_specs(params, decoder), {axis: plan.size(axis) for axis in MESH_AXES})
    table = sum(one.bytes for one in placed if one.path.startswith("embed/") and not decoder.config.tied)
    held = sum(one.bytes for one in placed)
    experts = sum(one.bytes for one in placed if "/experts/" in one.path)

    # The second step's share: filling and draining a pipeline is left out.
    moved, flops = _difference(*counted[:2])
    rows = sizes.slots // programs.parts
    ticks = max(programs.groups, plan.size("pp"))  # of which each reads the stage's weights for one group's slots
    tokens = rows / programs.groups
    flops += ticks * _expert_flops(decoder, tokens)
    cache = _cache_bytes(programs, context)
    touched = experts * _touched(decoder, tokens * plan.size("ep")) + held - experts - table
    traffic = float(ticks) * (touched + cache * rows / programs.groups)
    step = step_roofline(hardware, flops=flops, traffic=traffic, moved=[(one.group, False, one.moved) for one in moved])
    count = sum(one.count for one in moved)

    found, work = counted[2]
    work += plan.size("pp") * _expert_flops(decoder, sizes.rows * sizes.chunk)
    exchanged = [(one.group, False, one.moved) for one in found]
    prompt = step_roofline(hardware, flops=work, traffic=float(plan.size("pp") * held), moved=exchanged)
    wait = latency * sum(one.count for one in found)
    return TokenCost(
        plan,
        held,
        round(programs.cache_config.bytes / (programs.parts * _cache_ways(programs))),
        flops,
        traffic,
        count,
        sum((one.moved for one in moved), 0.0),
        step.serial + latency * count,
        sizes.slots,
        (prompt.serial + wait) / (sizes.rows * programs.parts * sizes.chunk),
    )


def _traced(
    config: TransformerConfig, plan: Plan, sizes: ServeConfig, dtype: str, weights: QuantConfig | None
) -> tuple[ShardedDecoder, Programs, Any, list[tuple[list[Collective], float]]]:
    """Decoder, programs and shapes of the weights; collectives and FLOPs of one step, of two, and of a chunk read."""
    decoder: Any = None

    def served(params: Any) -> Any:
        nonlocal decoder
        params, decoder = serve(params, config, plan, dtype)
        return params

    shapes = param_shapes(config)
    params = jax.eval_shape(served, shapes if weights is None else quantized_shapes(shapes, weights))
    programs = Programs(decoder, sizes, abstract_mesh(plan))
    state = jax.eval_shape(programs.empty)

    def drawn(steps: int) -> Any:
        def call(params: Any, state: Any) -> Any:
            slots = jnp.zeros(sizes.slots, jnp.int32)
            return programs.generate(params, state, slots, slots + 1, greedy(sizes.slots), steps=steps)

        return call

    def read(params: Any, state: Any) -> Any:
        n = sizes.rows * programs.parts
        none = np.zeros(n, np.int32)
        chunk = Rows(np.zeros((n, sizes.chunk), np.int32), none, none, none + 1)
        return programs.extend(params, state, chunk)

    counted = [_counted(config, function, params, state) for function in (drawn(1), drawn(2), read)]
    return decoder, programs, params, counted


def _counted(config: TransformerConfig, function: Any, *args: Any) -> tuple[list[Collective], float]:
    products = count_plain_products(config, function, *args)
    return count_collectives(function, *args), float(sum(one.flops * one.runs for one in products))


def _difference(
    one: tuple[list[Collective], float], two: tuple[list[Collective], float]
) -> tuple[list[Collective], float]:
    """What the second program has more of: it has the same collectives, some of which run more often."""
    found = []
    for before, after in zip(one[0], two[0], strict=True):
        assert (before.kind, before.axes, before.scope) == (after.kind, after.axes, after.scope)
        if after.count > before.count:
            found.append(replace(after, count=after.count - before.count))
    return found, two[1] - one[1]


def _expert_flops(decoder: ShardedDecoder, tokens: float | int) -> float:
    """FLOPs of one device's routed experts for its tokens, in kernels whose trips depend on the data."""
    config, plan = decoder.config, decoder.plan
    layers = config.mlps.count("routed") / plan.size("pp")
    return layers * expert_flops(config, tokens, plan.size("tp"))


def _touched(decoder: ShardedDecoder, tokens: float | int) -> float:
    """Share of a device's experts that some token of a step goes to, if all are chosen equally often."""
    if "routed" not in decoder.config.pattern:
        return 1.0
    router = decoder.config.moe.router
    return 1.0 - (1.0 - router.k / router.experts) ** tokens


def _cache_bytes(programs: Programs, tokens: int) -> float:
    """Bytes of one slot's KV cache with so many tokens, on one device."""
    one: CacheConfig = replace(programs.cache_config, slots=1, length=tokens, pages=0)
    return one.bytes / _cache_ways(programs)


def _cache_ways(programs: Programs) -> int:
    """Devices that the cache of one slot is split over."""
    plan = programs.decoder.plan
    return plan.size("pp") * plan.size("tp") * plan.size("cp")


def filled(
    cost: TokenCost, config: TransformerConfig, sizes: ServeConfig, hardware: Hardware, **options: Any
) -> TokenCost:
    """Explain the same plan with as many texts at a time as the memory holds, at most 1,024.

    Args:
      cost: of the plan, from `token_cost` with the same arguments.
      config, sizes, hardware, options: see `token_cost`.
    """
    parts = cost.plan.data
    stages = cost.plan.size("pp")
    room = HEADROOM * hardware.memory - cost.weights
    local = min(int(room * (sizes.slots // parts) / cost.cache), 1024 // parts)
    local = max(local // stages * stages, stages)  # whole groups
    pages = sizes.pages // parts * local // (sizes.slots // parts) * parts
    more = replace(sizes, slots=local * parts, groups=0, pages=pages)
    return token_cost(config, cost.plan, more, hardware, **options)


def serving_plans(
    config: TransformerConfig, devices: int, sizes: ServeConfig, hardware: Hardware, **options: Any
) -> tuple[list[TokenCost], dict[str, str]]:
    """Explain every plan of so many devices.

    Args:
      config: the model.
      devices: their number; some plans leave none idle, none uses more.
      sizes: see `token_cost`.
      hardware: see `token_cost`.
      options: see `token_cost`.

    Returns:
      The plans that fit the model, the fastest step first, and why others do not, by plan.
    """
    found, refused = [], {}
    for factors in factorings(devices, len(MESH_AXES)):
        chosen = dict(zip(MESH_AXES, factors, strict=True))
        text = ", ".join(f"{axis}={size}" for axis, size in chosen.items() if size > 1)
        if chosen["fsdp"] > 1 or (chosen["ep"] > 1 and "routed" not in config.pattern):
            continue  # weights gathered in every step; nothing to split
        try:
            found.append(token_cost(config, Plan(text), sizes, hardware, **options))
        except PlanError as error:
            refused[text] = str(error)
    return sorted(found, key=lambda one: one.seconds), refused


HEAD = ("plan", "texts", "weights", "KV cache", "collectives", "sent", "a step at best", "tokens/s", "prompt tokens/s")


def table(found: Sequence[TokenCost], hardware: Hardware) -> list[tuple[str, ...]]:
    """Rows of text below `HEAD`; what does not fit in the memory says so."""
    return [
        (
            one.plan.axes or "one device",
            str(one.slots),
            f"{one.weights / 1e9:.2f} GB",
            f"{one.cache / 1e9:.2f} GB" + ("" if one.fits(hardware) else ", does not fit"),
            str(one.collectives),
            f"{one.moved / 1e3:.1f} kB",
            f"{one.seconds * 1e3:.3f} ms",
            f"{one.tokens_per_second:,.0f}",
            f"{1 / one.prefill:,.0f}",
        )
        for one in found
    ]
