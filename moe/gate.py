"""From a frozen config to a router: which parameters it has, and tokens -> `Routing`.

Axes: N tokens, D width, E experts, P slots per expert, A groups of experts. Parameters are a dict of float32 arrays by
the names of `parameter_shapes`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moe import route
from moe.routing import Routing, check_k


@dataclass(frozen=True)
class RouterConfig:
    """Which router, and its settings; those that a router has no use for are ignored.

    Attributes:
      name: a key of `ROUTERS`.
      experts: E.
      k: choices per token (in each chosen group, for "hierarchical").
      softmax: for "top_k": weights from a softmax "after" or "before" the selection.
      jitter: for "switch": half the width of the multiplicative noise on the router's input in training.
      groups: for "sigmoid", "softmax_groups" and "hierarchical": blocks of consecutive experts.
      top_groups: blocks a token's experts may come from.
      scale: for "top_k", "sigmoid" and "softmax_groups": factor on the weights.
      capacity_factor: for "expert_choice": tokens per expert over N / E, the mean number of experts a token gets.
      slots: for "soft": P.
      seed: for "hash".
    """

    name: str = "top_k"
    experts: int = 8
    k: int = 2
    softmax: str = "after"
    jitter: float = 0.0
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    capacity_factor: float = 2.0
    slots: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.name not in ROUTERS:
            raise ValueError(f"name={self.name!r}: choose one of {', '.join(ROUTERS)}")
        if self.softmax not in ("before", "after"):
            raise ValueError(f"softmax={self.softmax!r}: choose 'before' or 'after'")
        check_k(self.k, self.experts)
        if self.groups < 1 or self.experts % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ValueError(
                f"experts={self.experts} in groups={self.groups}, of which top_groups={self.top_groups}: groups must "
                "divide the experts, and top_groups be in 1..groups"
            )
        if self.slots < 1 or self.capacity_factor <= 0 or not 0 <= self.jitter < 1:
            raise ValueError(
                f"slots={self.slots} must be at least 1, capacity_factor={self.capacity_factor} positive, "
                f"jitter={self.jitter} in [0, 1)"
            )

    @property
    def causal(self) -> bool:
        """False if the router looks ahead even when tokens are decoded."""
        return self.name not in ("expert_choice", "soft")


Gate = Callable[..., Routing]
"""(params, x_ND float32, mask_N, config, key, train, tokens_N) -> Routing."""


def _logits(params, x_ND, name="kernel"):
    return jnp.einsum("nd,de->ne", x_ND, params[name].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _switch(params, x_ND, mask_N, c, key, train, tokens_N):
    return route.switch(_logits(params, route.jitter(x_ND, c.jitter, key=key)), mask_N)


def _noisy(params, x_ND, mask_N, c, key, train, tokens_N):
    return route.noisy_top_k(_logits(params, x_ND), _logits(params, x_ND, "noise"), c.k, mask_N, key=key)


def _hierarchical(params, x_ND, mask_N, c, key, train, tokens_N):
    inner = (x_ND.shape[0], c.groups, c.experts // c.groups)
    return route.hierarchical(
        _logits(params, x_ND),
        _logits(params, x_ND, "inner").reshape(inner),
        c.top_groups,
        c.k,
        mask_N,
        noise_NA=_logits(params, x_ND, "noise"),
        noise_NAB=_logits(params, x_ND, "inner_noise").reshape(inner),
        key=key,
    )


def _scored(score, group_score):
    def gate(params, x_ND, mask_N, c, key, train, tokens_N):
        return route.sigmoid_top_k(
            _logits(params, x_ND),
            c.k,
            mask_N,
            bias_E=params.get("bias"),
            groups=c.groups,
            top_groups=c.top_groups,
            group_score=group_score,
            normalize=score == "sigmoid",
            scale=c.scale,
            score=score,
        )

    return gate


def _expert_choice(params, x_ND, mask_N, c, key, train, tokens_N):
    n = x_ND.shape[0]
    return route.expert_choice(_logits(params, x_ND), min(n, max(1, int(c.capacity_factor * n / c.experts))), mask_N)


def _soft(params, x_ND, mask_N, c, key, train, tokens_N):
    # Tokens and slot parameters are normalised (section 2.3), so that large widths do not saturate the softmax.
    unit = x_ND / jnp.maximum(jnp.linalg.norm(x_ND, axis=-1, keepdims=True), 1e-6)
    kernel_DS = params["kernel"].astype(jnp.float32)
    kernel_DS = kernel_DS / jnp.maximum(jnp.linalg.norm(kernel_DS, axis=0, keepdims=True), 1e-6)
    logits_NS = unit @ (params["scale"].reshape(1, 1) * kernel_DS)
    return route.soft(logits_NS.reshape(-1, c.experts, c.slots), mask_N)


def _hash(params, x_ND, mask_N, c, key, train, tokens_N):
    if tokens_N is None:
        raise ValueError("the hash router routes token ids: pass tokens=")
    return route.hash_tokens(tokens_N, c.experts, c.k, mask_N, seed=c.seed)


ROUTERS: dict[str, Gate] = {
    "top_k": lambda p, x, m, c, key, train, t: route.top_k(_logits(p, x), c.k, m, softmax=c.softmax, scale=c.scale),
    "switch": _switch,
    "gshard": lambda p, x, m, c, key, train, t: route.gshard(_logits(p, x), m, key=key),
    "noisy": _noisy,
    "hierarchical": _hierarchical,
    "sigmoid": _scored("sigmoid", "top2"),
    "softmax_groups": _scored("softmax", "max"),
    "expert_choice": _expert_choice,
    "soft": _soft,
    "base": lambda p, x, m, c, key, train, t: route.base(_logits(p, x), m, train=train),
    "hash": _hash,
    "uniform": lambda p, x, m, c, key, train, t: route.uniform(_logits(p, x), c.k, m),
}


def parameter_shapes(config: RouterConfig, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a router's parameters: "kernel" and what else it has.

    Kernels start random, "noise" kernels and "bias" at zero, "scale" at one. "bias" gets no gradient: it is moved by
    `route.update_bias` after the optimizer.
    """
    e, d = config.experts, width
    if config.name == "hash":
        return {}
    if config.name == "hierarchical":
        return {"kernel": (d, config.groups), "noise": (d, config.groups), "inner": (d, e), "inner_noise": (d, e)}
    if config.name == "soft":
        return {"kernel": (d, e * config.slots), "scale": (1,)}
    more: dict[str, dict[str, tuple[int, ...]]] = {"noisy": {"noise": (d, e)}, "sigmoid": {"bias": (e,)}}
    return {"kernel": (d, e)} | more.get(config.name, {})


def gate(
    params: Mapping[str, Array],
    x_ND: Float[Array, "N D"],
    config: RouterConfig,
    mask_N: Bool[Array, " N"] | None = None,
    *,
    key: Key[Array, ""] | None = None,
    train: bool = False,
    tokens_N: Int[Array, " N"] | None = None,
) -> Routing:
    """Route tokens by their activations.

    Args:
      params: arrays by the names of `parameter_shapes`.
      x_ND: what the router reads, any float dtype; all that follows is float32.
      config: which router.
      mask_N: False for padding.
      key: for noise; None switches it off.
      train: True balances the BASE router's assignment; no other router asks.
      tokens_N: token ids, for the hash router.

    Raises:
      ValueError: the hash router without token ids.
    """
    return ROUTERS[config.name](params, x_ND.astype(jnp.float32), mask_N, config, key, train, tokens_N)
