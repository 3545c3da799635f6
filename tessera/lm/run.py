"""A language model's training run, made from the config of `scripts/train.py`: its parts and what they do."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict
from rich.table import Table

from sharding.plan import Plan
from tessera.data.loader import token_batches
from tessera.data.text import TextConfig, TextSplits, load_text
from tessera.infra.config import ConfigError, build, checked
from tessera.infra.schema import completed
from tessera.infra.workdir import resolve
from tessera.lm.run_config import RunConfig
from tessera.lm.schema import SCHEMA
from tessera.lm.warm_start import StartConfig, starting_params
from tessera.loop import LoopConfig, evaluate
from tessera.models.lm_loss import make_adjust, make_eval
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.optim.optimizer import OptimizerConfig, eval_params, learning_rate, make_optimizer
from tessera.parallel.placement import Placement
from tessera.step import LossFn, StepConfig, TrainState, make_train_step


@dataclass(frozen=True)
class TextRun:
    """The parts of a run; made by `make_text_run`.

    Attributes:
      config: the settings, resolved.
      run: model, plan, optimizer and step.
      splits: tokens [N] of training, validation and test text.
      loop: how long and how often.
      start: another run whose weights this one begins with.
      loss_fn, placement: the loss under the plan, and where state and batches lie.
    """

    config: ConfigDict
    run: RunConfig
    splits: TextSplits
    loop: LoopConfig
    start: StartConfig
    loss_fn: LossFn
    placement: Placement

    @property
    def model(self) -> Decoder:
        """The decoder."""
        return Decoder(self.run.model)

    def settings(self) -> dict[str, Any]:
        """What makes this run this run.

        The text itself belongs to it: another text in the same files is another run. The plan does not: a run may go on
        under another one.
        """
        settings = {name: value for name, value in resolve(self.config).items() if name not in ("plan", "sharding")}
        return settings | {"data_sha256": self.splits.content_hash}

    def make_step(self) -> Callable[..., Any]:
        """The training step, see `tessera.step.make_train_step`."""
        tx = make_optimizer(self.run.optimizer)
        return make_train_step(self.loss_fn, tx, self.run.step, adjust=make_adjust(self.run.model))

    def begin(self, resumed: bool) -> TrainState:
        """The first state, where the plan puts it; a run that is `resumed` needs its shapes alone."""
        init_key, _ = self.keys

        def first(params: PyTree | None = None) -> TrainState:
            return self.run.init(init_key) if params is None else self.run.state(params)

        make = jax.jit(first, out_shardings=self.placement.state)
        if not self.start.workdir or resumed:
            return make()
        return make(checked("config.start", starting_params, self.start, self.run.model, key=init_key))

    @property
    def keys(self) -> tuple[jax.Array, jax.Array]:
        """Keys of the initial weights and of the steps, from the seed."""
        init_key, step_key = jax.random.split(jax.random.key(self.config.seed))
        return init_key, step_key

    def batches(self, tokens: np.ndarray, **options: Any) -> grain.DatasetIterator:
        """This process's part of the batches of a split; `options` as for `tessera.data.loader.token_batches`."""
        index, count = self.placement.share()
        sizes = {"batch_size": self.run.batch_size, "length": self.run.length, "seed": self.config.seed}
        return token_batches(tokens, **sizes, process_index=index, process_count=count, **options)

    def some(self, tokens: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """The first `config.eval.batches` batches of a split, in its order."""
        return itertools.islice(self.batches(tokens, shuffle=False, repeat=False), self.config.eval.batches)

    def held_out(self, state: TrainState, tokens: np.ndarray) -> dict[str, float]:
        """Metrics on `some` of a split with averaged weights, where the optimizer or the step keeps any."""
        params = eval_params(self.run.optimizer, state.opt_state, state.params) if state.ema is None else state.ema
        return evaluate(self._eval, params, (self.placement.place({"tokens": b["tokens"]}) for b in self.some(tokens)))

    @cached_property
    def _eval(self) -> Any:
        return make_eval(self.loss_fn)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(self.run.optimizer)(step // self.run.optimizer.accumulate)


def make_run(c: ConfigDict, vocab_size: int) -> RunConfig:
    """What a training step depends on, from the config of `scripts/train.py`; nothing is read or placed.

    Raises:
      ConfigError: a setting that is wrong, by its path.
    """
    c = completed(SCHEMA, c)
    steps = max(c.steps // max(c.optimizer.accumulate, 1), 1)
    opt = build(OptimizerConfig, c.optimizer, "config.optimizer", lr=c.lr, steps=steps)
    step = build(StepConfig, c.step, "config.step", ema=opt.ema)
    checked("config.optimizer", make_optimizer, opt)
    model = build(TransformerConfig, c.model, "config.model", vocab_size=vocab_size)
    plan = build(Plan, c.sharding, "config.sharding", axes=c.plan)
    return RunConfig(model, plan, opt, step, c.batch_size, c.length, c.z_loss)


def make_text_run(c: ConfigDict) -> TextRun:
    """Build and check every part of a run and read its text; nothing is written.

    Raises:
      ConfigError: a setting that is wrong, by its path.
      DataUnavailable: the text is neither there nor to be had.
    """
    c = completed(SCHEMA, c)
    for name, value, least in (
        ("seed", c.seed, 0),
        ("batch_size", c.batch_size, 1),
        ("length", c.length, 1),
        ("eval.batches", c.eval.batches, 1),
    ):
        if value < least:
            raise ConfigError(f"config.{name}={value}: at least {least} is needed")
    loop = checked("config", LoopConfig, c.steps, c.log.every, c.eval.every, tokens=c.batch_size * c.length)
    start = build(StartConfig, c.start, "config.start")
    run = make_run(c, vocab_size=1)  # every other setting is checked before the text is read, or even fetched
    splits = checked("config.data", load_text, build(TextConfig, c.data, "config.data"))
    check_splits(c, splits)
    run = replace(run, model=replace(run.model, vocab_size=splits.vocab_size))
    loss_fn, placement = checked("config.plan", run.under_plan)
    _, count = checked("config.plan", placement.share)
    if c.batch_size % count:
        raise ConfigError(f"config.batch_size={c.batch_size}: {count} processes share a batch; a multiple is needed")
    return TextRun(c, run, splits, loop, start, loss_fn, placement)


def check_splits(c: ConfigDict, splits: TextSplits) -> None:
    """Check that training and both evaluations get their batches, before the first step.

    Training goes over its text again and again, so a window is enough; validation and test take whole batches from one
    pass.

    Raises:
      ConfigError: the splits that are too small, what each has and what would do.
    """
    lines = []
    for name in ("train", "validation", "test"):
        tokens, batch = len(getattr(splits, name)), 1 if name == "train" else c.batch_size
        windows = max(0, tokens - 1) // c.length
        if windows >= batch:
            continue
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
    table = Table("", "nats per token", "bits per token", "accuracy", title=title, title_justify="left")
    for name, found in results.items():
        loss, accuracy = found["loss"], found["accuracy"]
        table.add_row(name, f"{loss:.4f}", f"{loss / math.log(2):.4f}", f"{accuracy:.4f}")
    return table
