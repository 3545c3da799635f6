"""Balanced assignment of tokens to experts on the device: BASE layers, by Bertsekas's auction, and Sinkhorn routing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from moe.routing import Routing, check_k, make_routing, prepare, take


def auction(
    values_NE: Float[Array, "N E"],
    capacity: int,
    mask_N: Bool[Array, " N"] | None = None,
    *,
    epsilon: float = 1e-3,
    rounds: int = 2000,
    places: Int[Array, ""] | None = None,
) -> Int32[Array, " N"]:
    """Solve the assignment of tokens to experts, at most `capacity` each, by an auction (Bertsekas & Castanon 1989).

    The auction with similar objects: every unassigned token bids for its best expert at current prices, the margin over
    its second best plus epsilon; an expert holds its `capacity` highest bids, and its price is the lowest of them once
    it is full. The sum of values is within N epsilon of the optimum. Tokens unassigned after `rounds` rounds fill the
    free places in order.

    Args:
      values_NE: value of every token to every expert.
      capacity: places per expert; E * capacity must be at least N.
      mask_N: False for padding, which has no place (its expert is E).
      epsilon: smallest raise of a bid: smaller is nearer the optimum and takes longer.
      rounds: bound on the rounds.
      places: places per expert known at run time only, at most `capacity`; for a batch with padding.

    Raises:
      ValueError: fewer places than tokens, or epsilon not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import route
      >>> route.auction(jnp.array([[2.0, 1.0], [2.0, 0.0], [1.0, 1.0], [3.0, 0.0]]), capacity=2).tolist()
      [1, 0, 1, 0]
    """
    values_NE, mask_N = prepare(values_NE, mask_N)
    n, e = values_NE.shape
    if e * capacity < n:
        raise ValueError(f"{e} experts with {capacity} places each cannot take {n} tokens")
    if epsilon <= 0:
        raise ValueError(f"epsilon={epsilon} must be positive, or equal bidders would never finish")
    held = min(capacity, n)
    places = jnp.int32(capacity) if places is None else places
    within_1C = jnp.arange(held)[None] < places
    hot_E = jnp.arange(e)[None]

    def auction_round(state):
        expert_N, bid_N, count = state
        held_NE = jnp.where(expert_N[:, None] == hot_E, bid_N[:, None], -jnp.inf)
        highest_EC = jax.lax.top_k(held_NE.T, held)[0]
        # -inf while there are free places
        lowest_E = jnp.take(highest_EC, places - 1, axis=1, mode="fill", fill_value=-jnp.inf)
        price_E = jnp.where(jnp.isfinite(lowest_E), lowest_E, 0.0)
        net_NE = values_NE - price_E[None]
        best_N = net_NE.argmax(axis=-1)
        first_N = net_NE.max(axis=-1)
        second_N = jnp.where(best_N[:, None] == hot_E, -jnp.inf, net_NE).max(axis=-1)
        raise_N = jnp.where(jnp.isfinite(second_N), first_N - second_N, 0.0) + epsilon
        bids_N = price_E[best_N] + raise_N
        free_N = (expert_N == e) & mask_N
        expert_N, bid_N = jnp.where(free_N, best_N, expert_N), jnp.where(free_N, bids_N, bid_N)
        # Outbid: not among the `held` highest of its expert. Ties go to the lower token, so ranks, not values, decide.
        held_NE = jnp.where(expert_N[:, None] == hot_E, bid_N[:, None], -jnp.inf)
        winners_EC = jax.lax.top_k(held_NE.T, held)[1]
        holds_EN = jnp.zeros((e, n), bool).at[jnp.arange(e)[:, None], winners_EC].set(within_1C)
        wins_N = (holds_EN.T & (expert_N[:, None] == hot_E)).any(axis=-1)
        return jnp.where(wins_N, expert_N, e), jnp.where(wins_N, bid_N, -jnp.inf), count + 1

    def unfinished(state):
        expert_N, _, count = state
        return ((expert_N == e) & mask_N).any() & (count < rounds)

    start = (jnp.full(n, e, jnp.int32), jnp.full(n, -jnp.inf), jnp.int32(0))
    expert_N, _, _ = jax.lax.while_loop(unfinished, lambda s: _typed(auction_round(s)), start)
    return _fill(expert_N, mask_N, e, places)


def _typed(state):
    """Cast the state to the dtypes of the loop's carry (argmax gives the platform's index type)."""
    expert_N, bid_N, count = state
    return expert_N.astype(jnp.int32), bid_N, count


def _fill(
    expert_N: Int32[Array, " N"], mask_N: Bool[Array, " N"], experts: int, places: Int[Array, ""]
) -> Int32[Array, " N"]:
    """Assign tokens without an expert to the free places, both in order."""
    free_N = (expert_N == experts) & mask_N
    places_E = places - (expert_N[:, None] == jnp.arange(experts)[None]).sum(axis=0)
    rank_N = jnp.cumsum(free_N) - 1
    filled_N = jnp.searchsorted(jnp.cumsum(places_E), rank_N, side="right")
    return jnp.where(free_N, filled_N, expert_N).astype(jnp.int32)


def base(
    logits_NE: Float[Array, "N E"],
    mask_N: Bool[Array, " N"] | None = None,
    *,
    train: bool = True,
    epsilon: float = 1e-3,
    rounds: int = 2000,
) -> Routing:
    """Route to one expert of ceil(N / E) tokens at most, weight sigmoid(logit) (BASE: Lewis et al. 2021, eq. 2, 4).

    N counts tokens without padding.

    Args:
      logits_NE: token-expert affinities.
      mask_N: False for padding.
      train: False chooses each token's best expert (section 3.1, "testing"), which is causal.
      epsilon: see `auction`.
      rounds: see `auction`.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import route
      >>> logits_NE = jnp.array([[2.0, 1.0], [2.0, 0.0], [1.0, 1.0], [3.0, 0.0]])
      >>> sorted(route.base(logits_NE).experts_NK.ravel().tolist())
      [0, 0, 1, 1]
    """
    logits_NE, mask_N = prepare(logits_NE, mask_N)
    n, e = logits_NE.shape
    if train:
        values_NE: Float32[Array, "N E"] = jax.lax.stop_gradient(logits_NE)
        places = -(-mask_N.sum(dtype=jnp.int32) // e)
        expert_N = auction(values_NE, -(-n // e), mask_N, epsilon=epsilon, rounds=rounds, places=places)
    else:
        expert_N = logits_NE.argmax(axis=-1)
    expert_N1 = jnp.minimum(expert_N, e - 1)[:, None]  # padding has expert E here, and from make_routing again
    weights_N1 = jax.nn.sigmoid(take(logits_NE, expert_N1))
    return make_routing(expert_N1, weights_N1, jax.nn.softmax(logits_NE), logits_NE, mask_N, causal=not train)


def balance(
    logits_NE: Float[Array, "N E"],
    mask_N: Bool[Array, " N"] | None = None,
    *,
    tolerance: float = 1e-3,
    rounds: int = 100,
) -> Float32[Array, "N E"]:
    """Scale exp(logits) by rows and columns until tokens sum to 1 and experts to N / E (Sinkhorn & Knopp 1967).

    Args:
      logits_NE: router logits.
      mask_N: False for padding, whose rows are zeros and which N does not count.
      tolerance: stops when no expert's sum is further from N / E, as a share of it.
      rounds: bound on the iterations.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import route
      >>> route.balance(jnp.log(jnp.array([[1.0, 1.0], [3.0, 1.0]])), tolerance=1e-6).sum(axis=0).round(3).tolist()
      [1.0, 1.0]
    """
    logits_NE, mask_N = prepare(logits_NE, mask_N)
    share = mask_N.sum() / logits_NE.shape[1]

    def rows(columns_E):
        return jnp.where(mask_N[:, None], jax.nn.softmax(logits_NE + columns_E[None]), 0.0)

    def unbalanced(state):
        _, sums_E, count = state
        return (jnp.abs(sums_E - share).max() > tolerance * share) & (count < rounds)

    def sinkhorn_round(state):
        columns_E, sums_E, count = state
        columns_E += jnp.log(share) - jnp.log(jnp.maximum(sums_E, 1e-30))
        return columns_E, rows(columns_E).sum(axis=0), count + 1

    start_E = jnp.zeros(logits_NE.shape[1])
    return rows(jax.lax.while_loop(unbalanced, sinkhorn_round, (start_E, rows(start_E).sum(axis=0), 0))[0])


def sinkhorn(
    logits_NE: Float[Array, "N E"],
    k: int,
    mask_N: Bool[Array, " N"] | None = None,
    *,
    train: bool = True,
    tolerance: float = 1e-3,
    rounds: int = 100,
) -> Routing:
    """Route by the k largest entries of the balanced matrix (S-BASE: Clark et al. 2022, section 3.2.1; Megatron-LM).

    Weights are the softmax probabilities of the logits, for k = 1 the sigmoid, as in Megatron-LM. The load is near
    balance without an auxiliary loss, and not exactly balanced, as entries are fractions.

    Args:
      logits_NE: router logits.
      k: choices.
      mask_N: False for padding.
      train: False chooses by the logits themselves, which is causal.
      tolerance, rounds: see `balance`.

    Raises:
      ValueError: k is not in 1..E.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import route
      >>> logits_NE = jnp.array([[2.0, 1.0], [2.0, 0.0], [1.0, 1.0], [3.0, 0.0]])
      >>> [route.sinkhorn(logits_NE, 1, train=train).experts_NK.ravel().tolist() for train in (True, False)]
      [[1, 0, 1, 0], [0, 0, 0, 0]]
    """
    logits_NE, mask_N = prepare(logits_NE, mask_N)
    check_k(k, logits_NE.shape[-1])
    select_NE = jax.lax.stop_gradient(logits_NE)
    if train:
        select_NE = balance(select_NE, mask_N, tolerance=tolerance, rounds=rounds)
    experts_NK = jax.lax.top_k(select_NE, k)[1]
    probs_NE = jax.nn.softmax(logits_NE)
    weights_NK = take(jax.nn.sigmoid(logits_NE) if k == 1 else probs_NE, experts_NK)
    return make_routing(experts_NK, weights_NK, probs_NE, logits_NE, mask_N, causal=not train)
