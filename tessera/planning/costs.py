"""How much a training step of the decoder computes and moves under a plan, by formulas: to rank thousands of plans.

The plan that is explained is counted from its program (`sharding.analysis.collectives`);
tests hold the formulas against those counts.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from moe.activations import GATED
from sharding.analysis.collectives import Product, count_products
from sharding.pipeline.schedules import bubble_formula
from sharding.plan import Plan
from tessera.models.transformer import TransformerConfig
from tessera.parallel.decoder import ShardedDecoder
from tessera.planning.memory import F32, Sizes, StateParts, local_sizes


class Axis(NamedTuple):
    """Bytes one device sends over one mesh axis in a step."""

    axis: str
    group: int
    crosses: bool
    moved: float


@dataclass(frozen=True)
class Costs:
    """What one device does in a step.

    Attributes:
      flops: of matrix products; a multiply-add is two, and products that are computed again count again.
      traffic: bytes from and to HBM: operands and results of products, parameters, moments and gradients.
      moved: bytes sent, by mesh axis.
      bubble: idle fraction of the pipeline.
    """

    flops: float
    traffic: float
    moved: tuple[Axis, ...]
    bubble: float


def estimate_costs(
    decoder: ShardedDecoder, placed: StateParts, batch_size: int, length: int, grad_accum_steps: int = 1
) -> Costs:
    """Costs of one step; arguments as for `tessera.planning.memory.estimate_memory`."""
    config, plan = decoder.config, decoder.plan
    z = local_sizes(config, plan, batch_size, length, grad_accum_steps)
    stages = plan.size("pp")
    rounds = grad_accum_steps * (plan.microbatch_count if stages > 1 else 1)
    passes = _mean(config, PASSES) + stage_again(config, plan) + first_passes(config, plan, grad_accum_steps)
    forward = _layer_flops(config, z, length)
    head = 2.0 * z.b * z.t * z.D * z.V
    flops = rounds * (passes * sum(forward) + 3 * head)
    params = placed["params"]
    bytes_of = {one.path: float(one.bytes) for one in params}
    local = sum(bytes_of.values())
    # Weights in the compute dtype in every pass.
    traffic = state_traffic(placed) + rounds * passes * local * plan.size("fsdp") * z.item / F32
    traffic += rounds * passes * _layer_traffic(z) + rounds * 3 * z.b * z.t * z.V * F32
    sizes = stages, plan.microbatch_count, plan.virtual, forward_passes(config, plan) - 1
    bubble = bubble_formula(plan.schedule, *sizes) if stages > 1 else 0.0
    return Costs(flops, traffic, tuple(_moved(decoder, z, bytes_of, rounds)), bubble)


def state_traffic(placed: StateParts) -> float:
    """Bytes that a step reads and writes of the train state.

    Read and write weights and two moments, write and read gradients. A model that is adapted is read, its adapted
    kernels are written with the adapters added, and their gradients written and read.
    """
    model, adapters, adapted = (sum(one.bytes for one in placed[part]) for part in ("params", "adapters", "adapted"))
    return 8.0 * adapters + model + 3.0 * adapted if adapters else 8.0 * model


# How often a layer's products run: forward, and twice for the backward pass; again where they are computed again.
# Naming what to keep saves some of the second forward pass; counted is all of it.
PASSES = {"none": 3.0, "dots": 3.2, "full": 4.0, "names": 4.0}
AGAIN = {"none": 0.0, "dots": 0.0, "full": 1.0, "names": 1.0}


def _mean(config: TransformerConfig, by_base: dict[str, float]) -> float:
    """Mean over layers of a number that belongs to how they are recomputed."""
    return sum(by_base[way.base] * way.layers for way in config.remat_groups) / config.layers


def forward_passes(config: TransformerConfig, plan: Plan, grad_accum_steps: int = 1) -> float:
    """How often a layer runs forward in a step: once, again if it is recomputed, and again in a pipeline's stage.

    Once more where losses of routers are of a whole batch that goes through the model in parts.
    """
    return 1 + _mean(config, AGAIN) + stage_again(config, plan) + first_passes(config, plan, grad_accum_steps)


def stage_again(config: TransformerConfig, plan: Plan) -> bool:
    """Whether a pipeline's stage computes its layers again from its input: unless `remat` says "none"."""
    return plan.size("pp") > 1 and config.remat_groups[0].base != "none"


def first_passes(config: TransformerConfig, plan: Plan, grad_accum_steps: int) -> int:
    """Forward passes of all parts of a batch before the first has its gradient, see `MoEConfig.whole_batch`."""
    parts = grad_accum_steps > 1 or plan.size("pp") > 1
    return int("routed" in config.pattern and config.moe.whole_batch and parts)


def count_plain_products(config: TransformerConfig, function: Callable[..., Any], *args: Any) -> list[Product]:
    """`count_products` without those of dropless experts, whose loops' trips depend on the data: see `expert_flops`."""
    found = count_products(function, *args)
    if "routed" not in config.pattern or config.moe.mixture.dispatch != "dropless":
        return found
    return [one for one in found if not re.search(r"\bexperts\b", one.scope)]


def expert_flops(config: TransformerConfig, tokens: float | int, tp: int) -> float:
    """FLOPs of one forward pass of `tokens` through the dropless experts of one layer, on one device of tp.

    0 without routed layers and for another dispatch, whose products `count_products` finds.
    """
    moe = config.moe
    if "routed" not in config.pattern or moe.mixture.dispatch != "dropless":
        return 0.0
    width, inputs = moe.width_of(config.ff_size) / tp, moe.latent or config.width
    products = 3.0 if moe.mixture.activation in GATED else 2.0
    return 2.0 * tokens * (products * moe.router.k * inputs * width + moe.latent * config.width)


def _layer_flops(config: TransformerConfig, z: Sizes, length: int) -> tuple[float, float, float]:
    """FLOPs of one forward pass through all layers of a device: attention, dense feed-forward, experts."""
    tokens = z.b * z.t
    projections = 2.0 * tokens * z.D * z.h * (2 * z.H + 2 * z.K)
    if rank := config.latent.kv_rank:
        m, down = config.latent, config.latent.q_rank or z.D
        weights = z.D * (rank + m.rope_dim + m.q_rank) + down * z.H * z.h + rank * z.H * (m.nope_dim + m.value_dim)
        projections = 2.0 * tokens * (weights + z.H * m.value_dim * z.D)
    # Plain attention computes the scores that the causal mask or a window hides; the ring computes half of them.
    share = 0.5 if z.S < length else 1.0
    scores = 2.0 * tokens * length * share * z.H * (z.h + config.value_size)
    dense = 3 * 2.0 * tokens * z.D * z.F
    moe = config.moe
    experts = 3 * 2.0 * tokens * z.W * (z.Z * moe.router.k + z.D * moe.shared)
    experts += 2.0 * tokens * z.D * (moe.router.experts + 2 * moe.latent)
    return z.layers * (projections + scores), (z.layers - z.routed) * dense, z.routed * float(experts)


def _layer_traffic(z: Sizes) -> float:
    """Bytes of activations that all layers' products read and write in one pass."""
    tokens = z.b * z.t
    attention = tokens * (4 * z.D + 2 * (2 * z.H + 2 * z.K) * z.h) * z.item + 2 * z.b * z.H * z.t * z.S * (F32 + z.item)
    dense = tokens * (3 * z.D + 4 * z.F) * z.item
    experts = z.M * (3 * z.Z + 4 * z.W) * z.item
    return float(z.layers * attention + (z.layers - z.routed) * dense + z.routed * experts)


def _moved(decoder: ShardedDecoder, z: Sizes, bytes_of: dict[str, float], rounds: int) -> list[Axis]:
    """Bytes one device sends over every axis of the plan, by the ring algorithms."""
    plan = decoder.plan
    again = forward_passes(decoder.config, plan, rounds)
    stream, found = float(z.b * z.t * z.D * z.item), []
    experts = sum(size for path, size in bytes_of.items() if "/experts/" in path)
    others = sum(bytes_of.values()) - experts

    def add(axis: str, total: float) -> None:
        found.append(Axis(axis, plan.size(axis), plan.dcn[axis] > 1, float(total)))

    for axis in plan.present("pp", "dp", "fsdp", "ep", "cp", "tp"):
        n = plan.size(axis)
        ring = (n - 1) / n
        if axis == "fsdp" and plan.zero == 3:
            # Gathered forward and backward, and once more by a stage; gradients scattered: in the compute dtype.
            times = 3 + (plan.size("pp") > 1 and decoder.config.remat != "none")
            add(axis, rounds * times * ring * (experts + others) * n * z.item / F32)
        elif axis in ("dp", "fsdp"):
            add(axis, _times(decoder, rounds) * 2 * ring * (experts + others))
        elif axis == "ep":
            tokens = z.routed * z.b * z.t * decoder.config.moe.router.k * z.Z * z.item
            sent = ring * tokens if decoder.platform in ("tpu", "gpu") else (n - 1) * tokens
            add(axis, _times(decoder, rounds) * 2 * ring * others + rounds * (2 * again + 2) * sent)
        elif axis == "cp":
            add(axis, rounds * z.layers * _context(plan, z, n, again) + 2 * ring * (experts + others))
        elif axis == "tp":
            # Two sums forward and two backward a layer; of those computed again the last is not needed.
            add(axis, rounds * 2 * ring * stream * (z.layers * (4 + (again - 1)) + 2))
        else:
            add(axis, 2.0 * rounds * z.b * z.s * z.D * z.item)
    return found


def _times(decoder: ShardedDecoder, rounds: int) -> int:
    """How often gradients are summed: a pipeline does it once, after its last tick."""
    return rounds if decoder.plan.size("pp") == 1 else max(1, rounds // decoder.plan.microbatch_count)


def _context(plan: Plan, z: Sizes, n: int, again: float) -> float:
    """Bytes of one layer's attention over cp."""
    if plan.context == "all_to_all":
        return (again + 1) * (n - 1) / n * z.b * z.t * (2 * z.H + 2 * z.K) * z.h * z.item
    keys = 2.0 * z.b * z.t * z.K * z.h
    # Keys and values go round in every pass, their gradients in float32 with them in the last.
    return again * (n - 1) * keys * z.item + (n - 1) * keys * z.item + n * keys * F32
