"""The record every router returns, and the arithmetic routers share.

Axes: N tokens, E experts, K choices a token makes, P slots an expert has in Soft MoE. All router arithmetic is float32
whatever the dtype of the logits ("selective precision": Fedus et al. 2021, section 2.4).
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
    """Soft MoE's mixing matrices (Puigcerver et al. 2023, eq. 1 and 3).

    Attributes:
      dispatch_NEP: share of token n in the input of slot (e, p); sums to one over tokens.
      combine_NEP: share of slot (e, p) in the output of token n; sums to one over slots.
    """

    dispatch_NEP: Float32[Array, "N E P"]
    combine_NEP: Float32[Array, "N E P"]


@dataclass(frozen=True)
class Routing:
    """Which experts a token goes to, with which weights, and what the router computed on the way; a pytree.

    Attributes:
      experts_NK: expert of every choice in 0..E-1, or E for a choice that goes nowhere (padding; a second expert not
        taken). The choices of one token are distinct, best first.
      weights_NK: factor of every expert's output; 0 for a choice that goes nowhere.
      probs_NE: the router's distribution over experts; rows sum to one.
      logits_NE: its logits, without noise and bias.
      mask_N: False for padding tokens, which go nowhere and count in no loss or metric.
      load_NE: Shazeer's smooth P(x, i), differentiable, whose sum over tokens estimates the load; None elsewhere.
      slots: Soft MoE's mixing matrices; None elsewhere.
      rows: static; the most choices that can go somewhere (N K, fewer with expert choice).
      causal: static; False if a token's routing depends on tokens after it.
    """

    experts_NK: Int32[Array, "N K"]
    weights_NK: Float32[Array, "N K"]
    probs_NE: Float32[Array, "N E"]
    logits_NE: Float32[Array, "N E"]
    mask_N: Bool[Array, " N"]
    load_NE: Float32[Array, "N E"] | None = None
    slots: Slots | None = None
    rows: int = 0
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
    """float32 logits with zeros in padding rows (so that not even a NaN there reaches anything), and the mask."""
    logits_NE = logits_NE.astype(jnp.float32)
    if mask_N is None:
        return logits_NE, jnp.ones(logits_NE.shape[0], bool)
    return jnp.where(mask_N[:, None], logits_NE, 0.0), mask_N


def check_k(k: int, experts: int) -> None:
    """Refuse a number of choices that the experts cannot give.

    Raises:
      ValueError: k is not in 1..E.
    """
    if not 1 <= k <= experts:
        raise ValueError(f"k={k} choices among {experts} experts: k must be in 1..{experts}")


def take(values_NE: Float[Array, "N E"], experts_NK: Int[Array, "N K"]) -> Float[Array, "N K"]:
    """values[n, experts[n, k]]."""
    return jnp.take_along_axis(values_NE, experts_NK, axis=-1)


def make_routing(
    experts_NK: Int[Array, "N K"],
    weights_NK: Float[Array, "N K"],
    probs_NE: Float[Array, "N E"],
    logits_NE: Float[Array, "N E"],
    mask_N: Bool[Array, " N"],
    taken_NK: Bool[Array, "N K"] | None = None,
    **more: Any,
) -> Routing:
    """The record, with choices of padding tokens and those not `taken` sent nowhere (expert E, weight 0)."""
    n, k = experts_NK.shape
    taken_NK = jnp.broadcast_to(mask_N[:, None], (n, k)) if taken_NK is None else taken_NK & mask_N[:, None]
    return Routing(
        jnp.where(taken_NK, experts_NK, probs_NE.shape[-1]).astype(jnp.int32),
        jnp.where(taken_NK, weights_NK, 0.0).astype(jnp.float32),
        probs_NE,
        logits_NE,
        mask_N,
        **{"rows": n * k} | more,
    )


def taken(routing: Routing) -> Bool[Array, "N K"]:
    """True for every choice that goes to an expert."""
    return routing.experts_NK < routing.num_experts


def require_causal(routing: Routing) -> None:
    """Refuse, while tracing, a routing in which a token's experts depend on later tokens.

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
    """Route every group of N / groups consecutive tokens by itself (expert choice within a sequence, for instance).

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
