"""Experiments on tickets: `tessera study --config=study_instability --workdir=runs/study`."""

import time

from rich.console import Console

from tessera.cli.main import Invocation
from tessera.data.download import DataUnavailable
from tessera.infra.checkpoint import CheckpointDamaged
from tessera.infra.config import checked
from tessera.infra.memo import Memo
from tessera.infra.workdir import WorkdirMismatch, hold
from tessera.reports.html import print_report
from tessera.tickets.studies import (
    ablations,
    distribution,
    instability,
    movement,
    population,
    reasons,
    reliability,
    rewinding,
    schema,
    sources,
    sparse_training,
    strong,
    transfer,
)
from tessera.tickets.studies.study import write_study

STUDIES = {
    "ablations": ablations.run,
    "distribution": distribution.run,
    "instability": instability.run,
    "movement": movement.run,
    "population": population.run,
    "reasons": reasons.run,
    "reliability": reliability.run,
    "rewinding": rewinding.run,
    "sources": sources.run,
    "sparse_training": sparse_training.run,
    "strong": strong.run,
    "transfer": transfer.run,
}

SCHEMA = schema.STUDY_SCHEMA
ERRORS = (DataUnavailable, WorkdirMismatch, CheckpointDamaged, FloatingPointError)


def main(invocation: Invocation) -> None:
    """Config -> memo on disk -> table, picture, page."""
    config, console = invocation.config, Console()
    name = checked("config.name", _known, config.get("name", ""))
    workdir = invocation.prepare(whole=True)
    begun = time.monotonic()
    memo = Memo(workdir / "memo", lambda part: console.log(f"{time.monotonic() - begun:6.0f} s  {part}"))
    with hold(workdir):
        study = checked("config.study", STUDIES[name], config, memo)
    for text in study.findings:
        console.print(text)
    console.print(f"{time.monotonic() - begun:.0f} s")
    print_report(write_study, workdir, study)


def _known(name: str) -> str:
    if name not in STUDIES:
        raise ValueError(f"{name!r} is not one of {', '.join(STUDIES)}")
    return name
