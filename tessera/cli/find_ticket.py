"""Find lottery tickets: `tessera find-ticket --config=lottery_digits --workdir=runs/digits`."""

from rich.console import Console

from lottery import imp, summary
from tessera.cli.main import Invocation
from tessera.data.download import DataUnavailable
from tessera.infra.checkpoint import CheckpointDamaged
from tessera.infra.config import checked
from tessera.infra.logger import Progress
from tessera.infra.workdir import WorkdirMismatch, hold
from tessera.reports.html import print_report
from tessera.tickets.report import FirstLayer, lottery_report, summary_table
from tessera.tickets.setup import SCHEMA as SCHEMA
from tessera.tickets.setup import LevelStore, make_setup, search_tickets

ERRORS = (DataUnavailable, WorkdirMismatch, CheckpointDamaged, FloatingPointError)


def main(invocation: Invocation) -> None:
    """Config -> dataclasses -> search -> CSV, report."""
    setup = make_setup(invocation.config)
    # A finished search goes on to more levels where their densities do not depend on their number.
    extends = setup.search.schedule == "geometric" and not setup.search.density
    workdir = invocation.prepare(whole=True, grows=("search.levels",) if extends else ())
    store = LevelStore(workdir / "levels")
    first_layer = FirstLayer(store)
    with hold(workdir), Progress(setup.search.levels + 1, "levels", every=0.0) as levels:

        def train_fn(starts: imp.Starts, *, level: int) -> imp.Trained:
            levels.advance(level - levels.done)
            total = setup.ticket.steps - starts.start_step
            with Progress(total, f"level {level:2d} x{len(starts.names)}", parent=levels, begins="compiling") as bar:
                return setup.train(
                    starts, store.unfinished(level), lambda n, row: bar.advance(n, **row) if row else bar.skip(n)
                )

        rows = checked("config.search", search_tickets, setup, first_layer, train_fn, invocation.config)
        levels.advance(levels.total - levels.done)
    summary.write_csv(rows, workdir / "tickets.csv")
    Console().print(summary_table(rows))
    images = setup.splits.train.images
    mean = images.mean(axis=0) if images.ndim == 4 else None
    print_report(lottery_report, workdir, rows, first_layer.masks, mean)
