"""What one block of the decoder keeps for its backward pass on one device: read off JAX's own residuals."""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sharding.plan import Plan
from sharding.tensor_parallel import INSIDE, RESIDUAL
from tessera.models.layers import attention
from tessera.models.remat import Remat
from tessera.models.transformer import DTYPES, Block, TransformerConfig


class Kept(NamedTuple):
    """Bytes kept in the device's memory and in the host's."""

    device: int
    host: int


def kept_per_row(config: TransformerConfig, plan: Plan, length: int, way: Remat) -> Kept:
    """What one block with a dense feed-forward layer keeps for one row of a device's batch.

    The block is traced with one device's sizes and without a mesh: where a collective would change a shape, copies and
    slices stand in. Parameters are not counted.

    Args:
      config: the whole model.
      plan: how it is split; only tp, cp, `sequence` and `context` matter.
      length: tokens of a whole sequence.
      way: what the backward pass recomputes; the block's input is counted under every one.
    """
    tp, cp = plan.size("tp"), plan.size("cp")
    if way.base == "full":  # the input alone
        tokens = length // cp // (tp if plan.sequence else 1)
        return Kept(tokens * config.width * DTYPES[config.dtype].dtype.itemsize, 0)
    local = replace(
        config,
        heads=config.heads // tp,
        kv_heads=config.kv_size // tp,
        head_dim=config.head_size,
        ff=config.ff_size // tp,
        mlp="swiglu",
        layers=1,
        vocab_size=1,
        remat="none",
    )
    context = plan.context if cp > 1 else "whole"
    return _kept(local, tp if plan.sequence else 1, length // cp, context, cp, replace(way, layers=1))


@functools.lru_cache(maxsize=512)
def _kept(config: TransformerConfig, split: int, t: int, context: str, cp: int, way: Remat) -> Kept:
    one, two = (_residuals(config, split, t, context, cp, way, rows) for rows in (1, 2))
    return Kept(two.device - one.device, two.host - one.host)


def _residuals(config: TransformerConfig, split: int, t: int, context: str, cp: int, way: Remat, rows: int) -> Kept:
    def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        if split > 1 and axes == INSIDE:
            return jnp.concatenate([x] * split, axis=1)
        return x[:, : x.shape[1] // split] if split > 1 and axes == RESIDUAL else x

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if context == "ring":  # keeps queries, keys, values and the result, and computes the rest again
            return jax.checkpoint(attention)(q, k, v)
        if context == "all_to_all":
            q, k, v = (x.reshape(rows, t * cp, x.shape[2] // cp, x.shape[3]) for x in (q, k, v))
            return attention(q, k, v).reshape(rows, t, -1, config.head_size)
        return attention(q, k, v)

    block = Block(config, constrain, attend, "swiglu")
    x = jax.ShapeDtypeStruct((rows, t // split, config.width), DTYPES[config.dtype])
    positions = jnp.zeros((rows, t), jnp.int32)
    params = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, positions), x)

    def run(params: Any, x: jax.Array) -> jax.Array:
        return block.apply(params, x, positions)[0]

    kept = run if way.base == "none" else jax.checkpoint(run, policy=way.policy)
    pull = jax.make_jaxpr(lambda params, x: jax.tree.leaves(jax.vjp(kept, params, x)[1]))(params, x)
    total = {False: 0, True: 0}
    for aval in pull.out_avals:
        total[aval.memory_space == jax.memory.Space.Host] += aval.size * aval.dtype.itemsize
    return Kept(total[False], total[True])
