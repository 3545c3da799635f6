"""One device's part of prefill and decode, mapped over the mesh and compiled; `programs` says when to call what.

Axes: B slots, N rows of a call, T tokens of a row, V vocabulary, D width; inside `jax.shard_map` one device's sizes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from sharding.inference.kv_cache import Cache, Read, append, copy_prefix, read_range, read_slots
from sharding.inference.pipeline_ring import Ring, pass_on
from sharding.inference.sample import (
    ALTERNATIVES,
    DRAWN,
    READ,
    Settings,
    best,
    logprob,
    mark_seen,
    sample_tokens,
    top_logprobs,
)
from sharding.inference.speculative import accept
from tessera.parallel.decoder import DecodeInputs, ShardedDecoder
from tessera.serving.quantized import quantized_specs


class State(NamedTuple):
    """What stays on the devices between calls: the cache, and how often each slot has seen a token, int32 [B, V]."""

    cache: Any
    seen: Any


class Drawn(NamedTuple):
    """Tokens and log-probabilities, [N] of a prefill or [steps, B] of a decode, and their logits if asked for.

    A token of -1, and what comes after it in its slot, was not drawn. `top` are the most probable tokens and their
    log-probabilities, [N, K] or [steps, B, K], see `sharding.inference.sample.top_logprobs`. `read` is the same of a
    prompt's tokens, if asked for: log-probabilities [N, T] of the token that follows each, and the most probable ones
    in its place, [N, T, K].
    """

    tokens: Any
    logprobs: Any
    logits: Any
    top: Any
    read: Any = None


class Rows(NamedTuple):
    """Chunks of texts: tokens [N, T], slot [N] within the row's data-parallel part, first position [N], count [N].

    Tokens from position `prompts` [N] on were drawn, as the penalties count them; None is none.
    """

    tokens: Any
    slots: Any
    starts: Any
    counts: Any
    prompts: Any = None


def _compile(programs: Any, function: Callable, in_specs: tuple, out_specs: tuple) -> Callable:
    """shard_map and jit with the state, argument 1, donated; parameter specs are read off the first call."""
    made: dict[str, Callable] = {}

    def call(params: PyTree, state: State, *rest: Any) -> Any:
        if "program" not in made:
            of_params = PartitionSpec() if "rows" in params else quantized_specs(params, programs.decoder)
            specs = (of_params, programs.state_specs, *in_specs)
            mapped = jax.shard_map(function, mesh=programs.mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
            made["program"] = jax.jit(mapped, donate_argnums=1)
        return made["program"](params, state, *rest)

    return call


def extend_program(
    programs: Any, *, logits: bool, every: bool, fresh: bool, biased: bool, scored: bool, drawn: bool
) -> Callable:
    """`Programs.extend` of these options, compiled once per shape; `programs` is a `Programs`."""
    decoder, config, data = programs.decoder, programs.config, programs.data

    def local(
        params: PyTree, state: State, rows: Rows, settings: Settings, bias: Any, targets: Any
    ) -> tuple[State, Drawn]:
        past = None if fresh else read_slots(rows.slots)
        x_NTD, cache = _read(decoder, params, state.cache, rows, past, settings.adapter)
        last_N = jnp.maximum(rows.counts - 1, 0)
        if not (every or scored):
            x_NTD = jnp.take_along_axis(x_NTD, last_N[:, None, None], axis=1)
        x_NTD = _from_first(x_NTD, decoder.pp)
        logits_NTV = decoder.logits(params, x_NTD)
        seen = _see(state.seen, rows, decoder.tp)
        last_NV = logits_NTV[:, -1]
        if scored:
            last_NV = jnp.take_along_axis(logits_NTV, last_N[:, None, None], axis=1)[:, 0]
        drawn = sample_tokens(last_NV, seen[rows.slots], settings, decoder.tp, config.candidates, bias)
        shown = (logits_NTV if every else last_NV) if logits else None
        top = top_logprobs(last_NV, settings, decoder.tp)
        read = _score(logits_NTV, targets, settings, decoder.tp) if scored else None
        return State(cache, seen), Drawn(*drawn, shown, top, read)

    row = PartitionSpec(data)
    shown = PartitionSpec(data, None, decoder.tp) if every else PartitionSpec(data, decoder.tp)
    read = (row, (row, row)) if scored else None
    out = (programs.state_specs, Drawn(row, row, shown if logits else None, (row, row), read))
    bias = PartitionSpec(data, decoder.tp) if biased else None
    given = (_rows_specs(row, drawn), _settings_specs(row), bias, row if scored else None)
    return _compile(programs, local, given, out)


def reuse_program(programs: Any) -> Callable:
    """`Programs.reuse`, compiled: (state, rows, sources [N], targets [N]), rows of tokens that slots are to have."""
    tp, row = programs.decoder.tp, PartitionSpec(programs.data)

    def local(state: State, rows: Rows, sources: Any, targets: Any) -> State:
        cache = copy_prefix(state.cache, sources, targets, rows.counts, rows.slots)
        return State(cache, _see(state.seen, rows, tp))

    specs = programs.state_specs
    given = (specs, _rows_specs(row, True), row, row)
    mapped = jax.shard_map(local, mesh=programs.mesh, in_specs=given, out_specs=specs, check_vma=False)
    return jax.jit(mapped, donate_argnums=0)


def _score(logits_NTV: jax.Array, targets_NT: jax.Array, settings: Settings, tp: str | None) -> tuple:
    """Log-probabilities [N, T] of the tokens that follow, and (ids, values) [N, T, K] of the most probable ones."""
    n, t, columns = logits_NTV.shape
    logits_MV = logits_NTV.reshape(n * t, columns)
    top = top_logprobs(logits_MV, settings, tp)
    return logprob(logits_MV, targets_NT.reshape(-1), tp).reshape(n, t), tuple(x.reshape(n, t, -1) for x in top)


def _rows_specs(row: PartitionSpec, drawn: bool) -> Rows:
    return Rows(row, row, row, row, row if drawn else None)


def _settings_specs(row: PartitionSpec) -> Settings:
    return Settings(*[row] * len(Settings._fields))


def _read(
    decoder: ShardedDecoder, params: PyTree, cache: Cache, rows: Rows, read: Read | None, adapter: Any
) -> tuple[jax.Array, Cache]:
    """Rows through all stages; the result [N, T, D] is that of the first stage's devices."""
    stage = 0 if decoder.pp is None else jax.lax.axis_index(decoder.pp)
    inputs = DecodeInputs(rows.tokens, rows.starts, read, adapter)

    def tick(carry: tuple, number: jax.Array) -> tuple:
        x_NTD, cache = carry
        y_NTD, k, v = decoder.cached_layers(params, x_NTD, cache, inputs)
        counts = _after(jnp.where(number == stage, rows.counts, 0), y_NTD)  # a stage writes once, when its turn comes
        cache = append(cache, k, v, rows.slots, rows.starts, counts, decoder.cp)
        return (pass_on(y_NTD, decoder.pp), cache), None

    ticks = jnp.arange(decoder.plan.size("pp"))
    # After the last tick the result has come around to stage 0.
    return jax.lax.scan(tick, (decoder.embed(params, rows.tokens), cache), ticks)[0]


def _after(counts_N: jax.Array, x_NTD: jax.Array) -> jax.Array:
    """The counts, known only once the last layer has read the cache: else XLA:CPU copies it whole before the write."""
    return counts_N + (x_NTD[:, 0, 0] > jnp.inf).astype(jnp.int32)  # zeros, which the compiler does not know


def _from_first(x: jax.Array, pp: str | None) -> jax.Array:
    """The first stage's array on all stages."""
    return x if pp is None else jax.lax.psum(jnp.where(jax.lax.axis_index(pp) == 0, x, 0), pp)


def _see(seen_BV: jax.Array, rows: Rows, tp: str | None) -> jax.Array:
    """Forget what slots held whose rows begin, and note the tokens read."""
    begins_N = (rows.counts > 0) & (rows.starts == 0)
    seen_BV = seen_BV.at[jnp.where(begins_N, rows.slots, seen_BV.shape[0])].set(0, mode="drop")
    ok_NT = jnp.arange(rows.tokens.shape[1])[None] < rows.counts[:, None]
    if rows.prompts is None:
        return mark_seen(seen_BV, rows.slots, rows.tokens, ok_NT, tp, READ)
    drawn_NT = rows.starts[:, None] + jnp.arange(rows.tokens.shape[1])[None] >= rows.prompts[:, None]
    seen_BV = mark_seen(seen_BV, rows.slots, rows.tokens, ok_NT & ~drawn_NT, tp, READ)
    return mark_seen(seen_BV, rows.slots, rows.tokens, ok_NT & drawn_NT, tp, DRAWN)


def generate_program(programs: Any, ring: Ring, *, logits: bool, biased: bool) -> Callable:
    """`Programs.generate` with this schedule, compiled; `programs` is a `Programs`."""
    decoder, config, data = programs.decoder, programs.config, programs.data
    count = config.slots // programs.parts // ring.groups

    def local(
        params: PyTree, state: State, tokens: Any, budget: Any, settings: Settings, bias: Any
    ) -> tuple[State, Drawn]:
        stage = 0 if decoder.pp is None else jax.lax.axis_index(decoder.pp)
        groups_n = jnp.arange(ring.groups * count, dtype=jnp.int32).reshape(ring.groups, count)
        shape = (ring.steps, *tokens.shape)
        alternatives = (*shape, min(ALTERNATIVES, decoder.config.vocab_size))
        top = jnp.zeros(alternatives, jnp.int32), jnp.zeros(alternatives)
        output = Drawn(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), None, top)
        if logits:
            width = decoder.config.vocab_size // decoder.plan.size("tp")
            output = output._replace(logits=jnp.zeros((*shape, width), jnp.float32))

        def tick(carry: tuple, number: jax.Array) -> tuple:
            x_N1D, tokens_N, state, tokens, output = carry
            item = ring.item(number, stage)
            slots_N = groups_n[item.group]
            entering_N, budget_N, settings_N = jax.tree.map(lambda leaf: leaf[slots_N], (tokens, budget, settings))
            # Only the first stage knows what was drawn in this call: the tokens go around with their activations.
            tokens_N = jnp.where(stage == 0, entering_N, tokens_N)
            live_N = item.live & (item.step < budget_N)
            starts_N = state.cache.lengths[slots_N]
            entering_N1D = decoder.embed(params, tokens_N[:, None])
            x_N1D = jnp.where(stage == 0, entering_N1D, x_N1D)
            inputs = DecodeInputs(tokens_N[:, None], starts_N, read_range(slots_N[0], count), settings_N.adapter)
            y_N1D, k, v = decoder.cached_layers(params, x_N1D, state.cache, inputs)
            counts_N = _after(live_N.astype(jnp.int32), y_N1D)
            cache = append(state.cache, k, v, slots_N, starts_N, counts_N, decoder.cp)
            seen = mark_seen(state.seen, slots_N, tokens_N[:, None], live_N[:, None], decoder.tp, DRAWN)
            logits_NV = decoder.logits(params, y_N1D)[:, 0]
            settings_N = settings_N._replace(index=settings_N.index + item.step)
            bias_NV = None if bias is None else bias[slots_N]
            next_N, logprob_N = sample_tokens(
                logits_NV, seen[slots_N], settings_N, decoder.tp, config.candidates, bias_NV
            )
            top = top_logprobs(logits_NV, settings_N, decoder.tp)
            new = Drawn(next_N, logprob_N, logits_NV if logits else None, top)
            output = _record(output, new, item.step, slots_N, live_N)
            moved = (y_N1D, tokens_N, next_N, slots_N, live_N)
            x_N1D, tokens_N, next_N, slots_N, live_N = (pass_on(x, decoder.pp) for x in moved)
            # What the last stage drew is the input of the first; other stages get what no stage before the first reads.
            place_N = jnp.where(live_N & (stage == 0), slots_N, tokens.shape[0])
            tokens = tokens.at[place_N].set(next_N, mode="drop")
            return (x_N1D, tokens_N, State(cache, seen), tokens, output), None

        x_N1D = decoder.embed(params, tokens[:count, None]) * 0
        carry, _ = jax.lax.scan(tick, (x_N1D, tokens[:count], state, tokens, output), jnp.arange(ring.ticks))
        _, _, state, _, output = carry
        if decoder.pp is not None:  # only the last stage drew from finished activations
            final = stage == decoder.plan.size("pp") - 1
            output = jax.tree.map(lambda leaf: jax.lax.psum(jnp.where(final, leaf, 0), decoder.pp), output)
        return state, output

    row, drawn = PartitionSpec(data), PartitionSpec(None, data)
    out = (
        programs.state_specs,
        Drawn(drawn, drawn, PartitionSpec(None, data, decoder.tp) if logits else None, (drawn, drawn)),
    )
    bias = PartitionSpec(data, decoder.tp) if biased else None
    return _compile(programs, local, (row, row, _settings_specs(row), bias), out)


def verify_program(programs: Any) -> Callable:
    """Check what a draft drew after every slot's last token; see `tessera.serving.speculative`.

    The compiled (params, state, tokens [B], drafted [U, B], logits [U, B, V], budget [B], settings) gives the state,
    the tokens that were drawn [U, B], and copies of its lengths and `seen` for the draft. Of the U = T + 1 steps of the
    draft the last only read.
    """
    decoder, config, data = programs.decoder, programs.config, programs.data

    def local(
        params: PyTree, state: State, tokens: Any, drafted: Any, logits: Any, budget: Any, settings: Settings
    ) -> tuple[State, Drawn, Any, Any]:
        u, b = drafted.shape
        slots_B, live_B, starts_B = jnp.arange(b, dtype=jnp.int32), budget > 0, state.cache.lengths
        drafted_BT = drafted[:-1].T
        rows = Rows(jnp.concatenate([tokens[:, None], drafted_BT], 1), slots_B, starts_B, jnp.where(live_B, u, 0))
        x_BUD, cache = _read(decoder, params, state.cache, rows, read_range(0, b), settings.adapter)
        logits_BUV = decoder.logits(params, _from_first(x_BUD, decoder.pp))
        seen = mark_seen(state.seen, slots_B, tokens[:, None], live_B[:, None], decoder.tp, DRAWN)
        draft_BTV = logits[:-1].transpose(1, 0, 2)
        stayed_B, next_B = accept(logits_BUV, draft_BTV, drafted_BT, seen, settings, decoder.tp, config.candidates)
        drawn_BU = jnp.concatenate([drafted_BT, next_B[:, None]], 1)
        drawn_BU = jnp.where(jnp.arange(u)[None] == stayed_B[:, None], next_B[:, None], drawn_BU)
        state = State(cache, seen)
        state, drawn = _keep(decoder, state, logits_BUV, drawn_BU, stayed_B, live_B, starts_B, settings)
        return state, drawn, state.cache.lengths, state.seen

    row, drawn = PartitionSpec(data), PartitionSpec(None, data)
    state = programs.state_specs
    given = (row, drawn, PartitionSpec(None, data, decoder.tp), row, _settings_specs(row))
    return _compile(
        programs, local, given, (state, Drawn(drawn, drawn, None, (drawn, drawn)), state.cache.lengths, state.seen)
    )


def lookup_program(programs: Any) -> Callable:
    """`Programs.verify`, compiled: like `verify_program`, of tokens [T, B] that no model has drawn, -1 for none.

    They stay where the model's best token is the same, so rows with drafts must be greedy without penalties.
    """
    decoder, config, data = programs.decoder, programs.config, programs.data

    def local(
        params: PyTree, state: State, tokens: Any, drafted: Any, budget: Any, settings: Settings
    ) -> tuple[State, Drawn]:
        drafted_BT = drafted.T
        b, t = drafted_BT.shape
        slots_B, live_B, starts_B = jnp.arange(b, dtype=jnp.int32), budget > 0, state.cache.lengths
        counts_B = jnp.where(live_B, 1 + (drafted_BT >= 0).sum(1), 0)
        read_BU = jnp.concatenate([tokens[:, None], jnp.maximum(drafted_BT, 0)], 1)
        rows = Rows(read_BU, slots_B, starts_B, counts_B.astype(jnp.int32))
        x_BUD, cache = _read(decoder, params, state.cache, rows, read_range(0, b), settings.adapter)
        logits_BUV = decoder.logits(params, _from_first(x_BUD, decoder.pp))
        seen = mark_seen(state.seen, slots_B, tokens[:, None], live_B[:, None], decoder.tp, DRAWN)
        first_B, _ = sample_tokens(logits_BUV[:, 0], seen, settings, decoder.tp, config.candidates)
        best_N = best(logits_BUV.reshape(b * (t + 1), -1), decoder.tp)
        drawn_BU = best_N.reshape(b, t + 1).at[:, 0].set(first_B)
        stayed_B = jnp.cumprod((drafted_BT == drawn_BU[:, :-1]).astype(jnp.int32), axis=1).sum(1)
        return _keep(decoder, State(cache, seen), logits_BUV, drawn_BU, stayed_B, live_B, starts_B, settings)

    row, drawn = PartitionSpec(data), PartitionSpec(None, data)
    given = (row, drawn, row, _settings_specs(row))
    return _compile(programs, local, given, (programs.state_specs, Drawn(drawn, drawn, None, (drawn, drawn))))


def _keep(
    decoder: ShardedDecoder,
    state: State,
    logits_BUV: jax.Array,
    drawn_BU: jax.Array,
    stayed_B: jax.Array,
    live_B: jax.Array,
    starts_B: jax.Array,
    settings: Settings,
) -> tuple[State, Drawn]:
    """The state and what was drawn where the first `stayed` of the drafted tokens are right, and one follows them."""
    b, u = drawn_BU.shape
    step_U, stayed_B1 = jnp.arange(u)[None], stayed_B[:, None]
    drawn_BU = jnp.where(step_U <= stayed_B1, drawn_BU, -1)
    logits_NV = logits_BUV.reshape(b * u, -1)
    logprob_N = logprob(logits_NV, drawn_BU.reshape(-1), decoder.tp)
    top = jax.tree.map(lambda x: x.reshape(b, u, -1).swapaxes(0, 1), top_logprobs(logits_NV, settings, decoder.tp))
    stays_BT = live_B[:, None] & (step_U < stayed_B1)[:, :-1]
    seen = mark_seen(state.seen, jnp.arange(b, dtype=jnp.int32), drawn_BU[:, :-1], stays_BT, decoder.tp, DRAWN)
    # Nothing past a slot's length is ever looked at: this forgets what did not stay.
    lengths = jnp.where(live_B, starts_B + 1 + stayed_B, starts_B)
    return State(state.cache._replace(lengths=lengths), seen), Drawn(drawn_BU.T, logprob_N.reshape(b, u).T, None, top)


def _record(output: Drawn, new: Drawn, step: Any, slots_N: Any, live_N: Any) -> Drawn:
    """Note what was drawn where the rows are live."""
    place_N = jnp.where(live_N, slots_N, output.tokens.shape[1])
    return jax.tree.map(lambda all_BN, new_N: all_BN.at[step, place_N].set(new_N, mode="drop"), output, new)
