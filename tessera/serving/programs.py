"""Prefill and decode as jitted programs of static shapes with a donated KV cache, under any plan.

Axes: B slots, N rows of a call, T tokens of a row, V vocabulary, D width. Arguments and results are global arrays;
inside `jax.shard_map` the functions here see one device's part. A row belongs to the data-parallel part its place in
the call says (row r of N to part r // (N / parts)), and its slot is counted within that part.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import PyTree

from sharding.errors import PlanError
from sharding.inference.kv_cache import CacheConfig, cache_specs, make_cache
from sharding.inference.pipeline_ring import Ring, check_groups, default_groups
from sharding.inference.sample import CANDIDATES, Settings, greedy
from sharding.mesh import make_mesh
from sharding.plan import DATA_AXES
from sharding.rules import shardings
from tessera.parallel.decoder import ShardedDecoder
from tessera.serving.layout import lay_out
from tessera.serving.quantized import quantized_specs
from tessera.serving.steps import Drawn, Rows, State, extend_program, generate_program, lookup_program, reuse_program


@dataclass(frozen=True)
class ServeConfig:
    """Sizes that programs are compiled for.

    Attributes:
      slots: B, requests decoded at the same time over all devices.
      length: most tokens of a text, prompt included.
      cache_dtype: "float32", "bfloat16" or "int8"; "" is the model's.
      groups: groups of a device's slots that go around the ring of pipeline stages; 0 takes as many as stages.
      steps: tokens decoded per call (fewer calls to the host, later reaction to a finished text).
      chunk: chunked prefill: most tokens of a prompt read in one call.
      rows: chunks of prompts read in one call by each data-parallel part.
      candidates: see `sharding.inference.sample.CANDIDATES`.
      pages: pages of the KV cache that all slots share (PagedAttention), so that many short texts fit in little memory
        and a common beginning is there once; 0 gives every slot room for `length` tokens, which a step reads faster.
      page_size: tokens of a page.
      layout: of the weights: "stacked" as under every plan, or on one device "rows": unrolled layers with kernels
        transposed for few rows, quantized ones multiplied in int8 (see `tessera.serving.layout`); "auto" is "rows" on
        a CPU.
    """

    slots: int = 8
    length: int = 256
    cache_dtype: str = ""
    groups: int = 0
    steps: int = 1
    chunk: int = 128
    rows: int = 1
    candidates: int = CANDIDATES
    pages: int = 0
    page_size: int = 64
    layout: Literal["auto", "stacked", "rows"] = "auto"

    def __post_init__(self) -> None:
        for name in ("slots", "length", "steps", "chunk", "rows", "candidates", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.pages < 0:
            raise ValueError(f"pages={self.pages} must be at least 1, or 0 for contiguous slots")

    def buckets(self) -> tuple[int, ...]:
        """Lengths that chunks of prompts are padded to: powers of two from 16 below the chunk, and the chunk."""
        sizes = []
        size = min(16, self.chunk)
        while size < self.chunk:
            sizes.append(size)
            size *= 2
        return (*sizes, self.chunk)


@dataclass(frozen=True)
class Programs:
    """Jitted functions of one model, plan and `ServeConfig`; each compiles once per shape of its arguments.

    Over an `AbstractMesh` they can be traced, not run.
    """

    decoder: ShardedDecoder
    config: ServeConfig
    mesh: Mesh | AbstractMesh
    _made: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def device_mesh(self) -> Mesh:
        """The mesh, of devices there are."""
        assert isinstance(self.mesh, Mesh), "programs over an AbstractMesh cannot run"
        return self.mesh

    @property
    def parts(self) -> int:
        """Data-parallel parts the slots are split into."""
        return self.decoder.plan.data

    @property
    def reach(self) -> int:
        """Most tokens that a call of `generate` puts into a slot's cache."""
        return self.config.steps

    @functools.cached_property
    def cache_config(self) -> CacheConfig:
        """Sizes of the KV cache; its dtype is the model's unless the config says another."""
        model, latent = self.decoder.config, self.decoder.config.latent.absorbed
        return CacheConfig(
            model.layers,
            self.config.slots,
            self.decoder.plan.size("tp") if latent else model.kv_size,  # a copy of the latents for each device
            self.config.length,
            self.decoder.cache_size,
            self.config.cache_dtype or model.dtype,
            shared=latent,
            pages=self.config.pages,
            page_size=self.config.page_size,
        )

    @functools.cached_property
    def groups(self) -> int:
        """g, groups of a device's slots."""
        local, stages = self.config.slots // self.parts, self.decoder.plan.size("pp")
        groups = self.config.groups or default_groups(stages, local)
        check_groups(groups, local)
        return groups

    @property
    def data(self) -> Any:
        """Mesh axes of slots and rows in a partition."""
        return self.decoder.plan.present(*DATA_AXES) or None

    @functools.cached_property
    def state_specs(self) -> State:
        """Partition of the state."""
        return State(cache_specs(self.cache_config, self.decoder.plan), PartitionSpec(self.data, self.decoder.tp))

    @property
    def rows(self) -> bool:
        """Whether the weights are laid out for one CPU, see `ServeConfig.layout`."""
        on_cpu = self.decoder.plan.devices == 1 and self.device_mesh.devices.flat[0].platform == "cpu"
        return on_cpu if self.config.layout == "auto" else self.config.layout == "rows"

    def place(self, params: PyTree) -> PyTree:
        """Parameters from `serve`, or placed ones, on their devices."""
        if self.rows:
            params = params if "rows" in params else lay_out(params, self.decoder.config)
            return jax.device_put(params, shardings(self.device_mesh, PartitionSpec()))
        return jax.device_put(params, shardings(self.device_mesh, quantized_specs(params, self.decoder)))

    def empty(self) -> State:
        """An empty state, not placed."""
        vocabulary = self.decoder.config.vocab_size
        return State(make_cache(self.cache_config), jnp.zeros((self.config.slots, vocabulary), jnp.int32))

    def start(self) -> State:
        """An empty state on the devices."""
        if "start" not in self._made:
            self._made["start"] = jax.jit(self.empty, out_shardings=shardings(self.device_mesh, self.state_specs))
        return self._made["start"]()

    def point(self, state: State, table: Any) -> State:
        """Give the slots of a paged cache their pages.

        Args:
          state: given away.
          table: int [B, M], see `Cache.table`.
        """
        where = shardings(self.device_mesh, self.state_specs).cache.table
        # A copy: the devices of a CPU may read the host's array later.
        return state._replace(cache=state.cache._replace(table=jax.device_put(np.array(table, np.int32), where)))

    def prefill(self, params: PyTree, tokens: Any, lengths: Any) -> tuple[State, jax.Array]:
        """A new cache with one prompt per slot; contiguous slots only.

        Args:
          params: from `place`.
          tokens: int [B, T], padded at the end.
          lengths: int [B], tokens of each row; 0 leaves the slot empty.

        Returns:
          The state, and float32 logits [B, V] of each row's last token.

        Raises:
          PlanError: a paged cache, whose pages an `Engine` gives out.
        """
        if self.config.pages:
            raise PlanError(f"pages={self.config.pages}: prefill has no page table; use an Engine, or pages=0")
        tokens, lengths = np.asarray(tokens, np.int32), np.asarray(lengths, np.int32)
        slots = np.tile(np.arange(self.config.slots // self.parts, dtype=np.int32), self.parts)
        state, logits = self.start(), None
        for first in range(0, tokens.shape[1], self.config.chunk):
            chunk = tokens[:, first : first + self.config.chunk]
            counts = np.clip(lengths - first, 0, chunk.shape[1])
            rows = Rows(chunk, slots, np.where(counts > 0, first, 0), counts)
            state, drawn = self.extend(params, state, rows, logits=True, fresh=first == 0)
            keep = (counts > 0)[:, None]
            logits = drawn.logits if logits is None else jnp.where(keep, drawn.logits, logits)
        assert logits is not None
        return state, logits

    def decode(self, params: PyTree, state: State, tokens: Any, active: Any) -> tuple[State, jax.Array]:
        """One step of every active slot.

        Args:
          params: from `place`.
          state: donated.
          tokens: int [B], the last token of every slot, not in the cache yet.
          active: bool [B].

        Returns:
          The state, and float32 logits [B, V] of the token that follows.
        """
        settings = greedy(self.config.slots)
        budget = np.asarray(active).astype(np.int32)
        state, drawn = self.generate(params, state, tokens, budget, settings, steps=1, logits=True)
        return state, drawn.logits[0]

    def extend(
        self,
        params: PyTree,
        state: State,
        rows: Rows,
        settings: Settings | None = None,
        *,
        logits: bool = False,
        every: bool = False,
        fresh: bool = False,
        bias: Any = None,
        targets: Any = None,
    ) -> tuple[State, Drawn]:
        """Prefill the next chunk of some prompts and draw the token that follows each.

        Args:
          params: from `place`.
          state: donated.
          rows: the chunks; a row that starts at 0 forgets what its slot held.
          settings: of each row; None is greedy.
          logits: also give the logits of each row's last token, or with `every` of all its tokens [N, T, V].
          every: see `logits`.
          fresh: promise that every row starts at 0: nothing is read from the cache.
          bias: float [N, V] added to the logits that are drawn from, see `sample_tokens`; None is none.
          targets: int [N, T], the token that follows each token of the chunks: also give its log-probability, and the
            most probable tokens in its place, as `Drawn.read`.
        """
        count = rows.tokens.shape[0]
        if count % self.parts:
            raise PlanError(f"{count} rows do not divide over the {self.parts} data-parallel parts")
        settings = greedy(count) if settings is None else settings
        options = {"logits": logits, "every": every, "fresh": fresh}
        options |= {"biased": bias is not None, "scored": targets is not None, "drawn": rows.prompts is not None}
        key = ("extend", count, rows.tokens.shape[1], *options.values())
        if key not in self._made:
            self._made[key] = extend_program(self, **options)
        rows = Rows(*(None if x is None else np.asarray(x, np.int32) for x in rows))
        return self._cut(*self._made[key](params, state, rows, settings, self._pad(bias), targets))

    def _pad(self, bias: Any) -> Any:
        """A bias for the columns of padding too, whose logits are -inf whatever is added."""
        more = self.decoder.config.vocab_size - self.decoder.vocabulary
        return bias if bias is None or not more else jnp.pad(jnp.asarray(bias), ((0, 0), (0, more)))

    def _cut(self, state: State, drawn: Drawn) -> tuple[State, Drawn]:
        """The same without logits of padding."""
        if drawn.logits is None or not self.decoder.padded_from:
            return state, drawn
        return state, drawn._replace(logits=drawn.logits[..., : self.decoder.vocabulary])

    def reuse(self, state: State, slot: int, tokens: Any, source: int, target: int, prompt: int) -> State:
        """Let a slot begin with tokens that are in the cache already (prefix caching); what it held is forgotten.

        Args:
          state: donated.
          slot: the slot.
          tokens: int [n], at least one.
          source: slot of the same data-parallel part, counted in it, that begins with the tokens; of a paged cache the
            page with the last ones, if it has others too. See `copy_prefix`.
          target: the slot, counted so, or the page, to copy to; the source's number copies nothing.
          prompt: how many of the tokens are of the prompt, and not drawn.
        """
        part, place = divmod(slot, self.config.slots // self.parts)
        one = np.zeros((5, self.parts), np.int32)
        one[:, part] = place, len(tokens), prompt, source, target
        padded = np.zeros((self.parts, self.config.length), np.int32)
        padded[part, : len(tokens)] = tokens
        if "reuse" not in self._made:
            self._made["reuse"] = reuse_program(self)
        slots, counts, prompts, sources, targets = one
        return self._made["reuse"](state, Rows(padded, slots, counts * 0, counts, prompts), sources, targets)

    def generate(
        self,
        params: PyTree,
        state: State,
        tokens: Any,
        budget: Any,
        settings: Settings,
        *,
        steps: int = 0,
        logits: bool = False,
        bias: Any = None,
    ) -> tuple[State, Drawn]:
        """Draw up to `steps` tokens in every slot, each the input of the next.

        Args:
          params: from `place`.
          state: donated.
          tokens: int [B], the last token of every slot, not in the cache yet.
          budget: int [B], tokens to draw in each slot, 0 for a slot not in use; what comes after them is to be ignored.
          settings: of every slot; `index` is that of the first token drawn.
          steps: 0 takes the config's.
          logits: also give the logits [steps, B, V].
          bias: float [B, V] added to the logits that are drawn from, see `sample_tokens`; None is none.
        """
        ring = Ring(self.decoder.plan.size("pp"), self.groups, steps or self.config.steps)
        key = ("generate", ring, logits, bias is not None)
        if key not in self._made:
            self._made[key] = generate_program(self, ring, logits=logits, biased=bias is not None)
        tokens, budget = (jnp.asarray(x, jnp.int32) for x in (tokens, budget))
        return self._cut(*self._made[key](params, state, tokens, budget, settings, self._pad(bias)))

    def verify(
        self, params: PyTree, state: State, tokens: Any, drafted: Any, budget: Any, settings: Settings
    ) -> tuple[State, Drawn]:
        """Draw a token in every slot like `generate`, after the drafted ones that are what greedy decoding gives.

        Args:
          params: from `place`.
          state: donated.
          tokens: int [B], the last token of every slot, not in the cache yet.
          drafted: int [T, B], what may follow, -1 behind it; none but in greedy rows without penalties.
          budget: int [B], 0 for a slot not in use; more may be drawn than that, to be ignored.
          settings: of every slot; `index` is that of the first token drawn.

        Returns:
          The state, and tokens [T + 1, B], -1 behind those that were drawn.
        """
        if "verify" not in self._made:
            self._made["verify"] = lookup_program(self)
        tokens, drafted, budget = (jnp.asarray(x, jnp.int32) for x in (tokens, drafted, budget))
        return self._cut(*self._made["verify"](params, state, tokens, drafted, budget, settings))


def make_programs(decoder: ShardedDecoder, config: ServeConfig, devices: Any = None) -> Programs:
    """Programs for a model from `serve`, on the first of the devices that its plan takes.

    Raises:
      PlanError: cache, slots or groups that do not divide.
    """
    found = list(jax.devices() if devices is None else devices)[: decoder.plan.devices]
    programs = Programs(decoder, config, make_mesh(decoder.plan, found))
    _ = programs.state_specs, programs.groups
    return programs
