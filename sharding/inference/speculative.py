"""Speculative decoding: a small model drafts, the large one checks, and the result is distributed as the large one's.

Leviathan et al. (2023), algorithm 1; Chen et al. (2023), algorithm 2. Both models' logits go through the same
penalties, temperature and thresholds, so that what is exact is the distribution a request asked for. Axes: N rows, T
drafted tokens, U = T + 1, V vocabulary, split over tp as in `sharding.inference.sample`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sharding.inference.sample import CANDIDATES, DRAWN, Settings, best, penalise, uniform, vocabulary_ids, warp
from sharding.inference.top_p import log_normaliser

AGAIN = 1 << 30  # added to a token's index: noise that the draft has not used
COIN = -1  # in place of a vocabulary id: the number that decides whether a drafted token stays


def distribution(
    logits_NV: Float[Array, "N V"], settings: Settings, tp: str | None = None, candidates: int = CANDIDATES
) -> Float[Array, "N V"]:
    """Log-probabilities that `sample.draw` draws from; all mass on the best token where the temperature is 0."""
    warped_NV = warp(logits_NV, settings, tp, candidates)
    warped_NV -= log_normaliser(warped_NV, tp)[:, None]
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
    """Which drafted tokens stay, and the token after them.

    Token t stays if all before it do and a uniform number is below p(x) / q(x). After the first that goes the next
    token is drawn from max(0, p - q), normalised; if all stay, from p.

    Args:
      target_NUV: logits of the large model after each prefix of the draft, the empty one too.
      draft_NTV: logits the drafted tokens were drawn from by `sample.sample` with the same settings.
      drafted_NT: the tokens.
      seen_NV: what the penalties look at, before the draft; see `sample.READ`.
      settings: `index` is that of the first drafted token.
      tp: mesh axis that splits the vocabulary.
      candidates: see `sharding.inference.sample`.

    Returns:
      The number of tokens that stay, 0..T, and the next token.
    """
    n, t = drafted_NT.shape
    ids_V = vocabulary_ids(seen_NV.shape[1], tp)
    drafted_NTV = drafted_NT[..., None] == ids_V[None, None]
    # Drafted tokens count as drawn for those after them.
    seen_NTV = seen_NV[:, None] + jnp.cumsum(DRAWN * drafted_NTV.astype(jnp.int32), axis=1)
    seen_NUV = jnp.concatenate([seen_NV[:, None], seen_NTV], axis=1)

    def over_time(logits_NXV: Array) -> Array:
        length, columns = logits_NXV.shape[1:]
        rows = Settings(*(jnp.repeat(x, length) for x in settings))
        flat = penalise(logits_NXV.reshape(-1, columns), seen_NUV[:, :length].reshape(-1, columns), rows)
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
        # Past the draft there is nothing to subtract.
        q_NUV = jnp.concatenate([q_NTV, jnp.full_like(p_NUV[:, :1], -jnp.inf)], axis=1)
        q_NV = jnp.take_along_axis(q_NUV, count_N[:, None, None], axis=1)[:, 0]
        rest_NV = jnp.maximum(jnp.exp(p_NV) - jnp.exp(q_NV), 0.0)
        # p and q equal to the last bit leave nothing, but then nothing is rejected either; rounding is caught anyway.
        total_N = rest_NV.sum(-1)
        total_N = total_N if tp is None else jax.lax.psum(total_N, tp)
        rest_NV = jnp.where(total_N[:, None] > 0, rest_NV, jnp.exp(p_NV))
        noise_NV = uniform(settings.seed, settings.index + count_N + AGAIN, ids_V)
        return count_N, best(jnp.log(rest_NV) - jnp.log(-jnp.log(noise_NV)), tp)
