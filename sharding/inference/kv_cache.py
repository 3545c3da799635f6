"""KV cache: keys and values of previous tokens by slot, sharded over pp, dp, tp and cp; optionally int8, or paged.

Axes: see `sharding.inference`. Position p of a sequence is on device p mod c of the c devices of cp, in row p div c, so
that sequences of any length are balanced. A slot has room for a whole sequence (contiguous), or the rows of a sequence
are those of the pages that a page table names (Kwon et al. 2023, PagedAttention); in both cases `append` writes them
and a `Read` gives them in order, so that attention does not know which it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from sharding.errors import PlanError, choice
from sharding.plan import DATA_AXES, Plan

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.int8}


@dataclass(frozen=True)
class CacheConfig:
    """Sizes of a KV cache over all devices.

    Attributes:
      layers: L.
      slots: B, sequences that are decoded at the same time.
      kv_heads: K.
      length: most tokens of one sequence, prompt included.
      head_dim: h.
      dtype: "float32", "bfloat16" or "int8" (one float32 scale per position and head).
      shared: values are the first channels of the keys (latent attention), and not stored again.
      pages: pages that the slots share, over all devices; 0 gives every slot its own `length` positions.
      page_size: tokens of a page.

    Example:
      >>> from sharding.inference import CacheConfig
      >>> CacheConfig(layers=12, slots=8, kv_heads=4, length=1024, head_dim=64, dtype="bfloat16").bytes
      100663296
    """

    layers: int
    slots: int
    kv_heads: int
    length: int
    head_dim: int
    dtype: str = "float32"
    shared: bool = False
    pages: int = 0
    page_size: int = 64

    def __post_init__(self) -> None:
        for name in ("layers", "slots", "kv_heads", "length", "head_dim", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.pages < 0:
            raise ValueError(f"pages={self.pages} must be at least 1, or 0 for contiguous slots")
        if self.dtype not in DTYPES:
            raise ValueError(f"cache dtype {self.dtype!r}: {choice(self.dtype, DTYPES)}")

    @property
    def bytes(self) -> int:
        """Bytes of keys, values and scales over all devices."""
        per_head = self.head_dim * jnp.dtype(DTYPES[self.dtype]).itemsize + (4 if self.dtype == "int8" else 0)
        blocks, size = self.blocks
        return (2 - self.shared) * self.layers * blocks * self.kv_heads * size * per_head

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of pages and their tokens; without pages a slot is one page of `length`."""
        return (self.pages, self.page_size) if self.pages else (self.slots, self.length)

    @property
    def slot_pages(self) -> int:
        """Pages of a text of `length` tokens."""
        return -(-self.length // self.page_size)

    def check(self, plan: Plan) -> None:
        """Refuse sizes that do not divide, and pages that are too few for one text.

        Raises:
          PlanError: layers over pp, slots and pages over the data axes, heads over tp, positions (of a page) over cp.
        """
        parts = {"layers": ("pp",), "slots": DATA_AXES, "kv_heads": ("tp",)}
        parts |= {"pages": DATA_AXES, "page_size": ("cp",)} if self.pages else {"length": ("cp",)}
        for name, axes in parts.items():
            ways = 1
            for axis in axes:
                ways *= plan.size(axis)
            if getattr(self, name) % ways:
                near = max(1, round(getattr(self, name) / ways)) * ways
                written = " x ".join(f"{axis}={plan.size(axis)}" for axis in plan.present(*axes))
                raise PlanError(
                    f"plan {plan.axes!r}: {name}={getattr(self, name)} of the cache does not divide by {written}; "
                    f"nearest valid: {near}"
                )
        if self.pages and self.pages // plan.data < self.slot_pages:
            each = f" for each of the {plan.data} data-parallel parts" if plan.data > 1 else ""
            raise PlanError(
                f"pages={self.pages} of page_size={self.page_size}: a text of length={self.length} needs "
                f"{self.slot_pages}{each}; valid: pages={self.slot_pages * plan.data} or more"
            )


class Cache(NamedTuple):
    """A KV cache: keys and values, their scales (None unless int8), and the number of tokens in every slot.

    Values that the keys begin with are None. With pages the second axis counts pages instead of slots, and
    `table` int32 [B, M] has the pages of every slot in the order of its text, numbered within the data-parallel part;
    a number that no page has stands where there is none. Pages belong to one slot, or are only read.

    Example:
      >>> from sharding.inference import CacheConfig, make_cache
      >>> cache = make_cache(CacheConfig(layers=2, slots=3, kv_heads=1, length=8, head_dim=4))
      >>> cache.k.shape, cache.lengths.tolist()
      ((2, 3, 1, 8, 4), [0, 0, 0])
    """

    k: Any
    v: Any
    k_scale: Any
    v_scale: Any
    lengths: Any
    table: Any = None


class Past(NamedTuple):
    """Keys and values [N, K, S, h] of some slots in one layer, and their scales [N, K, S] or None.

    Without values of their own (None) the keys are the values too.
    """

    k: jax.Array
    v: jax.Array | None
    k_scale: jax.Array | None
    v_scale: jax.Array | None


class Blocks(NamedTuple):
    """The same, `size` positions of `length` at a time: `read(first)` gives those from position `first` on."""

    read: Callable[[Any], Past]
    size: int
    length: int


def make_cache(config: CacheConfig) -> Cache:
    """Make an empty KV cache; under jit with `out_shardings` every device allocates only its shard.

    Example:
      >>> from sharding.inference import CacheConfig, make_cache
      >>> make_cache(CacheConfig(2, 3, 1, length=8, head_dim=4, dtype="int8")).k_scale.shape
      (2, 3, 1, 8)
    """
    blocks, size = config.blocks
    shape = (config.layers, blocks, config.kv_heads, size, config.head_dim)

    def scale():
        return jnp.zeros(shape[:-1], jnp.float32) if config.dtype == "int8" else None

    dtype = DTYPES[config.dtype]
    lengths = jnp.zeros(config.slots, jnp.int32)
    table = jnp.full((config.slots, config.slot_pages), config.pages, jnp.int32) if config.pages else None
    k, v = jnp.zeros(shape, dtype), None if config.shared else jnp.zeros(shape, dtype)
    return Cache(k, v, scale(), None if config.shared else scale(), lengths, table)


def cache_specs(config: CacheConfig, plan: Plan) -> Cache:
    """Make the PartitionSpec of every array of the KV cache.

    Raises:
      PlanError: see `CacheConfig.check`.

    Example:
      >>> import sharding
      >>> from sharding.inference import CacheConfig, cache_specs
      >>> config = CacheConfig(layers=4, slots=8, kv_heads=2, length=64, head_dim=16)
      >>> tuple(cache_specs(config, sharding.Plan("dp=2, fsdp=2, tp=2")).k)
      (None, ('dp', 'fsdp'), 'tp', None)
    """
    config.check(plan)
    data = plan.present(*DATA_AXES) or None
    names = [next(iter(plan.present(axis)), None) for axis in ("pp", "tp", "cp")]
    values = PartitionSpec(names[0], data, names[1], names[2])
    scales = values if config.dtype == "int8" else None
    v, v_scales = (None, None) if config.shared else (values, scales)
    return Cache(values, v, scales, v_scales, PartitionSpec(data), PartitionSpec(data) if config.pages else None)


def quantize_vectors(x: Float[Array, "*N h"]) -> tuple[Int[Array, "*N h"], Float[Array, "*N"]]:
    """Quantize vectors to int8 with one scale each: x is values * scale within scale / 2."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(-1), 1e-12) / 127
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def append(
    cache: Cache,
    k_LNKTh: Float[Array, "L N K T h"],
    v_LNKTh: Float[Array, "L N K T h"],
    slots_N: Int[Array, " N"],
    starts_N: Int[Array, " N"],
    counts_N: Int[Array, " N"],
    cp: str | None = None,
) -> Cache:
    """Append tokens to the KV cache: the first `counts` of every row, at position `starts` of its slot.

    Args:
      cache: one device's shard.
      k_LNKTh: keys.
      v_LNKTh: values.
      slots_N: slot of every row among this device's; no two rows with tokens share one. Tokens of a paged slot that
        its table has no page for are not written.
      starts_N: position of the first token.
      counts_N: tokens of each row, 0 for an unused row.
      cp: mesh axis that splits positions.

    Example:
      >>> import jax.numpy as jnp
      >>> from sharding.inference import CacheConfig, append, make_cache
      >>> cache = make_cache(CacheConfig(layers=1, slots=2, kv_heads=1, length=8, head_dim=4))
      >>> kv, int32 = jnp.ones((1, 1, 1, 3, 4)), jnp.int32
      >>> slots, starts, counts = jnp.array([1], int32), jnp.array([0], int32), jnp.array([3], int32)
      >>> append(cache, kv, kv, slots, starts, counts).lengths.tolist()
      [0, 3]
    """
    ways, index = (1, 0) if cp is None else (jax.lax.axis_size(cp), jax.lax.axis_index(cp))
    steps_T = jnp.arange(k_LNKTh.shape[3], dtype=jnp.int32)
    position_NT = starts_N[:, None] + steps_T[None]
    here_NT = (steps_T[None] < counts_N[:, None]) & (position_NT % ways == index)
    # The scatter drops rows past the end.
    size = cache.k.shape[3]
    row_NT = jnp.where(here_NT, position_NT // ways, size)
    block_NT = slots_N[:, None]
    if cache.table is not None:
        pages, page_NT = cache.k.shape[1], position_NT // ways // size
        found_NT = jnp.take_along_axis(cache.table[slots_N], page_NT, axis=1, mode="fill", fill_value=pages)
        block_NT, row_NT = jnp.where(here_NT, found_NT, pages), position_NT // ways % size

    def write(array: jax.Array | None, values: jax.Array) -> Any:
        if array is None:
            return None
        order = (1, 3, 0, 2, *range(4, values.ndim))
        return array.at[:, block_NT, :, row_NT].set(values.transpose(order).astype(array.dtype), mode="drop")

    used_N = jnp.where(counts_N > 0, slots_N, cache.lengths.shape[0])
    lengths = cache.lengths.at[used_N].set(starts_N + counts_N, mode="drop")
    if cache.k_scale is None:
        return Cache(write(cache.k, k_LNKTh), write(cache.v, v_LNKTh), None, None, lengths, cache.table)
    (k, k_scale), (v, v_scale) = quantize_vectors(k_LNKTh), quantize_vectors(v_LNKTh)
    scales = write(cache.k_scale, k_scale), write(cache.v_scale, v_scale)
    return Cache(write(cache.k, k), write(cache.v, v), *scales, lengths, cache.table)


def copy_prefix(
    cache: Cache,
    sources_N: Int[Array, " N"],
    targets_N: Int[Array, " N"],
    counts_N: Int[Array, " N"],
    slots_N: Int[Array, " N"] | None = None,
) -> Cache:
    """Let slots begin with the first `counts` tokens of others (prefix caching); a count of 0 changes nothing.

    Source and target may be the same, and nothing is copied.

    Args:
      cache: one device's shard.
      sources_N: slots to copy from; of a paged cache, the page with the last tokens, if it has others too (the whole
        pages before it are shared: the slot's table names them already).
      targets_N: slots, or pages, to copy to.
      counts_N: tokens that the slot then has.
      slots_N: the slots, where targets are pages.

    Example:
      >>> import jax.numpy as jnp
      >>> from sharding.inference import CacheConfig, append, copy_prefix, make_cache
      >>> cache = make_cache(CacheConfig(layers=1, slots=2, kv_heads=1, length=8, head_dim=4))
      >>> kv, zero = jnp.ones((1, 1, 1, 3, 4)), jnp.array([0], jnp.int32)
      >>> cache = append(cache, kv, kv, zero, zero, jnp.array([3], jnp.int32))
      >>> copied = copy_prefix(cache, zero, jnp.array([1], jnp.int32), jnp.array([2], jnp.int32))
      >>> copied.lengths.tolist(), copied.k[0, 1, 0, :3, 0].tolist()
      ([3, 2], [1.0, 1.0, 1.0])
    """
    used_N = jnp.where(counts_N > 0, targets_N, cache.k.shape[1])

    def copy(array: jax.Array | None) -> Any:  # whole blocks: what is past a slot's length is never looked at
        return None if array is None else array.at[:, used_N].set(array[:, sources_N], mode="drop")

    slots_N = targets_N if slots_N is None else slots_N
    lengths = cache.lengths.at[jnp.where(counts_N > 0, slots_N, cache.lengths.shape[0])].set(counts_N, mode="drop")
    return Cache(copy(cache.k), copy(cache.v), copy(cache.k_scale), copy(cache.v_scale), lengths, cache.table)


Read = Callable[..., Past]
"""(cache, layer) -> cached keys and values of the rows of a call; (cache, layer, first, size) -> so many positions."""


def _read_pages(cache: Cache, layer: Any, table_NM: jax.Array) -> Past:
    """The pages of some slots in one layer, gathered into one stretch per slot; what is not a page is any other."""
    heads_K = jnp.arange(cache.k.shape[2])[None, :, None]

    def gather(array: jax.Array | None) -> Any:
        if array is None:
            return None
        x_NKMP = array.at[layer, table_NM[:, None], heads_K].get(mode="clip")
        return x_NKMP.reshape(*x_NKMP.shape[:2], -1, *x_NKMP.shape[4:])

    return Past(gather(cache.k), gather(cache.v), gather(cache.k_scale), gather(cache.v_scale))


def _positions(array: jax.Array, layer: Any, slot: Any, count: int, first: Any, size: int) -> jax.Array:
    """`size` positions (0: all) of `count` slots in one layer [count, K, size, ...]."""
    rest = array.shape[4:]
    start = (layer, slot, 0, first, *[0] * len(rest))
    return jax.lax.dynamic_slice(array, start, (1, count, array.shape[2], size or array.shape[3], *rest))[0]


def read_slots(slots_N: Int[Array, " N"]) -> Read:
    """Make a reader of any slots of this device, in any order (a gather).

    Example:
      >>> import jax.numpy as jnp
      >>> from sharding.inference import CacheConfig, make_cache, read_slots
      >>> cache = make_cache(CacheConfig(layers=1, slots=4, kv_heads=1, length=8, head_dim=4))
      >>> read_slots(jnp.array([2, 0], jnp.int32))(cache, 0).k.shape
      (2, 1, 8, 4)
    """

    def read(cache: Cache, layer: Any, first: Any = 0, size: int = 0) -> Past:
        if cache.table is not None:
            return _read_pages(cache, layer, cache.table[slots_N])

        def take(array: jax.Array | None) -> Any:
            if array is None:
                return None
            if not size:
                return jax.lax.dynamic_index_in_dim(array, layer, 0, keepdims=False)[slots_N]
            return jax.vmap(lambda slot: _positions(array, layer, slot, 1, first, size)[0])(slots_N)

        return Past(take(cache.k), take(cache.v), take(cache.k_scale), take(cache.v_scale))

    return read


def read_range(first: Any, count: int) -> Read:
    """Make a reader of `count` consecutive slots (a slice instead of a gather).

    Example:
      >>> from sharding.inference import CacheConfig, make_cache, read_range
      >>> cache = make_cache(CacheConfig(layers=1, slots=4, kv_heads=1, length=8, head_dim=4))
      >>> read_range(1, 2)(cache, 0).k.shape
      (2, 1, 8, 4)
    """

    def read(cache: Cache, layer: Any, position: Any = 0, size: int = 0) -> Past:
        if cache.table is not None:
            return _read_pages(cache, layer, jax.lax.dynamic_slice_in_dim(cache.table, first, count))

        def cut(array: jax.Array | None) -> Any:
            return None if array is None else _positions(array, layer, first, count, position, size)

        return Past(cut(cache.k), cut(cache.v), cut(cache.k_scale), cut(cache.v_scale))

    return read
