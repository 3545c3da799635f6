"""Expert feed-forward layers (SwiGLU, GELU, ...) on rows sorted by expert, and their mixture by a `Routing`.

Parameters are a dict of stacked arrays: gate [E, D, F] (gated activations only), up [E, D, F], down [E, F, D], and
optionally gate_bias [E, F], up_bias [E, F], down_bias [E, D]. For serving with dispatch "dropless" the stacked arrays
may be `moe.kernels.Quantized`. A dense or shared layer has the same without the axis E.

Axes: N tokens, D width, F feed-forward width, E experts, K choices, R rows sorted by expert.

Example:
  >>> import jax, jax.numpy as jnp
  >>> from moe import experts, route
  >>> params = experts.initialize(8, 16, 4, key=jax.random.key(0))
  >>> x_ND = jnp.ones((6, 8))
  >>> experts.mixture(params, x_ND, route.top_k(x_ND[:, :4], k=2))[0].shape
  (6, 8)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moe import dispatch
from moe.activations import ACTIVATIONS, GATED, PLAIN, Activation, Gating, activate, kernel_names
from moe.kernels import Combine, Quantized, SwiGLU, grouped_matmul
from moe.kernels.implementations import NAMES, choose
from moe.kernels.xla import mixture as xla_mixture
from moe.routing import Routing

Params = Mapping[str, Any]
Dispatch = Literal["dropless", "capacity", "dense"]
DISPATCHES = ("dropless", "capacity", "dense")
Backend = Literal["auto", "xla", "tpu", "gpu", "tokamax", "tpu_interpret", "gpu_interpret"]


@dataclass(frozen=True)
class MixtureConfig:
    """Options of the expert computation: activation, dispatch algorithm and kernel backend.

    Attributes:
      activation: "swiglu", "geglu" or "reglu" (gated: Shazeer 2020, eq. 5-6), or without a gate "gelu", "relu" or
        "relu2" (squared ReLU: So et al. 2021, section 3.1). GELU is the exact one.
      dispatch: "dropless" sorts tokens by expert and multiplies ragged groups (Gale et al. 2022); "capacity" gives
        every expert a fixed number of places and multiplies one batch (Lepikhin et al. 2020); "dense" runs every expert
        on every token, a reference for tiny shapes.
      backend: the kernels of "dropless", see `moe.kernels.implementations.choose`; "auto" is the environment variable
        TESSERA_BACKEND where it is set.
      capacity_factor: for "capacity", see `dispatch.capacity_of`.
      groups: for "capacity": groups of consecutive tokens that compete for places, on every device that has a part of
        the tokens (Lepikhin et al. 2020, section 3.2).
      drop: for "capacity" and `slack`: "position" or "probability", see `dispatch.places`.
      movement: for "capacity": "gather" or "einsum".
      dropout: rate of expert dropout, on the hidden activations of experts (Fedus et al. 2021, section 2.4).
      deterministic: for backend "gpu": a token's rows are summed in a fixed order, without which no run is reproducible
        bit for bit. False uses atomic additions in the kernel; see `grouped_matmul`.
      gating: constants of a gated activation.
      weigh: what the gate weights multiply: the experts' "output", or their "input" (Llama 4).
      slack: for "dropless" under expert parallelism: rows that a device has room to receive over those of a balanced
        load; what does not fit is dropped, in training only (MaxText's ragged_buffer_factor). 0 has room for the rows
        of all devices and drops nothing.

    Example:
      >>> import moe
      >>> moe.MixtureConfig(dispatch="capacity", capacity_factor=2.0).backend
      'auto'
    """

    activation: Activation = "swiglu"
    dispatch: Dispatch = "dropless"
    backend: Backend = "auto"
    capacity_factor: float = 1.25
    groups: int = 1
    drop: Literal["position", "probability"] = "position"
    movement: Literal["gather", "einsum"] = "gather"
    dropout: float = 0.0
    deterministic: bool = True
    gating: Gating = PLAIN
    weigh: Literal["output", "input"] = "output"
    slack: float = 0.0

    def __post_init__(self):
        choices = {
            "activation": ACTIVATIONS,
            "weigh": ("output", "input"),
            "dispatch": DISPATCHES,
            "backend": NAMES,
            "drop": ("position", "probability"),
            "movement": ("gather", "einsum"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if self.weigh == "input" and self.dispatch == "capacity":
            raise ValueError("weigh='input' with dispatch='capacity': choose 'dropless'")
        if self.gating != PLAIN and self.activation not in GATED:
            raise ValueError(f"gating={self.gating} with activation={self.activation!r}: choose one of {GATED}")
        if self.slack and (self.slack < 1 or self.dispatch != "dropless"):
            raise ValueError(
                f"slack={self.slack}, dispatch={self.dispatch!r}: 0, or at least 1 (a balanced load) with 'dropless'"
            )
        if self.capacity_factor <= 0 or self.groups < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"capacity_factor={self.capacity_factor} must be positive, groups={self.groups} at least 1, "
                f"dropout={self.dropout} in [0, 1)"
            )

    @property
    def plain(self) -> bool:
        """Whether the experts are SwiGLU as published, weighted at their output: the fused kernels' case."""
        return self.activation == "swiglu" and self.gating == PLAIN and self.weigh == "output"


def dense(
    params: Params, x: Float[Array, "*N D"], activation: Activation = "swiglu", gating: Gating = PLAIN
) -> Float[Array, "*N D"]:
    """Apply a dense feed-forward layer (parameters without the axis E); a shared expert is one for every token."""

    def product(x, name):
        y = x @ params[name].astype(x.dtype)
        bias = params.get(f"{name}_bias")
        return y if bias is None else y + bias.astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))

    gate = product(x, "gate") if activation in GATED else None
    return product(activate(product(x, "up"), gate, activation, gating), "down")


def drop_hidden(hidden: Float[Array, "*N F"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "*N F"]:
    """Apply inverted dropout to hidden activations (expert dropout); the identity for a key of None."""
    if key is None or rate == 0:
        return hidden
    mask = jax.random.bernoulli(key, 1 - rate, hidden.shape)
    return jnp.where(mask, hidden / (1 - rate), 0).astype(hidden.dtype)


def expert_ffn(
    params: Params,
    rows_RD: Float[Array, "R D"],
    sizes_E: Int[Array, " E"],
    activation: Activation = "swiglu",
    *,
    gating: Gating = PLAIN,
    dispatch: Dispatch = "dropless",
    backend: str = "auto",
    dropout: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "R D"]:
    """Apply each expert's feed-forward network to its rows.

    Args:
      params: stacked parameters, see the module's docstring; any float dtype, multiplied in that of the rows.
      rows_RD: rows sorted by expert.
      sizes_E: rows of every expert; rows past their sum become zeros.
      activation, gating: see `MixtureConfig`.
      dispatch: how the rows came about: "dropless", groups of any size; "capacity", R / E rows for every expert, which
        are multiplied as one batch; "dense" runs every expert on every row, a reference for tiny shapes.
      backend: the kernels of "dropless", see `moe.kernels.implementations.choose`.
      dropout: rate of expert dropout.
      key: for dropout; None switches it off.

    Raises:
      ValueError: "capacity" and rows that do not divide by the experts.
    """
    if dispatch == "capacity" and rows_RD.shape[0] % sizes_E.shape[0]:
        raise ValueError(f"dispatch='capacity': {rows_RD.shape[0]} rows do not divide among {sizes_E.shape[0]} experts")
    r = rows_RD.shape[0]
    row_R = jnp.arange(r)
    expert_R = jnp.searchsorted(jnp.cumsum(sizes_E), row_R, side="right")  # E past the sum

    def product(x_RD, name):
        w = _kernel(params[name], x_RD.dtype)
        if dispatch == "capacity":
            y = jnp.einsum("ecd,edf->ecf", x_RD.reshape(w.shape[0], -1, w.shape[1]), w).reshape(r, -1)
        elif dispatch == "dense":
            hot_RE = (expert_R[:, None] == jnp.arange(w.shape[0])[None]).astype(x_RD.dtype)
            y = jnp.einsum("rd,edf,re->rf", x_RD, w, hot_RE)
        else:
            y = grouped_matmul(x_RD, w, sizes_E, backend=backend)
        if f"{name}_bias" in params:
            y += jnp.take(params[f"{name}_bias"].astype(y.dtype), expert_R, axis=0, mode="fill", fill_value=0)
        return y

    gate_RF = product(rows_RD, "gate") if activation in GATED else None
    hidden_RF = activate(product(rows_RD, "up"), gate_RF, activation, gating)
    return product(drop_hidden(hidden_RF, dropout, key), "down")


def fused(
    params: Params,
    x_ND: Float[Array, "N D"],
    routing: Routing,
    *,
    backend: str = "auto",
    dropout: float = 0.0,
    deterministic: bool = True,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "N D"]:
    """Apply dropless SwiGLU experts by two fused products: gather and SwiGLU, then the combine; one loop for "xla".

    Arguments as in `mixture`; parameters without biases.
    """
    plan, backend = dispatch.plan(routing), choose(backend, x_ND)
    gate, up, down = (_kernel(params[name], x_ND.dtype) for name in ("gate", "up", "down"))
    weights_R = routing.weights_NK.reshape(-1)[plan.order_R]
    plain = not isinstance(gate, Quantized)
    if backend == "xla" and plain and (key is None or not dropout) and x_ND.size and gate.size:
        return xla_mixture.mixture(x_ND, gate, up, down, plan.sizes_E, plan.tokens_R, weights_R)
    multiply = partial(grouped_matmul, backend=backend, deterministic=deterministic)
    hidden_RF = multiply(x_ND, (gate, up), plan.sizes_E, gather=plan.tokens_R, epilogue=SwiGLU())
    hidden_RF = drop_hidden(hidden_RF, dropout, key)
    return multiply(hidden_RF, down, plan.sizes_E, epilogue=Combine(plan.tokens_R, weights_R, x_ND.shape[0]))


def _kernel(w: Any, dtype: Any) -> Any:
    """Cast kernels; quantized ones are widened by the products, a tile's expert at a time."""
    return w if isinstance(w, Quantized) else w.astype(dtype)


def mixture(
    params: Params,
    x_ND: Float[Array, "N D"],
    routing: Routing,
    config: MixtureConfig = MixtureConfig(),
    *,
    key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, "N D"], Bool[Array, "N K"] | None]:
    """Compute a mixture of experts: dispatch tokens, run their experts, combine (Shazeer et al. 2017, eq. 1).

    Args:
      params: stacked parameters, see the module's docstring.
      x_ND: tokens of any float dtype, which is that of the products.
      routing: of these tokens, from any router.
      config: activation, dispatch and backend.
      key: for expert dropout; None switches it off.

    Returns:
      The weighted sums of the experts' outputs, and for dispatch "capacity" True for every choice that was not dropped
      (None for other dispatches).

    Raises:
      ValueError: tokens that are not [N, D], or a routing among another number of experts.
    """
    if x_ND.ndim != 2:
        raise ValueError(f"tokens of shape {x_ND.shape}: [N, D] is expected; x.reshape(-1, {x_ND.shape[-1]})")
    held = jax.tree.leaves(params["up"])[0].shape[0] if "up" in params else routing.num_experts  # quantized ones too
    if routing.slots is None and routing.num_experts != held:
        raise ValueError(f"the router chooses among {routing.num_experts} experts, params hold {held}")
    hidden: Any = {"activation": config.activation, "gating": config.gating}
    if config.weigh == "input" and routing.slots is None:
        k, config = routing.k, replace(config, weigh="output")
        y_AD, _ = mixture(params, *weighed_choices(x_ND, routing), config, key=key)
        return y_AD.reshape(-1, k, y_AD.shape[1]).sum(axis=1), None
    run = partial(expert_ffn, params, **hidden, dropout=config.dropout, key=key)
    if routing.slots is not None:
        return dispatch.soft(x_ND, routing, partial(run, dispatch="capacity")), None
    if config.dispatch == "capacity":
        return dispatch.capacity(
            x_ND,
            routing,
            partial(run, dispatch="capacity"),
            _capacity(routing, config),
            groups=config.groups,
            drop=config.drop,
            movement=config.movement,
        )
    if config.dispatch == "dense":
        if config.dropout and key is not None:
            raise ValueError("dispatch='dense' has no expert dropout: choose 'dropless' or 'capacity'")
        one = partial(_expert, params, **hidden)
        return dispatch.dense(x_ND, routing, one), None
    if config.plain and not any(name.endswith("_bias") for name in params):
        how = {name: getattr(config, name) for name in ("backend", "dropout", "deterministic")}
        return fused(params, x_ND, routing, **how, key=key), None
    return dispatch.dropless(x_ND, routing, partial(run, backend=config.backend)), None


def weighed_choices(x_ND: Float[Array, "N D"], routing: Routing) -> tuple[Float[Array, "A D"], Routing]:
    """Make every choice a token of its own, multiplied by its gate weight, with one choice of weight 1.

    Returns:
      The A = N K tokens, those of one token next to each other, and their routing.
    """
    n, k = routing.experts_NK.shape
    x_NKD = x_ND[:, None] * routing.weights_NK[:, :, None].astype(x_ND.dtype)
    each: Any = {name: jnp.repeat(getattr(routing, name), k, axis=0) for name in ("probs_NE", "logits_NE", "mask_N")}
    experts_A1 = routing.experts_NK.reshape(-1, 1)
    weights_A1 = (experts_A1 < routing.num_experts).astype(jnp.float32)
    return x_NKD.reshape(n * k, -1), replace(routing, experts_NK=experts_A1, weights_NK=weights_A1, **each)


def _capacity(routing: Routing, config: MixtureConfig) -> int:
    return dispatch.capacity_of(routing.mask_N.shape[0] // config.groups, routing, config.capacity_factor)


def placements(routing: Routing, config: MixtureConfig) -> tuple[Int[Array, "N K"], Bool[Array, "N K"]]:
    """Number every choice's place under dispatch "capacity", and compare it with the capacity (`dispatch.places`)."""
    return dispatch.places(routing, _capacity(routing, config), config.drop, config.groups)


def _expert(params: Params, x_ND: Array, e: int, activation: Activation, gating: Gating) -> Array:
    return dense({name: leaf[e] for name, leaf in params.items()}, x_ND, activation, gating)


def initialize(
    width: int,
    ff: int,
    experts: int,
    activation: Activation = "swiglu",
    *,
    biases: bool = False,
    key: Key[Array, ""],
) -> dict[str, Array]:
    """Draw float32 expert parameters with variance 1 / fan-in and zero biases; `experts=0` makes a dense layer's."""
    names = kernel_names(activation)
    stack = (experts,) if experts else ()
    params = {}
    for name, one in zip(names, jax.random.split(key, len(names)), strict=True):
        inputs, outputs = (ff, width) if name == "down" else (width, ff)
        params[name] = jax.random.normal(one, (*stack, inputs, outputs), jnp.float32) * inputs**-0.5
        if biases:
            params[f"{name}_bias"] = jnp.zeros((*stack, outputs), jnp.float32)
    return params
