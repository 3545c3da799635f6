"""`Routing`, the record that every router returns, and the arithmetic that routers share.

Axes: N tokens, E experts, K choices a token makes, P slots an expert has in Soft MoE. All router arithmetic is float32
whatever the dtype of the logits ("selective precision": Fedus et al. 2021, section 2.4).

Example:
  >>> import jax.numpy as jnp
  >>> from moe import routing
  >>> logits_NE, mask_N = routing.prepare(jnp.zeros((2, 3)), None)
  >>> experts_NK, weights_NK = jnp.array([[0], [2]]), jnp.ones((2, 1))
  >>> found = routing.make_routing(experts_NK, weights_NK, logits_NE + 1 / 3, logits_NE, mask_N)
  >>> found.num_experts, found.k, found.rows
  (3, 1, 2)
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32


@dataclass(frozen=True)
class Slots:
    """Dispatch and combine weights of Soft MoE (Puigcerver et al. 2023, eq. 1 and 3).

    Attributes:
      dispatch_NEP: share of token n in the input of slot (e, p); sums to one over tokens.
      combine_NEP: share of slot (e, p) in the output of token n; sums to one over slots.
    """

    dispatch_NEP: Float32[Array, "N E P"]
    combine_NEP: Float32[Array, "N E P"]


@dataclass(frozen=True)
class Routing:
    """Expert assignment of a batch of tokens: expert ids, gate weights, router probabilities and logits; a pytree.

    Attributes:
      experts_NK: expert of every choice in 0..E-1, distinct for one token and best first; E for a choice that is not
        routed (padding, or a second expert that was not drawn).
      weights_NK: gate value, the factor of the expert's output; 0 for a choice that is not routed.
      probs_NE: the router's distribution over experts; rows sum to one.
      logits_NE: its logits, without noise and bias.
      mask_N: False for padding tokens, which are not routed and count in no loss or metric.
      load_NE: smooth load P(x, i), differentiable, whose sum over tokens estimates the load (Shazeer et al. 2017,
        appendix A); None for other routers.
      slots: dispatch and combine weights of Soft MoE; None for other routers.
      rows: static int; upper bound of the routed choices (N K, fewer with expert choice).
      causal: static; False if a token's routing depends on tokens after it.

    Example:
      >>> import jax.numpy as jnp
      >>> import moe
      >>> routing = moe.route.top_k(jnp.zeros((5, 4)), k=2)
      >>> isinstance(routing, moe.Routing), routing.num_experts, routing.k
      (True, 4, 2)
    """

    experts_NK: Int32[Array, "N K"]
    weights_NK: Float32[Array, "N K"]
    probs_NE: Float32[Array, "N E"]
    logits_NE: Float32[Array, "N E"]
    mask_N: Bool[Array, " N"]
    load_NE: Float32[Array, "N E"] | None = None
    slots: Slots | None = None
    rows: Any = 0
    causal: bool = True

    @property
    def num_experts(self) -> int:
        """E."""
        return self.probs_NE.shape[-1]

    @property
    def k(self) -> int:
        """K."""
        return self.experts_NK.shape[-1]


def register(cls: type, static: tuple[str, ...] = ()) -> None:
    """Register a frozen dataclass as a pytree whose unflattening skips `__init__`: JAX puts non-arrays into leaves."""
    data = tuple(field.name for field in fields(cls) if field.name not in static)

    def flatten_with_keys(x: Any) -> tuple[Any, Any]:
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(x, name)) for name in data)
        return children, tuple(getattr(x, name) for name in static)

    def unflatten(meta: Any, children: Any) -> Any:
        x: Any = object.__new__(cls)
        for name, value in zip((*data, *static), (*children, *meta), strict=True):
            object.__setattr__(x, name, value)
        return x

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)


register(Slots)
register(Routing, ("rows", "causal"))


def prepare(
    logits_NE: Float[Array, "N E"], mask_N: Bool[Array, " N"] | None
) -> tuple[Float32[Array, "N E"], Bool[Array, " N"]]:
    """Cast logits to float32 and zero the rows of padding, which may hold NaN; a mask of None becomes all True."""
    logits_NE = logits_NE.astype(jnp.float32)
    if mask_N is None:
        return logits_NE, jnp.ones(logits_NE.shape[0], bool)
    return jnp.where(mask_N[:, None], logits_NE, 0.0), mask_N


def mask_rows(x_ND: Float[Array, "N D"], mask_N: Bool[Array, " N"] | None) -> Float[Array, "N D"]:
    """Zero the rows of padding, whose values and cotangents may be NaN; a mask of None changes nothing."""
    return x_ND if mask_N is None else jnp.where(mask_N[:, None], x_ND, 0)


def check_k(k: int, experts: int) -> None:
    """Check the number of choices per token.

    Raises:
      ValueError: k is not in 1..E.
    """
    if not 1 <= k <= experts:
        raise ValueError(f"k={k} choices among {experts} experts: k must be in 1..{experts}")


def take(values_NE: Float[Array, "N E"], experts_NK: Int[Array, "N K"]) -> Float[Array, "N K"]:
    """Gather values[n, experts[n, k]]."""
    return jnp.take_along_axis(values_NE, experts_NK, axis=-1)


def make_routing(
    experts_NK: Int[Array, "N K"],
    weights_NK: Float[Array, "N K"],
    probs_NE: Float[Array, "N E"],
    logits_NE: Float[Array, "N E"],
    mask_N: Bool[Array, " N"],
    routed_NK: Bool[Array, "N K"] | None = None,
    **more: Any,
) -> Routing:
    """Build a `Routing`; choices of padding tokens and those outside `routed_NK` get expert E and weight 0."""
    n, k = experts_NK.shape
    routed_NK = jnp.broadcast_to(mask_N[:, None], (n, k)) if routed_NK is None else routed_NK & mask_N[:, None]
    return Routing(
        jnp.where(routed_NK, experts_NK, probs_NE.shape[-1]).astype(jnp.int32),
        jnp.where(routed_NK, weights_NK, 0.0).astype(jnp.float32),
        probs_NE,
        logits_NE,
        mask_N,
        **{"rows": n * k} | more,
    )


def only(routing: Routing, placed_NK: Bool[Array, "N K"]) -> Routing:
    """Leave out the choices that are not in `placed_NK`, for example those beyond a capacity."""
    return replace(
        routing,
        experts_NK=jnp.where(placed_NK, routing.experts_NK, routing.num_experts),
        weights_NK=jnp.where(placed_NK, routing.weights_NK, 0.0),
    )


def first_experts(routing: Routing, experts: int) -> Routing:
    """Leave out the choices of all but the first so many experts."""
    narrow = {name: getattr(routing, name)[:, :experts] for name in ("probs_NE", "logits_NE")}
    routing = only(routing, routing.experts_NK < experts)
    return replace(routing, experts_NK=jnp.minimum(routing.experts_NK, experts), **narrow, load_NE=None)


def is_routed(routing: Routing) -> Bool[Array, "N K"]:
    """Return True for every choice that has an expert."""
    return routing.experts_NK < routing.num_experts


def require_causal(routing: Routing) -> None:
    """Check, while tracing, that no token's experts depend on later tokens (autoregressive decoding).

    Raises:
      ValueError: the router looks ahead, so that tokens generated one by one would be routed otherwise.
    """
    if not routing.causal:
        raise ValueError(
            "this router chooses among all tokens of a batch, so it looks ahead and cannot be used in causal decoding; "
            "route with top_k, switch, gshard, sigmoid_top_k or hash_tokens instead"
        )


def grouped(
    router: Callable[[Float[Array, "N E"], Bool[Array, " N"]], Routing],
    logits_NE: Float[Array, "N E"],
    groups: int,
    mask_N: Bool[Array, " N"] | None = None,
) -> Routing:
    """Route every group of N / groups consecutive tokens separately, for example expert choice within a sequence.

    Args:
      router: (logits, mask) -> routing.
      logits_NE: logits of all tokens.
      groups: number of groups.
      mask_N: False for padding.

    Raises:
      ValueError: the tokens do not divide into the groups.
    """
    n, e = logits_NE.shape
    if groups < 1 or n % groups:
        raise ValueError(f"{n} tokens do not divide into {groups} groups")
    logits_NE, mask_N = prepare(logits_NE, mask_N)
    routing = jax.vmap(router)(logits_NE.reshape(groups, -1, e), mask_N.reshape(groups, -1))
    merge = partial(jax.tree.map, lambda x: x.reshape(n, *x.shape[2:]))
    if routing.slots is not None:
        raise ValueError("Soft MoE mixes a fixed set of tokens: apply the layer to every group instead (jax.vmap)")
    return replace(merge(routing), rows=groups * routing.rows)
