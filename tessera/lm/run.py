"""A language model's training run: its settings, and its parts made from the config of `scripts/train.py`."""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key, PyTree
from ml_collections import ConfigDict
from rich.table import Table

from lottery.masks import support
from lottery.transform import keep_zeros
from sharding.errors import PlanError
from sharding.mesh import make_mesh
from sharding.plan import Plan
from tessera.data.loader import held_out_batches, token_batches, window_count
from tessera.data.packing import Packed
from tessera.data.rampup import RampedBatches, RampUp, stages
from tessera.data.text import (
    ByteTokenizer,
    TextConfig,
    TextSplits,
    Tokenizer,
    join_documents,
    load_text,
    overlap,
    read_texts,
    separator_of,
)
from tessera.infra.config import ConfigError, build, check_seeds, checked
from tessera.infra.remote import local
from tessera.infra.workdir import read_settings, resolve
from tessera.lm import lora
from tessera.lm.distill import DistillConfig, distill_loss
from tessera.lm.lora import LoRAConfig
from tessera.lm.warm_start import Pretrained, StartConfig, starting_params
from tessera.loop import Batches, LoopConfig, evaluate
from tessera.models.attention_forms import resolved
from tessera.models.lm_loss import lm_loss, make_adjust, make_eval, training_flops
from tessera.models.transformer import Decoder, TransformerConfig, param_shapes
from tessera.optim.optimizer import OptimizerConfig, eval_params, learning_rate, make_optimizer
from tessera.parallel.decoder import ShardedDecoder, batch_sharding, state_shardings
from tessera.parallel.pipelined_decoder import make_loss
from tessera.step import LossFn, Metrics, StepConfig, TrainState, init_state, make_train_step


@dataclass(frozen=True)
class RunConfig:
    """What one training step depends on.

    Attributes:
      model, plan, optimizer, step: the parts.
      batch_size: sequences per step over all devices.
      ramp: of the batch size; None without.
      length: tokens per sequence.
      z_loss: see `tessera.losses.cross_entropy`.
      loss_chunk_size: tokens of a device whose logits exist at once, see `sharding.linear_cross_entropy`; 0 is all.
      lora: adapters that are trained in place of the model; of rank 0 there are none.
      distill: a teacher's part in the loss.
      keep_zeros: weights of kernels that are zero stay zero.
    """

    model: TransformerConfig
    plan: Plan
    optimizer: OptimizerConfig
    step: StepConfig
    batch_size: int
    length: int
    z_loss: float = 0.0
    loss_chunk_size: int = 0
    lora: LoRAConfig | None = None
    distill: DistillConfig | None = None
    keep_zeros: bool = False
    ramp: RampUp | None = None

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """All batch sizes of the run, ascending."""
        return self.ramp.sizes if self.ramp else (self.batch_size,)

    def parts(self, batch_size: int) -> int:
        """Parts of gradient accumulation for a batch of the ramp: their rows stay the same, their number grows."""
        return batch_size // accumulated_batch(self) if self.step.grad_accum_steps > 1 else 1

    @property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer of what is trained."""
        tx = make_optimizer(self.optimizer)
        return keep_zeros(tx) if self.keep_zeros and self.lora is None else tx

    def decoder(self, plan: Plan, platform: str = "") -> ShardedDecoder:
        """The model under a plan, for a platform."""
        return ShardedDecoder(self.model, plan, self.z_loss, platform, loss_chunk_size=self.loss_chunk_size)

    def whole(self, params: PyTree, frozen: PyTree) -> PyTree:
        """The model's parameters, from those that are trained and those of `TrainState.frozen`."""
        if self.lora is None:
            return params
        masks = support(frozen["base"]) if self.keep_zeros else None
        return lora.apply(frozen["base"], params, self.lora, masks)

    @property
    def join(self) -> Callable[[PyTree, PyTree], PyTree] | None:
        """What the loss takes, from what is trained and what is frozen; None where that is the parameters alone."""
        if self.distill is None:
            return None if self.lora is None else self.whole
        teacher = "base" if self.lora is not None and not self.distill.dir else "teacher"
        return lambda params, frozen: (self.whole(params, frozen), frozen[teacher])


class Placement(NamedTuple):
    """Shardings of the state (one for all of it, or a tree like it) and of a batch's leading axis."""

    state: PyTree
    batch: NamedSharding

    def place(self, batch: PyTree) -> PyTree:
        """This process's rows of a batch (NumPy arrays [b, ...]) as part of the global device arrays [B, ...]."""
        return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(self.batch, rows), batch)

    def share(self) -> tuple[int, int]:
        """(index, count): which of how many parts of every batch this process feeds to its devices.

        Under a plan whose tensor-parallel devices (say) span processes, these processes feed the same part.

        Raises:
          ValueError: the processes' parts overlap without being the same.
        """
        axes = self.batch.spec[0] if len(self.batch.spec) else ()
        names = (axes,) if isinstance(axes, str) else axes or ()
        parts = int(np.prod([self.batch.mesh.shape[name] for name in names], dtype=int))
        owned: dict[int, set[int]] = {}
        blocks: Mapping[Any, Any] = self.batch.devices_indices_map((parts,))
        for device, (rows,) in blocks.items():
            owned.setdefault(device.process_index, set()).add(rows.start or 0)
        return batch_share(owned, jax.process_index())


class Run(NamedTuple):
    """The parts of a training run, from `build_run`.

    Attributes:
      settings: what makes this run this run, JSON values. The text itself belongs to it: another text in the same files
        is another run. The plan does not: a run may go on under another one.
      config: model, plan, optimizer and step.
      loop: how long and how often.
      placement: where state and batches lie on the devices.
      key: constant key of the steps.
      step_fn: (state, batch, key) -> (state, metrics), see `tessera.step.make_train_step`.
      init_fn: resumed -> the first state, placed; one that is `resumed` is needed for its shapes alone.
      loader: split -> this process's part of its batches, shuffled, for ever; see `tessera.data.loader.token_batches`.
      held_out: split -> the first `config.eval.batches` full batches of it, in its order.
      eval_fn: (state, split) -> loss and accuracy on the first `config.eval.batches` batches, a last partial one
        included, with averaged weights where there are any; and bits per byte, by the split's bytes per token, where
        these are known. On "validation" also loss and bits per byte of every one of `config.eval.texts`, by name.
      schedule: step -> learning rate.
      tokenizer: of the text; None for token files without one.
      notes: lines to print at the start: the overlap of training and held-out text, what packing leaves as padding, the
        steps of a batch-size ramp, and what computes attention.
    """

    settings: dict[str, Any]
    config: RunConfig
    loop: LoopConfig
    placement: Placement
    key: Key[Array, ""]
    step_fn: Callable[..., Any]
    init_fn: Callable[[bool], TrainState]
    loader: Callable[[str], Batches]
    held_out: Callable[[str], Iterator[dict[str, np.ndarray]]]
    eval_fn: Callable[[TrainState, str], dict[str, float]]
    schedule: optax.Schedule
    tokenizer: Tokenizer | None
    notes: tuple[str, ...]


def build_run(c: ConfigDict, pretrained: Pretrained | None = None) -> Run:
    """Check every setting, read the text, and make the parts of a run; nothing is written.

    Args:
      c: the settings of `tessera.lm.schema`, complete (the command line gives them so; see
        `tessera.infra.schema.completed`).
      pretrained: what `config.start.dir` and `config.distill.dir` name, in whose architecture `c.model` is (see
        `tessera.lm.warm_start.with_pretrained`).

    Raises:
      ConfigError: a setting that is wrong, by its path, or a text that is too small.
      DataUnavailable: the text is neither there nor to be had.
    """
    check_seeds(c.to_dict())
    for name, value, least in (
        ("steps", c.steps, 1),
        ("batch_size", c.batch_size, 1),
        ("length", c.length, 1),
        ("eval.batches", c.eval.batches, 1),
        ("eval.sample", c.eval.sample, 0),
    ):
        if value < least:
            raise ConfigError(f"config.{name}={value}: at least {least} is needed")
    loop = checked("config", LoopConfig, c.steps, c.log.every, c.eval.every, tokens=c.length)
    start = build(StartConfig, c.start, "config.start")
    text = build(TextConfig, c.data, "config.data")
    least = words_at_start(start, pretrained)
    # All settings are checked before the text is read, or even fetched.
    config = run_config(c, max(least, text.vocab_size))
    splits = checked("config.data", load_text, text)
    rows = splits.packed(c.length, text.packing) if text.packing else splits
    check_splits(c, rows)
    if splits.vocab_size != text.vocab_size:  # a small text has fewer byte pairs than were asked for
        config = run_config(c, max(least, splits.vocab_size))
    check_adaptation(c, config, splits.vocab_size, least)
    how: Any = {"packed": bool(text.packing)}
    checked("config.model", config.model.check_attention, jax.default_backend(), config.length, **how)
    loss_fn, placement = checked("config.plan", under_plan, config)
    index, count = checked("config.plan", placement.share)
    loop = replace(loop, devices=placement.batch.mesh.size, flops=checked("config.lora", run_flops, config, pretrained))
    for size in config.batch_sizes:
        if size % count:
            raise ConfigError(f"config.batch_size={size}: {count} processes share a batch; a multiple is needed")
    init_key, step_key = jax.random.split(jax.random.key(c.seed))
    eval_step, adjust = make_eval(loss_fn), make_adjust(config.model) if config.lora is None else None
    trained_loss = (
        loss_fn
        if config.distill is None
        else checked("config.distill", with_teacher, config, pretrained, placement.batch.mesh)
    )
    steps_by_parts = {
        parts: make_train_step(
            trained_loss, config.tx, replace(config.step, grad_accum_steps=parts), adjust=adjust, join=config.join
        )
        for parts in {config.parts(size) for size in config.batch_sizes}
    }

    def step_fn(state: TrainState, batch: PyTree, key: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        return steps_by_parts[config.parts(batch["tokens"].shape[0])](state, batch, key)

    def init_fn(resumed: bool) -> TrainState:
        params = teacher = None
        if pretrained is not None and (not resumed or config.join is not None):
            params, teacher = pretrained.params, pretrained.teacher
        if start.workdir and (not resumed or config.join is not None):
            params = checked("config.start", starting_params, start, config.model, key=init_key)
        first = jax.jit(lambda *given: first_state(config, given[0], init_key, given[1]), out_shardings=placement.state)
        return checked("config.lora", first, params, teacher)

    def loader(split: str, **options: Any) -> Batches:
        ramp = config.ramp if split == "train" else None
        sizes: dict[str, Any] = {"batch_size": ramp.unit if ramp else config.batch_size, "length": config.length}
        sizes |= {"seed": c.seed, "parts": rows.parts if split == "train" else ()}
        found = token_batches(getattr(rows, split), **sizes, process_index=index, process_count=count, **options)
        return RampedBatches(found, ramp) if ramp else found

    def held_out(split: str) -> Iterator[dict[str, np.ndarray]]:
        batches: Any = loader(split, shuffle=False, repeat=False)
        return itertools.islice(batches, c.eval.batches)

    named = {name: named_text(c, name, text, splits) for name in c.eval.texts}

    def weighed(tokens: Any) -> Iterator[tuple[Any, float]]:
        sizes = {"batch_size": config.batch_size, "length": config.length, "limit": c.eval.batches}
        found = held_out_batches(tokens, **sizes, process_index=index, process_count=count)
        for batch, weight in found:
            yield placement.place({name: value for name, value in batch.items() if name != "ids"}), weight

    def eval_fn(state: TrainState, split: str) -> dict[str, float]:
        params = whole_model(config, state)
        found = evaluate(eval_step, params, weighed(getattr(rows, split)))
        if split in splits.bytes_per_token:
            found["bits_per_byte"] = found["loss"] / math.log(2) / splits.bytes_per_token[split]
        for name, (tokens, size) in named.items() if split == "validation" else ():
            loss = evaluate(eval_step, params, weighed(tokens))["loss"]
            found |= {f"{name}: loss": loss, f"{name}: bits_per_byte": loss / math.log(2) / size}
        return found

    settings = {name: value for name, value in resolve(c).items() if name not in ("plan", "sharding")}
    settings |= {"data_sha256": splits.content_hash}
    if pretrained is not None:  # another model in the same directory is another run
        settings |= {"start_sha256": tree_hash((pretrained.params, pretrained.teacher))}
    if text.tokenizer != "bpe" and config.model.vocab_size != text.vocab_size:
        settings |= {"vocab_size": config.model.vocab_size}  # that of a file, or of the model at the start
    schedule = learning_rate(config.optimizer)
    devices = placement.batch.mesh.devices
    how |= {"devices": devices.size}
    attention = checked("config.model", config.model.check_attention, devices.flat[0].platform, config.length, **how)
    said = (overlap_line(text, splits), packing_line(text, rows), ramp_line(config.ramp, c.steps), attention)
    functions = (step_fn, init_fn, loader, held_out, eval_fn, schedule)
    return Run(settings, config, loop, placement, step_key, *functions, splits.tokenizer, tuple(filter(None, said)))


def named_text(c: ConfigDict, name: str, text: TextConfig, splits: TextSplits) -> tuple[Any, float]:
    """The tokens of one of `config.eval.texts`, packed if the training text is, and its bytes per token.

    Raises:
      ConfigError: it cannot be read, is too small for a batch, or the run's tokens have no tokenizer.
    """
    where = "config.eval.texts"
    if splits.tokenizer is None:
        raise ConfigError(f"{where}={name!r}: the training tokens have no tokenizer; name it as data.tokenizer")
    documents = [one.encode() for one in checked(where, read_texts, replace(text, name=name, sources=(), max_bytes=0))]
    separator = separator_of(splits.tokenizer, text.tokenizer if text.from_file else "", text.separator)
    tokens, places = join_documents(splits.tokenizer, documents, separator)
    least = c.batch_size * c.length + 1
    if len(tokens) < least:
        raise ConfigError(f"{where}: {name!r} has {len(tokens)} tokens; at least {least} fill a batch")
    rows = Packed(tokens, places, c.length, text.packing) if text.packing else tokens
    return rows, sum(map(len, documents)) / len(tokens)


def packing_line(text: TextConfig, splits: TextSplits) -> str:
    """How the training documents are packed, as a line; "" without packing."""
    if not text.packing:
        return ""
    found = [part for part, _ in splits.parts] or [splits.train]
    rows, documents = sum(map(len, found)), sum(len(one.documents.ends) for one in found)
    padding = sum(one.padding * len(one) for one in found) / rows
    cut = sum(one.cut for one in found)
    return (
        f"packing: {documents:,} training documents in {rows:,} rows ({text.packing}); {padding:.2%} padding, "
        f"{cut:,} documents cut"
    )


def ramp_line(ramp: RampUp | None, steps: int) -> str:
    """The batch sizes of a run by its steps, as a line; "" without a ramp."""
    found = [f"{one.size} in steps {one.first:,} to {one.last:,}" for one in stages(ramp, steps)] if ramp else []
    return f"batch sizes: {', '.join(found)}" if found else ""


def overlap_line(text: TextConfig, splits: TextSplits) -> str:
    """How much of validation and test is in the training text too, as a line; "" for `overlap=0`."""
    n = text.overlap if text.overlap >= 0 else 50 if isinstance(splits.tokenizer, ByteTokenizer) else 13
    if not n:
        return ""
    limit = text.overlap_limit or len(splits.train)
    shares, looked = overlap(splits.train, {"validation": splits.validation, "test": splits.test}, n, limit)
    found = " and ".join(f"{share:.2%} of {name}" for name, share in shares.items())
    part = "" if looked == 1 else f" (of {looked:.2%} of it; config.data.overlap_limit=0 looks at all)"
    return f"overlap: {found} is in the training text too, by {n}-grams of tokens{part}"


def run_config(c: ConfigDict, vocab_size: int) -> RunConfig:
    """What a training step depends on, from the config of `scripts/train.py`; nothing is read or placed.

    Raises:
      ConfigError: a setting that is wrong, by its path.
    """
    optimizer = build(OptimizerConfig, c.optimizer, "config.optimizer", lr=c.lr, steps=max(c.steps, 1))
    checked("config.optimizer", make_optimizer, optimizer)
    step = build(StepConfig, c.step, "config.step", ema=optimizer.ema)
    settings = {name: c.model[name] for name in c.model if name != "moe" or c.model.mlp == "routed"}
    model = build(TransformerConfig, settings, "config.model", vocab_size=vocab_size)
    plan = build(Plan, c.sharding, "config.sharding", axes=c.plan)
    if "routed" in model.pattern:
        checked("config.model.moe.router", model.moe.router.check_training)
    ramp = None
    if c.rampup_batch_size:
        where = "config.rampup_batch_size"
        if len(c.rampup_batch_size) != 3:
            raise ConfigError(f"{where}={c.rampup_batch_size}: three numbers (start, increment, samples) are needed")
        ramp = checked(where, RampUp, *c.rampup_batch_size, c.batch_size)
        part = c.batch_size // step.grad_accum_steps if step.grad_accum_steps > 1 else 1
        if ramp.unit % part:
            raise ConfigError(
                f"{where}={c.rampup_batch_size}: start and increment must be multiples of the {part} sequences of a "
                f"part of gradient accumulation (batch_size={c.batch_size}, grad_accum_steps={step.grad_accum_steps})"
            )
        if step.noise_scale and ramp.start < 2 * part:
            raise ConfigError(f"{where}={c.rampup_batch_size}: noise_scale needs two parts, a start of {2 * part}")
    adapters = build(LoRAConfig, c.lora, "config.lora") if c.lora.rank else None
    teacher = build(DistillConfig, c.distill, "config.distill") if c.distill.weight or c.distill.hidden else None
    if c.loss_chunk_size < 0:
        raise ConfigError(f"config.loss_chunk_size={c.loss_chunk_size}: tokens at a time, or 0 for all at once")
    sizes = c.batch_size, c.length, c.z_loss, c.loss_chunk_size
    keep_zeros = c.start.keep_zeros or bool(c.start.mask)
    return RunConfig(model, plan, optimizer, step, *sizes, adapters, teacher, keep_zeros, ramp)


def words_at_start(start: StartConfig, pretrained: Pretrained | None) -> int:
    """Vocabulary of a model to go on from, which may be larger than its tokenizer's; 0 where that is not known."""
    if pretrained is not None and pretrained.model is not None:
        return pretrained.model.vocab_size
    if start.workdir:
        return checked("config.start", read_settings, local(start.workdir)).get("vocab_size", 0)
    return 0


def run_flops(config: RunConfig, pretrained: Pretrained | None = None) -> float:
    """FLOPs of training on one sequence, see `tessera.models.lm_loss.training_flops`.

    Raises:
      ValueError: adapters that do not fit the model.
    """
    adapters = teacher = None
    if config.lora is not None:
        make = partial(lora.initialize, param_shapes(config.model), config.lora)
        adapters = jax.eval_shape(lambda: make(key=jax.random.key(0)))
    if config.distill is not None:
        other = None if pretrained is None else pretrained.teacher_model
        teacher = config.model if other is None else other
    return training_flops(config.model, config.length, adapters, teacher)


def with_teacher(config: RunConfig, pretrained: Pretrained | None, mesh: Mesh | None = None) -> LossFn:
    """The loss of a run that is distilled; see `tessera.lm.distill.distill_loss`."""
    other = None if pretrained is None or pretrained.teacher_model is None else Decoder(pretrained.teacher_model)
    how: Any = {"loss_chunk_size": config.loss_chunk_size, "mesh": mesh}
    return distill_loss(Decoder(config.model), config.distill or DistillConfig(), config.z_loss, other, **how)


def check_adaptation(c: ConfigDict, config: RunConfig, words: int, least: int) -> None:
    """Check that adapters, a teacher and kept zeros have a model to come from, and that its tokenizer fits it.

    Raises:
      ConfigError: the setting that would have none, or that does not go together with another.
    """
    if least and words > least:
        raise ConfigError(
            f"config.data.tokenizer={c.data.tokenizer!r} has {words} tokens, the model of config.start {least}: "
            "its own tokenizer is needed"
        )
    if c.start.dir and c.start.workdir:
        raise ConfigError(
            f"config.start.dir={c.start.dir!r} and .workdir={c.start.workdir!r}: a run starts from one of the two"
        )
    if c.start.step and not c.start.workdir:
        raise ConfigError(f"config.start.step={c.start.step}: a checkpoint of a run, which start.workdir names")
    for name, needs in (("mask", "dir"), ("random_weights", "dir"), ("shuffle_mask", "mask")):
        if c.start[name] and not c.start[needs]:
            raise ConfigError(f"config.start.{name}={c.start[name]!r} needs a Hugging Face directory, start.{needs}")
    start = c.start.dir or c.start.workdir
    for name, asked in (("lora.rank", config.lora), ("start.keep_zeros", config.keep_zeros)):
        if asked and not start:
            raise ConfigError(f"config.{name} is set: name the model to start from as config.start.dir or .workdir")
    if config.distill is not None and not (start or config.distill.dir):
        raise ConfigError(
            "config.distill is set: name the teacher as config.distill.dir, or a start (config.start.dir)"
        )
    if config.distill is not None and config.plan.axes:
        raise ConfigError(f"config.distill with config.plan={config.plan.axes!r}: a teacher is read with plan='' only")


def tree_hash(tree: PyTree) -> str:
    """SHA-256 of a tree's arrays, in hexadecimal."""
    found = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        found.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} ".encode())
        found.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return found.hexdigest()


def whole_model(config: RunConfig, state: TrainState) -> PyTree:
    """The parameters that a run's state stands for: averaged where there is an average, adapters merged in."""
    params = eval_params(config.optimizer, state.opt_state, state.params) if state.ema is None else state.ema
    return params if config.lora is None else _merged(config)(params, state.frozen)


@functools.cache
def _merged(config: RunConfig) -> Callable[[PyTree, PyTree], PyTree]:
    return jax.jit(config.whole)


def first_state(
    config: RunConfig, params: PyTree = None, key: Key[Array, ""] | None = None, teacher: PyTree = None
) -> TrainState:
    """The state before the first step, with these parameters or random ones.

    Call it under `jax.eval_shape` to have its shapes alone. With adapters these are what is trained, and the model is
    frozen; so is a teacher, which is the model itself where none is given.
    """
    key = jax.random.key(0) if key is None else key
    if params is None:
        tokens = jnp.zeros((1, config.length), jnp.int32)
        params = Decoder(config.model).init(key, tokens)["params"]
    frozen, trained = {}, params
    if config.lora is not None:
        trained, frozen = lora.initialize(params, config.lora, key=jax.random.fold_in(key, 1)), {"base": params}
    if config.distill is not None and (config.lora is None or config.distill.dir):
        frozen["teacher"] = jax.tree.map(jnp.copy, params) if teacher is None else teacher
    return replace(init_state(trained, config.tx, config.step), frozen=frozen or None)


def under_plan(
    config: RunConfig, init: Callable[[], TrainState] | None = None, devices: Sequence[Any] | None = None
) -> tuple[LossFn, Placement]:
    """Loss and placement under the plan; an empty one is data parallelism over the devices that divide the batch.

    Routed experts then run under the plan "dp": left to the compiler, every device would compute all of them.

    Args:
      config: its plan is for all devices there are, see `Plan.fill`. Every part of gradient accumulation goes through
        the plan by itself.
      init: makes the first state, of which only the shapes are looked at; default `first_state(config)`.
      devices: default all; those of a topology to compile for it ahead of time.

    Raises:
      PlanError: the plan does not fit the devices, the model or the batch.
      ValueError: several processes and a batch that does not divide by their devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    ring = config.plan.context == "ring" and config.plan.axes and config.plan.fill(len(devices)).size("cp") > 1
    if ring and resolved(config.model.attention_implementation) != "xla":
        raise PlanError(
            f"attention_implementation={config.model.attention_implementation!r} with plan {config.plan.axes!r}: ring "
            "attention is XLA's; choose 'xla', or context='all_to_all'"
        )
    config.model.check_attention(devices[0].platform, config.length, len(devices) if config.plan.axes else 1)
    if not config.plan.axes:
        apart = "routed" in config.model.pattern and config.step.grad_accum_steps > 1
        mine = dividing(devices, accumulated_batch(config) if apart else math.gcd(*config.batch_sizes))
        placement = data_parallel(mine)
        mesh: Any = placement.batch.mesh
        loss_fn = lm_loss(Decoder(config.model), config.z_loss, config.loss_chunk_size, mesh)
        if "routed" not in config.model.pattern or len(mine) == 1:
            return loss_fn, placement
        try:
            return under_plan(replace(config, plan=replace(config.plan, axes=f"dp={len(mine)}")), init, mine)
        except PlanError as error:
            logging.warning("without a plan every device computes all experts, since %s", error)
            return loss_fn, placement
    plan = config.plan.fill(len(devices))
    decoder = config.decoder(plan, devices[0].platform)
    for rows in config.batch_sizes if config.step.grad_accum_steps == 1 else (accumulated_batch(config),):
        decoder.check(rows, config.length)
    mesh = make_mesh(plan, devices)
    state = state_shardings(decoder, mesh, jax.eval_shape(init or partial(first_state, config)))
    return make_loss(decoder, mesh), Placement(state, batch_sharding(decoder, mesh))


def accumulated_batch(config: RunConfig) -> int:
    """Sequences that go through the model at once: a part of gradient accumulation.

    Raises:
      PlanError: a batch that does not divide into the parts.
    """
    parts = config.step.grad_accum_steps
    if config.batch_size % parts:
        raise PlanError(f"batch_size={config.batch_size} does not divide into grad_accum_steps={parts}")
    return config.batch_size // parts


def dividing(devices: Sequence[Any], batch_size: int) -> list[Any]:
    """As many of the devices as divide the batch; several processes need all of theirs.

    Raises:
      ValueError: several processes and a batch that does not divide by their devices.
    """
    count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    if jax.process_count() > 1 and count != len(devices):
        raise ValueError(f"batch_size={batch_size} does not divide by the {len(devices)} devices of all processes")
    if count < len(devices):
        said = "batch_size=%d uses %d of %d devices; a multiple of %d uses all"
        logging.warning(said, batch_size, count, len(devices), len(devices))
    return list(devices[:count])


def data_parallel(devices: Sequence[Any]) -> Placement:
    """The state on every device and the batch split over them."""
    mesh = Mesh(np.array(devices), ("data",))
    return Placement(NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data")))


def batch_share(owned: Mapping[int, set[int]], process: int) -> tuple[int, int]:
    """Index of a process's part among the distinct parts, and their number; `owned` are the row blocks by process.

    Raises:
      ValueError: two processes have some blocks in common and not all.
    """
    parts = sorted({tuple(sorted(blocks)) for blocks in owned.values()})
    if sum(len(part) for part in parts) != len(set().union(*parts)):
        raise ValueError(
            f"rows of the batch by process are {dict(owned)}: two processes must feed the same rows or none in common; "
            "make the product of the axes that do not split the batch a multiple or a divisor of a process's devices"
        )
    return parts.index(tuple(sorted(owned[process]))), len(parts)


def check_splits(c: ConfigDict, splits: TextSplits) -> None:
    """Check that training and both evaluations get their batches, before the first step.

    Training goes over its text again and again, so a window is enough; validation and test need full batches from one
    pass.

    Raises:
      ConfigError: the splits that are too small, what each has and what would do.
    """
    lines = []
    for name in ("train", "validation", "test"):
        found, batch = getattr(splits, name), 1 if name == "train" else c.batch_size
        windows = max(0, window_count(found, c.length))
        if windows >= batch:
            continue
        tokens = len(found.tokens) if isinstance(found, Packed) else len(found)
        cap = f", config.data.max_bytes={c.data.max_bytes}" if c.data.max_bytes else ""
        fixes = [f"more text (config.data.name={c.data.name!r}{cap})"]
        if name != "train":
            fixes.append(f"a larger share (config.data.{name}={c.data[name]})")
        if name != "train" and windows:
            fixes.append(f"config.batch_size of at most {windows}")
        if tokens > batch:
            fixes.append(f"config.length of at most {(tokens - 1) // batch}")
        sizes = f"config.length={c.length}" + (f", config.batch_size={c.batch_size}" if name != "train" else "")
        lines.append(
            f"the {name} text has {tokens} tokens; at least {batch * c.length + 1} are needed ({sizes}): "
            f"use {' or '.join(fixes)}"
        )
    if lines:
        raise ConfigError("config.data: " + "\n  ".join(lines))


def results_table(title: str, results: Mapping[str, Mapping[str, float]]) -> Table:
    """A table of losses and accuracies by split, for the terminal."""
    heads = ("", "nats per token", "bits per token", "bits per byte", "accuracy")
    table = Table(*heads, title=title, title_justify="left")
    for name, found in results.items():
        loss, accuracy = found["loss"], found["accuracy"]
        per_byte = f"{found['bits_per_byte']:.4f}" if "bits_per_byte" in found else "unknown"
        table.add_row(name, f"{loss:.4f}", f"{loss / math.log(2):.4f}", per_byte, f"{accuracy:.4f}")
    return table
