"""Keys and values of the tokens read so far, by slot: layout, appending, reading.

Axes: see `sharding.inference`. Position p of a text lies on device p mod c of the c devices of cp, in row p div c, so
that texts of any length are shared evenly.
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
    """Sizes of a cache over all devices.

    Attributes:
      layers: L.
      slots: B, texts that are continued at the same time.
      kv_heads: K.
      length: most tokens of one text, prompt included.
      head_dim: h.
      dtype: "float32", "bfloat16" or "int8" (one float32 scale per position and head).
    """

    layers: int
    slots: int
    kv_heads: int
    length: int
    head_dim: int
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("layers", "slots", "kv_heads", "length", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"cache dtype {self.dtype!r}: {choice(self.dtype, DTYPES)}")

    @property
    def bytes(self) -> int:
        """Size over all devices."""
        per_head = self.head_dim * jnp.dtype(DTYPES[self.dtype]).itemsize + (4 if self.dtype == "int8" else 0)
        return 2 * self.layers * self.slots * self.kv_heads * self.length * per_head

    def check(self, plan: Plan) -> None:
        """Refuse sizes that do not divide.

        Raises:
          PlanError: layers over pp, slots over the data axes, heads over tp or positions over cp.
        """
        parts = {"layers": ("pp",), "slots": DATA_AXES, "kv_heads": ("tp",), "length": ("cp",)}
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


class Cache(NamedTuple):
    """Keys and values, their scales (None unless int8), and the number of tokens read into every slot."""

    k: Any
    v: Any
    k_scale: Any
    v_scale: Any
    lengths: Any


class Past(NamedTuple):
    """Keys and values [N, K, S, h] of some slots in one layer, and their scales [N, K, S] or None."""

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None
    v_scale: jax.Array | None


def make_cache(config: CacheConfig) -> Cache:
    """An empty cache, whole; under jit with `out_shardings` no device ever holds more than its part."""
    shape = (config.layers, config.slots, config.kv_heads, config.length, config.head_dim)

    def scale():
        return jnp.zeros(shape[:-1], jnp.float32) if config.dtype == "int8" else None

    dtype = DTYPES[config.dtype]
    lengths = jnp.zeros(config.slots, jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), scale(), scale(), lengths)


def cache_specs(config: CacheConfig, plan: Plan) -> Cache:
    """Partition of every array of the cache.

    Raises:
      PlanError: sizes that do not divide.
    """
    config.check(plan)
    data = plan.present(*DATA_AXES) or None
    names = [next(iter(plan.present(axis)), None) for axis in ("pp", "tp", "cp")]
    values = PartitionSpec(names[0], data, names[1], names[2])
    scales = values if config.dtype == "int8" else None
    return Cache(values, values, scales, scales, PartitionSpec(data))


def quantise(x: Float[Array, "*N h"]) -> tuple[Int[Array, "*N h"], Float[Array, "*N"]]:
    """int8 values and one scale per vector: x is about values * scale, off by at most scale / 2."""
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
    """Write the first counts tokens of every row into its slot from position `starts` on, and nothing elsewhere.

    Args:
      cache: one device's part.
      k_LNKTh: keys.
      v_LNKTh: values.
      slots_N: slot of every row among this device's; no two rows with tokens share one.
      starts_N: position of the first token.
      counts_N: tokens of each row, 0 for a row that is not in use.
      cp: mesh axis that splits positions.
    """
    ways, index = (1, 0) if cp is None else (jax.lax.axis_size(cp), jax.lax.axis_index(cp))
    steps_T = jnp.arange(k_LNKTh.shape[3], dtype=jnp.int32)
    position_NT = starts_N[:, None] + steps_T[None]
    here_NT = (steps_T[None] < counts_N[:, None]) & (position_NT % ways == index)
    # A place past the end is dropped by the scatter.
    row_NT = jnp.where(here_NT, position_NT // ways, cache.k.shape[3])

    def write(array: jax.Array, values: jax.Array) -> jax.Array:
        order = (1, 3, 0, 2, *range(4, values.ndim))
        return array.at[:, slots_N[:, None], :, row_NT].set(values.transpose(order).astype(array.dtype), mode="drop")

    used_N = jnp.where(counts_N > 0, slots_N, cache.lengths.shape[0])
    lengths = cache.lengths.at[used_N].set(starts_N + counts_N, mode="drop")
    if cache.k_scale is None:
        return Cache(write(cache.k, k_LNKTh), write(cache.v, v_LNKTh), None, None, lengths)
    (k, k_scale), (v, v_scale) = quantise(k_LNKTh), quantise(v_LNKTh)
    scales = write(cache.k_scale, k_scale), write(cache.v_scale, v_scale)
    return Cache(write(cache.k, k), write(cache.v, v), *scales, lengths)


Read = Callable[[Cache, Any], Past]
"""(cache, layer) -> the past of the rows of a call."""


def read_slots(slots_N: Int[Array, " N"]) -> Read:
    """Read any slots of this device, in any order."""

    def read(cache: Cache, layer: Any) -> Past:
        def take(array: jax.Array | None) -> Any:
            return None if array is None else jax.lax.dynamic_index_in_dim(array, layer, 0, keepdims=False)[slots_N]

        return Past(take(cache.k), take(cache.v), take(cache.k_scale), take(cache.v_scale))

    return read


def read_range(first: Any, count: int) -> Read:
    """Read `count` consecutive slots: a slice instead of a gather."""

    def read(cache: Cache, layer: Any) -> Past:
        def cut(array: jax.Array | None) -> Any:
            if array is None:
                return None
            start = (layer, first, *[0] * (array.ndim - 2))
            return jax.lax.dynamic_slice(array, start, (1, count, *array.shape[2:]))[0]

        return Past(cut(cache.k), cut(cache.v), cut(cache.k_scale), cut(cache.v_scale))

    return read
