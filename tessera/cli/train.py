"""Train a language model: `tessera train --config=lm:tiny --workdir=runs/lm`."""

import jax
from rich.console import Console

from sharding.errors import PlanError
from sharding.multihost.distributed import DistributedError
from tessera.cli.main import Invocation
from tessera.data.download import DataUnavailable
from tessera.infra.artifacts import CheckpointDamaged, CheckpointMismatch
from tessera.infra.checkpoint import CheckpointConfig, Checkpoints
from tessera.infra.config import build
from tessera.infra.logger import Logger
from tessera.infra.workdir import WorkdirMismatch, prepare
from tessera.lm import schema as lm_schema
from tessera.lm.run import make_text_run, results_table
from tessera.loop import train
from tessera.parallel.placement import join_processes
from tessera.planning.report import run_sections
from tessera.reports.html import print_report
from tessera.reports.router import write_specialization
from tessera.reports.run_report import lm_report
from tessera.signals import Interrupted, NonFiniteLoss

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
    """Config -> parts of the run -> loop -> table and report. Returns the exit status."""
    join_processes(invocation.hosts)
    c, first_process = invocation.config, jax.process_index() == 0
    saving = build(CheckpointConfig, c.checkpoint, "config.checkpoint")
    it = make_text_run(c)
    workdir = prepare(invocation.workdir, it.settings(), name=invocation.name, defaults=invocation.defaults)
    logger = Logger(workdir, tensorboard=c.log.tensorboard, wandb=c.log.wandb, active=first_process)
    with logger, Checkpoints(workdir / "checkpoints", saving) as checkpoints:
        try:
            result = train(
                it.make_step(),
                lambda: it.begin(resumed=bool(checkpoints.steps())),
                it.batches(it.splits.train),
                it.loop,
                key=it.keys[1],
                logger=logger,
                checkpoints=checkpoints,
                evaluate=lambda state: it.held_out(state, it.splits.validation),
                schedule=it.learning_rate,
                place=it.placement.place,
            )
        except Interrupted as stop:
            Console(stderr=True).print(f"{stop} ({workdir})", soft_wrap=True)
            return 128 + stop.signum
        results = {"validation": result.evaluation, "test": it.held_out(result.state, it.splits.test)}
    if jax.process_count() == 1:
        some = it.some(it.splits.validation)
        write_specialization(workdir, it.model, result.state.params, some, c.data.tokenizer)
    if first_process:
        Console().print(results_table(f"{workdir.name}: {c.steps} steps", results))
        print_report(lm_report, workdir, results["test"], *run_sections(it.run.model, it.run.plan, workdir))
    return 0
