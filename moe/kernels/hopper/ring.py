"""The pipeline under every Hopper kernel: one warpgroup loads, one or two multiply, and nothing stops between tiles.

A block stays on its multiprocessor and walks over output tiles (persistent). Operand tiles go round a ring of shared
memory slots: the loading warpgroup fills slots by TMA and runs ahead, over the ends of tiles too; the others wait for a
full slot, multiply it by wgmma and hand it back one step later, when its product is sure to be done. A kernel says
where a tile's operands lie (`plan`, `load`), how a slot is multiplied, and what becomes of the sums (`finish`).

Two blocks may work as a pair (a cluster) on neighbouring tiles that have an operand in common: each fetches half of it
for both (`load` with collective_axes=PAIR), and a slot is filled again when both have handed it back.
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
# What Pallas' interpreter (JAX 0.12) does not know and is done otherwise there: TMA copies that add, and wgmma whose
# left operand is in registers. Tests teach it both.
LACKING = frozenset({"additions", "registers"})
# Name of the axis along which blocks work as a pair.
PAIR = "pair"
# Registers of a thread that loads; the rest of the file is shared out among the threads that multiply.
LOADING_REGISTERS = 40


class Ring(NamedTuple):
    """Slots and barriers as refs of a kernel: buffers (stages, ...) each, ready and consumed one barrier a slot."""

    buffers: tuple[Any, ...]
    ready: Any
    consumed: Any

    def slot(self, step: Any) -> Any:
        """Slot of a step."""
        return lax.rem(step, jnp.int32(self.buffers[0].shape[0]))


def chunk(dtype: Any) -> int:
    """Columns that fill a row of a swizzled tile."""
    return ROW_BYTES // jnp.dtype(dtype).itemsize


def swizzled(dtype: Any) -> tuple[Any, ...]:
    """Layout of shared memory that both TMA and wgmma read without bank conflicts."""
    return plgpu.TilingTransform((ALIGN, chunk(dtype))), plgpu.SwizzleTransform(ROW_BYTES)


class Tile(NamedTuple):
    """An operand's part of a slot.

    Fields:
      shape: of the part.
      dtype: of its elements.
      copies: TMA copies that fill it; 0 where the multiplying warpgroups do.
      layout: of shared memory; None: `swizzled(dtype)`.
    """

    shape: tuple[int, ...]
    dtype: Any
    copies: int = 1
    layout: tuple[Any, ...] | None = None

    @property
    def bytes(self) -> int:
        """Size."""
        return prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def buffer(self, slots: int) -> Any:
        """What a kernel allocates: this part of every slot."""
        layout = swizzled(self.dtype) if self.layout is None else self.layout
        return plgpu.SMEM((slots, *self.shape), self.dtype, transforms=layout)


def stages(tiles: Sequence[Tile], *, other: int, most: int = 6) -> int:
    """Slots that fit in shared memory next to `other` bytes.

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
    """What a kernel allocates for its ring."""
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
    """The body of a kernel.

    Args:
      ring: as allocated by `scratch`.
      total: number of output tiles.
      consumers: multiplying warpgroups, numbered from 0; the loading one is the last.
      plan: tile number -> (where, number of steps); called by every warpgroup.
      load: (where, step of the tile, buffers of the slot, barrier) -> None; one TMA copy into each buffer.
      multiply: (accumulators, where, step of the tile, buffers of the slot) -> None; one wgmma per accumulator.
      finish: (where, sums) -> None; the sums are float32 values in registers.
      sums: shape of each accumulator of one warpgroup.
      busy: where -> whether this warpgroup has anything to write there; None: always. Warpgroups share the tensor
        cores, so that what one leaves out makes the other faster.
      begin: where -> None; called by the loading warpgroup before a tile's first step.
      registers: whether `multiply` gives wgmma operands in registers. They may not change before the product is done,
        so each step waits for its own.
    """
    loading = lax.axis_index("wg") == consumers

    @pl.when(loading)
    def _load():
        plgpu.set_max_registers(LOADING_REGISTERS, action="decrease")
        _produce(ring, total, plan, load, begin)

    @pl.when(jnp.logical_not(loading))
    def _multiply():
        plgpu.set_max_registers(min(256, (512 - LOADING_REGISTERS) // consumers // 8 * 8), action="increase")
        _consume(ring, total, plan, multiply, finish, sums, busy, registers)


def meet(barrier: Any) -> None:
    """Wait until every multiplying warpgroup is here; the barrier counts one arrival of each."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def _walk(total, visit, carry):
    """Visit this block's share of the tiles, in order."""
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

    # A barrier that is left half way would be wrong for the next user of this shared memory.
    def drain(step, _):
        plgpu.barrier_wait(ring.consumed.at[ring.slot(step)])

    lax.fori_loop(jnp.maximum(steps - slots, 0), steps, drain, None)


def _consume(ring, total, plan, multiply, finish, sums, busy, registers):
    late = 0 if registers else 1  # steps by which a slot is handed back after its product was begun

    def work(where, count, step):
        def accumulate(*totals):
            def one(i, step):
                slot = ring.slot(step)
                plgpu.barrier_wait(ring.ready.at[slot])
                multiply(totals, where, i, [buffer.at[slot] for buffer in ring.buffers])
                # Left under way: the products of this step. Those before are done, and their slot can be filled again.
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
    """Blocks to launch: one a multiprocessor of the device that is compiled for; two are enough to interpret."""
    if interpret:
        return 2
    device = jax.sharding.get_abstract_mesh().abstract_device
    # Without a GPU at hand: an H200 has 132, and fewer or more only wait.
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
    """The kernel: a function of its operands, whose `body` gets operands, outputs and what `memory` asks for.

    Inside shard_map, arrays and refs of the kernel are those of one shard, and `out` is too: a map over warps takes
    nothing that varies over mesh axes.
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
        # The first is the list of steps, which varies wherever anything does.
        return [vary(each, operands[0]) for each in kernel(*map(local, operands))]

    return call
