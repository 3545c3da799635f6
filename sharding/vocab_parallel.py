"""Vocab-parallel embedding and vocab-parallel cross-entropy: the vocabulary split over tensor-parallel devices.

Every device has rows (columns) [i V, (i + 1) V) of the table (head), i its index along the axis and V its part. No
array of the full vocabulary exists on any device: devices exchange one number per token and quantity (Shoeybi et al.
2019, section 3). All functions run inside shard_map; with `tp` None they are the unsharded ones.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def lookup(tokens_BT: Int[Array, "B T"], table_VD: Float[Array, "V D"], tp: str | None) -> Float[Array, "B T D"]:
    """Look up vocab-parallel embeddings: a device's rows, zeros for tokens of other devices.

    The caller sums over `tp` (`sharding.tensor_parallel.reduce_scatter_sequence`, which may scatter over time).

    Args:
      tokens_BT: ids in the full vocabulary; any other id gives NaN, under every split.
      table_VD: this device's rows.
      tp: mesh axis that splits the vocabulary.

    Example:
      >>> import jax.numpy as jnp, sharding
      >>> sharding.lookup(jnp.array([[2, 0]]), jnp.arange(6.0).reshape(3, 2), None).tolist()
      [[[4.0, 5.0], [0.0, 1.0]]]
    """
    rows = table_VD.shape[0]
    vocabulary = rows if tp is None else rows * jax.lax.axis_size(tp)
    known_BT = (tokens_BT >= 0) & (tokens_BT < vocabulary)
    local_BT = tokens_BT if tp is None else tokens_BT - jax.lax.axis_index(tp) * rows
    here_BT = (local_BT >= 0) & (local_BT < rows)
    return jnp.where(
        here_BT[..., None],
        table_VD[jnp.clip(local_BT, 0, rows - 1)],
        jnp.where(known_BT, 0, jnp.nan).astype(table_VD.dtype)[..., None],
    )


def token_losses(
    logits_BTV: Float[Array, "B T V"], labels_BT: Int[Array, "B T"], tp: str | None
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """Compute vocab-parallel cross-entropy of every token from this device's columns of the logits.

    The log-sum-exp is merged over devices: with m the maximum over all devices, lse = m + log(sum over devices of
    sum exp(logits - m)). The largest logit is the label's if no smaller id has an equal one, as `argmax` breaks ties.

    Args:
      logits_BTV: float32, this device's columns.
      labels_BT: ids in the full vocabulary.
      tp: mesh axis that splits the vocabulary.

    Returns:
      negative log-likelihood in nats, log-sum-exp, and 1.0 where the largest logit is the label's; equal on all devices
      of `tp`.

    Example:
      >>> import jax, jax.numpy as jnp, sharding
      >>> from functools import partial
      >>> from jax.sharding import PartitionSpec as P
      >>> nll, lse, right = sharding.token_losses(jnp.log(jnp.array([[[1.0, 3.0]]])), jnp.array([[1]]), None)
      >>> round(float(nll[0, 0]), 4), float(right[0, 0])
      (0.2877, 1.0)
      >>> mesh = sharding.abstract_mesh(sharding.Plan("tp=4"))
      >>> parallel = jax.shard_map(
      ...     partial(sharding.token_losses, tp="tp"), mesh=mesh, in_specs=(P(None, None, "tp"), P()), out_specs=P()
      ... )
      >>> jax.eval_shape(parallel, jnp.zeros((2, 8, 32)), jnp.zeros((2, 8), jnp.int32))[0].shape
      (2, 8)
    """
    columns = logits_BTV.shape[-1]
    offset = 0 if tp is None else jax.lax.axis_index(tp) * columns
    ids_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2) + offset
    top_BT = jax.lax.stop_gradient(logits_BTV).max(-1)
    most_BT = top_BT if tp is None else jax.lax.pmax(top_BT, tp)
    # A compare and a sum, not a gather: zero on devices without the label's column.
    label_BT = jnp.where(labels_BT[..., None] == ids_BTV, logits_BTV, 0.0).sum(-1)
    mass_BT = jnp.exp(logits_BTV - most_BT[..., None]).sum(-1)
    best_BT = jnp.where(jax.lax.stop_gradient(logits_BTV) == most_BT[..., None], ids_BTV, jnp.iinfo(jnp.int32).max).min(
        -1
    )
    if tp is not None:
        label_BT, mass_BT = jax.lax.psum((label_BT, mass_BT), tp)
        best_BT = jax.lax.pmin(best_BT, tp)
    lse_BT = most_BT + jnp.log(mass_BT)
    return lse_BT - label_BT, lse_BT, (best_BT == labels_BT).astype(jnp.float32)
