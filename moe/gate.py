"""Gating network: a router chosen by config, the shapes of its parameters, and activations -> `Routing`.

Axes: N tokens, D width, E experts, P slots per expert, A groups of experts. Parameters are a dict of float32 arrays by
the names of `parameter_shapes`.

Example:
  >>> import jax.numpy as jnp
  >>> from moe import gate
  >>> config = gate.RouterConfig("top_k", experts=4, k=2)
  >>> params = {name: jnp.ones(shape) for name, shape in gate.parameter_shapes(config, 8).items()}
  >>> gate.gate(params, jnp.ones((3, 8)), config).experts_NK.shape
  (3, 2)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moe import route
from moe.routing import Routing, check_k, mask_rows


@dataclass(frozen=True)
class RouterConfig:
    """Router and its options; options of other routers are ignored.

    Attributes:
      name: a key of `ROUTERS`.
      experts: E.
      k: choices per token (in each chosen group, for "hierarchical").
      softmax: for "top_k": weights from a softmax "after" or "before" the selection.
      jitter: for "switch": half the width of the multiplicative noise on the router's input in training; for
        "sparsemixer": half the relative distance from the best logit within which experts take part.
      groups: for "sigmoid", "softmax_groups" and "hierarchical": blocks of consecutive experts.
      top_groups: blocks a token's experts may come from.
      scale: for "top_k", "sigmoid" and "softmax_groups": factor on the weights.
      capacity_factor: for "expert_choice": tokens per expert over N / E, the mean number of experts a token gets.
      slots: for "soft": P.
      seed: for "hash".
      bias: the logits have a learned bias (gpt-oss); not for "soft" and "hash".
      score: for "sigmoid": scores of the experts, "sigmoid" of the logits (DeepSeek-V3), "softmax" (Ernie 4.5, DBRX)
        or "sqrt_softplus" (DeepSeek-V4).
      normalize: for "sigmoid": p of the p-norm by which the chosen scores are divided (2 in DBRX); 0 leaves them.
      skew: for "uniform": imbalance of the forced load, for benchmarks: expert e has a share proportional to
        (e + 1)^-skew.
      penalty: for "relu": first coefficient of the penalty on the weights (`losses.relu_penalty`), for which k is the
        mean number of choices to reach.
      penalty_rate: for "relu": factor by which a step raises or lowers it; 1 leaves it.

    Example:
      >>> import moe
      >>> moe.RouterConfig("expert_choice", experts=4).causal
      False
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
    bias: bool = False
    score: str = "sigmoid"
    normalize: float = 1.0
    skew: float = 0.0
    penalty: float = 1e-8
    penalty_rate: float = 1.2

    def __post_init__(self):
        if self.name not in ROUTERS:
            raise ValueError(f"name={self.name!r}: choose one of {', '.join(ROUTERS)}")
        if self.softmax not in ("before", "after"):
            raise ValueError(f"softmax={self.softmax!r}: choose 'before' or 'after'")
        if self.score not in route.biased.SCORES:
            raise ValueError(f"score={self.score!r}: choose one of {', '.join(route.biased.SCORES)}")
        if self.bias and self.name in ("soft", "hash"):
            raise ValueError(f"bias=True: the router {self.name!r} has no logits to add it to")
        check_k(self.k, self.experts)
        if self.penalty < 0 or self.penalty_rate < 1:
            raise ValueError(f"penalty={self.penalty} must be at least 0, penalty_rate={self.penalty_rate} at least 1")
        if self.groups < 1 or self.experts % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ValueError(
                f"experts={self.experts} in groups={self.groups}, of which top_groups={self.top_groups}: groups must "
                "divide the experts, and top_groups be in 1..groups"
            )
        if (
            self.slots < 1
            or self.capacity_factor <= 0
            or not 0 <= self.jitter < 1
            or min(self.normalize, self.skew) < 0
        ):
            raise ValueError(
                f"slots={self.slots} must be at least 1, capacity_factor={self.capacity_factor} positive, "
                f"jitter={self.jitter} in [0, 1), normalize={self.normalize} and skew={self.skew} at least 0"
            )

    @property
    def causal(self) -> bool:
        """False if the router looks ahead even when tokens are decoded."""
        return ROUTERS[self.name].causal

    def check_training(self) -> None:
        """Refuse a router whose weights are constant: a softmax over one choice. Serving such a model is right.

        Raises:
          ValueError: no gradient of the model's loss would reach the router.
        """
        one = self.k == 1 < self.experts
        constant = {"top_k": one and self.softmax == "after", "noisy": one, "uniform": one}
        constant["sparsemixer"] = self.jitter == 0
        if self.name == "hierarchical":
            constant["hierarchical"] = self.k == 1 < self.experts // self.groups or self.top_groups == 1 < self.groups
        if constant.get(self.name):
            settings = f"name={self.name!r}, k={self.k}" + ", top_groups=1" * (self.top_groups == 1 < self.groups)
            choose = "k (and top_groups) of at least 2, or with softmax='before', 'switch' or 'sigmoid'"
            raise ValueError(
                f"router {settings}: the softmax over one choice is 1, so no gradient of the loss reaches the router; "
                f"train with {'jitter above 0' if self.name == 'sparsemixer' else choose}"
            )


class Context(NamedTuple):
    """Inputs of a router besides its parameters, the activations and its config.

    Fields:
      mask_N: False for padding, or None.
      key: for noise; None switches it off.
      train: whether this is training.
      tokens_N: token ids, or None.
    """

    mask_N: Bool[Array, " N"] | None = None
    key: Key[Array, ""] | None = None
    train: bool = False
    tokens_N: Int[Array, " N"] | None = None


def _kernel_shapes(c: RouterConfig, width: int) -> dict[str, tuple[int, ...]]:
    return {"kernel": (width, c.experts)}


@dataclass(frozen=True)
class RouterSpec:
    """One router of the table `ROUTERS`.

    Attributes:
      route: (params, x_ND float32, config, context) -> Routing.
      shapes: (config, width) -> shape of each parameter by name.
      causal: False if it looks ahead even when tokens are decoded.
      balance: the choices that its balance loss counts, see `losses.load_balance`.
    """

    route: Callable[[Mapping[str, Array], Array, RouterConfig, Context], Routing]
    shapes: Callable[[RouterConfig, int], dict[str, tuple[int, ...]]] = _kernel_shapes
    causal: bool = True
    balance: Literal["all", "first", "scores"] = "all"


def _logits(params, x_ND, name="kernel"):
    logits_NE = jnp.einsum("nd,de->ne", x_ND, params[name].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    if name == "kernel" and "logit_bias" in params:
        logits_NE += params["logit_bias"].astype(jnp.float32)[None]
    return logits_NE


def _top_k(params, x_ND, c, ctx):
    return route.top_k(_logits(params, x_ND), c.k, ctx.mask_N, softmax=c.softmax, scale=c.scale)


def _switch(params, x_ND, c, ctx):
    return route.switch(_logits(params, route.jitter(x_ND, c.jitter, key=ctx.key)), ctx.mask_N)


def _gshard(params, x_ND, c, ctx):
    return route.gshard(_logits(params, x_ND), ctx.mask_N, key=ctx.key)


def _noisy(params, x_ND, c, ctx):
    return route.noisy_top_k(_logits(params, x_ND), _logits(params, x_ND, "noise"), c.k, ctx.mask_N, key=ctx.key)


def _hierarchical(params, x_ND, c, ctx):
    inner = (x_ND.shape[0], c.groups, c.experts // c.groups)
    return route.hierarchical(
        _logits(params, x_ND),
        _logits(params, x_ND, "inner").reshape(inner),
        c.top_groups,
        c.k,
        ctx.mask_N,
        noise_NA=_logits(params, x_ND, "noise"),
        noise_NAB=_logits(params, x_ND, "inner_noise").reshape(inner),
        key=ctx.key,
    )


def _hierarchical_shapes(c, width):
    groups, experts = (width, c.groups), (width, c.experts)
    return {"kernel": groups, "noise": groups, "inner": experts, "inner_noise": experts}


def _sparsemixer(params, x_ND, c, ctx):
    return route.sparsemixer(_logits(params, x_ND), c.k, ctx.mask_N, epsilon=c.jitter, key=ctx.key)


def _sigmoid(params, x_ND, c, ctx):
    return _scored(params, x_ND, c, ctx, score=c.score, group_score="top2", normalize=c.normalize)


def _scored(params, x_ND, c, ctx, *, score, group_score, normalize):
    return route.sigmoid_top_k(
        _logits(params, x_ND),
        c.k,
        ctx.mask_N,
        bias_E=params.get("bias"),
        groups=c.groups,
        top_groups=c.top_groups,
        group_score=group_score,
        normalize=normalize,
        scale=c.scale,
        score=score,
    )


def _expert_choice(params, x_ND, c, ctx):
    n = x_ND.shape[0]
    capacity = min(n, max(1, int(c.capacity_factor * n / c.experts)))
    places = None  # as many as the tokens without padding would have
    if ctx.mask_N is not None:
        places = jnp.maximum(1, (c.capacity_factor * ctx.mask_N.sum() / c.experts).astype(jnp.int32))
    return route.expert_choice(_logits(params, x_ND), capacity, ctx.mask_N, places=places)


def _unit(x, axis):
    """Divide by the norm; a zero vector stays zero, and its gradient finite."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=axis, keepdims=True), 1e-12))


def _soft(params, x_ND, c, ctx):
    # Tokens and slot parameters are normalized (section 2.3), so that large widths do not saturate the softmax.
    kernel_DS = _unit(params["kernel"].astype(jnp.float32), axis=0)
    logits_NS = _unit(x_ND, axis=1) @ (params["scale"].reshape(1, 1) * kernel_DS)
    return route.soft(logits_NS.reshape(-1, c.experts, c.slots), ctx.mask_N)


def _base(params, x_ND, c, ctx):
    return route.base(_logits(params, x_ND), ctx.mask_N, train=ctx.train)


def _sinkhorn(params, x_ND, c, ctx):
    return route.sinkhorn(_logits(params, x_ND), c.k, ctx.mask_N, train=ctx.train)


def _relu(params, x_ND, c, ctx):
    return route.relu(_logits(params, x_ND), ctx.mask_N)


def _hash(params, x_ND, c, ctx):
    if ctx.tokens_N is None:
        raise ValueError("the hash router routes token ids: pass tokens_N= to moe.gate.gate, or tokens_BT to MoE")
    return route.hash_tokens(ctx.tokens_N, c.experts, c.k, ctx.mask_N, seed=c.seed)


def _uniform(params, x_ND, c, ctx):
    return route.uniform(_logits(params, x_ND), c.k, ctx.mask_N, skew=c.skew)


ROUTERS: dict[str, RouterSpec] = {
    "top_k": RouterSpec(_top_k),
    "switch": RouterSpec(_switch),
    "gshard": RouterSpec(_gshard, balance="first"),
    "noisy": RouterSpec(_noisy, lambda c, d: {"kernel": (d, c.experts), "noise": (d, c.experts)}),
    "hierarchical": RouterSpec(_hierarchical, _hierarchical_shapes),
    "sigmoid": RouterSpec(
        _sigmoid,
        lambda c, d: {"kernel": (d, c.experts), "bias": (c.experts,)},
        balance="scores",
    ),
    "softmax_groups": RouterSpec(partial(_scored, score="softmax", group_score="max", normalize=0.0)),
    "sparsemixer": RouterSpec(_sparsemixer),
    "relu": RouterSpec(_relu, lambda c, d: {"kernel": (d, c.experts), "penalty": (1,)}),
    "expert_choice": RouterSpec(_expert_choice, causal=False),
    "soft": RouterSpec(_soft, lambda c, d: {"kernel": (d, c.experts * c.slots), "scale": (1,)}, causal=False),
    "base": RouterSpec(_base),
    "sinkhorn": RouterSpec(_sinkhorn),
    "hash": RouterSpec(_hash, lambda c, d: {}),
    "uniform": RouterSpec(_uniform),
}


def parameter_shapes(config: RouterConfig, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a router's parameters by name: "kernel", and others where it has them.

    Kernels start random, "noise" kernels and biases at zero, "scale" at one, "penalty" at `RouterConfig.penalty`.
    "bias" and "penalty" get no gradient: `route.update_bias` and `route.update_penalty` move them after the
    optimizer. "logit_bias" (`RouterConfig.bias`) is learned like a kernel.
    """
    shapes = ROUTERS[config.name].shapes(config, width)
    return shapes | ({"logit_bias": shapes["kernel"][1:]} if config.bias else {})


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
    """Route tokens by their activations (gating network: Shazeer et al. 2017, section 2.1).

    Args:
      params: arrays by the names of `parameter_shapes`.
      x_ND: activations of any float dtype; the router's arithmetic is float32. Those of padding may be NaN.
      config: router and its options.
      mask_N: False for padding.
      key: for noise; None switches it off.
      train: True balances the assignment of the routers BASE and Sinkhorn, and refuses constant weights
        (`RouterConfig.check_training`).
      tokens_N: token ids, for the hash router.

    Raises:
      ValueError: the hash router without token ids, or training with weights that have no gradient.
    """
    if train:
        config.check_training()
    x_ND = mask_rows(x_ND.astype(jnp.float32), mask_N)
    return ROUTERS[config.name].route(params, x_ND, config, Context(mask_N, key, train, tokens_N))
