"""Expert parallelism inside `jax.shard_map`: all-to-all dispatch of tokens (GShard), or all-gather of tokens.

Every device of the mesh axis `axis` has E / P consecutive experts and a part of the tokens, and calls `all_to_all` or
`all_gather` with its tokens and their routing over all E experts. The result equals that of one device; no token is
dropped, for which a device needs room for the rows of all. `bounded_all_to_all` has buffers of a chosen size instead
and drops what does not fit. For tensor parallelism inside the experts wrap the expert function by `tensor_parallel`.

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
from jaxtyping import Array, Bool, Float, Int

from moe.dispatch import ExpertFn, Plan, combine, gather, number, plan, plan_rows
from moe.kernels.implementations import zeros
from moe.routing import Routing, is_routed, only

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
    devices, _ = _split(routing, axis)
    return _all_to_all(x_ND, routing, experts, axis, exchange, devices * routing.rows)


def bounded_all_to_all(
    x_ND: Float[Array, "N D"],
    routing: Routing,
    experts: ExpertFn,
    axis: str,
    slack: float,
    *,
    drop: Literal["position", "probability"] = "position",
    exchange: Exchange = "auto",
) -> tuple[Float[Array, "N F"], Bool[Array, "N K"]]:
    """Dispatch tokens by all-to-all into receive buffers of fixed size (MaxText's ragged_buffer_factor).

    A device receives at most `slack` times its rows under balanced load, N K, so its memory does not grow with the
    number of devices. Every sender has an even share of the buffer and, with the "ragged" exchange, what others leave
    of theirs, in the order of devices. Choices beyond it are dropped and add zeros; which ones, `dispatch.places`
    says, with devices in place of experts.

    Args:
      x_ND, routing, experts, axis, exchange: as in `all_to_all`.
      slack: at least 1; rounded up so that all devices' shares are equal.
      drop: priority of the choices.

    Returns:
      Outputs, and True for every choice that is not dropped.

    Raises:
      ValueError: as `all_to_all`, or slack below 1.
    """
    if slack < 1:
        raise ValueError(f"slack={slack}: a buffer holds at least the rows of a balanced load; choose 1 or more")
    devices, local = _split(routing, axis)
    share = min(routing.rows, -(-int(slack * routing.rows + 0.999999) // devices))
    device_NK = routing.experts_NK // local  # that of a choice that is not routed is out of range
    wanted_P = (device_NK.reshape(-1, 1) == jnp.arange(devices)[None]).sum(axis=0, dtype=jnp.int32)
    given_P = jnp.minimum(wanted_P, share)
    if _resolve(exchange) == "ragged":
        wanted_PP = jax.lax.all_gather(wanted_P, axis)  # [sender, receiver]
        more_PP = jnp.maximum(wanted_PP - share, 0)
        left_P = devices * share - jnp.minimum(wanted_PP, share).sum(axis=0)
        left_PP = left_P[None] - (jnp.cumsum(more_PP, axis=0) - more_PP)
        given_P += jnp.clip(left_PP, 0, more_PP)[jax.lax.axis_index(axis)]
    limit_NK = given_P[jnp.minimum(device_NK, devices - 1)]
    placed_NK = is_routed(routing) & (number(routing, device_NK, devices, drop) < limit_NK)
    y_NF = _all_to_all(x_ND, only(routing, placed_NK), experts, axis, exchange, devices * share)
    return y_NF, placed_NK


def _resolve(exchange: Exchange) -> Exchange:
    if exchange != "auto":
        return exchange
    return "ragged" if jax.default_backend() in ("tpu", "gpu") else "padded"


def _all_to_all(x_ND, routing: Routing, experts: ExpertFn, axis: str, exchange: Exchange, most: int):
    """Dispatch to devices that receive at most `most` rows each, and with "padded" even shares of them from each."""
    devices, local = _split(routing, axis)
    by_expert = plan(routing)
    rows_RD = gather(x_ND, by_expert)
    run = _ragged if _resolve(exchange) == "ragged" else _padded
    y_RF = run(rows_RD, by_expert, experts, axis, devices, local, most)
    return combine(y_RF, routing.weights_NK, by_expert)


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


def _padded(rows_RD, by_expert: Plan, experts: ExpertFn, axis: str, devices: int, local: int, most: int):
    """Run rows through remote experts, exchanged in blocks of equally many rows B per device."""
    (r, d), block = rows_RD.shape, most // devices
    sizes_PL = by_expert.sizes_E.reshape(devices, local)
    starts_P = jnp.cumsum(sizes_PL.sum(1)) - sizes_PL.sum(1)
    # Rows are sorted by expert, so those of one device are consecutive.
    source_PB = starts_P[:, None] + jnp.arange(block)[None]
    live_PB = jnp.arange(block)[None] < sizes_PL.sum(1)[:, None]
    send_PBD = jnp.where(live_PB[:, :, None], jnp.take(rows_RD, source_PB, axis=0, mode="clip"), 0)
    received_PBD = jax.lax.all_to_all(send_PBD, axis, 0, 0, tiled=True)
    sizes_PL = jax.lax.all_to_all(sizes_PL, axis, 0, 0, tiled=True)

    experts_PB = _expert_of_row(sizes_PL, block)
    mine = plan_rows(experts_PB.reshape(-1, 1), local, most)
    y_MF = experts(gather(received_PBD.reshape(-1, d), mine), mine.sizes_E)
    back_PBF = _unpermute(y_MF, mine).reshape(devices, block, -1)
    back_PBF = jax.lax.all_to_all(back_PBF, axis, 0, 0, tiled=True)
    # Row i went to place i - start of its device's block.
    device_R = jnp.minimum(jnp.searchsorted(starts_P, jnp.arange(r), side="right") - 1, devices - 1)
    place_R = jnp.arange(r) - starts_P[device_R]
    live_R = jnp.arange(r) < by_expert.sizes_E.sum()
    return jnp.where(live_R[:, None], back_PBF[device_R, jnp.minimum(place_R, block - 1)], 0)


def _expert_of_row(sizes_PL: Int[Array, "P L"], rows: int) -> Int[Array, "P B"]:
    """Local expert of every row of every sender's block; L past the end."""
    ends_PL = jnp.cumsum(sizes_PL, axis=1)
    return (jnp.arange(rows)[None, :, None] >= ends_PL[:, None, :]).sum(axis=-1).astype(jnp.int32)


def _unpermute(y_MF: Float[Array, "M F"], mine: Plan) -> Float[Array, "M F"]:
    """Permute rows back into the order of their arrival."""
    ones_M1 = (mine.inverse_NK < mine.order_R.shape[0]).astype(jnp.float32)
    return combine(y_MF, ones_M1, mine)


def _ragged(rows_RD, by_expert: Plan, experts: ExpertFn, axis: str, devices: int, local: int, most: int):
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
    buffer_MD = zeros((most, d), rows_RD.dtype, rows_RD)
    received_MD = exchange_rows(rows_RD, buffer_MD, sent_starts_P, sent_P, there_P, received_P, axis)
    sizes_PL = jax.lax.all_to_all(sizes_PL, axis, 0, 0, tiled=True)

    mine = plan_rows(_expert_of_received(sizes_PL, most)[:, None], local, most)
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
