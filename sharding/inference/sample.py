"""The next token from logits whose vocabulary is split over tp, without gathering them.

What crosses devices: the largest C logits of each device (to find the thresholds of top-k and top-p), the log-sum-exp,
and the best token of each; where C are too few, sums per row. Noise is a function of (seed, number of the token,
vocabulary id) alone, so a request's tokens depend neither on the plan nor on what else is decoded. Axes: see
`sharding.inference`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sharding.inference.top_p import cutoff, log_normaliser

CANDIDATES = 128
"""Default C; a larger top-k, or a nucleus (top-p) of more tokens, is found by bisection."""
READ, DRAWN = 1, 2
"""What `seen` counts: 1 for a token of the prompt, 2 for every time it was drawn."""


class Settings(NamedTuple):
    """How each row samples; arrays [N].

    temperature: 0 takes the most probable token. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off. penalty: of tokens
    seen before (Keskar et al. 2019, section 4.1), 1 is off. presence, frequency: taken off a logit once, and for every
    time, that its token was drawn; 0 is off. seed: of the row's noise. index: number of the token to be drawn, from 0.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    penalty: Any
    presence: Any
    frequency: Any
    seed: Any
    index: Any


def greedy(rows: int) -> Settings:
    """Settings that take the most probable token."""
    zeros, ones = jnp.zeros(rows, jnp.float32), jnp.ones(rows, jnp.float32)
    whole = jnp.zeros(rows, jnp.int32)
    return Settings(zeros, whole, ones, zeros, ones, zeros, zeros, whole.astype(jnp.uint32), whole)


def vocabulary_ids(columns: int, tp: str | None) -> Int[Array, " V"]:
    """Vocabulary ids of this device's columns."""
    first = 0 if tp is None else jax.lax.axis_index(tp) * columns
    return (first + jnp.arange(columns)).astype(jnp.int32)


def mark_seen(
    seen_BV: Int[Array, "B V"],
    slots_N: Int[Array, " N"],
    tokens_NT: Int[Array, "N T"],
    ok_NT: Bool[Array, "N T"],
    tp: str | None,
    what: int,
) -> Int[Array, "B V"]:
    """Note tokens of some slots as `READ` (before any is drawn) or `DRAWN`, each on the device that has its column."""
    columns = seen_BV.shape[1]
    column_NT = tokens_NT - (0 if tp is None else jax.lax.axis_index(tp) * columns)
    here_NT = ok_NT & (column_NT >= 0) & (column_NT < columns)
    place = seen_BV.at[slots_N[:, None], jnp.where(here_NT, column_NT, columns)]
    return place.set(what, mode="drop") if what == READ else place.add(what, mode="drop")


def penalise(logits_NV: Float[Array, "N V"], seen_NV: Int[Array, "N V"], settings: Settings) -> Float[Array, "N V"]:
    """Push down what was seen before.

    Positive logits of seen tokens are divided and negative ones multiplied by `penalty` (Keskar et al. 2019, section
    4.1); then `presence` is taken off the logits of drawn tokens, and `frequency` times the number of draws.
    """
    penalty_N1, presence_N1, frequency_N1 = (x[:, None] for x in settings[4:7])
    drawn_NV = (seen_NV // DRAWN).astype(jnp.float32)
    scaled_NV = jnp.where(logits_NV > 0, logits_NV / penalty_N1, logits_NV * penalty_N1)
    logits_NV = jnp.where(seen_NV > 0, scaled_NV, logits_NV)
    return logits_NV - frequency_N1 * drawn_NV - jnp.where(drawn_NV > 0, presence_N1, 0.0)


def largest(logits_NV: Float[Array, "N V"], count: int, tp: str | None) -> Float[Array, "N C"]:
    """The `count` largest logits of the whole vocabulary, descending: each device's own, merged."""
    top_NC = jax.lax.top_k(logits_NV, min(count, logits_NV.shape[1]))[0]
    if tp is None:
        return top_NC
    every_NC = jax.lax.all_gather(top_NC, tp, axis=1, tiled=True)
    return jax.lax.top_k(every_NC, min(count, every_NC.shape[1]))[0]


def threshold(
    scaled_NV: Float[Array, "N V"], settings: Settings, tp: str | None, candidates: int
) -> Float[Array, " N"]:
    """Smallest scaled logit that may be drawn, after top-k, top-p and min-p; -inf where all are off.

    Top-p keeps the smallest set of most probable tokens whose mass reaches p (Holtzman et al. 2020, section 3.1), among
    those top-k left; min-p those of at least that share of the largest probability (Nguyen et al. 2024). Equal logits
    stay or go together. The thresholds are read off the largest C logits where these suffice.
    """
    top_NC = largest(scaled_NV, candidates, tp)
    c, whole = top_NC.shape[1], scaled_NV.shape[1] * (1 if tp is None else jax.lax.axis_size(tp))
    k_N = jnp.minimum(settings.top_k, whole)
    floor_N = jnp.take_along_axis(top_NC, jnp.clip(k_N - 1, 0, c - 1)[:, None], axis=1)[:, 0]
    if c < whole:
        floor_N = cutoff(scaled_NV, jnp.ones_like(scaled_NV), k_N.astype(jnp.float32), floor_N, k_N > c, tp)
    floor_N = jnp.where(k_N > 0, floor_N, -jnp.inf)
    # What top-p measures against: the mass top-k left.
    total_N = log_normaliser(jnp.where(scaled_NV >= floor_N[:, None], scaled_NV, -jnp.inf), tp)
    mass_NC = jnp.where(top_NC >= floor_N[:, None], jnp.exp(top_NC - total_N[:, None]), 0.0)
    through_NC = jnp.cumsum(mass_NC, axis=1)
    inside_NC = (mass_NC > 0) & (through_NC - mass_NC < settings.top_p[:, None])
    limit_N = jnp.take_along_axis(top_NC, jnp.maximum(inside_NC.sum(1) - 1, 0)[:, None], axis=1)[:, 0]
    nucleus_N = settings.top_p < 1
    if c < whole:
        mass_NV = jnp.exp(scaled_NV - total_N[:, None])
        short_N = nucleus_N & (through_NC[:, -1] < settings.top_p) & (top_NC[:, -1] > floor_N)
        limit_N = cutoff(scaled_NV, mass_NV, settings.top_p, limit_N, short_N, tp)
    limit_N = jnp.maximum(floor_N, jnp.where(nucleus_N, limit_N, -jnp.inf))
    return jnp.maximum(limit_N, top_NC[:, 0] + jnp.log(settings.min_p))


def warp(
    logits_NV: Float[Array, "N V"], settings: Settings, tp: str | None, candidates: int = CANDIDATES
) -> Float[Array, "N V"]:
    """Logits over temperature, -inf where top-k, top-p or min-p forbid; rows of temperature 0 stay as they are.

    The thresholds are looked for only if some row has any.
    """
    warm_N = settings.temperature > 0
    scaled_NV = logits_NV / jnp.where(warm_N, settings.temperature, 1.0)[:, None]
    limited_N = warm_N & ((settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0))

    def limited() -> Array:
        limit_N = jnp.where(limited_N, threshold(scaled_NV, settings, tp, candidates), -jnp.inf)
        return jnp.where(scaled_NV >= limit_N[:, None], scaled_NV, -jnp.inf)

    # The devices of tp hold the same settings and take the same branch.
    return jax.lax.cond(limited_N.any(), limited, lambda: scaled_NV)


def uniform(seed_N: Array, index_N: Int[Array, " N"], ids_V: Int[Array, " V"]) -> Float[Array, "N V"]:
    """Numbers in (0, 1), each a hash of (seed, index, id) and of nothing else."""

    def one(seed: Array, index: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), index)
        words_V2 = jax.vmap(lambda word: jax.random.key_data(jax.random.fold_in(key, word)))(ids_V)
        return ((words_V2[:, 0] >> 9).astype(jnp.float32) + 0.5) * 2.0**-23

    return jax.vmap(one)(seed_N, index_N)


def best(scores_NV: Float[Array, "N V"], tp: str | None) -> Int[Array, " N"]:
    """Vocabulary id of the largest score, the smallest id of equal ones."""
    local_N = scores_NV.argmax(-1)
    ids_N = vocabulary_ids(scores_NV.shape[1], tp)[local_N]
    if tp is None:
        return ids_N
    top_N = jnp.take_along_axis(scores_NV, local_N[:, None], axis=1)[:, 0]
    top_PN, ids_PN = jax.lax.all_gather(top_N, tp), jax.lax.all_gather(ids_N, tp)
    return jnp.take_along_axis(ids_PN, top_PN.argmax(0)[None], axis=0)[0]


def draw(warped_NV: Float[Array, "N V"], settings: Settings, tp: str | None) -> Int[Array, " N"]:
    """One token a row from softmax(warped), by Gumbel-max (Maddison et al. 2014); rows of temperature 0: the best.

    The noise is computed only if some row asks for it.
    """
    cold_N = settings.temperature <= 0

    def noisy() -> Array:
        noise_NV = -jnp.log(-jnp.log(uniform(settings.seed, settings.index, vocabulary_ids(warped_NV.shape[1], tp))))
        return warped_NV + jnp.where(cold_N[:, None], 0.0, noise_NV)

    # Nothing crosses devices inside the branches: devices of dp may take different ones.
    return best(jax.lax.cond(cold_N.all(), lambda: warped_NV, noisy), tp)


def sample(
    logits_NV: Float[Array, "N V"],
    seen_NV: Int[Array, "N V"],
    settings: Settings,
    tp: str | None = None,
    candidates: int = CANDIDATES,
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """Next token of every row and its log-probability under the model itself (temperature 1, nothing forbidden).

    Args:
      logits_NV: float32, this device's columns.
      seen_NV: how often each token was seen, see `READ`.
      settings: of each row.
      tp: mesh axis that splits the vocabulary.
      candidates: C, see `CANDIDATES`.
    """
    with jax.named_scope("sample"):
        warped_NV = warp(penalise(logits_NV, seen_NV, settings), settings, tp, candidates)
        tokens_N = draw(warped_NV, settings, tp)
        return tokens_N, logprob(logits_NV, tokens_N, tp)


def logprob(logits_NV: Float[Array, "N V"], tokens_N: Int[Array, " N"], tp: str | None) -> Float[Array, " N"]:
    """Log-probability of one token a row under the model itself."""
    mine_NV = vocabulary_ids(logits_NV.shape[1], tp)[None] == tokens_N[:, None]
    logit_N = jnp.where(mine_NV, logits_NV, 0.0).sum(-1)
    logit_N = logit_N if tp is None else jax.lax.psum(logit_N, tp)
    return logit_N - log_normaliser(logits_NV, tp)
