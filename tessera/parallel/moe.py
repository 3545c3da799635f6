"""Routed experts of which every device has some: one device's part of `moe.layer.MoE`, run inside shard_map."""

from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from moe import losses
from moe.experts import dense, expert_ffn, mixture
from moe.gate import gate
from moe.layer import Kernels, MoEConfig, Router, serving
from moe.parallel import all_to_all
from moe.routing import Routing
from sharding.errors import PlanError
from sharding.plan import Plan

ROUTERS = ("top_k", "switch", "sigmoid", "softmax_groups")
"""Routers that choose for every token by itself and without noise, so that splitting the batch changes nothing."""


def check_experts(config: MoEConfig, plan: Plan) -> None:
    """Refuse experts whose numbers under the plan would differ from those of one device.

    Raises:
      PlanError: a router that looks at other tokens or draws noise, a capacity, expert dropout, auxiliary losses that
        are no means over tokens, biases moved outside the gradient, biases under tensor parallelism.
    """
    split_rows = plan.size("pp") > 1 and config.balance and config.balance_scope == "batch"
    split_time = plan.size("cp") > 1 and config.balance and config.balance_scope == "sequence"
    wrong = {
        f"router.name={config.router.name!r} (choose one of {', '.join(ROUTERS)})": config.router.name not in ROUTERS,
        f"router.jitter={config.router.jitter}": config.router.jitter,
        "mixture.dispatch='capacity' (choose 'dropless')": config.mixture.dispatch == "capacity",
        f"mixture.dropout={config.mixture.dropout}": config.mixture.dropout,
        f"importance={config.importance}": config.importance,
        f"load={config.load}": config.load,
        f"bias_rate={config.bias_rate}": config.bias_rate,
        "balance_scope='sequence' with cp > 1 (choose 'batch')": split_time,
        "balance_scope='batch' with pp > 1, where a batch is cut into microbatches (choose 'sequence')": split_rows,
        "biases with tp > 1": config.biases and plan.size("tp") > 1,
    }
    for setting, refused in wrong.items():
        if refused:
            raise PlanError(f"plan {plan.axes!r} and moe.{setting}: not the same numbers as on one device")


def balance_loss(
    routing: Routing, config: MoEConfig, sequences: int, axes: tuple[str, ...], tp: str | None
) -> Float32[Array, ""]:
    """`moe.layer.auxiliary` of the whole batch, equal on all devices: the balance is asked of all tokens together.

    Args:
      routing: of this device's tokens.
      config: the layer.
      sequences: rows of this device's batch.
      axes: mesh axes that split the tokens.
      tp: mesh axis along which the routing is computed again and again.
    """
    total = jnp.float32(0)
    if config.balance and config.balance_scope == "batch":
        total += config.balance * losses.load_balance(routing, axis_name=axes or None)
    elif config.balance:
        each = losses.load_balance(routing, sequences)
        total += config.balance * (jax.lax.pmean(each, axes) if axes else each)
    if config.z:
        each = losses.z_loss(routing)
        total += config.z * (jax.lax.pmean(each, axes) if axes else each)
    varying = tp is not None and tp in jax.typeof(total).mat.varying
    return jax.lax.pmean(total, tp) if varying else total


class SplitMoE(nn.Module):
    """E / ep experts of F / tp channels each; parameters by the names of `moe.layer.MoE`, in this device's sizes.

    What it returns is this device's part of a sum over tp. `platform` is the one compiled for, "" the default
    backend's. Sown into "intermediates": "aux_loss".
    """

    config: MoEConfig
    plan: Plan
    width: int
    ff: int
    axes: tuple[str, ...]
    platform: str = ""

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], tokens_BT: Int[Array, "B T"] | None = None) -> Array:
        """Send every token to its experts, wherever they are, and bring the results [B, T, D] back.

        Only the hash router reads the token ids.
        """
        c, (b, t, d) = self.config, x_BTD.shape
        ep, tp = (next(iter(self.plan.present(axis)), None) for axis in ("ep", "tp"))
        ff = self.ff // self.plan.size("tp")
        activation, x_ND = c.mixture.activation, x_BTD.reshape(b * t, d)
        experts = c.router.experts // self.plan.size("ep")
        params = Kernels(self.width, ff, (experts,), activation, c.biases, name="experts")()
        with jax.named_scope("route"):
            tokens_N = None if tokens_BT is None else tokens_BT.reshape(b * t)
            routing = gate(Router(c.router, self.width, name="router")(), x_ND, c.router, tokens_N=tokens_N)
        backend = c.mixture.backend
        if self.platform == "tpu" and backend == "auto":  # compiled ahead of time, perhaps on another platform
            backend = "tpu"
        with jax.named_scope("experts"):
            if ep is None:
                y_ND = mixture(params, x_ND, routing, replace(serving(c.mixture), backend=backend))[0]
            else:
                exchange: Any = {"tpu": "ragged", "gpu": "ragged", "cpu": "padded"}.get(self.platform, "auto")
                run = partial(expert_ffn, params, activation=activation, backend=backend)
                y_ND = all_to_all(x_ND, routing, run, ep, exchange=exchange)
        if c.shared:
            with jax.named_scope("shared"):
                kernels = Kernels(self.width, c.shared * ff, (), activation, c.biases, name="shared")()
                y_ND += dense(kernels, x_ND, activation)
        self.sow("intermediates", "aux_loss", balance_loss(routing, c, b, self.axes, tp))
        return y_ND.reshape(b, t, d)
