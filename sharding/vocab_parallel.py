"""Embedding and cross-entropy with the vocabulary split over tensor-parallel devices.

Every device has rows (columns) [i V, (i + 1) V) of the table (head), i its index along the axis and V its part. No
array of the full vocabulary exists on any device: what crosses devices is one number per token and quantity (Shoeybi et
al. 2019, section 3). All functions run inside shard_map; with `tp` None they are the ordinary ones.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def lookup(tokens_BT: Int[Array, "B T"], table_VD: Float[Array, "V D"], tp: str | None) -> Float[Array, "B T D"]:
    """This device's contribution to the embeddings: the row where it has it, zeros elsewhere.

    The sum over `tp` is left to the caller (`sharding.tensor_parallel.leave`), which may scatter it over time.

    Args:
      tokens_BT: ids in the full vocabulary.
      table_VD: this device's rows.
      tp: mesh axis that splits the vocabulary.
    """
    if tp is None:
        return table_VD[tokens_BT]
    rows = table_VD.shape[0]
    local_BT = tokens_BT - jax.lax.axis_index(tp) * rows
    here_BT = (local_BT >= 0) & (local_BT < rows)
    return jnp.where(here_BT[..., None], table_VD[jnp.clip(local_BT, 0, rows - 1)], 0)


def token_losses(
    logits_BTV: Float[Array, "B T V"], labels_BT: Int[Array, "B T"], tp: str | None
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """Cross-entropy of every token from this device's part of its logits.

    The log-sum-exp is merged from the parts': with m the maximum over all devices, lse = m + log(sum over devices of
    sum exp(logits - m)). The largest logit is the label's if no smaller id has an equal one, as `argmax` breaks ties.

    Args:
      logits_BTV: float32, this device's columns.
      labels_BT: ids in the full vocabulary.
      tp: mesh axis that splits the vocabulary.

    Returns:
      negative log-likelihood in nats, log-sum-exp, and 1.0 where the largest logit is the label's; equal on all devices
      of `tp`.
    """
    columns = logits_BTV.shape[-1]
    offset = 0 if tp is None else jax.lax.axis_index(tp) * columns
    ids_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2) + offset
    top_BT = jax.lax.stop_gradient(logits_BTV).max(-1)
    most_BT = top_BT if tp is None else jax.lax.pmax(top_BT, tp)
    # A compare and a sum, not a gather: nothing to do for the devices that lack the label's column.
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
