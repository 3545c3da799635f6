"""Train one run of a sweep: the trunk at a stable learning rate, and a decay branched off it for every readout.

`train_run` is what `scaling.sweeps.sweep` gets as its training function. The trunk is saved at every branch point and
now and then in between; a killed run goes on from the last save, and a readout added later from the branch point before
it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from scaling.sweeps.plan import PlannedRun, Readout
from scaling.sweeps.store import Row, Store
from tessera.data.loader import mixed_order
from tessera.data.text import TextConfig, TextSplits, load_text
from tessera.infra.artifacts import ArtifactStore
from tessera.infra.config import ConfigError
from tessera.step import TrainState, index_block, run_blocks
from tessera.sweeps.programs import Programs, Schedule, Trial, TrialConfig, compile_programs

EVAL_BATCH = 64  # windows


def compile_cache(directory: Path) -> dict[str, str]:
    """Environment of processes that share compiled programs: runs of one shape, and a run that was killed."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(directory.absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }


class TextStore(Store):
    """Artifacts of a sweep on text, whose rows also have the unique tokens of its training text.

    They are what the law of limited data asks for (`scaling.published.DATA_CONSTRAINED`).
    """

    def rows(self, run: PlannedRun) -> list[Row]:
        """Read the existing rows, by rising step, with `unique_tokens` = tokens / epochs."""
        found = super().rows(run)
        for row in found:
            if "epochs" in row:
                row["unique_tokens"] = round(row["tokens"] / row["epochs"])
        return found


class Texts(NamedTuple):
    """The text of a sweep on the device.

    Attributes:
      train: training stream, in the smallest type that holds the vocabulary. Sources are one behind another, each with
        a window of nothing behind it, so that windows are numbered from one to the next.
      validation: windows [n, b, T + 1].
      mixture: number and weight of every source's training windows.
      bytes_per_token: of the validation text; 0 where it is not known.
    """

    train: Array
    validation: Array
    mixture: tuple[tuple[int, float], ...]
    bytes_per_token: float

    @property
    def size(self) -> int:
        """Training windows."""
        return sum(windows for windows, _ in self.mixture)

    def order(self, seed: int, start: int, steps: int, batch_size: int) -> np.ndarray:
        """Windows int32 [steps, batch] of the steps that follow `start`; of several sources by their weights."""
        if len(self.mixture) == 1:
            return index_block(seed=seed, start=start, steps=steps, batch_size=batch_size, size=self.size)
        mixed = mixed_order(self.mixture, seed)
        numbers = np.array([mixed[i] for i in range(start * batch_size, (start + steps) * batch_size)])
        gaps = np.searchsorted(np.cumsum([windows for windows, _ in self.mixture]), numbers, side="right")
        return (numbers + gaps).reshape(steps, batch_size).astype(np.int32)


def load_texts(text: TextConfig, length: int, eval_tokens: int) -> Texts:
    """Read the text, token files too, into memory; errors as of `check_texts`."""
    splits = load_text(text)
    windows = check_texts(splits, length, eval_tokens, text.sources)
    there = (len(splits.validation) - 1) // length
    # Spread over the whole stream: its first files are not like the rest (tables of character sets, for one).
    starts = length * (np.arange(windows) * there // windows)[:, None] + np.arange(length + 1)
    validation = splits.validation[starts].astype(np.int32).reshape(-1, EVAL_BATCH, length + 1)
    dtype = np.uint8 if splits.vocab_size <= 256 else np.uint16 if splits.vocab_size <= 1 << 16 else np.int32
    parts = splits.parts or ((splits.train, 1.0),)
    mixture = tuple(((len(stream) - 1) // length, weight) for stream, weight in parts)
    streams = []
    for (stream, _), (windows, _) in zip(parts, mixture, strict=True):
        tokens = np.zeros((windows + 1) * length, dtype)
        tokens[: windows * length + 1] = stream[: windows * length + 1]
        streams.append(tokens)
    train = jnp.asarray(np.concatenate(streams))
    return Texts(train, jnp.asarray(validation), mixture, splits.bytes_per_token.get("validation", 0.0))


def check_texts(splits: TextSplits, length: int, eval_tokens: int, sources: Sequence[tuple[str, float]] = ()) -> int:
    """Check that a sweep's runs have text to train on and to measure with; returns the windows they measure with.

    Raises:
      ConfigError: packed documents, less training text (of any source) than one window or more than can be numbered, or
        less validation text than one batch.
    """
    if splits.documents:
        raise ConfigError("config.data.packing: a sweep trains on windows of the stream; leave it ''")
    if len(splits.train) >= 2**31:
        raise ConfigError(
            f"config.data: {len(splits.train)} training tokens; a sweep keeps its text on the device and numbers fewer "
            "than 2^31: set config.data.max_tokens"
        )
    for (stream, _), (name, _) in zip(splits.parts, sources, strict=bool(splits.parts)):
        if len(stream) <= length:
            raise ConfigError(
                f"config.data.sources: {name!r} has {len(stream)} training tokens; at least {length + 1} are needed"
            )
    least = EVAL_BATCH * length
    if eval_tokens < least:
        raise ConfigError(
            f"config.train.eval_tokens={eval_tokens}: at least {least} are needed, {EVAL_BATCH} windows of "
            f"config.family.length={length}"
        )
    for name, needed in (("train", length + 1), ("validation", least + 1)):
        there = len(getattr(splits, name))
        if there < needed:
            fixes = ["more text (config.data.name, config.data.max_bytes)"]
            fixes += ["a larger config.data.validation"] if name == "validation" else []
            shortest = (there - 1) // (EVAL_BATCH if name == "validation" else 1)
            fixes += [f"config.family.length of at most {shortest}"] if shortest > 0 else []
            raise ConfigError(
                f"config.data: the {name} text has {there} tokens; at least {needed} are needed with "
                f"config.family.length={length}: use {' or '.join(fixes)}"
            )
    return min(eval_tokens // length, (len(splits.validation) - 1) // length) // EVAL_BATCH * EVAL_BATCH


class Trainer:
    """One run under way: its programs, its text, and where it saves."""

    def __init__(
        self, run: PlannedRun, directory: Path, texts: Texts, config: TrialConfig, report: Callable[[int], None]
    ):
        self.run, self.texts, self.config, self.report = run, texts, config, report
        self.programs: Programs = compile_programs(Trial(run.settings["model"], run.settings["seed"], config))
        # States of the trunk: at every branch point, which stay, and in between, of which the newest does.
        self.branches = ArtifactStore(directory / "trunk", "branch-")
        self.between = ArtifactStore(directory / "trunk", "step-")

    def index(self, start: int, steps: int) -> np.ndarray:
        """Windows of the steps that follow `start`, the same for a trunk and its decays."""
        return self.texts.order(self.run.settings["seed"], start, steps, self.run.settings["batch"])

    def load(self, before: int, like: TrainState) -> TrainState | None:
        """The newest sound state of the trunk at or before a step."""
        found = [saved for store in (self.branches, self.between) if (saved := store.latest(like, before))]
        return max(found, key=lambda saved: saved[0])[1] if found else None

    def branch(self, state: TrainState) -> None:
        """Save the trunk at a branch point; the states in between before it are no longer needed."""
        step = int(state.step)
        if step not in self.branches.steps():
            self.branches.save(step, state)
        self.between.clear(before=step + 1)

    def _save(self, step: int, state: TrainState) -> None:
        self.between.save(step, state)
        self.between.clear(before=step)

    def advance(self, state: TrainState, until: int, schedule: Schedule, *, save: bool) -> TrainState:
        """Train to a step.

        Raises:
          FloatingPointError: the loss is no longer finite.
        """
        start, chunk = int(state.step), self.config.chunk
        begun = start

        def advance(state: TrainState, start: int, stop: int) -> tuple[TrainState, dict[str, Array]]:
            block, count = self.index(start, chunk), np.int32(stop - start)
            state, loss = self.programs.advance(state, self.texts.train, block, count, schedule)
            return state, {"loss": loss}

        def after(step: int, state: TrainState, row: dict[str, Any]) -> None:
            nonlocal begun
            self.report(step - begun)
            begun = step

        marks = [*range(start + chunk, until, chunk), until] if until > start else []
        saving: dict[str, Any] = {"save": self._save if save else None, "save_seconds": self.config.save_seconds}
        return run_blocks(advance, state, marks, start=start, names=[self.run.name], after=after, **saving)[1]

    def read_out(self, state: TrainState, readout: Readout, schedule: Schedule) -> dict[str, Any]:
        """Decay from a branch point and measure."""
        measured: dict[str, Any] = {}
        if self.config.noise_batches:
            index = self.index(readout.branch, self.config.noise_batches)
            signal, noise = self.programs.noise(state.params, self.texts.train, index)
            measured = {"gradient_signal": float(signal), "gradient_noise": float(noise)}
        decay = schedule._replace(branch=readout.branch, end=readout.steps)
        final = self.advance(state, readout.steps, decay, save=False)
        loss = float(self.programs.evaluate(final.params, self.texts.validation))
        epochs = readout.tokens / (self.texts.size * self.run.settings["model"]["length"])
        if size := self.texts.bytes_per_token:
            measured["bits_per_byte"] = loss / math.log(2) / size
        return {"loss": loss, "epochs": epochs} | measured


def train_run(
    run: PlannedRun, directory: Path, report: Callable[[int], None], *, text: TextConfig, config: TrialConfig
) -> Iterator[tuple[Readout, dict[str, Any]]]:
    """Train a run and yield its readouts one by one; the training function of a sweep, see
    `scaling.sweeps.store.TrainFn`.

    Args:
      run: what to train; its readouts are those still wanted.
      directory: where its trunk is saved and found again.
      report: called with the steps done since the last call.
      text: what to train on.
      config: how.

    Yields:
      Each readout with loss (validation, nats per token), bits_per_byte where the bytes of the text are known, epochs
      (windows of training over those there are) and the two estimates of `tessera.optim.noise_scale` at the branch
      point, over sequences.

    Raises:
      FloatingPointError: the loss is no longer finite; the sweep stores that as the run's result.
    """
    texts = load_texts(text, run.settings["model"]["length"], config.eval_tokens)
    trainer = Trainer(run, directory, texts, config, report)
    schedule = Schedule(run.settings["lr"], run.settings["warmup"])
    state = trainer.programs.init()
    state = trainer.load(run.readouts[0].branch, state) or state
    report(int(state.step))
    for readout in run.readouts:
        state = trainer.advance(state, readout.branch, schedule, save=True)
        trainer.branch(state)
        yield readout, trainer.read_out(state, readout, schedule)
