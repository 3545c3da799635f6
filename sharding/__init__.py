"""Parallelism from a laptop to a pod: one plan, its mesh, sharding rules, and explicit collectives inside shard_map.

ZeRO / FSDP, tensor parallelism, sequence parallelism, vocab-parallel cross-entropy, context parallelism (ring
attention, Ulysses) and pipeline parallelism (`sharding.pipeline`); sharded decoding (`sharding.inference`); counts of
collectives and rooflines (`sharding.analysis`); several hosts (`sharding.multihost`).

Example:
  >>> import jax.numpy as jnp, sharding
  >>> plan = sharding.Plan("fsdp=4, tp=2")
  >>> params = {"mlp": {"up": {"kernel": jnp.zeros((64, 256))}}}
  >>> specs = sharding.param_specs(params, plan.sizes)
  >>> tuple(specs["mlp"]["up"]["kernel"])
  ('fsdp', 'tp')

Mesh axes, outermost (slowest links) first: pp pipeline stages, dp data parallelism, fsdp data parallelism with sharded
parameters, ep experts, cp context (parts of a sequence), tp tensor parallelism.

Logical axes name dimensions: layers, experts, vocab, width, heads, kv_heads, head_dim, ff of parameters; batch, time,
sequence (time in the residual stream), width, heads, kv_heads, head_dim, ff, vocab of activations. Rules map them to
mesh axes (`sharding.rules`).

Axis legend of array suffixes: B batch, T query time, S key time or time in the residual stream, D model width, H query
heads, K key/value heads, G query heads per key/value head, h head dimension, F feed-forward width, V vocabulary. Inside
shard_map these are the sizes of one device's part.

Names are imported on first use.
"""

from sharding._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "errors": ("PlanError",),
        "plan": ("Plan",),
        "mesh": ("abstract_mesh", "make_mesh"),
        "rules": ("Rules", "mirrored_specs", "param_specs", "resolve", "shardings"),
        "tensor_parallel": ("all_gather_sequence", "gather_params", "reduce_scatter_sequence", "vary"),
        "vocab_parallel": ("chunked_sum", "linear_cross_entropy", "lookup", "token_losses"),
        "attention": ("AttentionForm", "packed_window", "visible"),
        "context_parallel": ("contiguous_positions", "ring_attention", "ulysses_attention", "zigzag_positions"),
        "zero": ("ShardedParams",),
        "analysis": (),
        "inference": (),
        "multihost": (),
        "pipeline": (),
    },
)
