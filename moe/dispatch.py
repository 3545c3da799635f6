"""Token dispatch to experts and the weighted combine: dropless (sort by expert), with a capacity, dense, and Soft MoE.

Axes: N tokens, D width, E experts, K choices of a token, A = N K choices, numbered n K + k, R rows (routed choices, at
most `Routing.rows`) sorted by expert, C places of an expert, G groups, P slots. An expert function maps rows sorted by
expert, and their numbers per expert, to rows; rows past the sum of the sizes are zeros and must stay zeros.

Example:
  >>> import jax.numpy as jnp
  >>> from moe import dispatch, route
  >>> routing = route.top_k(jnp.array([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]), k=1)
  >>> dispatch.plan(routing).tokens_R.tolist()
  [1, 0, 2]
  >>> dispatch.dropless(jnp.eye(3), routing, lambda rows_RD, sizes_E: 2 * rows_RD).tolist()
  [[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]]
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from moe.kernels import checks
from moe.routing import Routing, is_routed, mask_rows, register, take

ExpertFn = Callable[[Array, Array], Array]
"""(rows_RD sorted by expert, sizes_E int32) -> rows [R, D']."""


@dataclass(frozen=True)
class Plan:
    """Permutation of the choices into expert order and its inverse, with the group sizes; sorted once for all products.

    Attributes:
      order_R: choice (n K + k) of every row, by expert, within an expert by token; rows past the sum of the sizes hold
        choices that are not routed.
      tokens_R: its token.
      inverse_NK: row of every choice; R for a choice that is not routed.
      sizes_E: rows of every expert.
    """

    order_R: Int32[Array, " R"]
    tokens_R: Int32[Array, " R"]
    inverse_NK: Int32[Array, "N K"]
    sizes_E: Int32[Array, " E"]

    @property
    def offsets_E(self) -> Int32[Array, " E"]:
        """First row of every expert."""
        return jnp.cumsum(self.sizes_E) - self.sizes_E


register(Plan)


def plan(routing: Routing) -> Plan:
    """Sort the choices of a routing by expert (stable)."""
    return plan_rows(routing.experts_NK, routing.num_experts, routing.rows)


def plan_rows(experts_NK: Int[Array, "N K"], num_experts: int, rows: Any) -> Plan:
    """Sort expert ids, as `plan` does; ids outside 0..E-1 (padding, experts of other devices) are not routed.

    Args:
      experts_NK: expert ids.
      num_experts: E.
      rows: upper bound of the ids in range.

    Raises:
      ValueError: symbolic dimensions (`jax.export`), which only dispatch "dense" has.
    """
    checks.fixed(experts=experts_NK)
    n, k = experts_NK.shape
    a, e = n * k, num_experts
    experts_A = experts_NK.reshape(a).astype(jnp.int32)
    experts_A = jnp.where((experts_A >= 0) & (experts_A < e), experts_A, e)
    hot_AE = experts_A[:, None] == jnp.arange(e, dtype=jnp.int32)[None]
    sizes_E = hot_AE.sum(axis=0, dtype=jnp.int32)
    if a * (e + 1) < 2**31:
        # One array to sort instead of pairs: the key holds the choice in its low digits.
        order_A = jnp.sort(experts_A * a + jnp.arange(a, dtype=jnp.int32)) % a
    else:
        order_A = jnp.argsort(experts_A, stable=True).astype(jnp.int32)
    # Scatter of distinct indices: the inverse permutation.
    inverse_A = jnp.zeros(a, jnp.int32).at[order_A].set(jnp.arange(a, dtype=jnp.int32), unique_indices=True)
    inverse_A = jnp.where(experts_A == e, rows, inverse_A)
    order_R = order_A[:rows]
    return Plan(order_R, order_R // k, inverse_A.reshape(n, k), sizes_E)


def _live(plan: Plan) -> Bool[Array, " R"]:
    return jnp.arange(plan.order_R.shape[0]) < plan.sizes_E.sum()


def _rows_of_choices(y_RD: Float[Array, "R D"], plan: Plan) -> Float[Array, "N K D"]:
    """Gather the row of every choice, zeros where it is not routed."""
    return jnp.take(y_RD, plan.inverse_NK, axis=0, mode="fill", fill_value=0)


def _sum_of_choices(y_RD: Float[Array, "R D"], plan: Plan) -> Float[Array, "N D"]:
    """Sum the rows of every token; y's padding rows must be zeros."""
    n, k = plan.inverse_NK.shape
    if plan.order_R.shape[0] < n * k:  # expert choice: few of the N K rows exist, so adding them is cheaper
        return jnp.zeros((n, y_RD.shape[1]), y_RD.dtype).at[plan.tokens_R].add(y_RD)
    return _rows_of_choices(y_RD, plan).sum(axis=1)


@jax.custom_vjp
def gather(x_ND: Float[Array, "N D"], plan: Plan) -> Float[Array, "R D"]:
    """Permute tokens into expert order, zeros past the sum of the sizes; the backward pass is a gather as well."""
    return jnp.where(_live(plan)[:, None], x_ND[plan.tokens_R], 0)


def _gather_fwd(x_ND, plan):
    return gather(x_ND, plan), plan


def _gather_bwd(plan, dy_RD):
    return _sum_of_choices(jnp.where(_live(plan)[:, None], dy_RD, 0), plan), None


gather.defvjp(_gather_fwd, _gather_bwd)


@jax.custom_vjp
def combine(y_RD: Float[Array, "R D"], weights_NK: Float[Array, "N K"], plan: Plan) -> Float[Array, "N D"]:
    """Sum a token's rows times their gate weights, in y's dtype with float32 products; the inverse of `gather`."""
    n, k = plan.inverse_NK.shape
    if plan.order_R.shape[0] < n * k:
        w_R = jnp.where(_live(plan), weights_NK.reshape(-1)[plan.order_R], 0)
        return _sum_of_choices((y_RD * w_R[:, None]).astype(y_RD.dtype), plan)
    rows_NKD = _rows_of_choices(y_RD, plan)
    return jnp.einsum("nkd,nk->nd", rows_NKD, weights_NK, preferred_element_type=jnp.float32).astype(y_RD.dtype)


def _combine_fwd(y_RD, weights_NK, plan):
    return combine(y_RD, weights_NK, plan), (y_RD, weights_NK, plan)


def _combine_bwd(saved, dout_ND):
    y_RD, weights_NK, plan = saved
    dout_RD = jnp.where(_live(plan)[:, None], dout_ND[plan.tokens_R], 0)
    w_R = weights_NK.reshape(-1)[plan.order_R]
    dy_RD = (dout_RD * w_R[:, None]).astype(y_RD.dtype)
    # The row's inner product first, then its permutation to the choice: D numbers a row are read once.
    dw_R = jnp.einsum("rd,rd->r", y_RD, dout_RD, preferred_element_type=jnp.float32)
    dw_NK = jnp.take(dw_R, plan.inverse_NK, mode="fill", fill_value=0)
    return dy_RD, dw_NK.astype(weights_NK.dtype), None


combine.defvjp(_combine_fwd, _combine_bwd)


def dropless(x_ND: Float[Array, "N D"], routing: Routing, experts: ExpertFn) -> Float[Array, "N F"]:
    """Dispatch without dropping (dropless MoE, MegaBlocks): sort, run ragged groups, combine (Gale et al. 2022).

    Args:
      x_ND: tokens.
      routing: of these tokens.
      experts: (rows sorted by expert, sizes) -> rows.
    """
    by_expert = plan(routing)
    return combine(experts(gather(x_ND, by_expert), by_expert.sizes_E), routing.weights_NK, by_expert)


def dense(x_ND: Float[Array, "N D"], routing: Routing, experts: Callable[[Array, int], Array]) -> Float[Array, "N F"]:
    """Run every expert on every token and weight the outputs: the reference of the tests, for tiny shapes.

    Args:
      x_ND: tokens.
      routing: of these tokens.
      experts: (x_ND, e) -> output of expert e (a Python int) on every token.
    """
    x_ND = mask_rows(x_ND, routing.mask_N)
    total: Array | None = None
    for e in range(routing.num_experts):
        weight_N = jnp.where(routing.experts_NK == e, routing.weights_NK, 0).sum(axis=1)
        out = experts(x_ND, e)
        out = out * weight_N[:, None].astype(out.dtype)
        total = out if total is None else total + out
    assert total is not None
    return mask_rows(total, routing.mask_N)


def soft(x_ND: Float[Array, "N D"], routing: Routing, experts: ExpertFn) -> Float[Array, "N F"]:
    """Dispatch by Soft MoE: slots are mixtures of tokens, outputs of slots (Puigcerver et al. 2023, section 2.1).

    Args:
      x_ND: tokens.
      routing: from `route.soft`.
      experts: as in `dropless`; every expert gets P rows.

    Raises:
      ValueError: the routing has no slots.
    """
    if routing.slots is None:
        raise ValueError("dispatch.soft needs Routing.slots, which only route.soft gives")
    _, e, p = routing.slots.dispatch_NEP.shape
    mix = {"preferred_element_type": jnp.float32}
    x_ND = mask_rows(x_ND, routing.mask_N)
    slots_EPD = jnp.einsum("nep,nd->epd", routing.slots.dispatch_NEP, x_ND, **mix).astype(x_ND.dtype)
    y_RD = experts(slots_EPD.reshape(e * p, -1), jnp.full(e, p, jnp.int32))
    y_EPD = y_RD.reshape(e, p, -1)
    y_ND = jnp.einsum("nep,epd->nd", routing.slots.combine_NEP, y_EPD, **mix).astype(y_RD.dtype)
    return mask_rows(y_ND, routing.mask_N)


def places(
    routing: Routing, capacity: int, drop: Literal["position", "probability"] = "position", groups: int = 1
) -> tuple[Int32[Array, "N K"], Bool[Array, "N K"]]:
    """Number every choice's place in its expert's buffer, and compare it with the expert capacity.

    All first choices come before all second ones. Among them "position" orders tokens as they come (Lepikhin et al.
    2020, algorithm 1; causal) and "probability" by the router's largest probability for one of their experts, before
    any normalization of the weights (batch-prioritized routing: Riquelme et al. 2021, section 4.1; it looks ahead).

    Args:
      routing: any routing.
      capacity: places of an expert in every group.
      drop: the order.
      groups: consecutive tokens that compete for places (a device's, a sequence's).

    Returns:
      Place [N, K], and whether the choice is routed and its place is below the capacity [N, K].

    Raises:
      ValueError: capacity below 1, or tokens that do not divide into the groups.
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity} places per expert: at least 1 is needed")
    n, k = routing.experts_NK.shape
    if groups < 1 or n % groups:
        raise ValueError(f"{n} tokens do not divide into {groups} groups")
    if groups > 1:
        cut = jax.tree.map(lambda leaf: leaf.reshape(groups, n // groups, *leaf.shape[1:]), routing)
        place_GMK, placed_GMK = jax.vmap(partial(places, capacity=capacity, drop=drop))(cut)
        return place_GMK.reshape(n, k), placed_GMK.reshape(n, k)
    place_NK = number(routing, routing.experts_NK, routing.num_experts, drop)
    return place_NK, is_routed(routing) & (place_NK < capacity)


def number(
    routing: Routing, queues_NK: Int[Array, "N K"], queues: int, drop: Literal["position", "probability"] = "position"
) -> Int32[Array, "N K"]:
    """Number the choices of every queue in the order of `places`.

    Args:
      routing: any routing.
      queues_NK: queue of every choice, an expert for instance or a device; those outside 0..queues-1 have no number.
      queues: how many there are.
      drop: the order.
    """
    (n, k), e = queues_NK.shape, routing.num_experts
    serve_N = jnp.arange(n)
    if drop == "probability":
        probs_NK = take(jax.lax.stop_gradient(routing.probs_NE), jnp.minimum(routing.experts_NK, e - 1))
        serve_N = jnp.argsort(-jnp.where(is_routed(routing), probs_NK, 0.0).max(axis=1), stable=True)
    queue_A = queues_NK[serve_N].T.reshape(-1)  # choice-major: k n_tokens + rank
    hot_AQ = (queue_A[:, None] == jnp.arange(queues)[None]).astype(jnp.int32)
    place_A = ((jnp.cumsum(hot_AQ, axis=0) - 1) * hot_AQ).sum(axis=1)
    return jnp.zeros((n, k), jnp.int32).at[serve_N].set(place_A.reshape(k, n).T, unique_indices=True)


def capacity_of(tokens: Any, routing: Routing, factor: float, multiple: int = 1) -> int:
    """Compute the expert capacity, ceil(factor * choices / experts), rounded up (Fedus et al. 2021, eq. 3).

    Args:
      tokens: tokens in a group.
      routing: for its K and E.
      factor: 1 is exactly enough for perfect balance.
      multiple: of which the result is a multiple (a tile).
    """
    checks.fixed(logits=routing.logits_NE)
    wanted = -(-int(factor * tokens * routing.k + 0.999999) // routing.num_experts)
    return max(1, -(-wanted // multiple)) * multiple


def capacity(
    x_ND: Float[Array, "N D"],
    routing: Routing,
    experts: ExpertFn,
    places_per_expert: int,
    *,
    groups: int = 1,
    drop: Literal["position", "probability"] = "position",
    movement: Literal["gather", "einsum"] = "gather",
) -> tuple[Float[Array, "N F"], Bool[Array, "N K"]]:
    """Dispatch with an expert capacity: choices beyond it are dropped (GShard: Lepikhin et al. 2020).

    Args:
      x_ND: tokens.
      routing: of these tokens.
      experts: as in `dropless`; every expert gets groups * places_per_expert rows, zeros in empty places.
      places_per_expert: C, see `capacity_of`.
      groups: consecutive tokens that compete for places (a device's, a sequence's).
      drop: priority of the choices, see `places`.
      movement: "gather" moves rows by index; "einsum" multiplies by one-hot tensors [N, E, C] (Lepikhin et al.
        2020, algorithm 2), which parallelizes by sharding constraints alone.

    Returns:
      Outputs (dropped choices add zeros), and True for every choice within the capacity.

    Raises:
      ValueError: the tokens do not divide into the groups, or places_per_expert below 1.
    """
    n, d = x_ND.shape
    e, c, k = routing.num_experts, places_per_expert, routing.k
    place_NK, placed_NK = places(routing, c, drop, groups)
    x_GMD = mask_rows(x_ND, routing.mask_N).reshape(groups, -1, d)
    to, back = (_to_places, _from_places) if movement == "gather" else (_to_places_hot, _from_places_hot)
    index_NK = jnp.where(placed_NK, routing.experts_NK * c + place_NK, e * c)  # e c: out of range
    index_GMK = index_NK.reshape(groups, -1, k)
    buffers_GSD = jax.vmap(lambda x, i: to(x, i, e * c))(x_GMD, index_GMK)
    rows_RD = buffers_GSD.reshape(groups, e, c, d).swapaxes(0, 1).reshape(-1, d)
    y_RF = experts(rows_RD, jnp.full(e, groups * c, jnp.int32))
    y_GSF = y_RF.reshape(e, groups, c, -1).swapaxes(0, 1).reshape(groups, e * c, -1)
    weights_GMK = jnp.where(placed_NK, routing.weights_NK, 0.0).reshape(groups, -1, k)
    y_GMF = jax.vmap(back)(y_GSF, index_GMK, weights_GMK)
    return mask_rows(y_GMF.reshape(n, -1), routing.mask_N), placed_NK


def _to_places(x_MD: Array, index_MK: Array, places: int) -> Array:
    m, k = index_MK.shape
    token_A = jnp.arange(m * k, dtype=jnp.int32) // k
    source_S = jnp.full(places, m, jnp.int32).at[index_MK.reshape(-1)].set(token_A, mode="drop")
    return jnp.take(x_MD, source_S, axis=0, mode="fill", fill_value=0)


def _from_places(y_SF: Array, index_MK: Array, weights_MK: Array) -> Array:
    rows_MKF = jnp.take(y_SF, index_MK, axis=0, mode="fill", fill_value=0)
    return jnp.einsum("mkf,mk->mf", rows_MKF, weights_MK, preferred_element_type=jnp.float32).astype(y_SF.dtype)


def _to_places_hot(x_MD: Array, index_MK: Array, places: int) -> Array:
    hot_MS = jax.nn.one_hot(index_MK, places, dtype=x_MD.dtype).sum(axis=1)
    return jnp.einsum("ms,md->sd", hot_MS, x_MD)


def _from_places_hot(y_SF: Array, index_MK: Array, weights_MK: Array) -> Array:
    combine_MS = (jax.nn.one_hot(index_MK, y_SF.shape[0]) * weights_MK[:, :, None]).sum(axis=1)
    return jnp.einsum("ms,sf->mf", combine_MS, y_SF, preferred_element_type=jnp.float32).astype(y_SF.dtype)
