"""A training step explained before it runs: placement, memory, collectives, arithmetic, time at best, better plans."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from sharding.analysis.collectives import Collective, count_collectives
from sharding.analysis.hardware import Hardware
from sharding.analysis.roofline import Moved, Placed, Roofline, cause, step_roofline, summarize
from sharding.analysis.search import Judged, Ranking, plans, rank
from sharding.mesh import abstract_mesh
from sharding.pipeline.lockstep import Lockstep, lockstep_schedule
from sharding.plan import MESH_AXES, Plan
from tessera.lm.run import RunConfig, accumulated_batch, first_state
from tessera.parallel.decoder import ShardedDecoder, sizes_of_params
from tessera.parallel.pipelined_decoder import make_loss
from tessera.planning.costs import (
    Costs,
    count_plain_products,
    estimate_costs,
    expert_flops,
    forward_passes,
    state_traffic,
)
from tessera.planning.memory import Memory, StateParts, estimate_memory, local_sizes, state_placements
from tessera.step import make_train_step

HEADROOM = 0.92
"""Share of a device's memory that a plan may fill by the estimate, see docs/results/pods.md."""


@dataclass(frozen=True)
class Explained:
    """What a step does on one device.

    Attributes:
      run: what was explained, its plan filled in.
      hardware: the device.
      params: where every parameter of the model lies.
      memory: by what it is for, estimated.
      moved: collectives of the program by kind, group and cause.
      flops: of matrix products, counted in the program.
      traffic: bytes of their operands and results, and of the optimizer's pass over the state.
      time: at best.
      schedule: of the pipeline, None without one.
      trained: parameters that a step trains: the model's, or its adapters' (LoRA).
    """

    run: RunConfig
    hardware: Hardware
    params: tuple[Placed, ...]
    memory: Memory
    moved: tuple[Moved, ...]
    flops: float
    traffic: float
    time: Roofline
    schedule: Lockstep | None
    trained: int

    @property
    def intensity(self) -> float:
        """FLOPs per byte of HBM traffic; below `hardware.ridge` the memory is what limits."""
        return self.flops / self.traffic

    @property
    def fits(self) -> bool:
        """Whether the estimate leaves `HEADROOM`."""
        return self.memory.total <= HEADROOM * self.hardware.memory

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together, at best."""
        return self.run.batch_size * self.run.length / self.time.overlapped


def explain(run: RunConfig, hardware: Hardware) -> Explained:
    """Trace the step and add it up; nothing is compiled and no array is made.

    Args:
      run: its plan says the number of devices, see `Plan.fill`.
      hardware: what it would run on.

    Raises:
      PlanError: the plan does not fit the model or the batch.
    """
    plan, decoder = run.plan, run.decoder(run.plan, hardware.platform)
    grad_accum_steps = run.step.grad_accum_steps
    decoder.check(accumulated_batch(run), run.length)
    state = jax.eval_shape(lambda: first_state(run))
    step = make_train_step(make_loss(decoder, abstract_mesh(plan)), run.tx, run.step, join=run.join)
    arguments = (
        state,
        {"tokens": jax.ShapeDtypeStruct((run.batch_size, run.length + 1), jnp.int32)},
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    schedule = None
    if plan.size("pp") > 1:
        schedule = lockstep_schedule(plan.schedule, plan.size("pp"), plan.microbatch_count, plan.virtual)
    # The program says what a stage does in a tick if it is not idle.
    busy = schedule.busy() if schedule else 1.0
    found = [_while_busy(one, busy) for one in count_collectives(step, *arguments)]
    sums = count_plain_products(run.model, step, *arguments)
    placed = state_placements(decoder, state)
    flops = busy * sum(one.flops * one.runs for one in sums) + _expert_flops(run)
    traffic = busy * sum(one.bytes * one.runs for one in sums) + state_traffic(placed)
    return Explained(
        run,
        hardware,
        tuple(placed["params"]),
        estimate_memory(decoder, placed, run.batch_size, run.length, grad_accum_steps),
        tuple(summarize(found)),
        flops,
        traffic,
        step_roofline(
            hardware,
            flops=flops,
            traffic=traffic,
            moved=[(one.group, crosses(one, plan), one.moved) for one in found],
            bubble=schedule.bubble(forward_passes(run.model, plan) - 1) if schedule else 0.0,
        ),
        schedule,
        sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    )


def _while_busy(one: Collective, busy: float) -> Collective:
    """A collective inside a tick of a pipeline runs only where there is work; those between ticks always run."""
    inside = cause(one.scope).split(",")[0] in ("layer", "embed", "head")
    return replace(one, count=round(one.count * busy)) if inside else one


def crosses(one: Collective | Moved, plan: Plan) -> bool:
    """Whether a collective goes through the data-centre network."""
    return any(plan.dcn.get(axis, 1) > 1 for axis in one.axes)


def _expert_flops(run: RunConfig) -> float:
    """FLOPs of routed experts on one device, which run in kernels and loops whose trips depend on the data."""
    grad_accum_steps = run.step.grad_accum_steps
    z = local_sizes(run.model, run.plan, run.batch_size, run.length, grad_accum_steps)
    rounds = grad_accum_steps * (run.plan.microbatch_count if run.plan.size("pp") > 1 else 1)
    passes = 2.0 + forward_passes(run.model, run.plan, grad_accum_steps)
    return rounds * passes * z.routed * expert_flops(run.model, z.b * z.t, run.plan.size("tp"))


Lying = Callable[[ShardedDecoder], StateParts]
"""Where a train state lies under a decoder's plan."""


def judge(run: RunConfig, hardware: Hardware, lying: Lying, plan: Plan) -> Judged:
    """What a plan would need, by formulas, for `sharding.analysis.search.rank`.

    Where the batch does not fit at once, with the fewest parts of gradient accumulation, from the run's own number on,
    with which it does; where none is enough, with those of least memory.

    Raises:
      PlanError: it does not divide the model or the batch.
    """
    decoder = run.decoder(plan, hardware.platform)
    least = run.step.grad_accum_steps
    decoder.check(accumulated_batch(run), run.length)
    placed = lying(decoder)
    rows = run.batch_size // least // plan.data // (plan.microbatch_count if plan.size("pp") > 1 else 1)
    sizes = [run.batch_size, run.length, least]
    found = []
    for more in (n for n in range(1, rows + 1) if rows % n == 0):
        sizes[2] = least * more
        found.append((estimate_memory(decoder, placed, *sizes).total, sizes[2]))
        if found[-1][0] <= HEADROOM * hardware.memory:
            break
    memory, sizes[2] = found[-1] if found[-1][0] <= HEADROOM * hardware.memory else min(found)
    time = bound(estimate_costs(decoder, placed, *sizes), hardware)
    return Judged(plan, memory, time.overlapped, time.serial, sizes[2])


def bound(costs: Costs, hardware: Hardware) -> Roofline:
    """The roofline of estimated costs."""
    moved = [(axis.group, axis.crosses, axis.moved) for axis in costs.moved]
    return step_roofline(hardware, flops=costs.flops, traffic=costs.traffic, moved=moved, bubble=costs.bubble)


def search(run: RunConfig, hardware: Hardware, devices: int) -> Ranking:
    """The best plans for so many devices, by the formulas of `tessera.planning.memory` and `tessera.planning.costs`.

    Plans with stages are tried with several numbers of microbatches, others with as many parts of gradient accumulation
    as the memory asks for.

    Args:
      run: its plan's schedule, rules and choices hold; its sizes are not looked at.
      hardware: the device.
      devices: their number.
    """
    state = jax.eval_shape(lambda: first_state(run))
    known: dict[tuple, StateParts] = {}

    def lying(decoder: ShardedDecoder) -> StateParts:
        sizes = sizes_of_params(decoder.plan)
        if sizes not in known:
            known[sizes] = state_placements(decoder, state)
        return known[sizes]

    # Without experts ep would be dp by another name.
    axes = [axis for axis in MESH_AXES if axis != "ep" or "routed" in run.model.pattern]
    candidates = plans(devices, replace(run.plan, axes="", microbatches=0), axes=axes)
    return rank(candidates, partial(judge, run, hardware, lying), HEADROOM * hardware.memory)
