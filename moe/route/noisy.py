"""Routers with noise: noisy top-k gating, the two-level gate of Shazeer et al. (2017), and SparseMixer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Key

from moe.routing import Routing, check_k, is_routed, make_routing, prepare, take

# Softplus underflows for very negative inputs, and the load divides by it.
SMALLEST_NOISE = 1e-6


def smooth_load(
    clean_NE: Float32[Array, "N E"], noisy_NE: Float32[Array, "N E"], std_NE: Float32[Array, "N E"], k: int
) -> Float32[Array, "N E"]:
    """Compute the probability of expert i in the top k over its own noise alone (Shazeer et al. 2017, eq. 9).

    P(x, i) = Phi((clean_i - kth_excluding(noisy, k, i)) / std_i). One where k = E.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import route
      >>> clean_NE = jnp.array([[1.0, 1.0, -9.0]])
      >>> route.smooth_load(clean_NE, clean_NE, jnp.ones((1, 3)), k=1).round(2).tolist()
      [[0.5, 0.5, 0.0]]
    """
    e = clean_NE.shape[-1]
    if k == e:
        return jnp.ones_like(clean_NE)
    best, experts = jax.lax.top_k(noisy_NE, k + 1)
    # By index: a fused program may compute the noisy values twice, with different roundings.
    inside_NE = (experts[:, :k, None] == jnp.arange(e)[None, None]).any(axis=1)
    # The k-th largest of the others: the (k+1)-th of all for those that are inside, the k-th for those outside.
    threshold_NE = jnp.where(inside_NE, best[:, k : k + 1], best[:, k - 1 : k])
    return jax.scipy.stats.norm.cdf((clean_NE - threshold_NE) / std_NE)


def noisy_top_k(
    logits_NE: Float[Array, "N E"],
    noise_NE: Float[Array, "N E"],
    k: int,
    mask_N: Bool[Array, " N"] | None = None,
    *,
    key: Key[Array, ""] | None = None,
) -> Routing:
    """Route by noisy top-k gating, softmax(KeepTopK(logits + N(0, 1) softplus(noise))) (Shazeer et al. 2017, eq. 3-5).

    Args:
      logits_NE: clean logits, x W_g.
      noise_NE: x W_noise; its softplus is the standard deviation of the noise.
      k: choices; at 1 the weight is 1 and has no gradient.
      mask_N: False for padding.
      key: None switches the noise off, as in evaluation; the smooth load is then that of the clean logits.

    Returns:
      A routing with `load_NE` for `losses.load_loss`.

    Raises:
      ValueError: k is not in 1..E.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from moe import route
      >>> logits_NE = jnp.array([[4.0, 2.0, 0.0]])
      >>> route.noisy_top_k(logits_NE, 0 * logits_NE, k=2, key=jax.random.key(0)).load_NE.shape
      (1, 3)
    """
    logits_NE, mask_N = prepare(logits_NE, mask_N)
    check_k(k, logits_NE.shape[-1])
    std_NE = jnp.maximum(jax.nn.softplus(prepare(noise_NE, mask_N)[0]), SMALLEST_NOISE)
    noisy_NE = logits_NE
    if key is not None:
        noisy_NE = logits_NE + jax.random.normal(key, logits_NE.shape, jnp.float32) * std_NE
    chosen_NK, experts_NK = jax.lax.top_k(noisy_NE, k)
    load_NE = smooth_load(logits_NE, noisy_NE, std_NE, k)
    return make_routing(
        experts_NK,
        jax.nn.softmax(chosen_NK),
        jax.nn.softmax(noisy_NE),
        logits_NE,
        mask_N,
        load_NE=jnp.where(mask_N[:, None], load_NE, 0.0),
    )


def sparsemixer(
    logits_NE: Float[Array, "N E"],
    k: int,
    mask_N: Bool[Array, " N"] | None = None,
    *,
    epsilon: float = 0.01,
    key: Key[Array, ""] | None = None,
) -> Routing:
    """Route by SparseMixer-v2: k experts one after the other, each drawn, with Heun's gradient (Liu et al. 2024, GRIN).

    Each choice is among the experts not yet chosen whose logits are near the best of these: (best - logit) /
    max(|logit|, best) at most 2 epsilon. Its weight is the softmax over them. In training it is drawn by that softmax,
    and where it is not the most probable one the weight is a third in three of four cases, while the gradient is always
    that of the softmax (arXiv:2409.12136, section 2; transformers' Phi-MoE).

    Args:
      logits_NE: router logits.
      k: choices, 2 in Phi-3.5-MoE.
      mask_N: False for padding.
      epsilon: half the width of the band.
      key: None takes the most probable experts, as in evaluation.

    Raises:
      ValueError: k is not in 1..E.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import route
      >>> routing = route.sparsemixer(jnp.array([[4.0, 3.99, 1.0]]), k=2)
      >>> routing.experts_NK.tolist(), routing.weights_NK.round(2).tolist()
      ([[0, 1]], [[0.5, 1.0]])
    """
    logits_NE, mask_N = prepare(logits_NE, mask_N)
    e = logits_NE.shape[-1]
    check_k(k, e)
    left_NE = jnp.ones(logits_NE.shape, bool)
    found = []
    for i in range(k):
        values_NE = jax.lax.stop_gradient(jnp.where(left_NE, logits_NE, -jnp.inf))
        best_N1 = values_NE.max(axis=-1, keepdims=True)
        far_NE = (best_N1 - logits_NE) / jnp.maximum(jnp.abs(logits_NE), best_N1) > 2 * epsilon
        probs_NE = jax.nn.softmax(jnp.where(far_NE | ~left_NE, -jnp.inf, logits_NE))
        expert_N1 = probs_NE.argmax(axis=-1, keepdims=True)
        weight_N1 = take(probs_NE, expert_N1)
        if key is not None:
            draw, heun = jax.random.split(jax.random.fold_in(key, i))
            likely_N1, expert_N1 = expert_N1, jax.random.categorical(draw, jnp.log(probs_NE), axis=-1)[:, None]
            weight_N1 = take(probs_NE, expert_N1)
            whole_N1 = (expert_N1 == likely_N1) | jax.random.bernoulli(heun, 0.25, expert_N1.shape)
            weight_N1 += jax.lax.stop_gradient(jnp.where(whole_N1, 0.0, weight_N1 * (1 / 3 - 1)))
        found.append((expert_N1, weight_N1))
        left_NE &= expert_N1 != jnp.arange(e)[None]
    experts_NK, weights_NK = (jnp.concatenate(columns, axis=1) for columns in zip(*found, strict=True))
    return make_routing(experts_NK, weights_NK, jax.nn.softmax(logits_NE), logits_NE, mask_N)


def hierarchical(
    primary_NA: Float[Array, "N A"],
    secondary_NAB: Float[Array, "N A B"],
    k_primary: int,
    k_secondary: int,
    mask_N: Bool[Array, " N"] | None = None,
    *,
    noise_NA: Float[Array, "N A"] | None = None,
    noise_NAB: Float[Array, "N A B"] | None = None,
    key: Key[Array, ""] | None = None,
) -> Routing:
    """Route at two levels, k_primary of A groups, k_secondary of B experts in each (Shazeer et al. 2017, appendix B).

    Expert b of group a is number a B + b; its weight is the product of both gates (eq. 12). The sum of `load_NE` over
    tokens is the paper's Load_H (eq. 14), that of the weights its Importance_H (eq. 13).

    Args:
      primary_NA: logits of the groups.
      secondary_NAB: logits of the experts in every group.
      k_primary: groups per token.
      k_secondary: experts per chosen group; the routing has K = k_primary k_secondary.
      mask_N: False for padding.
      noise_NA: x W_noise of the groups, zeros if None.
      noise_NAB: x W_noise of the experts, zeros if None.
      key: None switches the noise off.

    Raises:
      ValueError: a number of choices out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import route
      >>> groups_NA, experts_NAB = jnp.array([[0.0, 1.0]]), jnp.array([[[9.0, 0.0], [0.0, 1.0]]])
      >>> route.hierarchical(groups_NA, experts_NAB, 1, 1).experts_NK.tolist()
      [[3]]
    """
    n, a, b = secondary_NAB.shape
    keys = (None, None) if key is None else jax.random.split(key)
    noise_NA = jnp.zeros_like(primary_NA) if noise_NA is None else noise_NA
    noise_NAB = jnp.zeros_like(secondary_NAB) if noise_NAB is None else noise_NAB
    primary = noisy_top_k(primary_NA, noise_NA, k_primary, mask_N, key=keys[0])

    flat = (n * a, b)
    mask_NA = jnp.repeat(primary.mask_N, a)
    secondary = noisy_top_k(secondary_NAB.reshape(flat), noise_NAB.reshape(flat), k_secondary, mask_NA, key=keys[1])
    group_NI = jnp.where(is_routed(primary), primary.experts_NK, 0)

    def chosen(x):  # [N A, ...] -> [N, I, ...]: the rows of the chosen groups
        x = x.reshape(n, a, *x.shape[1:])
        return jnp.take_along_axis(x, group_NI.reshape(n, -1, *(1,) * (x.ndim - 2)), axis=1)

    experts_NIJ = group_NI[:, :, None] * b + chosen(secondary.experts_NK)
    weights_NIJ = primary.weights_NK[:, :, None] * chosen(secondary.weights_NK)
    probs_NAB = primary.probs_NE[:, :, None] * secondary.probs_NE.reshape(n, a, b)
    logits_NAB = jax.nn.log_softmax(primary.logits_NE)[:, :, None] + secondary.logits_NE.reshape(n, a, b)
    routing = make_routing(
        experts_NIJ.reshape(n, -1),
        weights_NIJ.reshape(n, -1),
        probs_NAB.reshape(n, -1),
        logits_NAB.reshape(n, -1),
        primary.mask_N,
    )
    assert primary.load_NE is not None and secondary.load_NE is not None
    inside_NA = (primary.experts_NK[:, :, None] == jnp.arange(a)[None, None]).any(axis=1).astype(jnp.float32)
    share_NA = inside_NA / jnp.maximum(inside_NA.sum(axis=0, keepdims=True), 1.0)  # 1 / |X^(a)| on its tokens
    groups_A = primary.load_NE.sum(axis=0)
    load_NAB = groups_A[None, :, None] * share_NA[:, :, None] * secondary.load_NE.reshape(n, a, b)
    return replace(routing, load_NE=load_NAB.reshape(n, -1))
