"""Train arms over seeds and compare them: `tessera compare --config=moe_vs_dense --workdir=DIR`."""

from dataclasses import dataclass, replace

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from lottery.summary import write_csv
from tessera.cli import train
from tessera.cli.main import Invocation
from tessera.infra.config import ConfigError
from tessera.infra.schema import Changes, Schema
from tessera.infra.workdir import hold, locate
from tessera.lm import schema as lm_schema
from tessera.reports import comparison
from tessera.reports.html import config_section, print_report, write_report


@dataclass(frozen=True)
class CompareSettings:
    """What stands at the top of a comparison's config.

    Attributes:
      title: of the page.
      seeds: of every arm.
      against: the arm that the others are compared with, seed by seed.
    """

    title: str = "Runs compared"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    against: str = "dense"


SCHEMA = Schema(CompareSettings, run=lm_schema.SCHEMA, arms=Changes(lm_schema.SCHEMA, "what an arm changes in `run`."))
ERRORS = train.ERRORS


def main(invocation: Invocation) -> int:
    """Train what is not finished, then tables and a report of all runs. Returns the exit status."""
    config = invocation.config
    root = locate(invocation.workdir, config, name=invocation.name, defaults=invocation.defaults)
    for arm in config.arms:  # what is wrong with the last one is said before anything is written or trained
        todo = [seed for seed in config.seeds if not comparison.finished(root / f"{arm}-{seed}")]
        if todo:
            check(config, arm, todo[0])
    invocation.prepare(whole=True)
    # Seeds of an arm are one program: compiled once, found again by the others and after a restart.
    jax.config.update("jax_compilation_cache_dir", str((root / "compiled").absolute()))
    with hold(root):
        runs = []
        for arm in config.arms:
            for seed in config.seeds:
                workdir = root / f"{arm}-{seed}"
                if not comparison.finished(workdir):
                    named = replace(
                        invocation,
                        config=(one := settings_of(config, arm, seed)),
                        name=f"{arm}-{seed}",
                        workdir=str(workdir),
                        defaults=lm_schema.SCHEMA.defaults(one),
                    )
                    status = train.main(named)
                    if status:
                        return status
                runs.append(comparison.read_run(workdir, arm, seed))
    tables = {
        "Validation loss, nats per token": comparison.loss_rows(runs),
        f"Validation loss, paired with {config.against} seed by seed": comparison.difference_rows(runs, config.against),
        "Load of the experts over the last tenth of the run": comparison.balance_rows(runs),
        "Do seeds agree on which expert a byte goes to?": comparison.stability_rows(runs),
    }
    for title, rows in tables.items():
        show(title, rows)
    write_csv([comparison.summary(one) for one in runs], root / "runs.csv")
    for text in comparison.findings(runs, config.against):
        Console().print(text, soft_wrap=True, highlight=False)
    sections = [*comparison.sections(runs, tables, config.against), config_section(root)]
    print_report(write_report, root, config.title, sections)
    return 0


def settings_of(config: ConfigDict, arm: str, seed: int) -> ConfigDict:
    """Settings of one run for `scripts/train.py`."""
    one = ConfigDict(config.run.to_dict())
    one.update(config.arms[arm])
    one.seed = seed
    return one


def check(config: ConfigDict, arm: str, seed: int) -> None:
    """Check the settings of an arm as the training script does; nothing is written.

    Raises:
      ConfigError: a setting that is wrong.
    """
    try:
        train.prepare_run(settings_of(config, arm, seed))
    except ConfigError as error:
        raise ConfigError(f"arm {arm!r} (config is config.run with config.arms.{arm}): {error}") from error


def show(title: str, rows: list[dict]) -> None:
    """Print rows as a table."""
    if not rows:
        return
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        cells = (
            "–" if cell is None else f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row.values()
        )
        table.add_row(*cells)
    Console().print(table)
