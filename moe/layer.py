"""Mixture-of-experts layer in Flax Linen: parameters, router, experts, shared experts and auxiliary losses.

    router/{kernel [D, E], ...}    experts/{gate [E, D, F], up [E, D, F], down [E, F, D]}/kernel (and /bias)
    shared/{gate [D, S F], up [D, S F], down [S F, D]}/kernel    shared_gate/kernel [D, 1]
    latent_in/kernel [D, Z]    latent_out/kernel [Z, D]    (with Z, that of the experts' kernels in place of D)

Axes: B batch, T tokens of a sequence, N = B T, D width, F feed-forward width of one expert, E experts, S shared
  experts, Z width of the experts' latents.

Example:
  >>> import jax, jax.numpy as jnp
  >>> from moe import layer
  >>> model = layer.MoE(layer.MoEConfig(shared=1), width=8, ff=16)
  >>> shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2, 8)))["params"]
  >>> sorted(shapes), shapes["experts"]["up"]["kernel"].shape
  (['experts', 'router', 'shared'], (8, 8, 16))
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from moe import losses, metrics
from moe.experts import (
    MixtureConfig,
    dense,
    expert_ffn,
    mixture,
    placements,
    weighed_choices,
)
from moe.gate import ROUTERS, RouterConfig, gate
from moe.kernels.implementations import varying
from moe.parallel import Exchange, all_to_all, bounded_all_to_all
from moe.parameters import Kernel, Kernels, Router
from moe.routing import Routing, first_experts, is_routed, mask_rows, only, require_causal


@dataclass(frozen=True)
class MoEConfig:
    """Options of a mixture-of-experts layer.

    Attributes:
      every: every n-th layer of a model is routed, the last of each n (Qwen2-MoE's decoder_sparse_step).
      first_k_dense_replace: the first so many layers of a model are dense (DeepSeek-V2, section 2.2; DeepSeek-V3), and
        `every` counts from the first after them.
      ff: F; 0 takes the dense layer's width divided by `granularity`.
      granularity: fine-grained experts: each is so many times narrower (Dai et al. 2024, section 3.1; give `router` so
        many times more experts and choices).
      shared: S, experts of width F that every token passes, unweighted (Dai et al. 2024, section 3.2).
      shared_gate: the output of the shared experts is multiplied by sigmoid(x w), a number per token (Qwen2-MoE).
      latent: Z, width of the routed experts' inputs and outputs, between two projections that all of them share
        (Nemotron 3's LatentMoE); 0 is D without projections.
      identity: the last so many of the router's experts return their input (zero-computation experts: LongCat-Flash
        2025, section 2.1); they have no parameters.
      null: the last so many of the router's experts before them return zeros (MoE++: Jin et al. 2024, section 3.1).
      biases: experts have biases.
      router: which experts a token goes to.
      mixture: how the experts are computed. A capacity holds in training only: outside nothing is dropped, so that a
        token decoded alone comes out as in its full sequence.
      balance: coefficient of the load-balance loss.
      balance_scope: the tokens that it is of: "batch" (all of a step: where a batch goes through the model in
        parts, that takes a forward pass of all parts first), "microbatch" (all that go through the model at once, over
        all devices; importance, load and the penalty of "relu" too) or "sequence".
      importance, load, z: coefficients of the importance, load and z losses.
      bias_rate: step of the loss-free balancing of the sigmoid router's bias; 0 leaves the bias alone.
      router_scale: factor on the standard deviation of the router's initial kernels (0.1: Fedus et al. 2021, 2.4).

    Example:
      >>> import moe
      >>> moe.MoEConfig(granularity=2, router=moe.RouterConfig("sigmoid", experts=16, k=4)).width_of(64)
      32
    """

    every: int = 1
    first_k_dense_replace: int = 0
    ff: int = 0
    granularity: int = 1
    shared: int = 0
    shared_gate: bool = False
    identity: int = 0
    null: int = 0
    biases: bool = False
    router: RouterConfig = RouterConfig()
    mixture: MixtureConfig = MixtureConfig()
    balance: float = 1e-2
    balance_scope: str = "batch"
    importance: float = 0.0
    load: float = 0.0
    z: float = 0.0
    bias_rate: float = 0.0
    router_scale: float = 1.0
    latent: int = 0

    def __post_init__(self):
        least = {"every": 1, "granularity": 1, "first_k_dense_replace": 0, "ff": 0, "shared": 0, "latent": 0}
        if any(getattr(self, name) < number for name, number in least.items()):
            told = ", ".join(f"{name}={getattr(self, name)} (>= {number})" for name, number in least.items())
            raise ValueError(f"sizes out of range: {told}")
        if self.shared_gate and not self.shared:
            raise ValueError("shared_gate=True without shared experts: set shared to at least 1")
        if (
            min(self.identity, self.null) < 0
            or self.stack < 1
            or (self.stack < self.router.experts and self.router.name == "soft")
        ):
            raise ValueError(
                f"identity={self.identity} and null={self.null} of router.experts={self.router.experts}: at least one "
                "other expert is needed, and another router than 'soft'"
            )
        if self.balance_scope not in ("batch", "microbatch", "sequence"):
            raise ValueError(f"balance_scope={self.balance_scope!r}: choose 'batch', 'microbatch' or 'sequence'")
        if self.load and self.router.name not in ("noisy", "hierarchical"):
            raise ValueError(f"load={self.load} needs the smooth load of the routers noisy and hierarchical")
        if self.bias_rate and self.router.name != "sigmoid":
            raise ValueError(f"bias_rate={self.bias_rate} moves the sigmoid router's bias, not {self.router.name}'s")

    @property
    def stack(self) -> int:
        """Experts that have parameters."""
        return self.router.experts - self.identity - self.null

    @property
    def plain(self) -> bool:
        """Whether the layer is SwiGLU experts alone, without biases and latents, as conversions need it."""
        return self.mixture.plain and not (self.shared or self.latent or self.biases or self.identity or self.null)

    @property
    def whole_batch(self) -> bool:
        """Whether some loss is one of all tokens of a step, and no mean of losses of its parts."""
        nonlinear = self.importance or self.load or self.router.name == "relu"
        return bool(self.balance and self.balance_scope == "batch" or nonlinear and self.balance_scope != "microbatch")

    def width_of(self, dense_ff: int) -> int:
        """Compute F from the width of the dense layer that the experts replace.

        Raises:
          ValueError: the granularity does not divide the dense width.
        """
        if self.ff == 0 and dense_ff % self.granularity:
            raise ValueError(f"ff={dense_ff} does not divide into granularity={self.granularity} parts; set moe.ff")
        return self.ff or dense_ff // self.granularity


@dataclass(frozen=True)
class ExpertAxes:
    """Mesh axes that split the layer, for code inside `jax.shard_map`; the default is one device.

    Attributes:
      experts: axis of expert parallelism: every device has E / size consecutive experts and exchanges tokens with the
        others (`moe.parallel.all_to_all`).
      width: axis of tensor parallelism, which splits F: outputs are partial sums over it.
      tokens: axes that split the tokens; auxiliary losses are those of the tokens of all devices.
      exchange: see `moe.parallel.all_to_all`.
    """

    experts: str | None = None
    width: str | None = None
    tokens: tuple[str, ...] = ()
    exchange: Exchange = "auto"


ONE_DEVICE = ExpertAxes()


def auxiliary(
    routing: Routing,
    config: MoEConfig,
    sequences: int,
    axes: ExpertAxes = ONE_DEVICE,
    penalty: Float[Array, "1"] | None = None,
    batch_SE: Float32[Array, "6 E"] | None = None,
) -> Float32[Array, ""]:
    """Sum the layer's auxiliary losses times their coefficients, over the tokens of all devices and equal on each.

    Args:
      routing: of this device's tokens.
      config: coefficients.
      sequences: rows of equal length that make up the tokens.
      axes: mesh axes inside `jax.shard_map`.
      penalty: coefficient of the penalty of the router "relu", a parameter of it.
      batch_SE: where these are the tokens of one part of a batch, the mean over all parts of the `losses.batch_sums` of
        their tokens on all devices: the losses of `MoEConfig.whole_batch` are then the batch's.
    """

    tokens, choices = axes.tokens or None, ROUTERS[config.router.name].balance

    def mean(value: Float32[Array, ""], of: Bool[Array, " M"]) -> Float32[Array, ""]:
        """Average the devices' means, each by the number of things it is a mean of."""
        if tokens is None:
            return value
        total, count = jax.lax.psum((value * of.sum(), of.sum().astype(jnp.float32)), tokens)
        return total / jnp.maximum(count, 1.0)

    coefficient = None
    if penalty is not None:
        coefficient = jax.lax.stop_gradient(penalty.sum())
        # Equal on all devices that hold the layer, of which the mean tells JAX; stages of a pipeline hold others.
        if holders := varying(coefficient) & {*axes.tokens, axes.width}:
            coefficient = jax.lax.pmean(coefficient, tuple(sorted(holders)))

    def of_sums(sums_SE: Float32[Array, "6 E"]) -> Float32[Array, ""]:
        total = jnp.float32(0)
        if config.balance and config.balance_scope != "sequence":
            total += config.balance * losses.balance_of(sums_SE)
        if config.importance:
            total += config.importance * metrics.squared_variation(sums_SE[2])
        if config.load:
            total += config.load * metrics.squared_variation(sums_SE[4])
        if coefficient is not None:
            total += coefficient * losses.penalty_of(sums_SE, config.router.k)
        return total

    if config.load and routing.load_NE is None:
        losses.load_loss(routing)  # says why there is none
    own_SE = losses.batch_sums(routing, choices, tokens)
    total = of_sums(own_SE) if batch_SE is None else losses.linearized(of_sums, own_SE, batch_SE)
    if config.balance and config.balance_scope == "sequence":
        full = routing.mask_N.reshape(sequences, -1).any(axis=1)
        total += config.balance * mean(losses.load_balance(routing, sequences, choices=choices), full)
    if config.z:
        total += config.z * mean(losses.z_loss(routing), routing.mask_N)
    # Tensor-parallel devices route the same tokens; the mean tells JAX that their results are equal.
    return jax.lax.pmean(total, axes.width) if axes.width is not None and axes.width in varying(total) else total


class MoE(nn.Module):
    """Mixture-of-experts layer in place of a feed-forward layer (Shazeer et al. 2017).

    An rng "router" means training: noise, capacity and expert dropout are on. Sown into "intermediates": "aux_loss",
    the weighted auxiliary losses (a scalar to be added to the loss), and "routing", what `metrics.summary` gives of
    this device's tokens; into "routings": the `Routing`; into "balance", if it is mutable: "sums", the
    `losses.batch_sums` of these tokens. Given instead, "sums" are those of the whole batch that these tokens are a part
    of (see `auxiliary`). With `causal`, a router that looks ahead is refused
    outside training, where tokens are decoded. With `axes` the parameters are one device's part: E / size experts and
    F / size channels.

    Attributes:
      config: options of the layer.
      width: D.
      ff: F.
      scale, output_scale: factors on the initial standard deviation of all kernels, and of the down kernels.
      causal: the layer belongs to an autoregressive decoder.
      axes: mesh axes that split it, inside `jax.shard_map`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import moe
      >>> model, x_BTD = moe.MoE(moe.MoEConfig(), width=8, ff=16), jnp.ones((1, 2, 8))
      >>> params = jax.jit(model.init)(jax.random.key(0), x_BTD)
      >>> forward = jax.jit(lambda params, x_BTD: model.apply(params, x_BTD, mutable=["intermediates"]))
      >>> y_BTD, sown = forward(params, x_BTD)
      >>> y_BTD.shape, sown["intermediates"]["aux_loss"][0].shape
      ((1, 2, 8), ())
    """

    config: MoEConfig
    width: int
    ff: int
    scale: float = 1.0
    output_scale: float = 1.0
    causal: bool = False
    axes: ExpertAxes = ONE_DEVICE

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        mask_BT: Bool[Array, "B T"] | None = None,
        tokens_BT: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Apply the experts of every token, and the shared ones.

        Args:
          x_BTD: activations of any float dtype, which is that of the experts' products.
          mask_BT: False for padding, which may be NaN and comes out as zeros.
          tokens_BT: token ids, for the hash router.
        """
        if x_BTD.ndim != 3:
            raise ValueError(
                f"activations of shape {x_BTD.shape}: [batch, tokens, width] is expected; x[None] of a flat batch"
            )
        c, (b, t, d) = self.config, x_BTD.shape
        train = self.has_rng("router")
        keys = jax.random.split(self.make_rng("router")) if train else (None, None)
        kernels = partial(
            Kernels,
            activation=c.mixture.activation,
            biases=c.biases,
            scale=self.scale,
            output_scale=self.output_scale,
        )
        ep, tp = self.axes.experts, self.axes.width
        ways = jax.lax.axis_size(tp) if tp else 1
        ff = self.ff // ways
        router = Router(c.router, self.width, c.router_scale, name="router")()
        stack = (c.stack // (jax.lax.axis_size(ep) if ep else 1),)

        def part(params: dict[str, Any]) -> dict[str, Any]:
            """One device's part, whose result is summed over tp: so is its share of the last bias."""
            return {name: leaf / ways if name == "down_bias" and ways > 1 else leaf for name, leaf in params.items()}

        params = part(kernels(width=c.latent or d, ff=ff, stack=stack, name="experts")())

        mask_N = None if mask_BT is None else mask_BT.reshape(-1)
        x_ND = mask_rows(x_BTD.reshape(b * t, d), mask_N)
        tokens_N = None if tokens_BT is None else tokens_BT.reshape(-1)
        with jax.named_scope("route"):
            routing = gate(router, x_ND, c.router, mask_N, key=keys[0], train=train, tokens_N=tokens_N)
        if self.causal and not train and not self.is_initializing():
            require_causal(routing)
        config = c.mixture if train else serving(c.mixture)
        hidden: Any = {"activation": config.activation, "gating": config.gating}
        sent = routing if c.stack == c.router.experts else first_experts(routing, c.stack)
        z_NZ = x_ND
        if c.latent:
            z_NZ = x_ND @ Kernel((d, c.latent), 0, self.scale, False, name="latent_in")("kernel")["kernel"].astype(
                x_ND.dtype
            )
        with jax.named_scope("experts"):
            if ep is None:
                y_ND, placed_NK = mixture(params, z_NZ, sent, config, key=keys[1])
            else:
                run = partial(expert_ffn, params, **hidden, backend=config.backend)
                placed_NK = placements(sent, config)[1] if config.dispatch == "capacity" else None
                sent = sent if placed_NK is None else only(sent, placed_NK)
                rows = z_NZ
                if config.weigh == "input":
                    rows, sent = weighed_choices(z_NZ, sent)
                how: Any = {"exchange": self.axes.exchange}
                if config.slack:
                    y_ND, placed_NK = bounded_all_to_all(rows, sent, run, ep, config.slack, drop=config.drop, **how)
                    placed_NK = placed_NK.reshape(b * t, -1)
                else:
                    y_ND = all_to_all(rows, sent, run, ep, **how)
                y_ND = y_ND.reshape(b * t, -1, z_NZ.shape[1]).sum(axis=1)
            if c.latent:
                project = Kernel((c.latent, d), 0, self.scale * self.output_scale, False, name="latent_out")
                y_ND = y_ND @ project("kernel")["kernel"].astype(y_ND.dtype)
        if c.stack < c.router.experts:
            free_NK = is_routed(routing) & (routing.experts_NK >= c.stack)
            placed_NK = None if placed_NK is None else placed_NK | free_NK  # no capacity holds for them
            same_NK = free_NK & (routing.experts_NK >= c.router.experts - c.identity)
            same_N1 = jnp.where(same_NK, routing.weights_NK, 0).sum(axis=1, keepdims=True) / ways  # summed over tp
            y_ND += (same_N1 * x_ND).astype(y_ND.dtype)
        if c.shared:
            with jax.named_scope("shared"):
                shared = dense(part(kernels(width=d, ff=c.shared * ff, name="shared")()), x_ND, **hidden)
                if c.shared_gate:
                    gate_D1 = Kernel((self.width, 1), 0, self.scale, False, name="shared_gate")("kernel")["kernel"]
                    shared *= jax.nn.sigmoid((x_ND @ gate_D1.astype(x_ND.dtype)).astype(jnp.float32)).astype(x_ND.dtype)
                y_ND += shared
        if self.is_mutable_collection("intermediates"):
            whole_SE: Any = None
            if self.is_mutable_collection("balance"):
                self.sow("balance", "sums", losses.batch_sums(routing, ROUTERS[c.router.name].balance))
            elif self.has_variable("balance", "sums"):
                whole_SE = self.get_variable("balance", "sums")
            found = auxiliary(routing, c, b, self.axes, router.get("penalty"), whole_SE)
            self.sow("intermediates", "aux_loss", found)
            self.sow("intermediates", "routing", metrics.summary(routing, placed_NK))
        self.sow("routings", "routing", routing)
        return mask_rows(y_ND, mask_N).reshape(b, t, d)


def serving(config: MixtureConfig) -> MixtureConfig:
    """Return the options without capacity and bounded buffers, so that no token depends on the others of its batch."""
    return replace(config, dispatch="dropless" if config.dispatch == "capacity" else config.dispatch, slack=0.0)
