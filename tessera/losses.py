"""Losses, accuracies and distillation as weighted means, computed in float32 whatever the dtype of the logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def weighted_mean(values: Float[Array, "*N"], weights: Float[Array, "*N"] | None = None) -> Float[Array, ""]:
    """sum(values * weights) / sum(weights) in float32; zero if all weights are zero, the plain mean for None."""
    values = values.astype(jnp.float32)
    if weights is None:
        return values.mean()
    weights = weights.astype(jnp.float32)
    weight = weights.sum()
    return (values * weights).sum() / jnp.where(weight == 0, 1.0, weight)


def cross_entropy(
    logits: Float[Array, "*N V"],
    labels: Int[Array, "*N"],
    weights: Float[Array, "*N"] | None = None,
    z: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean cross-entropy in nats with PaLM's z-loss.

    loss = mean(logsumexp(logits) - logits[label] + z * logsumexp(logits)^2). The last term holds the softmax's
    normaliser near one: Chowdhery et al. (2022), section 5 (z = 1e-4); de Brébisson & Vincent (2016).

    Args:
      logits: unnormalised log-probabilities.
      labels: class of every position, 0..V-1.
      weights: weight of every position (0 leaves it out), default all ones.
      z: coefficient of the z-loss.

    Returns:
      The loss, and the metrics cross_entropy (without the z-loss), z_loss (the added term), accuracy (a fraction) and
      weight (the sum of weights: positions counted); all float32 scalars.
    """
    logits = logits.astype(jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    # A compare and a sum where a gather would do: XLA fuses it, its gradient is no scatter, and a sharded vocabulary
    # needs one small all-reduce where a gather would collect the logits.
    hot = labels[..., None] == jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    nll = lse - jnp.where(hot, logits, 0.0).sum(axis=-1)
    nats, z_loss = weighted_mean(nll, weights), z * weighted_mean(jnp.square(lse), weights)
    metrics = {
        "cross_entropy": nats,
        "z_loss": z_loss,
        "accuracy": accuracy(logits, labels, weights),
        "weight": jnp.float32(labels.size) if weights is None else weights.astype(jnp.float32).sum(),
    }
    return nats + z_loss, metrics


def accuracy(
    logits: Float[Array, "*N V"],
    labels: Int[Array, "*N"],
    weights: Float[Array, "*N"] | None = None,
) -> Float[Array, ""]:
    """Weighted fraction of positions whose largest logit is the label's (the first of equal ones); float32."""
    return weighted_mean((logits.argmax(-1) == labels).astype(jnp.float32), weights)


def distillation(
    logits: Float[Array, "*N V"],
    teacher: Float[Array, "*N V"],
    temperature: float = 1.0,
    mean_weights: Float[Array, "*N"] | None = None,
) -> Float[Array, ""]:
    """Cross-entropy with a teacher's softened classes, times the square of the temperature, float32.

    Hinton, Vinyals & Dean 2015 (arXiv:1503.02531), section 2: both logits are divided by the temperature; the factor
    T^2 keeps the gradient as large as that of the labels. No gradient reaches the teacher. Weights of the positions are
    of mean one, see `tessera.step.with_mean_weights`.
    """
    soft = jax.nn.softmax(jax.lax.stop_gradient(teacher).astype(jnp.float32) / temperature)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    each = -(soft * log_p).sum(-1)
    return (each if mean_weights is None else each * mean_weights).mean() * temperature**2
