"""A language model under a plan: its loss and where its state and batches lie, for the training script."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from sharding.errors import PlanError
from sharding.mesh import make_mesh
from sharding.plan import Plan
from tessera.models.lm_loss import lm_loss
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.parallel.decoder import ShardedDecoder, batch_sharding, state_shardings
from tessera.parallel.pipelined_decoder import make_loss
from tessera.parallel.placement import Placement, data_parallel
from tessera.step import LossFn


def plan_decoder(
    config: TransformerConfig,
    plan: Plan,
    init: Callable[[], Any],
    *,
    batch_size: int,
    length: int,
    z_loss: float = 0.0,
    microbatches: int = 1,
    devices: Sequence[Any] | None = None,
) -> tuple[LossFn, Placement]:
    """Loss and placement of a decoder; an empty plan is plain data parallelism over the devices that divide the batch.

    Args:
      config: the model.
      plan: for all devices there are, see `Plan.fill`.
      init: makes the first state; only its shapes are looked at.
      batch_size: sequences per step over all devices.
      length: tokens per sequence.
      z_loss: see `tessera.losses.cross_entropy`.
      microbatches: parts whose gradients the training step accumulates; each goes through the plan by itself.
      devices: default all; those of a topology to compile for it ahead of time.

    Raises:
      PlanError: the plan does not fit the devices, the model or the batch.
    """
    if not plan.axes:
        return lm_loss(Decoder(config), z_loss), data_parallel(batch_size)
    devices = list(jax.devices() if devices is None else devices)
    plan = plan.fill(len(devices))
    decoder, mesh = ShardedDecoder(config, plan, z_loss, devices[0].platform), make_mesh(plan, devices)
    if batch_size % microbatches:
        raise PlanError(f"batch_size={batch_size} does not divide into {microbatches} microbatches of a step")
    decoder.check(batch_size // microbatches, length)
    state = state_shardings(decoder, mesh, jax.eval_shape(init))
    return make_loss(decoder, mesh), Placement(state, batch_sharding(decoder, mesh))
