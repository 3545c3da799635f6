"""Expert parallelism inside `jax.shard_map`: all-to-all dispatch of tokens (GShard), or all-gather of tokens.

Every device of the mesh axis `axis` has E / P consecutive experts and a part of the tokens, and calls `all_to_all` or
`all_gather` with its tokens and their routing over all E experts. The result equals that of one device; no token is
dropped. For tensor parallelism inside the experts wrap the expert function by `tensor_parallel`.

Axes: N tokens of one device, D width, E experts, L = E / P local experts, P devices of the axis, K choices, R rows a
device sends, M rows it receives.

Example:
  >>> import jax, jax.numpy as jnp, numpy as np
  >>> from functools import partial
  >>> from jax.sharding import Mesh, PartitionSpec as P
  >>> from moe import experts, parallel, route
  >>> params = experts.initialize(8, 16, 4, key=jax.random.key(0))
  >>> mesh = Mesh(np.array(jax.devices()[:1]), ("ep",))
  >>> @partial(jax.shard_map, mesh=mesh, in_specs=(P("ep"), P("ep")), out_specs=P("ep"))
  ... def layer(params, x_ND):
  ...     routing = route.top_k(x_ND[:, :4], k=2)
  ...     return parallel.all_to_all(x_ND, routing, partial(experts.expert_ffn, params), "ep")
  >>> jax.jit(layer)(params, jnp.ones((6, 8))).shape
  (6, 8)
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.dispatch import ExpertFn, Plan, combine, gather, plan, plan_rows
from moe.kernels.implementations import zeros
from moe.routing import Routing

Exchange = Literal["auto", "padded", "ragged"]


def tensor_parallel(experts: ExpertFn, axis: str) -> ExpertFn:
    """Sum the outputs of experts sharded along F (column-parallel gate and up, row-parallel down: Megatron-LM)."""
    return lambda rows_RD, sizes_E: jax.lax.psum(experts(rows_RD, sizes_E), axis)


def all_to_all(
    x_ND: Float[Array, "N D"],
    routing: Routing,
    experts: ExpertFn,
    axis: str,
    *,
    exchange: Exchange = "auto",
) -> Float[Array, "N F"]:
    """Dispatch tokens to the devices of their experts by all-to-all, and combine (GShard: Lepikhin et al. 2020).

    Args:
      x_ND: this device's tokens.
      routing: of these tokens, over all E experts.
      experts: this device's E / P experts: (rows sorted by expert, sizes [E / P]) -> rows.
      axis: the mesh axis.
      exchange: "padded" sends blocks of N K rows, most of them empty, by `all_to_all`; "ragged" sends existing rows
        only by `ragged_all_to_all`; "auto" is "ragged" on TPUs and GPUs and "padded" elsewhere (XLA has no ragged
        exchange for CPUs).

    Raises:
      ValueError: the experts do not divide by the devices, or the routing has slots (Soft MoE).
    """
    devices, local = _split(routing, axis)
    if exchange == "auto":
        exchange = "ragged" if jax.default_backend() in ("tpu", "gpu") else "padded"
    by_expert = plan(routing)
    rows_RD = gather(x_ND, by_expert)
    run = _ragged if exchange == "ragged" else _padded
    return combine(run(rows_RD, by_expert, experts, axis, devices, local), routing.weights_NK, by_expert)


def all_gather(x_ND: Float[Array, "N D"], routing: Routing, experts: ExpertFn, axis: str) -> Float[Array, "N F"]:
    """Gather all tokens on every device, run its experts on theirs, and reduce-scatter the outputs.

    Less traffic than `all_to_all` where K is near P or more (fine-grained experts), and no uneven messages.

    Args and errors are those of `all_to_all`.
    """
    _, local = _split(routing, axis)
    all_ND, ids_NK, weights_NK = (
        jax.lax.all_gather(leaf, axis, tiled=True) for leaf in (x_ND, routing.experts_NK, routing.weights_NK)
    )
    first = jax.lax.axis_index(axis) * local
    mine = plan_rows(ids_NK - first, local, ids_NK.size)
    y_ND = combine(experts(gather(all_ND, mine), mine.sizes_E), weights_NK, mine)
    return jax.lax.psum_scatter(y_ND, axis, scatter_dimension=0, tiled=True)


def _split(routing: Routing, axis: str) -> tuple[int, int]:
    """Return the number of devices of the axis and of experts on each."""
    if routing.slots is not None:
        raise ValueError("Soft MoE mixes all tokens of a device into every slot: there are no tokens to dispatch")
    devices = jax.lax.axis_size(axis)
    if routing.num_experts % devices:
        raise ValueError(f"{routing.num_experts} experts do not divide among the {devices} devices of axis {axis!r}")
    return devices, routing.num_experts // devices


def _padded(rows_RD, by_expert: Plan, experts: ExpertFn, axis: str, devices: int, local: int):
    """Run rows through remote experts, exchanged in blocks of R rows per device."""
    r, d = rows_RD.shape
    sizes_PL = by_expert.sizes_E.reshape(devices, local)
    starts_P = jnp.cumsum(sizes_PL.sum(1)) - sizes_PL.sum(1)
    # Rows are sorted by expert, so those of one device are consecutive.
    source_PR = starts_P[:, None] + jnp.arange(r)[None]
    live_PR = jnp.arange(r)[None] < sizes_PL.sum(1)[:, None]
    send_PRD = jnp.where(live_PR[:, :, None], jnp.take(rows_RD, source_PR, axis=0, mode="clip"), 0)
    received_PRD = jax.lax.all_to_all(send_PRD, axis, 0, 0, tiled=True)
    sizes_PL = jax.lax.all_to_all(sizes_PL, axis, 0, 0, tiled=True)

    experts_PR = _expert_of_row(sizes_PL, r)
    mine = plan_rows(experts_PR.reshape(-1, 1), local, devices * r)
    y_MF = experts(gather(received_PRD.reshape(-1, d), mine), mine.sizes_E)
    back_PRF = _unpermute(y_MF, mine).reshape(devices, r, -1)
    back_PRF = jax.lax.all_to_all(back_PRF, axis, 0, 0, tiled=True)
    # Row i went to place i - start of its device's block.
    device_R = jnp.minimum(jnp.searchsorted(starts_P, jnp.arange(r), side="right") - 1, devices - 1)
    place_R = jnp.arange(r) - starts_P[device_R]
    live_R = jnp.arange(r) < by_expert.sizes_E.sum()
    return jnp.where(live_R[:, None], back_PRF[device_R, jnp.minimum(place_R, r - 1)], 0)


def _expert_of_row(sizes_PL: Int[Array, "P L"], rows: int) -> Int[Array, "P R"]:
    """Local expert of every row of every sender's block; L past the end."""
    ends_PL = jnp.cumsum(sizes_PL, axis=1)
    return (jnp.arange(rows)[None, :, None] >= ends_PL[:, None, :]).sum(axis=-1).astype(jnp.int32)


def _unpermute(y_MF: Float[Array, "M F"], mine: Plan) -> Float[Array, "M F"]:
    """Permute rows back into the order of their arrival."""
    ones_M1 = (mine.inverse_NK < mine.order_R.shape[0]).astype(jnp.float32)
    return combine(y_MF, ones_M1, mine)


def _ragged(rows_RD, by_expert: Plan, experts: ExpertFn, axis: str, devices: int, local: int):
    """Run rows through remote experts, exchanged without padding."""
    r, d = rows_RD.shape
    sizes_PL = by_expert.sizes_E.reshape(devices, local)
    me = jax.lax.axis_index(axis)
    table_PP = jax.lax.all_gather(sizes_PL.sum(1), axis)  # [sender, receiver]
    sent_P, received_P = table_PP[me], table_PP[:, me]
    sent_starts_P = jnp.cumsum(sent_P) - sent_P
    # Offset of this device's rows at every receiver, behind those of lower senders, and of theirs here.
    there_P = (jnp.cumsum(table_PP, axis=0) - table_PP)[me]
    received_starts_P = jnp.cumsum(received_P) - received_P
    back_P = (jnp.cumsum(table_PP, axis=1) - table_PP)[:, me]
    buffer_MD = zeros((devices * r, d), rows_RD.dtype, rows_RD)
    received_MD = exchange_rows(rows_RD, buffer_MD, sent_starts_P, sent_P, there_P, received_P, axis)
    sizes_PL = jax.lax.all_to_all(sizes_PL, axis, 0, 0, tiled=True)

    mine = plan_rows(_expert_of_received(sizes_PL, devices * r)[:, None], local, devices * r)
    y_MF = _unpermute(experts(gather(received_MD, mine), mine.sizes_E), mine)
    buffer_RF = zeros((r, y_MF.shape[1]), y_MF.dtype, y_MF)
    return exchange_rows(y_MF, buffer_RF, received_starts_P, received_P, back_P, sent_P, axis)


def exchange_rows(rows, buffer, starts_P, sizes_P, there_P, received_P, axis: str):
    """Exchange rows by `jax.lax.ragged_all_to_all`: sizes[p] rows from starts[p] to offset there[p] of device p."""
    return jax.lax.ragged_all_to_all(rows, buffer, starts_P, sizes_P, there_P, received_P, axis_name=axis)


def _expert_of_received(sizes_PL: Int[Array, "P L"], rows: int) -> Int[Array, " M"]:
    """Local expert of every received row: the senders' blocks follow each other, sorted inside; L past the end."""
    ends_A = jnp.cumsum(sizes_PL.reshape(-1))
    block_M = jnp.searchsorted(ends_A, jnp.arange(rows), side="right")
    local = sizes_PL.shape[1]
    return jnp.where(block_M < ends_A.shape[0], block_M % local, local).astype(jnp.int32)
