"""The settings of a language model's training step: model, plan, optimizer, step and batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from sharding.plan import Plan
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.optim.optimizer import OptimizerConfig, make_optimizer
from tessera.parallel.build import plan_decoder
from tessera.parallel.placement import Placement
from tessera.step import LossFn, StepConfig, TrainState, init_state


@dataclass(frozen=True)
class RunConfig:
    """What one training step depends on; the fields are those of the training script's config.

    Attributes:
      model, plan, optimizer, step: the parts.
      batch_size: sequences per step over all devices.
      length: tokens per sequence.
      z_loss: see `tessera.losses.cross_entropy`.
    """

    model: TransformerConfig
    plan: Plan
    optimizer: OptimizerConfig
    step: StepConfig
    batch_size: int
    length: int
    z_loss: float = 0.0

    def init(self, key: Key[Array, ""] | None = None) -> TrainState:
        """The state before the first step; call it under `jax.eval_shape` to have its shapes alone."""
        tokens = jnp.zeros((1, self.length), jnp.int32)
        return self.state(Decoder(self.model).init(jax.random.key(0) if key is None else key, tokens)["params"])

    def state(self, params: PyTree) -> TrainState:
        """The state before the first step with these parameters."""
        return init_state(params, make_optimizer(self.optimizer), self.step)

    def under_plan(self, devices: Sequence[Any] | None = None) -> tuple[LossFn, Placement]:
        """Loss and placement, see `tessera.parallel.build.plan_decoder`."""
        sizes = {"batch_size": self.batch_size, "length": self.length, "microbatches": self.step.microbatches}
        return plan_decoder(self.model, self.plan, self.init, **sizes, z_loss=self.z_loss, devices=devices)
