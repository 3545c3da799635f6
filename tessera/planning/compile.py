"""The training step as the training script runs it, compiled for devices that need not be there."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from sharding.analysis.collectives import Collective
from sharding.analysis.hlo import compiled_collectives
from tessera.lm.run import RunConfig, first_state, under_plan
from tessera.models.lm_loss import make_adjust
from tessera.step import make_train_step


class Compiled(NamedTuple):
    """A compiled step: the compiler's memory per device in bytes, its collectives, and how long it took in seconds.

    `arguments` (state and batch) and `temporary` live at the same time; results take the place of donated arguments,
    and what they need beyond is `results`. `code` is the program itself. `collectives` is None where this JAX cannot
    read what a newer compiler (libtpu) wrote.
    """

    arguments: int
    temporary: int
    results: int
    code: int
    collectives: list[Collective] | None
    lower_seconds: float
    compile_seconds: float

    @property
    def total(self) -> int:
        """Bytes of device memory a step needs."""
        return self.arguments + self.temporary + self.results + self.code


def compile_step(run: RunConfig, devices: Sequence[Any]) -> Compiled:
    """Compile the step that `scripts/train.py` runs; only shapes exist.

    Args:
      run: what is trained.
      devices: JAX devices or those of `sharding.analysis.hardware.topology_devices`.

    Raises:
      PlanError: the plan does not fit the devices, the model or the batch.
      jax.errors.JaxRuntimeError: the compiler refuses the program, for want of memory for example.
    """
    loss_fn, placement = under_plan(run, devices=devices)
    adjust = make_adjust(run.model) if run.lora is None else None
    step = make_train_step(loss_fn, run.tx, run.step, adjust=adjust, join=run.join)
    state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        jax.eval_shape(lambda: first_state(run)),
        placement.state,
    )
    tokens = jax.ShapeDtypeStruct((run.batch_size, run.length + 1), jnp.int32, sharding=placement.batch)
    key = jax.eval_shape(lambda: jax.random.key(0))
    replicated = NamedSharding(placement.batch.mesh, PartitionSpec())
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated)
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0, out_shardings=(placement.state, None)).lower(
        state, {"tokens": tokens}, key
    )
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    memory: Any = compiled.memory_analysis()
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        memory.generated_code_size_in_bytes,
        _collectives(compiled),
        middle - start,
        end - middle,
    )


def _collectives(compiled: Any) -> list[Collective] | None:
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        line = next(iter(str(error).strip().splitlines()), "")
        logging.warning("the compiled program cannot be read by jaxlib %s: %s", jax.lib.__version__, line[:160])
        return None
    return compiled_collectives(text)
