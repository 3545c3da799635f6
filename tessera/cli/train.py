"""Train a language model: `tessera train --config=lm:tiny --workdir=runs/lm`."""

import sys

import jax
from rich.console import Console

from sharding.errors import PlanError
from sharding.multihost.distributed import DistributedError
from tessera.cli.main import Invocation
from tessera.data.download import DataUnavailable
from tessera.data.text import BPETokenizer, ByteTokenizer
from tessera.infra.checkpoint import CheckpointConfig, CheckpointDamaged, CheckpointMismatch, Checkpoints
from tessera.infra.config import build
from tessera.infra.logger import Logger
from tessera.infra.workdir import WorkdirMismatch, hold
from tessera.lm import schema as lm_schema
from tessera.lm.run import build_run, results_table
from tessera.loop import Interrupted, NonFiniteLoss, train
from tessera.models.transformer import Decoder
from tessera.planning.report import run_sections
from tessera.reports.html import print_report
from tessera.reports.router import write_specialization
from tessera.reports.run_report import lm_report

SCHEMA = lm_schema.SCHEMA
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
    run = build_run(c)
    workdir = invocation.prepare(run.settings, whole=True)
    for line in run.notes if first_process else ():
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
                run.loop,
                key=run.key,
                logger=logger,
                checkpoints=checkpoints,
                evaluate=lambda state: run.eval_fn(state, "validation"),
                schedule=run.schedule,
                place=run.placement.place,
            )
        except Interrupted as stop:
            Console(stderr=True).print(f"{stop} ({workdir})", soft_wrap=True)
            return 128 + stop.signum
        results = {"validation": result.evaluation, "test": run.eval_fn(result.state, "test")}
    if jax.process_count() == 1:
        model, batches = Decoder(run.config.model), run.held_out("validation")
        tokenizer = "bytes" if isinstance(run.tokenizer, ByteTokenizer) else c.data.tokenizer
        if run.tokenizer is not None:
            write_specialization(workdir, model, result.state.params, batches, tokenizer)
    if first_process:
        Console().print(results_table(f"{workdir.name}: {c.steps} steps", results))
        print_report(lm_report, workdir, results["test"], *run_sections(run.config.model, run.config.plan, workdir))
    return 0
