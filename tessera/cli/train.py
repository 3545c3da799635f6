"""Train a language model: `tessera train --config=lm:tiny --workdir=runs/lm`."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict
from rich.console import Console

from sharding.errors import PlanError
from sharding.multihost.distributed import DistributedError
from tessera.cli.main import Invocation
from tessera.data.download import DataUnavailable
from tessera.data.text import BPETokenizer, ByteTokenizer, Tokenizer
from tessera.infra.checkpoint import CheckpointConfig, CheckpointDamaged, CheckpointMismatch, Checkpoints
from tessera.infra.config import ConfigError, build, checked
from tessera.infra.logger import Logger
from tessera.infra.peak import peak_flops
from tessera.infra.remote import local
from tessera.infra.workdir import WorkdirMismatch, hold
from tessera.lm import schema as lm_schema
from tessera.lm.lora import LoRAConfig
from tessera.lm.run import Run, build_run, results_table, whole_model
from tessera.lm.warm_start import Pretrained, StartConfig, masked_params, with_pretrained
from tessera.loop import Interrupted, NonFiniteLoss, Profile, train
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.planning.report import run_sections
from tessera.reports.html import print_report
from tessera.reports.router import write_specialization
from tessera.reports.run_report import lm_report
from tessera.reports.sample import write_sample

SCHEMA = lm_schema.SCHEMA
MASK = 1  # folded into the run's key, for random weights and places of a mask
ERRORS = (
    DataUnavailable,
    WorkdirMismatch,
    CheckpointDamaged,
    CheckpointMismatch,
    NonFiniteLoss,
    PlanError,
    DistributedError,
    ImportError,
)


def main(invocation: Invocation) -> int:
    """Config -> parts of the run -> training loop -> table and report. Returns the exit status."""
    c, first_process = invocation.config, jax.process_index() == 0
    saving = build(CheckpointConfig, c.checkpoint, "config.checkpoint")
    c, run = prepare_run(c)
    text = invocation.flags.get("profile", "")
    profile = checked("--profile", Profile.parse, text, Path())
    if profile and profile.first > c.steps:
        raise ConfigError(f"--profile={text}: the run has {c.steps} steps")
    peak, said = peak_flops(c.log.hardware, c.model.dtype, run.loop.devices)
    workdir = invocation.prepare(run.settings, whole=True)
    for line in (*run.notes, said) if first_process else ():
        print(line, file=sys.stderr, flush=True)
    logger = Logger(workdir, tensorboard=c.log.tensorboard, wandb=c.log.wandb, active=first_process)
    with hold(workdir), logger, Checkpoints(workdir / "checkpoints", saving) as checkpoints:
        if first_process and isinstance(run.tokenizer, BPETokenizer) and c.data.tokenizer != "bpe":
            run.tokenizer.save(workdir / "tokenizer.json")  # with which the run is served
        try:
            result = train(
                run.step_fn,
                lambda: run.init_fn(bool(checkpoints.steps())),
                run.loader("train"),
                replace(run.loop, peak=peak),
                key=run.key,
                logger=logger,
                checkpoints=checkpoints,
                evaluate=lambda state: run.eval_fn(state, "validation"),
                schedule=run.schedule,
                place=run.placement.place,
                profile=profile and replace(profile, directory=workdir / "profile"),
            )
        except Interrupted as stop:
            Console(stderr=True).print(f"{stop} ({workdir})", soft_wrap=True)
            return 128 + stop.signum
        results = {"validation": result.evaluation, "test": run.eval_fn(result.state, "test")}
    if jax.process_count() == 1:
        if run.config.lora is not None and first_process:
            adapters = result.state.params if result.state.ema is None else result.state.ema
            write_adapter(workdir, adapters, run.config.lora, run.config.model, c.start.dir)
        model, batches = Decoder(run.config.model), run.held_out("validation")
        tokenizer = "bytes" if isinstance(run.tokenizer, ByteTokenizer) else c.data.tokenizer
        if run.tokenizer is not None:
            params = whole_model(run.config, result.state)
            write_specialization(workdir, model, params, batches, tokenizer)
            text_T = np.asarray(next(run.held_out("validation"))["tokens"])[0, :-1]
            write_sample(workdir, model, params, text_T, run.tokenizer, c.eval.sample)
    if first_process:
        title = f"{workdir.name}: {c.steps} steps, cross-entropy on at most {c.eval.batches} batches of"
        Console().print(results_table(title, results))
        print_report(lm_report, workdir, results["test"], *run_sections(run.config.model, run.config.plan, workdir))
    return 0


def prepare_run(c: ConfigDict) -> tuple[ConfigDict, Run]:
    """Settings with the architecture of the model that the run goes on from, where there is one, and the run.

    Raises:
      ConfigError, DataUnavailable: see `read_pretrained` and `tessera.lm.run.build_run`.
    """
    pretrained = read_pretrained(c) if c.start.dir or c.distill.dir else None
    c = c if pretrained is None else with_pretrained(c, pretrained)
    return c, build_run(c, pretrained)


def read_pretrained(c: ConfigDict) -> Pretrained:
    """Read the model to go on from and the teacher, where the config names them.

    Raises:
      ConfigError: a directory that cannot be read, by the setting that names it; models of different architectures.
    """
    from tessera.serving import huggingface  # of serving, which a run without them does not need
    from tessera.serving.load import SourceConfig, load

    def read(setting: str, path: str) -> Any:
        if not path:
            return None
        if not huggingface.is_directory(local(path)):
            raise ConfigError(f"config.{setting}={path!r}: no Hugging Face directory (config.json and safetensors)")
        return checked(f"config.{setting}", load, SourceConfig(path))

    start, teacher = read("start.dir", c.start.dir), read("distill.dir", c.distill.dir)
    first: tuple = (None, None, "")
    if start is not None:
        params = start.params
        if c.start.mask or c.start.random_weights:
            pruned = None if (mask := read("start.mask", c.start.mask)) is None else mask.params
            how, key = build(StartConfig, c.start, "config.start"), jax.random.fold_in(jax.random.key(c.seed), MASK)
            params = checked("config.start.mask", masked_params, params, start.config, how, pruned, key=key)
        first = (params, start.config, tokenizer_file(c.start.dir, start.tokenizer))
    return Pretrained(*first, *((None, None) if teacher is None else (teacher.params, teacher.config)))


def tokenizer_file(directory: str, tokenizer: Tokenizer) -> str:
    """The tokenizer's file of a Hugging Face directory; "" where there is none, or where it says what bytes do."""
    file, words = Path(local(directory)) / "tokenizer.json", "aZ ~\0\n\t\x7f äß€𝄞"
    of_bytes = tokenizer.vocab_size == 256 and tokenizer.encode(words).tolist() == list(words.encode())
    return str(file) if file.exists() and not of_bytes else ""


def write_adapter(workdir: Path, adapters: PyTree, lora: LoRAConfig, model: TransformerConfig, base: str) -> None:
    """Write a run's adapters as adapter/, for peft; where its format cannot say them, a line tells why."""
    from tessera.serving.adapters import NotConvertible, save_adapters

    try:
        save_adapters(workdir / "adapter", jax.device_get(adapters), lora, model, base)
    except (NotConvertible, ImportError) as error:
        print(f"no adapter/ for peft: {error}", file=sys.stderr)
