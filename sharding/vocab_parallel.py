"""Vocab-parallel embedding and cross-entropy (the vocabulary split over tensor-parallel devices), and both chunked.

Every device has rows (columns) [i V, (i + 1) V) of the table (head), i its index along the axis and V its part. No
array of the full vocabulary exists on any device: devices exchange one number per token and quantity (Shoeybi et al.
2019, section 3). All functions run inside shard_map; with `tp` None they are the unsharded ones.

`linear_cross_entropy` and `chunked_sum` take the tokens in chunks, so that no array of tokens x vocabulary exists.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

Sums = tuple[jax.Array, dict[str, jax.Array]]
"""A loss [] and metrics by name, summed over tokens."""


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


def linear_cross_entropy(
    x_ND: Float[Array, "N D"],
    head_DV: Float[Array, "D V"],
    labels_N: Int[Array, " N"],
    weights_N: Float[Array, " N"],
    tp: str | None = None,
    *,
    z: float = 0.0,
    softcap: float = 0.0,
    chunk: int = 0,
    vocabulary: int = 0,
) -> Sums:
    """Compute the output layer and its cross-entropy with z-loss in chunks of tokens (fused linear cross-entropy).

    The sum over tokens of weight * (nll + z * lse^2), of logits x_ND head_DV with their soft-cap. The logits exist for
    one chunk at a time, forward and backward; see `chunked_sum`.

    Args:
      x_ND: inputs of the output layer, in the dtype of the product, whose sums are float32.
      head_DV: this device's columns.
      labels_N: ids in the full vocabulary.
      weights_N: of the tokens, float32; they have no gradient.
      tp: mesh axis that splits the vocabulary.
      z: coefficient of the z-loss.
      softcap: logits l become softcap tanh(l / softcap); 0 leaves them.
      chunk: tokens at a time; 0 takes all at once.
      vocabulary: tokens in it, where the last devices' columns beyond are padding; 0 is every column.

    Returns:
      The sum, and those of cross_entropy (without the z-loss) and accuracy, which have no gradient; float32.

    Example:
      >>> import jax.numpy as jnp, sharding
      >>> x_ND, labels_N = jnp.ones((6, 4)), jnp.arange(6)
      >>> loss, sums = sharding.linear_cross_entropy(x_ND, jnp.zeros((4, 8)), labels_N, jnp.ones(6), chunk=4)
      >>> round(float(loss), 4), round(6 * float(jnp.log(8)), 4)
      (12.4766, 12.4766)
    """

    def loss(head_DV: jax.Array, x_CD: jax.Array, rest: tuple[jax.Array, jax.Array], _: None) -> Sums:
        labels_C, weights_C = rest
        logits_CV = jnp.einsum("cd,dv->cv", x_CD, head_DV.astype(x_CD.dtype), preferred_element_type=jnp.float32)
        logits_CV = softcap * jnp.tanh(logits_CV / softcap) if softcap else logits_CV
        columns = logits_CV.shape[-1]
        if vocabulary and columns * (1 if tp is None else jax.lax.axis_size(tp)) != vocabulary:
            ids_V = jnp.arange(columns) + (0 if tp is None else jax.lax.axis_index(tp) * columns)
            logits_CV = jnp.where(ids_V[None] < vocabulary, logits_CV, -jnp.inf)
        nll_1C, lse_1C, right_1C = token_losses(logits_CV[None], labels_C[None], tp)
        nats = (nll_1C[0] * weights_C).sum()
        metrics = {"cross_entropy": nats, "accuracy": (right_1C[0] * weights_C).sum()}
        return nats + z * (jnp.square(lse_1C[0]) * weights_C).sum(), metrics

    return chunked_sum(loss, head_DV, x_ND, (labels_N, weights_N), chunk=chunk)


def chunked_sum(
    fn: Callable[[PyTree, PyTree, PyTree, PyTree], Sums],
    shared: PyTree,
    x: PyTree,
    rest: PyTree,
    constants: PyTree = None,
    *,
    chunk: int = 0,
) -> Sums:
    """Sum a loss over chunks of tokens and compute its gradient along with it, chunk by chunk.

    Where it is differentiated, one pass over the chunks gives the sums and the gradient of each, which waits in place
    of what a backward pass would need (Liger Kernel: Hsu et al. 2024, arXiv:2410.10989, section 3.2): nothing is
    computed twice, and what `fn` makes of a chunk is gone after it.

    Args:
      fn: (shared, x, rest, constants) -> (loss [], metrics: {name: []}), sums over a chunk's tokens that are zero where
        all of `rest` is. It captures no traced values.
      shared: arrays that every chunk reads, with a gradient, which is added up in float32.
      x: arrays [N, ...] with a gradient.
      rest: arrays [N, ...] without one, such as labels and weights.
      constants: arrays without a gradient that every chunk reads.
      chunk: tokens at a time; the last chunk is filled up with zeros. 0 takes all at once, plainly.

    Returns:
      The sums; the metrics have no gradient.

    Example:
      >>> import jax, jax.numpy as jnp, sharding
      >>> square = lambda w, x_C, weights_C, _: ((weights_C * (w * x_C) ** 2).sum(), {})
      >>> total = lambda w: sharding.chunked_sum(square, w, jnp.arange(5.0), jnp.ones(5), chunk=2)[0]
      >>> [float(each) for each in jax.value_and_grad(total)(jnp.float32(1.0))]
      [30.0, 60.0]
    """
    if not chunk:
        loss, metrics = fn(shared, x, rest, constants)
        return loss, jax.lax.stop_gradient(metrics)
    count = jax.tree.leaves(x)[0].shape[0]
    parts = -(-count // chunk)
    size = -(-count // parts)  # chunks of one size, as few as there must be

    def cut(leaf: jax.Array) -> jax.Array:
        padded = jnp.pad(leaf, [(0, parts * size - count)] + [(0, 0)] * (leaf.ndim - 1))
        return padded.reshape(parts, size, *leaf.shape[1:])

    return _summed(fn, shared, *jax.tree.map(cut, (x, rest)), constants)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(fn: Callable[..., Sums], shared: PyTree, x: PyTree, rest: PyTree, constants: PyTree) -> Sums:
    sums = jax.lax.map(lambda one: fn(shared, *one, constants), (x, rest))
    return jax.tree.map(lambda each: each.sum(0), sums)


def _summed_forward(fn: Callable[..., Sums], shared: PyTree, x: PyTree, rest: PyTree, constants: PyTree) -> Any:
    gradient = jax.value_and_grad(fn, argnums=(0, 1), has_aux=True)

    def body(total: PyTree, one: Any) -> tuple[PyTree, Any]:
        sums, (d_shared, d_x) = gradient(shared, *one, constants)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, d_shared), (sums, d_x)

    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), shared)
    d_shared, (sums, d_x) = jax.lax.scan(body, zeros, (x, rest))
    d_shared = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), d_shared, shared)
    return jax.tree.map(lambda each: each.sum(0), sums), (d_shared, d_x)


def _summed_backward(fn: Callable[..., Sums], grads: tuple[PyTree, PyTree], cotangent: Sums) -> Any:
    d_shared, d_x = jax.tree.map(lambda grad: grad * cotangent[0].astype(grad.dtype), grads)
    return d_shared, d_x, None, None


_summed.defvjp(_summed_forward, _summed_backward)
