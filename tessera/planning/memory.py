"""How much memory, arithmetic and traffic a training step of the decoder needs under a plan, from sizes alone.

Formulas, and one block traced for the activations it saves: fast enough to judge every factoring of a pod. What they
leave out (fragmentation, the compiler's own copies) is measured against compiled programs in docs/results/pods.md.

Sizes of one device: b rows, t tokens of a row inside a layer, s in the residual stream, S keys, D width, H query and
K key/value heads of size h, F feed-forward channels, V vocabulary.
"""

import functools
import math
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal
from jaxtyping import PyTree

from sharding.analysis.roofline import Placed, placements
from sharding.attention import AttentionForm
from sharding.pipeline.lockstep import lockstep_schedule, slots
from sharding.pipeline.split import split_layer
from sharding.plan import Plan
from sharding.rules import mirrored_specs
from sharding.tensor_parallel import INSIDE, RESIDUAL
from tessera.lm import lora
from tessera.models.remat import Remat
from tessera.models.transformer import DTYPES, Block, TransformerConfig, attention
from tessera.parallel.decoder import ShardedDecoder
from tessera.step import TrainState

StateParts = dict[str, list[Placed]]
"""A train state's arrays by what they are: the model's "params", "optimizer", "ema" (empty without one), "adapters" and
the model's kernels that these belong to, "adapted", which a step adds them to in a copy (both empty without adapters).
"""

F32 = 4
ITEM = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what they are for.

    Attributes:
      params: float32 master weights, and their moving average if there is one; of a model that is adapted its own, the
        adapters (LoRA), and the kernels with these added.
      optimizer: moments and counters.
      gradients: float32, split as the parameters are.
      saved: activations that wait for the backward pass, as the remat policy says.
      attention: of one layer, forward and backward.
      feed_forward: of one layer, dense or experts, forward and backward.
      gathered: parameters of one layer gathered over fsdp, and their gradients.
      logits: of the head, and their gradient.
      host: offloaded activations in the host's memory, per device; no part of the total.
    """

    params: float
    optimizer: float
    gradients: float
    saved: float
    attention: float
    feed_forward: float
    gathered: float
    logits: float
    host: float = 0.0

    @property
    def state(self) -> float:
        """What lives from step to step."""
        return self.params + self.optimizer

    @property
    def total(self) -> float:
        """The most that lives at once: in the head, or in a layer's backward pass when gradients are there too."""
        layer = max(self.attention, self.feed_forward + self.gathered)
        return self.state + self.saved + max(self.logits, self.gradients + layer)

    def rows(self) -> list[tuple[str, float]]:
        """(part, bytes) of the device in order."""
        return [(field.name, getattr(self, field.name)) for field in fields(self) if field.name != "host"]


class Sizes(NamedTuple):
    """One device's sizes, see the module's docstring.

    `M` are the rows of its routed experts, `Z` the width of a row, `W` that inside an expert, `E` the experts' number;
    `layers` are those of its stage, the `routed` ones among them; `item` is the bytes of an activation.
    """

    b: int
    t: int
    s: int
    S: int
    D: int
    H: int
    K: int
    h: int
    F: int
    V: int
    M: int
    Z: int
    W: int
    E: int
    layers: int
    routed: int
    item: int


def local_sizes(
    config: TransformerConfig, plan: Plan, batch_size: int, length: int, grad_accum_steps: int = 1
) -> Sizes:
    """Sizes of what goes through one device's layers at once: a part of the batch, or a microbatch of it."""
    tp, cp, ep = (plan.size(axis) for axis in ("tp", "cp", "ep"))
    rows = max(1, batch_size // grad_accum_steps // plan.data)
    if plan.size("pp") > 1:
        rows = max(1, rows // plan.microbatch_count)
    t, moe = length // cp, config.moe
    # Of the first stage, which has a routed model's first dense layers besides.
    units = -(-((config.layers - config.first_dense) // len(config.pattern)) // plan.size("pp"))
    layers, routed = config.first_dense + units * len(config.pattern), units * config.pattern.count("routed")
    return Sizes(
        b=rows,
        t=t,
        s=t // tp if plan.sequence else t,
        S=t if plan.context == "ring" else length,
        D=config.width,
        H=config.heads // tp,
        K=config.kv_size // math.gcd(config.kv_size, tp),
        h=config.head_size,
        F=config.ff_size // tp,
        V=-(-config.vocab_size // tp),
        # Where nothing may be dropped every device has buffers for the rows of all devices (`moe.parallel.all_to_all`).
        M=math.ceil(rows * t * moe.router.k * min(ep, moe.mixture.slack or ep)) if routed else 0,
        Z=(moe.latent or config.width) if routed else 0,
        W=moe.width_of(config.ff_size) // tp if routed else 0,
        E=moe.router.experts // ep if routed else 0,
        layers=layers,
        routed=routed,
        item=ITEM[config.dtype],
    )


def estimate_memory(
    decoder: ShardedDecoder, placed: StateParts, batch_size: int, length: int, grad_accum_steps: int = 1
) -> Memory:
    """Memory of one device during a training step.

    Args:
      decoder: model and plan.
      placed: the train state's arrays, from `state_placements`.
      batch_size: sequences per step over all devices.
      length: tokens per sequence.
      grad_accum_steps: parts whose gradients the step adds up.
    """
    config, plan = decoder.config, decoder.plan
    z = local_sizes(config, plan, batch_size, length, grad_accum_steps)
    live = LIVE["cpu" if (decoder.platform or jax.default_backend()) == "cpu" else "accelerator"]
    bytes_of = {part: sum(one.bytes for one in found) for part, found in placed.items()}
    gradients = bytes_of["adapted"] + bytes_of["adapters"] if placed["adapters"] else bytes_of["params"]
    if plan.size("pp") > 1:
        gradients *= 2
    elif grad_accum_steps > 1:  # added up over the parts: those of what is trained
        gradients += bytes_of["adapters"] if placed["adapters"] else gradients
    saved, host = _saved(config, plan, z, length)
    layer = _layer_bytes(decoder, placed["params"]) * z.item // F32
    again = any(way.base != "none" for way in config.remat_groups)
    tokens = z.b * z.t
    if chunk := min(decoder.loss_chunk_size, tokens):
        tokens = -(-tokens // -(-tokens // chunk))  # of chunks of one size
    logits = tokens * z.V * F32
    head = z.D * z.V * (z.item + (F32 if chunk else 0))  # with chunks its gradient is added up in float32
    return Memory(
        params=float(sum(bytes_of[part] for part in ("params", "ema", "adapters", "adapted"))),
        optimizer=float(bytes_of["optimizer"]),
        gradients=float(gradients),
        saved=saved,
        attention=_attention(plan, z, live, again),
        feed_forward=_feed_forward(plan, z, live, again),
        gathered=2.0 * layer,
        logits=LOGITS * logits + head,
        host=host,
    )


def state_placements(decoder: ShardedDecoder, state: TrainState) -> StateParts:
    """Where everything of a train state (or of its shapes) lies under a plan."""
    sizes, adapted = decoder.plan.sizes, state.frozen is not None
    shapes = state.frozen["base"] if adapted else state.params
    full_specs = decoder.stored(3)
    found = {"params": placements(shapes, decoder.specs, sizes), "adapters": [], "adapted": []}
    for name, tree in (("optimizer", state.opt_state), ("ema", state.ema)):
        found[name] = placements(tree, mirrored_specs(tree, shapes, full_specs), sizes)
    if adapted:  # replicated, see `tessera.parallel.decoder.state_shardings`
        found["adapters"] = placements(state.params, mirrored_specs(state.params, shapes, full_specs), sizes)
        kernels = {path for path, _ in lora.pairs(state.params)}
        found["adapted"] = [one for one in found["params"] if one.path in kernels]
    return found


# Copies of the logits in float32 that live at once: logits, their exponentials, and the gradient.
LOGITS = 3.0


class Live(NamedTuple):
    """Copies that live at once in a layer's backward pass, read off compiled programs.

    See docs/results/pods.md for TPUs, docs/results/plans.md for CPUs.

    Attributes:
      scores: float32 arrays of the scores of plain attention, besides one in the compute dtype.
      ring: the same of ring attention, by the scores of one device's queries with as many keys.
      streams: arrays of the residual stream, of all tokens inside a layer.
      residuals: the same where the stream may be split along time.
      rows: arrays of the rows that go into routed experts.
      hidden: arrays of their hidden activations.
    """

    scores: float
    ring: float
    streams: float
    residuals: float
    rows: float
    hidden: float


# XLA's CPU compiler copies more: transposed scores, and buffers around the loops over tiles of experts.
LIVE = {"accelerator": Live(2.0, 1.0, 4.0, 0.0, 4.0, 5.0), "cpu": Live(3.0, 5.0, 4.0, 4.0, 11.0, 5.5)}


def _saved(config: TransformerConfig, plan: Plan, z: Sizes, length: int) -> tuple[float, float]:
    """Activations that all layers of a device keep for the backward pass: on the device and on the host."""
    dense = replace_routed(config)
    if plan.size("pp") > 1:
        # A stage keeps its inputs; the layers' own wait for one microbatch, while it is computed again. Without remat
        # these are kept instead, and a schedule that splits the backward pass keeps what W needs. What one work has
        # made and what another reads are outside the slots, as results and operands of their branches; how many of
        # them live at once was read off compiled programs (docs/results/plans.md).
        (way,) = config.remat_groups
        one = saved_per_row(dense, plan, length, way)
        waiting = _waiting(plan.schedule, plan.size("pp"), plan.microbatch_count, plan.virtual)
        inputs, layers = z.b * z.s * z.D * z.item, z.b * (z.layers // plan.virtual)
        own = one.device
        if way.base == "none" or waiting.weights:
            apart = split_per_row(dense, plan, length, way)
            if way.base == "none":
                own = apart.forward * (waiting.inputs + (1 if waiting.weights else 2))
            if waiting.weights:
                own += apart.backward * (waiting.weights + 2)
        return float(waiting.inputs * inputs + own * layers), float(one.host * layers)
    device = host = 0.0
    for stack in config.stacks:
        for way in config.groups(stack):
            one = saved_per_row(dense, plan, length, way)
            device += (one.device * way.layers + one.fixed) * z.b
            host += one.host * z.b * way.layers
            if "routed" in stack.pattern and way.base in ("none", "dots"):
                extra = _expert_saved(plan, z, way) - _DENSE_SAVED[way.base] * z.b * z.t * z.F * z.item
                device += extra * way.layers // len(stack.pattern)
    return device, host


# Arrays of F channels that a dense feed-forward layer keeps: gate, up, three of the activation, their product; or the
# products alone.
_DENSE_SAVED = {"none": 6, "dots": 2}


def _expert_saved(plan: Plan, z: Sizes, way: Remat) -> float:
    """Activations that a layer's experts keep under remat "none"; nothing in their loops and kernels is a dot.

    Gate and up where tokens stay on their device, whose rows are found again from the layer's input. Where they are
    sent, the six arrays of a dense layer, the rows received, which of them are live, and the rows that come back.
    """
    if way.base == "dots":
        return 0.0
    ep = plan.size("ep")
    if ep == 1:
        return 2.0 * z.M * z.W * z.item
    return z.M * ((6 * z.W + z.Z + z.Z / ep) * z.item + z.Z)


class Waiting(NamedTuple):
    """Microbatches whose inputs a stage saves at once, and of which it saves what W needs (0: no split backward)."""

    inputs: int
    weights: int


@functools.lru_cache(maxsize=1024)
def _waiting(schedule: str, stages: int, microbatches: int, virtual: int) -> Waiting:
    table = lockstep_schedule(schedule, stages, microbatches, virtual)
    return Waiting(slots(table)[0], slots(table, "B", "W")[0] if "W" in table.kinds else 0)


def _attention(plan: Plan, z: Sizes, live: Live, again: bool) -> float:
    """Attention's backward pass: the scores of all pairs, hidden ones too, and the block's streams.

    Ring attention computes them again whatever the policy. Where they are saved (`again` is False), what lives are the
    gradients of probabilities and scores.
    """
    ring = plan.size("cp") > 1 and plan.context == "ring"
    each = live.ring * F32 + z.item / 2 if ring else live.scores * F32 + z.item if again else 2.0 * F32
    return z.b * z.H * z.t * z.S * each + _streams(z, live)


def _feed_forward(plan: Plan, z: Sizes, live: Live, again: bool) -> float:
    """The backward pass of the feed-forward layer: gate, up, their product, and the gradients of two of them.

    The first three are not computed again where they are saved, which experts on their own device do not.
    """
    saved = 0 if again else 3
    dense = (5 - saved) * z.b * z.t * z.F * z.item if z.routed < z.layers else 0
    hidden = live.hidden - (saved if plan.size("ep") > 1 else 0)
    experts = z.M * (live.rows * z.Z + hidden * z.W) * z.item
    return float(_streams(z, live) + max(dense, experts))


def _streams(z: Sizes, live: Live) -> float:
    """What the two layers of a block read and add to the residual stream."""
    return (live.streams * z.t + live.residuals * z.s) * z.b * z.D * z.item


def _layer_bytes(decoder: ShardedDecoder, params: list[Placed]) -> float:
    """Float32 bytes of one layer's parameters on a device when they are gathered over fsdp."""
    fsdp = decoder.plan.size("fsdp") if decoder.plan.zero == 3 else 1
    blocks = sum(one.bytes * (fsdp if any("fsdp" in axes for axes in one.axes) else 1) for one in params if _block(one))
    return blocks / max(1, -(-decoder.units // decoder.plan.size("pp")))


def _block(one: Placed) -> bool:
    return one.path.startswith("blocks")


def replace_routed(config: TransformerConfig) -> TransformerConfig:
    """The model with dense layers only."""
    return replace(config, mlp="swiglu")


class Saved(NamedTuple):
    """Bytes of saved activations in the device's memory and (offloaded) in the host's.

    `fixed` are those on the device that depend on no parameter and no activation (masks, rotary factors), which all
    layers of a stack share.
    """

    device: int
    host: int
    fixed: int = 0


def saved_per_row(config: TransformerConfig, plan: Plan, length: int, group: Remat) -> Saved:
    """Activations that one block with a dense feed-forward layer saves for the backward pass, per row of the batch.

    Read off JAX's own residuals.

    The block is traced with one device's sizes and without a mesh: where a collective would change a shape, copies and
    slices stand in. Parameters are not counted.

    Args:
      config: the model.
      plan: how it is split; only tp, cp, `sequence` and `context` matter.
      length: tokens of a sequence.
      group: its remat policy; the block's input is counted under every one.
    """
    if group.base == "full":  # the input alone
        tokens = length // plan.size("cp") // (plan.size("tp") if plan.sequence else 1)
        return Saved(tokens * config.width * DTYPES[config.dtype].dtype.itemsize, 0)
    return _saved_per_row(*_local(config, plan, length), replace(group, layers=1))


class Apart(NamedTuple):
    """Bytes that F leaves for B, and B for W, where the backward pass of a block is split (`sharding.split_layer`)."""

    forward: int
    backward: int


def split_per_row(config: TransformerConfig, plan: Plan, length: int, group: Remat) -> Apart:
    """The residuals of a block in a pipeline, per row; arguments are those of `saved_per_row`."""
    return _split_per_row(*_local(config, plan, length), replace(group, layers=1))


Local = tuple[TransformerConfig, int, int, str, int]
"""One device's block: the model with its sizes, parts of a residual stream, tokens of a row, context and cp."""


def _local(config: TransformerConfig, plan: Plan, length: int) -> Local:
    tp, cp = plan.size("tp"), plan.size("cp")
    local = replace(
        config,
        heads=config.heads // tp,
        kv_heads=config.kv_size // math.gcd(config.kv_size, tp),
        head_dim=0 if config.latent.kv_rank else config.head_size,
        ff=config.ff_size // tp,
        mlp="swiglu",
        layers=1,
        vocab_size=1,
        remat="none",
    )
    return local, tp if plan.sequence else 1, length // cp, plan.context if cp > 1 else "full", cp


@functools.lru_cache(maxsize=512)
def _saved_per_row(config: TransformerConfig, split: int, t: int, context: str, cp: int, group: Remat) -> Saved:
    one, two = (_residuals(*_block_of((config, split, t, context, cp), group, rows)) for rows in (1, 2))
    return Saved(*(b - a for a, b in zip(one, two, strict=True)))


@functools.lru_cache(maxsize=512)
def _split_per_row(config: TransformerConfig, split: int, t: int, context: str, cp: int, group: Remat) -> Apart:
    layer, params, x = _block_of((config, split, t, context, cp), group, rows=1)
    parts = split_layer(layer, params, x, {})
    saved = jax.eval_shape(parts.forward, params, {}, x)[1]
    rest = jax.eval_shape(parts.backward, params, {}, saved, x)[1]
    # No parameters are among them, nor what follows from these alone; gradients of gains are, and are small.
    return Apart(*(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) for leaves in (saved, rest)))


def _block_of(local: Local, group: Remat, rows: int) -> tuple[Any, PyTree, jax.ShapeDtypeStruct]:
    """A block as a function of parameters and input, rematerialized, and shapes of both."""
    config, split, t, context, cp = local

    def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        if split > 1 and axes == INSIDE:
            return jnp.concatenate([x] * split, axis=1)
        return x[:, : x.shape[1] // split] if split > 1 and axes == RESIDUAL else x

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, form: AttentionForm) -> jax.Array:
        if context == "ring":  # keeps queries, keys, values and the result, and computes the rest again
            return jax.checkpoint(lambda q, k, v: attention(q, k, v, form))(q, k, v)
        if context == "all_to_all":
            q, k, v = (x.reshape(rows, t * cp, x.shape[2] // cp, x.shape[3]) for x in (q, k, v))
            return attention(q, k, v, form).reshape(rows, t, -1, v.shape[-1])
        return attention(q, k, v, form)

    block = Block(config, constrain, attend, "swiglu")
    x = jax.ShapeDtypeStruct((rows, t // split, config.width), DTYPES[config.dtype])
    positions = jnp.zeros((rows, t), jnp.int32)
    params = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, positions), x)

    def run(params: Any, x: jax.Array, micro: Any = None) -> jax.Array:
        return block.apply(params, x, positions)[0]

    return run if group.base == "none" else jax.checkpoint(run, policy=group.policy), params, x


def _residuals(saved: Any, params: PyTree, x: jax.ShapeDtypeStruct) -> Saved:
    pull = jax.make_jaxpr(lambda params, x: jax.tree.leaves(jax.vjp(saved, params, x)[1]))(params, x)
    found, moving = dict.fromkeys(Saved._fields, 0), _depend(pull.jaxpr, [True] * len(pull.jaxpr.invars))
    for aval, moves in zip(pull.out_avals, moving, strict=True):
        where = "host" if aval.memory_space == jax.memory.Space.Host else "device" if moves else "fixed"
        found[where] += aval.size * aval.dtype.itemsize
    return Saved(**found)


def _depend(jaxpr: Jaxpr, given: list[bool]) -> list[bool]:
    """Which results of a jaxpr depend on its arguments that are `given`."""
    known = {var for var, is_given in zip(jaxpr.invars, given, strict=True) if is_given}
    depends = lambda var: not isinstance(var, Literal) and var in known  # noqa: E731
    for eqn in jaxpr.eqns:
        flags = list(map(depends, eqn.invars))
        if eqn.primitive.name in ("jit", "pjit"):
            results = _depend(eqn.params["jaxpr"].jaxpr, flags)
        else:
            results = [any(flags)] * len(eqn.outvars)
        known.update(var for var, result in zip(eqn.outvars, results, strict=True) if result)
    return list(map(depends, jaxpr.outvars))
