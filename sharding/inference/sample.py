"""Vocab-parallel sampling: temperature, top-k, top-p (nucleus), min-p and penalties on logits split over tp.

Devices exchange their largest C logits (for the thresholds of top-k and top-p), the log-sum-exp and their best token;
where C are too few, sums per row. Noise is a function of (seed, number of the token, vocabulary id) alone, so a
request's tokens depend neither on the plan nor on other requests. Axes: see `sharding.inference`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sharding.inference.top_p import cutoff, log_normalizer

CANDIDATES = 128
"""Default C; a larger top-k, or a nucleus (top-p) of more tokens, is found by bisection."""
ALTERNATIVES = 20
"""Most probable tokens that `top_logprobs` gives."""
READ, DRAWN = 1, 2
"""Counts in `seen`: 1 for a token of the prompt, 2 for every draw."""


class Settings(NamedTuple):
    """Sampling settings of each row; arrays [N].

    Attributes:
      temperature: 0 is greedy decoding.
      top_k: 0 is off.
      top_p: nucleus sampling; 1 is off.
      min_p: 0 is off.
      penalty: repetition penalty (Keskar et al. 2019, section 4.1); 1 is off.
      presence, frequency: subtracted from a logit once, and per draw of its token; 0 is off.
      seed: of the row's noise.
      index: number of the token to be drawn, from 0.
      alternatives: whether `top_logprobs` are wanted; 0 is off.
      adapter: LoRA adapter that the logits are computed with, 0 is the base; None where the model has no adapters.

    Example:
      >>> from sharding.inference import greedy
      >>> settings = greedy(2)._replace(temperature=[0.7, 0.7])
      >>> settings.top_p.tolist()
      [1.0, 1.0]
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
    alternatives: Any
    adapter: Any = None


def greedy(rows: int) -> Settings:
    """Make the settings of greedy decoding.

    Example:
      >>> from sharding.inference import greedy
      >>> greedy(3).temperature.tolist()
      [0.0, 0.0, 0.0]
    """
    zeros, ones = jnp.zeros(rows, jnp.float32), jnp.ones(rows, jnp.float32)
    none = jnp.zeros(rows, jnp.int32)
    return Settings(zeros, none, ones, zeros, ones, zeros, zeros, none.astype(jnp.uint32), none, none)


def vocabulary_ids(columns: int, tp: str | None) -> Int[Array, " V"]:
    """Compute the vocabulary ids of this device's columns."""
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
    """Count tokens of some slots as `READ` (before any is drawn) or `DRAWN`, each on the device of its column."""
    columns = seen_BV.shape[1]
    column_NT = tokens_NT - (0 if tp is None else jax.lax.axis_index(tp) * columns)
    here_NT = ok_NT & (column_NT >= 0) & (column_NT < columns)
    place = seen_BV.at[slots_N[:, None], jnp.where(here_NT, column_NT, columns)]
    return place.set(what, mode="drop") if what == READ else place.add(what, mode="drop")


def penalize(logits_NV: Float[Array, "N V"], seen_NV: Int[Array, "N V"], settings: Settings) -> Float[Array, "N V"]:
    """Apply repetition, presence and frequency penalties.

    Positive logits of seen tokens are divided and negative ones multiplied by `penalty` (Keskar et al. 2019, section
    4.1); then `presence` is subtracted from the logits of drawn tokens, and `frequency` times the number of draws.
    """
    penalty_N1, presence_N1, frequency_N1 = (x[:, None] for x in settings[4:7])
    drawn_NV = (seen_NV // DRAWN).astype(jnp.float32)
    scaled_NV = jnp.where(logits_NV > 0, logits_NV / penalty_N1, logits_NV * penalty_N1)
    logits_NV = jnp.where(seen_NV > 0, scaled_NV, logits_NV)
    return logits_NV - frequency_N1 * drawn_NV - jnp.where(drawn_NV > 0, presence_N1, 0.0)


def largest(logits_NV: Float[Array, "N V"], count: int, tp: str | None) -> Float[Array, "N C"]:
    """Find the `count` largest logits of the full vocabulary, descending, merged over devices."""
    # The barrier: XLA makes a full sort of a top-k that only parts are used of.
    top_NC = jax.lax.optimization_barrier(jax.lax.top_k(logits_NV, min(count, logits_NV.shape[1]))[0])
    if tp is None:
        return top_NC
    every_NC = jax.lax.all_gather(top_NC, tp, axis=1, tiled=True)
    return jax.lax.top_k(every_NC, min(count, every_NC.shape[1]))[0]


def threshold(
    scaled_NV: Float[Array, "N V"], settings: Settings, tp: str | None, candidates: int
) -> Float[Array, " N"]:
    """Compute the smallest scaled logit allowed by top-k, top-p and min-p; -inf where all are off.

    Top-p keeps the smallest set of most probable tokens whose mass reaches p (Holtzman et al. 2020, section 3.1), among
    the ones of top-k; min-p the tokens of at least that share of the largest probability (Nguyen et al. 2024). Equal
    logits are treated alike. The thresholds are found among the largest C logits where these suffice.
    """
    top_NC = largest(scaled_NV, candidates, tp)
    c, total = top_NC.shape[1], scaled_NV.shape[1] * (1 if tp is None else jax.lax.axis_size(tp))
    k_N = jnp.minimum(settings.top_k, total)
    floor_N = jnp.take_along_axis(top_NC, jnp.clip(k_N - 1, 0, c - 1)[:, None], axis=1)[:, 0]
    if c < total:
        floor_N = cutoff(scaled_NV, jnp.ones_like(scaled_NV), k_N.astype(jnp.float32), floor_N, k_N > c, tp)
    floor_N = jnp.where(k_N > 0, floor_N, -jnp.inf)
    # Top-p is relative to the mass of top-k.
    total_N = log_normalizer(jnp.where(scaled_NV >= floor_N[:, None], scaled_NV, -jnp.inf), tp)
    mass_NC = jnp.where(top_NC >= floor_N[:, None], jnp.exp(top_NC - total_N[:, None]), 0.0)
    through_NC = jnp.cumsum(mass_NC, axis=1)
    inside_NC = (mass_NC > 0) & (through_NC - mass_NC < settings.top_p[:, None])
    limit_N = jnp.take_along_axis(top_NC, jnp.maximum(inside_NC.sum(1) - 1, 0)[:, None], axis=1)[:, 0]
    nucleus_N = settings.top_p < 1
    if c < total:
        mass_NV = jnp.exp(scaled_NV - total_N[:, None])
        short_N = nucleus_N & (through_NC[:, -1] < settings.top_p) & (top_NC[:, -1] > floor_N)
        limit_N = cutoff(scaled_NV, mass_NV, settings.top_p, limit_N, short_N, tp)
    limit_N = jnp.maximum(floor_N, jnp.where(nucleus_N, limit_N, -jnp.inf))
    return jnp.maximum(limit_N, top_NC[:, 0] + jnp.log(settings.min_p))


def warp(
    logits_NV: Float[Array, "N V"], settings: Settings, tp: str | None, candidates: int = CANDIDATES
) -> Float[Array, "N V"]:
    """Divide logits by the temperature and set them to -inf beyond top-k, top-p or min-p; not in greedy rows.

    The thresholds are computed only if some row has any.
    """
    warm_N = settings.temperature > 0
    scaled_NV = logits_NV / jnp.where(warm_N, settings.temperature, 1.0)[:, None]
    limited_N = warm_N & ((settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0))

    def limited() -> Array:
        limit_N = jnp.where(limited_N, threshold(scaled_NV, settings, tp, candidates), -jnp.inf)
        return jnp.where(scaled_NV >= limit_N[:, None], scaled_NV, -jnp.inf)

    # The devices of tp have the same settings and the same branch.
    return jax.lax.cond(limited_N.any(), limited, lambda: scaled_NV)


def uniform(seed_N: Array, index_N: Int[Array, " N"], ids_V: Int[Array, " V"]) -> Float[Array, "N V"]:
    """Draw uniform numbers in (0, 1), each a hash of (seed, index, id) alone.

    Threefry makes a key of every row; an id is mixed with its two words by MurmurHash3's finalizer, which costs a sixth
    of a Threefry per id.
    """

    def mix(x_NV: Array) -> Array:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x_NV = (x_NV ^ (x_NV >> shift)) * jnp.uint32(factor)
        return x_NV ^ (x_NV >> 16)

    keys_N = jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(seed_N, index_N)
    words_N2 = jax.random.key_data(keys_N)
    bits_NV = mix(mix(ids_V[None].astype(jnp.uint32) ^ words_N2[:, :1]) ^ words_N2[:, 1:])
    return ((bits_NV >> 9).astype(jnp.float32) + 0.5) * 2.0**-23


def best(scores_NV: Float[Array, "N V"], tp: str | None) -> Int[Array, " N"]:
    """Find the vocabulary id of the largest score (vocab-parallel argmax), the smallest id of equal ones."""
    local_N = scores_NV.argmax(-1)
    ids_N = vocabulary_ids(scores_NV.shape[1], tp)[local_N]
    if tp is None:
        return ids_N
    top_N = jnp.take_along_axis(scores_NV, local_N[:, None], axis=1)[:, 0]
    top_PN, ids_PN = jax.lax.all_gather(top_N, tp), jax.lax.all_gather(ids_N, tp)
    return jnp.take_along_axis(ids_PN, top_PN.argmax(0)[None], axis=0)[0]


def draw(warped_NV: Float[Array, "N V"], settings: Settings, tp: str | None) -> Int[Array, " N"]:
    """Draw one token a row from softmax(warped) by the Gumbel-max trick (Maddison et al. 2014); argmax in greedy rows.

    With the settings' top-p the token is that of the nucleus, see `redraw`. The noise is computed only if some row
    needs it.
    """
    cold_N = settings.temperature <= 0

    def noisy() -> Array:
        noise_NV = -jnp.log(-jnp.log(uniform(settings.seed, settings.index, vocabulary_ids(warped_NV.shape[1], tp))))
        return warped_NV + jnp.where(cold_N[:, None], 0.0, noise_NV)

    # No collectives inside the branches: devices of dp may have different ones.
    scores_NV = jax.lax.cond(cold_N.all(), lambda: warped_NV, noisy)
    tokens_N, top_p_N = best(scores_NV, tp), jnp.where(cold_N, 1.0, settings.top_p)
    # The devices of tp have the same settings and the same branch.
    again = lambda: redraw(tokens_N, scores_NV, warped_NV, top_p_N, tp)  # noqa: E731
    return jax.lax.cond((top_p_N < 1).any(), again, lambda: tokens_N)


def redraw(
    tokens_N: Int[Array, " N"],
    scores_NV: Float[Array, "N V"],
    logits_NV: Float[Array, "N V"],
    top_p_N: Float[Array, " N"],
    tp: str | None,
) -> Int[Array, " N"]:
    """Find the token of the nucleus with the best score, from the one with the best of all, without a threshold.

    A token is outside where the more probable ones alone have the mass p; the best of these is tried next. Every try is
    a pass over the vocabulary, and about 1 + ln(1 / p) are expected.
    """

    def all_sum(x_NV: Array) -> Array:
        return x_NV.sum(-1) if tp is None else jax.lax.psum(x_NV.sum(-1), tp)

    top_N = logits_NV.max(-1) if tp is None else jax.lax.pmax(logits_NV.max(-1), tp)
    share_NV = jax.lax.optimization_barrier(jnp.exp(logits_NV - top_N[:, None]))  # not once more in every pass
    mass_N = top_p_N * all_sum(share_NV)

    def outside(tokens_N: Array) -> tuple[Array, Array, Array]:
        if tp is None:
            logit_N = jnp.take_along_axis(logits_NV, tokens_N[:, None], axis=1)[:, 0]
        else:
            mine_NV = vocabulary_ids(logits_NV.shape[1], tp)[None] == tokens_N[:, None]
            logit_N = jax.lax.pmax(jnp.where(mine_NV, logits_NV, -jnp.inf).max(-1), tp)
        above_N = all_sum(jnp.where(logits_NV > logit_N[:, None], share_NV, 0.0))
        # The most probable token has nothing above it and is never outside, also where p of the mass is no float32.
        return tokens_N, logit_N, (top_p_N < 1) & (above_N > 0) & (above_N >= mass_N)

    def again(carry: tuple) -> tuple:
        _, logit_N, outside_N = carry
        open_NV = ~outside_N[:, None] | (logits_NV > logit_N[:, None])
        return outside(best(jnp.where(open_NV, scores_NV, -jnp.inf), tp))

    return jax.lax.while_loop(lambda carry: carry[2].any(), again, outside(tokens_N))[0]


def sample_tokens(
    logits_NV: Float[Array, "N V"],
    seen_NV: Int[Array, "N V"],
    settings: Settings,
    tp: str | None = None,
    candidates: int = CANDIDATES,
    bias_NV: Float[Array, "N V"] | None = None,
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """Sample the next token of every row, with its log-probability under the model (temperature 1, no thresholds).

    Args:
      logits_NV: float32, this device's columns.
      seen_NV: counts of previous tokens, see `READ`.
      settings: of each row.
      tp: mesh axis that splits the vocabulary.
      candidates: C, see `CANDIDATES`.
      bias_NV: added to the logits before anything else (logit bias); -inf forbids a token. The log-probability is
        that of the logits without it.

    Example:
      >>> import jax.numpy as jnp
      >>> from sharding.inference import greedy, sample_tokens
      >>> logits = jnp.log(jnp.array([[0.1, 0.2, 0.7]]))
      >>> token, logprob = sample_tokens(logits, jnp.zeros((1, 3), jnp.int32), greedy(1))
      >>> token.tolist(), round(float(jnp.exp(logprob[0])), 3)
      ([2], 0.7)
    """
    with jax.named_scope("sample"):
        biased_NV = logits_NV if bias_NV is None else logits_NV + bias_NV
        # Top-p is left to `draw`, but for rows whose min-p cuts off some of the mass that it is relative to.
        later_N = settings.min_p <= 0
        now, later = (settings._replace(top_p=jnp.where(x, 1.0, settings.top_p)) for x in (later_N, ~later_N))
        warped_NV = warp(penalize(biased_NV, seen_NV, settings), now, tp, candidates)
        tokens_N = draw(warped_NV, later, tp)
        return tokens_N, logprob(logits_NV, tokens_N, tp)


def top_logprobs(
    logits_NV: Float[Array, "N V"], settings: Settings, tp: str | None
) -> tuple[Int[Array, "N K"], Float[Array, "N K"]]:
    """Find the most probable tokens of every row under the model (temperature 1), with their log-probabilities.

    K is `ALTERNATIVES`, or the vocabulary's size where that is smaller; the smaller id comes first of equal ones. It is
    computed only if some row wants it, and zeros otherwise.
    """
    columns = logits_NV.shape[1]
    ids_V = vocabulary_ids(columns, tp)
    # Outside of the branch, where it is the one that `logprob` takes: equal tokens have equal numbers, bit for bit.
    z_N = jax.lax.optimization_barrier(log_normalizer(logits_NV, tp))

    def found() -> tuple[Array, Array]:
        top_NK, place_NK = jax.lax.top_k(logits_NV, min(ALTERNATIVES, columns))
        ids_NK = ids_V[place_NK]
        if tp is not None:  # devices are in the order of their columns
            top_NK, ids_NK = (jax.lax.all_gather(x, tp, axis=1, tiled=True) for x in (top_NK, ids_NK))
            top_NK, place_NK = jax.lax.top_k(top_NK, min(ALTERNATIVES, top_NK.shape[1]))
            ids_NK = jnp.take_along_axis(ids_NK, place_NK, axis=1)
        return ids_NK, top_NK - z_N[:, None]

    shape = jax.eval_shape(found)
    # The devices of tp have the same settings and the same branch.
    return jax.lax.cond(
        (settings.alternatives > 0).any(), found, lambda: tuple(jnp.zeros(x.shape, x.dtype) for x in shape)
    )


def logprob(logits_NV: Float[Array, "N V"], tokens_N: Int[Array, " N"], tp: str | None) -> Float[Array, " N"]:
    """Compute the log-probability of one token a row under the model (temperature 1)."""
    mine_NV = vocabulary_ids(logits_NV.shape[1], tp)[None] == tokens_N[:, None]
    logit_N = jnp.where(mine_NV, logits_NV, 0.0).sum(-1)
    logit_N = logit_N if tp is None else jax.lax.psum(logit_N, tp)
    return logit_N - jax.lax.optimization_barrier(log_normalizer(logits_NV, tp))
