"""Speculative decoding: a small model drafts tokens and the large one verifies them, exactly in distribution.

Leviathan et al. (2023), algorithm 1; Chen et al. (2023), algorithm 2. Both models' logits have the same penalties,
temperature and thresholds, so the result has exactly the requested distribution of the large model. Axes: N rows, T
drafted tokens, U = T + 1, V vocabulary, split over tp as in `sharding.inference.sample`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sharding.inference.sample import CANDIDATES, DRAWN, Settings, best, penalize, uniform, vocabulary_ids, warp
from sharding.inference.top_p import log_normalizer

AGAIN = 1 << 30  # added to a token's index: noise that the draft has not used
COIN = -1  # in place of a vocabulary id: the uniform number that accepts or rejects a drafted token


def distribution(
    logits_NV: Float[Array, "N V"], settings: Settings, tp: str | None = None, candidates: int = CANDIDATES
) -> Float[Array, "N V"]:
    """Compute the log-probabilities of `sample.draw`; all mass is on the best token where the temperature is 0."""
    warped_NV = warp(logits_NV, settings, tp, candidates)
    warped_NV -= log_normalizer(warped_NV, tp)[:, None]
    only_NV = vocabulary_ids(logits_NV.shape[1], tp)[None] == best(logits_NV, tp)[:, None]
    return jnp.where((settings.temperature <= 0)[:, None], jnp.where(only_NV, 0.0, -jnp.inf), warped_NV)


def accept(
    target_NUV: Float[Array, "N U V"],
    draft_NTV: Float[Array, "N T V"],
    drafted_NT: Int[Array, "N T"],
    seen_NV: Int[Array, "N V"],
    settings: Settings,
    tp: str | None = None,
    candidates: int = CANDIDATES,
) -> tuple[Int[Array, " N"], Int[Array, " N"]]:
    """Accept or reject drafted tokens, and sample the next token.

    Token t is accepted if all before it are and a uniform number is below p(x) / q(x). After the first rejection the
    next token is drawn from max(0, p - q), normalized; if all are accepted, from p.

    Args:
      target_NUV: logits of the large model after each prefix of the draft, the empty one too.
      draft_NTV: logits of the draft, whose tokens `sample.sample_tokens` drew with the same settings.
      drafted_NT: the tokens.
      seen_NV: counts for the penalties, before the draft; see `sample.READ`.
      settings: `index` is that of the first drafted token.
      tp: mesh axis that splits the vocabulary.
      candidates: see `sharding.inference.sample`.

    Returns:
      The number of accepted tokens, 0..T, and the next token.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sharding.inference import accept, greedy
      >>> likes = lambda *tokens: 9 * jax.nn.one_hot(jnp.array([tokens]), 4)  # logits of these tokens
      >>> target, draft = likes(1, 2, 3), likes(1, 0)  # the draft is wrong at the second token
      >>> count, following = accept(target, draft, jnp.array([[1, 0]]), jnp.zeros((1, 4), jnp.int32), greedy(1))
      >>> count.tolist(), following.tolist()
      ([1], [2])
    """
    n, t = drafted_NT.shape
    ids_V = vocabulary_ids(seen_NV.shape[1], tp)
    drafted_NTV = drafted_NT[..., None] == ids_V[None, None]
    # Drafted tokens count as drawn for those after them.
    seen_NTV = seen_NV[:, None] + jnp.cumsum(DRAWN * drafted_NTV.astype(jnp.int32), axis=1)
    seen_NUV = jnp.concatenate([seen_NV[:, None], seen_NTV], axis=1)

    def over_time(logits_NXV: Array) -> Array:
        length, columns = logits_NXV.shape[1:]
        rows = jax.tree.map(lambda x: jnp.repeat(x, length), settings)
        flat = penalize(logits_NXV.reshape(-1, columns), seen_NUV[:, :length].reshape(-1, columns), rows)
        return distribution(flat, rows, tp, candidates).reshape(logits_NXV.shape)

    def at(log_NTV: Array) -> Array:
        found_NT = jnp.where(drafted_NTV, log_NTV, -jnp.inf).max(-1)
        return found_NT if tp is None else jax.lax.pmax(found_NT, tp)

    with jax.named_scope("accept"):
        p_NUV, q_NTV = over_time(target_NUV), over_time(draft_NTV)
        coin = jnp.array([COIN], jnp.int32)
        coins_NT = jnp.stack([uniform(settings.seed, settings.index + i, coin)[:, 0] for i in range(t)], axis=1)
        stays_NT = jnp.log(coins_NT) < at(p_NUV[:, :t]) - at(q_NTV)
        count_N = jnp.cumprod(stays_NT.astype(jnp.int32), axis=1).sum(1)
        p_NV = jnp.take_along_axis(p_NUV, count_N[:, None, None], axis=1)[:, 0]
        # Past the draft nothing is subtracted.
        q_NUV = jnp.concatenate([q_NTV, jnp.full_like(p_NUV[:, :1], -jnp.inf)], axis=1)
        q_NV = jnp.take_along_axis(q_NUV, count_N[:, None, None], axis=1)[:, 0]
        rest_NV = jnp.maximum(jnp.exp(p_NV) - jnp.exp(q_NV), 0.0)
        # Equal p and q leave no mass, but then nothing is rejected either; this guards against rounding.
        total_N = rest_NV.sum(-1)
        total_N = total_N if tp is None else jax.lax.psum(total_N, tp)
        rest_NV = jnp.where(total_N[:, None] > 0, rest_NV, jnp.exp(p_NV))
        noise_NV = uniform(settings.seed, settings.index + count_N + AGAIN, ids_V)
        return count_N, best(jnp.log(rest_NV) - jnp.log(-jnp.log(noise_NV)), tp)
