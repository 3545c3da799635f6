"""Look at a finished search: `tessera analyze-ticket --config.search=RUN`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tessera.cli.main import Invocation
from tessera.data.download import DataUnavailable
from tessera.infra.checkpoint import CheckpointDamaged
from tessera.infra.config import ConfigError, build, checked
from tessera.infra.memo import Memo
from tessera.infra.remote import is_url
from tessera.infra.schema import Schema
from tessera.infra.workdir import WorkdirMismatch, hold
from tessera.reports.html import print_report
from tessera.tickets.probe_report import analysis_report, analyze
from tessera.tickets.probes import AnalysisConfig
from tessera.tickets.setup import finished


@dataclass(frozen=True)
class AnalyzeSettings:
    """What stands at the top of an analysis' config.

    Attributes:
      search: workdir of the finished search, or its URL.
      levels: pruning levels to look at; () takes five over the depth.
    """

    search: str = ""
    levels: tuple[int, ...] = ()


SCHEMA = Schema(AnalyzeSettings, analysis=AnalysisConfig)
ERRORS = (DataUnavailable, WorkdirMismatch, CheckpointDamaged, FloatingPointError)


def spread(have: Sequence[int]) -> list[int]:
    """Five of the finished levels over the depth: the first three, the one in the middle and the last."""
    return sorted({0, *have[1:3], have[len(have) // 2], have[-1]} if have else {0})


def main(invocation: Invocation) -> None:
    """Config -> levels of the search -> connectivity, overlap, sharpness -> page."""
    config, console = invocation.config, Console()
    if not config.search:
        raise ConfigError("config.search: the workdir of a finished search is needed")
    search = checked("config.search", finished, config.search, "config.search")
    have = [n for n in range(search.setup.search.levels + 1) if search.store.has(n)]
    levels = list(config.levels) or spread(have)
    missing = [level for level in levels if level not in have]
    if missing:
        raise ConfigError(f"config.levels: the search has no finished level {missing[0]}; finished: {have}")
    if is_url(config.search) and not invocation.workdir:
        raise ConfigError("--workdir=DIR is needed where config.search is a URL: what is there is only read")
    workdir = invocation.prepare(workdir=str(Path(config.search) / "analysis"))
    memo = Memo(workdir / "memo", lambda name: console.log(name))
    settings = build(AnalysisConfig, config.analysis, "config.analysis")
    with hold(workdir):
        found = analyze(search, memo, settings, levels)
    print_report(analysis_report, workdir, search, found, settings)
