"""Train arms over seeds and compare: `python scripts/compare_moe.py --config=configs/moe_vs_dense.py --workdir=DIR`."""

from dataclasses import replace
from pathlib import Path

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from lottery.summary import write_csv
from scripts import train
from tessera.infra.config import ConfigError, Invocation, run
from tessera.infra.workdir import prepare
from tessera.lm.run import make_text_run
from tessera.reports import comparison
from tessera.reports.html import config_section, print_report, write_report


def main(invocation: Invocation) -> int:
    """Train what is not finished, then tables and a report of all runs. Returns the exit status."""
    config = invocation.config
    root = Path(invocation.workdir or f"runs/{invocation.name}")
    for arm in config.arms:  # what is wrong with the last one is said before anything is written or trained
        todo = [seed for seed in config.seeds if not comparison.finished(root / f"{arm}-{seed}")]
        if todo:
            check(config, arm, todo[0])
    prepare(root, config)
    # Seeds of an arm are one program: compiled once, found again by the others and after a restart.
    jax.config.update("jax_compilation_cache_dir", str((root / "compiled").absolute()))
    runs = []
    for arm in config.arms:
        for seed in config.seeds:
            workdir = root / f"{arm}-{seed}"
            if not comparison.finished(workdir):
                named = replace(
                    invocation, config=settings_of(config, arm, seed), name=f"{arm}-{seed}", workdir=str(workdir)
                )
                status = train.main(named)
                if status:
                    return status
            runs.append(comparison.read_run(workdir, arm, seed))
    tables = {
        "Validation loss, nats per token": comparison.loss_rows(runs),
        f"Validation loss, paired with {config.against} seed by seed": comparison.difference_rows(runs, config.against),
        "Load of the experts over the last tenth of the run": comparison.balance_rows(runs),
        "Do seeds agree on who serves which byte?": comparison.stability_rows(runs),
    }
    for title, rows in tables.items():
        show(title, rows)
    write_csv([comparison.summary(one) for one in runs], root / "runs.csv")
    sections = [*comparison.sections(runs, tables), config_section(root)]
    print_report(write_report, root, "Routed experts against a dense decoder", sections)
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
        make_text_run(settings_of(config, arm, seed))
    except ConfigError as error:
        raise ConfigError(f"arm {arm!r} (config is config.run with config.arms.{arm}): {error}") from error


def show(title: str, rows: list[dict]) -> None:
    """Print rows as a table."""
    if not rows:
        return
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    Console().print(table)


if __name__ == "__main__":
    run(main, config_file="moe_vs_dense.py", errors=train.ERRORS)
