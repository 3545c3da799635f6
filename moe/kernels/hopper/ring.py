"""Persistent, warp-specialized software pipeline of all Hopper kernels, over a ring buffer in shared memory (SMEM).

A thread block walks over output tiles (persistent kernel). The producer warpgroup fills slots of the ring buffer by TMA
and runs ahead, past the ends of tiles too; one or two consumer warpgroups wait for a full slot, multiply it by wgmma
and release it one step later, when that wgmma has completed. A kernel defines the tile schedule (`plan`), the TMA
copies (`load`), the product (`multiply`) and the epilogue (`finish`).

Two thread blocks may form a cluster, a pair, on neighboring tiles that share an operand: each loads half of it for both
by TMA multicast (`load` with collective_axes=PAIR), and a slot is filled again when both have released it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.implementations import local, vary

# Rows of a swizzled tile of shared memory; a TMA copy of such tiles starts at a multiple of it.
ALIGN = 8
# Bytes of a row of such a tile: 64 columns of a 16-bit type.
ROW_BYTES = 128
# Shared memory that a block may have on compute capability 9.0, less what barriers and alignment take.
SHARED = 227 * 1024 - 2048
# Not supported by Pallas' interpreter (JAX 0.12), where the kernels do without: TMA reductions ("additions"), and wgmma
# with its left operand in registers. The tests add both to it.
LACKING = frozenset({"additions", "registers"})
# Name of the cluster axis.
PAIR = "pair"
# Registers of a producer thread; the consumer threads divide the rest of the file.
PRODUCER_REGISTERS = 40


class Ring(NamedTuple):
    """SMEM ring buffer as kernel refs: operand buffers (slots, ...), and per slot the barriers ready and consumed."""

    buffers: tuple[Any, ...]
    ready: Any
    consumed: Any

    def slot(self, step: Any) -> Any:
        """Return the slot of a step."""
        return lax.rem(step, jnp.int32(self.buffers[0].shape[0]))


def chunk(dtype: Any) -> int:
    """Return the columns of a 128-byte row of a swizzled tile."""
    return ROW_BYTES // jnp.dtype(dtype).itemsize


def swizzled(dtype: Any) -> tuple[Any, ...]:
    """Return the SMEM layout (8 rows of 128 bytes, swizzled) that TMA and wgmma access without bank conflicts."""
    return plgpu.TilingTransform((ALIGN, chunk(dtype))), plgpu.SwizzleTransform(ROW_BYTES)


class Tile(NamedTuple):
    """One operand's tile in a slot.

    Fields:
      shape: of the tile.
      dtype: of its elements.
      copies: TMA copies that fill it; 0 if the consumer warpgroups do.
      layout: in SMEM; None: `swizzled(dtype)`.
    """

    shape: tuple[int, ...]
    dtype: Any
    copies: int = 1
    layout: tuple[Any, ...] | None = None

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def buffer(self, slots: int) -> Any:
        """Return the SMEM allocation of this tile for all slots."""
        layout = swizzled(self.dtype) if self.layout is None else self.layout
        return plgpu.SMEM((slots, *self.shape), self.dtype, transforms=layout)


def stages(tiles: Sequence[Tile], *, other: int, most: int = 6) -> int:
    """Count the slots that fit in SMEM next to `other` bytes.

    Raises:
      ValueError: fewer than two fit.
    """
    step = sum(tile.bytes for tile in tiles)
    count = min((SHARED - other) // step, most)
    if count < 2:
        raise ValueError(
            f"tiles {[tile.shape for tile in tiles]} take {step} bytes a step: two steps and {other} bytes for "
            f"results do not fit in {SHARED} bytes of shared memory. Choose smaller rows or cols in Tiling"
        )
    return count


def scratch(tiles: Sequence[Tile], *, slots: int, consumers: int, pairs: bool) -> Ring:
    """Return the SMEM and barrier allocations of a ring buffer."""
    count: dict[str, Any] = {"num_arrivals": consumers, "num_barriers": slots}
    return Ring(
        tuple(tile.buffer(slots) for tile in tiles),
        plgpu.Barrier(num_arrivals=sum(tile.copies for tile in tiles), num_barriers=slots),
        plgpu.ClusterBarrier(collective_axes=(PAIR,), **count) if pairs else plgpu.Barrier(**count),
    )


def run(
    ring: Ring,
    total: Any,
    *,
    consumers: int,
    plan: Callable[[Any], tuple[Any, Any]],
    load: Callable[..., None],
    multiply: Callable[..., None],
    finish: Callable[..., None],
    sums: Sequence[tuple[int, int]],
    busy: Callable[[Any], Any] | None = None,
    begin: Callable[[Any], None] | None = None,
    registers: bool = False,
) -> None:
    """Run the body of a kernel: one producer and `consumers` consumer warpgroups.

    Args:
      ring: as allocated by `scratch`.
      total: number of output tiles.
      consumers: consumer warpgroups, numbered from 0; the producer is the last.
      plan: tile number -> (where, number of steps); called by every warpgroup.
      load: (where, step of the tile, buffers of the slot, barrier) -> None; one TMA copy into each buffer.
      multiply: (accumulators, where, step of the tile, buffers of the slot) -> None; one wgmma per accumulator.
      finish: (where, sums) -> None; the sums are float32 values in registers.
      sums: shape of each accumulator of one warpgroup.
      busy: where -> whether this warpgroup has rows to write there; None: always. Warpgroups share the tensor cores, so
        a product that one omits speeds up the other.
      begin: where -> None; called by the producer before a tile's first step.
      registers: whether `multiply` passes wgmma an operand in registers. It may not change before the product has
        completed, so each step waits for its own.
    """
    producer = lax.axis_index("wg") == consumers

    @pl.when(producer)
    def _load():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _produce(ring, total, plan, load, begin)

    @pl.when(jnp.logical_not(producer))
    def _multiply():
        plgpu.set_max_registers(min(256, (512 - PRODUCER_REGISTERS) // consumers // 8 * 8), action="increase")
        _consume(ring, total, plan, multiply, finish, sums, busy, registers)


def meet(barrier: Any) -> None:
    """Synchronize the consumer warpgroups at a barrier that counts one arrival of each."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def _walk(total, visit, carry):
    """Loop over this thread block's tiles (grid-stride loop)."""
    first, size = lax.axis_index("sm"), lax.axis_size("sm")
    mine = lax.div(total - first + size - 1, jnp.int32(size))
    return lax.fori_loop(0, mine, lambda i, carry: visit(first + i * size, carry), carry)


def _produce(ring, total, plan, load, begin):
    slots = ring.buffers[0].shape[0]

    def tile(t, step):
        where, count = plan(t)
        if begin is not None:
            begin(where)

        def fill(i, step):
            slot = ring.slot(step)

            @pl.when(step >= slots)
            def _wait():
                plgpu.barrier_wait(ring.consumed.at[slot])

            load(where, i, [buffer.at[slot] for buffer in ring.buffers], ring.ready.at[slot])
            return step + 1

        return lax.fori_loop(0, count, fill, step)

    steps = _walk(total, tile, jnp.int32(0))

    # A barrier in mid-phase would be wrong for the next kernel in this shared memory.
    def drain(step, _):
        plgpu.barrier_wait(ring.consumed.at[ring.slot(step)])

    lax.fori_loop(jnp.maximum(steps - slots, 0), steps, drain, None)


def _consume(ring, total, plan, multiply, finish, sums, busy, registers):
    late = 0 if registers else 1  # steps between the issue of a wgmma and the release of its slot

    def work(where, count, step):
        def accumulate(*totals):
            def one(i, step):
                slot = ring.slot(step)
                plgpu.barrier_wait(ring.ready.at[slot])
                multiply(totals, where, i, [buffer.at[slot] for buffer in ring.buffers])
                # Products of this step stay in flight; those before have completed, and their slot is released.
                plgpu.wgmma_wait(late * len(sums))

                @pl.when(i >= late)
                def _release():
                    plgpu.barrier_arrive(ring.consumed.at[ring.slot(step - late)])

                return step + 1

            end = lax.fori_loop(0, count, one, step)
            plgpu.wgmma_wait(0)

            @pl.when(late * count > 0)
            def _release_last():
                plgpu.barrier_arrive(ring.consumed.at[ring.slot(end - 1)])

            return tuple(total[...] for total in totals)

        finish(where, pl.run_scoped(accumulate, *[plgpu.ACC(shape, jnp.float32) for shape in sums]))

    def pass_by(count, step):
        def one(_, step):
            plgpu.barrier_wait(ring.ready.at[ring.slot(step)])
            plgpu.barrier_arrive(ring.consumed.at[ring.slot(step)])
            return step + 1

        lax.fori_loop(0, count, one, step)

    def tile(t, step):
        where, count = plan(t)
        if busy is None:
            work(where, count, step)
        else:
            mine = busy(where)
            pl.when(mine)(partial(work, where, count, step))
            pl.when(jnp.logical_not(mine))(partial(pass_by, count, step))
        return step + count

    _walk(total, tile, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def cores(interpret: bool) -> int:
    """Count the thread blocks to launch: one per SM of the device compiled for, two in the interpreter."""
    if interpret:
        return 2
    device = jax.sharding.get_abstract_mesh().abstract_device
    # Without a GPU: an H200 has 132 SMs; another number is correct and slower.
    return device.num_cores if device is not None else getattr(jax.devices()[0], "core_count", 132)


def launch(
    body: Callable[..., None],
    out: Sequence[Any],
    memory: Any,
    *,
    consumers: int,
    pairs: bool,
    interpret: bool,
    name: str,
) -> Callable[..., list[jax.Array]]:
    """Make a kernel: a function of its operands, whose `body` gets operands, outputs and the allocations in `memory`.

    Inside shard_map, arrays and refs of the kernel and `out` are those of one shard, without mesh axes: `warp_map`
    accepts no varying values.
    """
    options: dict[str, Any] = {}
    if interpret:
        options["interpret"] = plgpu.InterpretGPUParams(detect_races=True)  # type: ignore[attr-defined]  # JAX 0.11
    if pairs:
        options |= {"cluster": (2,), "cluster_names": (PAIR,)}
    kernel = plgpu.kernel(
        body,
        out_type=list(out),
        scratch_types=memory,
        grid=(cores(interpret) // (2 if pairs else 1),),
        grid_names=("sm",),
        num_threads=consumers + 1,
        thread_name="wg",
        kernel_name=name,
        **options,
    )

    def call(*operands):
        # The first operand is the step table, which varies over all mesh axes that any operand does.
        return [vary(each, operands[0]) for each in kernel(*map(local, operands))]

    return call
