"""One plan from a laptop to a pod: mesh, placement rules and every kind of parallelism.

Mesh axes, outermost (slowest links) first: pp pipeline stages, dp data copies, fsdp data copies that share the storage
of parameters, ep experts, cp parts of a sequence (context), tp parts of a tensor.

Logical axes name what a dimension is: layers, experts, vocab, width, heads, kv_heads, head_dim, ff of parameters;
batch, time, sequence (time in the residual stream), width, heads, kv_heads, head_dim, ff, vocab of activations. Rules
map them to mesh axes (`sharding.rules`).

Axis legend of array suffixes: B batch, T query time, S key time or time in the residual stream, D model width, H query
heads, K key/value heads, G query heads per key/value head, h head dimension, F feed-forward width, V vocabulary. Inside
shard_map these are the sizes of one device's part.
"""
