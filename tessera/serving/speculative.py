"""Two models decode together: the small one drafts a few tokens in every slot, the large one checks them in one pass.

`Speculating` has the interface of `Programs`, so that the engine, and what is above it, does not know the difference.
Axes: B slots, T drafted tokens, U = T + 1, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from sharding.errors import PlanError
from sharding.inference.sample import Settings
from sharding.rules import shardings
from tessera.parallel.decoder import ShardedDecoder
from tessera.serving.programs import Programs, ServeConfig
from tessera.serving.steps import Drawn, Rows, State, verify_program


class Both(NamedTuple):
    """Parameters or states of the two models."""

    target: Any
    draft: Any


@dataclass(frozen=True)
class Speculating:
    """Programs that decode as `target` would alone, faster where `draft` guesses well.

    Distributions are the target's own, with any settings of a request; at temperature 0 so are the tokens. A sampled
    text differs from the one the target draws alone with the same seed, and still depends on nothing else.

    Attributes:
      target: the large model's programs.
      draft: the small one's: same slots, length and vocabulary, and the slots split over as many devices.
      drafted: T, tokens drafted per round.
    """

    target: Programs
    draft: Programs
    drafted: int = 4

    def __post_init__(self) -> None:
        large, small = self.target, self.draft
        if self.drafted < 1:
            raise ValueError(f"drafted={self.drafted} must be at least 1")
        names: Sequence[tuple[str, Any, Any]] = (
            ("slots", large.config.slots, small.config.slots),
            ("length", large.config.length, small.config.length),
            ("chunk", large.config.chunk, small.config.chunk),
            ("pages", large.config.pages, small.config.pages),
            ("page_size", large.config.page_size, small.config.page_size),
            ("vocabulary", large.decoder.vocabulary, small.decoder.vocabulary),
            ("data-parallel parts", large.parts, small.parts),
        )
        for name, one, other in names:
            if one != other:
                raise PlanError(f"the two models differ in {name}: {one}, and {other} of the draft")

    @property
    def config(self) -> ServeConfig:
        """Sizes, the same of both but for what `steps` says: a round draws 1 to T + 1 tokens."""
        return self.target.config

    @property
    def decoder(self) -> ShardedDecoder:
        """The large model."""
        return self.target.decoder

    @property
    def parts(self) -> int:
        """Data-parallel parts the slots are split into."""
        return self.target.parts

    def place(self, params: PyTree, draft: PyTree) -> Both:
        """Parameters of the two, each from `serve`, on their devices."""
        return Both(self.target.place(params), self.draft.place(draft))

    def start(self) -> Both:
        """Empty states."""
        return Both(self.target.start(), self.draft.start())

    @property
    def reach(self) -> int:
        """Most tokens that a round puts into a slot's caches."""
        return self.drafted + 1

    def point(self, state: Both, table: Any) -> Both:
        """Both models' caches have the same page table, see `Programs.point`."""
        return Both(self.target.point(state.target, table), self.draft.point(state.draft, table))

    def reuse(self, state: Both, *args: Any) -> Both:
        """Both models' slots begin with tokens that are in their caches already, see `Programs.reuse`."""
        return Both(self.target.reuse(state.target, *args), self.draft.reuse(state.draft, *args))

    def extend(
        self,
        params: Both,
        state: Both,
        rows: Rows,
        settings: Settings,
        *,
        fresh: bool = False,
        bias: Any = None,
        targets: Any = None,
    ) -> tuple[Both, Drawn]:
        """Both prefill the next chunk of some prompts; what is drawn is the large model's. See `Programs.extend`."""
        draft, _ = self.draft.extend(params.draft, state.draft, rows, fresh=fresh)
        options = {"fresh": fresh, "bias": bias, "targets": targets}
        target, drawn = self.target.extend(params.target, state.target, rows, settings, **options)
        return Both(target, draft), drawn

    def generate(self, params: Both, state: Both, tokens: Any, budget: Any, settings: Settings) -> tuple[Both, Drawn]:
        """One round: draft T tokens in every slot with a budget, check them, and draw the one after those that stay.

        Args:
          params: from `place`.
          state: donated.
          tokens: int [B], the last token of every slot.
          budget: int [B], 0 for a slot not in use; more may be drawn than that, to be ignored.
          settings: of every slot; `index` is that of the first token drawn.

        Returns:
          The states, and tokens [U, B], -1 behind those that were drawn.
        """
        steps = self.drafted + 1  # the last only reads what was drafted last
        live = (jnp.asarray(budget) > 0).astype(jnp.int32)
        draft, made = self.draft.generate(
            params.draft, state.draft, tokens, live * steps, settings, steps=steps, logits=True
        )
        guesses, logits = self._move(made)
        target, drawn, lengths, seen = self._verify(
            params.target, state.target, tokens, guesses, logits, live, settings
        )
        specs = shardings(self.draft.device_mesh, self.draft.state_specs)
        seen = columns(seen, self.draft.decoder.config.vocab_size, 0)
        cache = draft.cache._replace(lengths=jax.device_put(lengths, specs.cache.lengths))
        return Both(target, State(cache, jax.device_put(seen, specs.seen))), drawn

    @cached_property
    def _verify(self) -> Callable:
        return verify_program(self.target)

    def _move(self, made: Drawn) -> tuple[jax.Array, jax.Array]:
        """The draft's tokens and logits on the large model's devices."""
        data, tp = self.target.data, self.target.decoder.tp
        where = shardings(self.target.device_mesh, (PartitionSpec(None, data), PartitionSpec(None, data, tp)))
        logits = columns(made.logits, self.target.decoder.config.vocab_size, -jnp.inf)
        return jax.device_put((made.tokens, logits), where)


def columns(x: jax.Array, count: int, fill: int | float) -> jax.Array:
    """So many columns of the vocabulary, which the two models' plans may have padded differently."""
    if x.shape[-1] < count:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count - x.shape[-1])], constant_values=fill)
    return x[..., :count] if x.shape[-1] > count else x
