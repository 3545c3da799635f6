"""Find lottery tickets: `python scripts/find_ticket.py --config=configs/lottery_digits.py --workdir=runs/digits`."""

import jax
import jax.numpy as jnp
from rich.console import Console

from lottery import imp, summary
from training.checkpoint import CheckpointDamaged
from training.config import Invocation, build, checked, run
from training.download import DataUnavailable
from training.images import ImageConfig, load_images
from training.lenet import LeNet, MLPConfig
from training.levels import LevelStore
from training.optimizer import OptimizerConfig, make_optimizer
from training.progress import Progress
from training.schedules import parse_steps
from training.ticket_report import FirstLayer, lottery_report, summary_table
from training.tickets import TicketConfig, make_programs, train_stack
from training.workdir import WorkdirMismatch, prepare


def main(invocation: Invocation) -> None:
    """Config -> dataclasses -> search -> CSV, report."""
    config = invocation.config
    splits = checked("config.data", load_images, build(ImageConfig, config.data, "config.data"))
    size = len(splits.train.labels)

    def steps(name, text) -> int:
        return checked(name, parse_steps, text, steps_per_epoch=size // config.train.batch_size)

    rewind = steps("config.search.rewind", config.search.rewind)
    train = {**config.train, "steps": steps("config.train.steps", config.train.steps)}
    ticket = build(TicketConfig, train, "config.train", rewind=rewind)
    search = build(imp.SearchConfig, {**config.search, "rewind": rewind}, "config.search", seeds=tuple(config.seeds))
    optimizer = build(OptimizerConfig, config.optimizer, "config.optimizer", lr=config.lr, steps=ticket.steps)
    model = LeNet(build(MLPConfig, config.model, "config.model", classes=splits.num_classes))
    workdir = prepare(invocation.workdir or f"runs/{invocation.name}", config)

    tx = checked("config.optimizer", make_optimizer, optimizer)
    example = jnp.asarray(splits.train.images[:1])

    def apply(params, images):
        return model.apply({"params": params}, images)

    programs = make_programs(splits, apply=apply, optimizer=tx, config=ticket)
    store = LevelStore(workdir / "levels")
    first_layer = FirstLayer(store)
    with Progress(search.levels + 1, "levels", every=0) as levels:

        def train_fn(starts: imp.Starts, *, level: int) -> imp.Trained:
            levels.advance(level - levels.done)
            with Progress(
                ticket.steps - starts.start_step, f"level {level:2d} x{len(starts.names)}", parent=levels
            ) as bar:
                return train_stack(
                    starts,
                    programs,
                    config=ticket,
                    size=size,
                    unfinished=store.unfinished(level),
                    report=lambda steps, row: bar.advance(steps, **row) if row else bar.skip(steps),
                )

        rows = imp.search(
            lambda key: model.init(key, example)["params"], train_fn, first_layer, search, opt_init=jax.jit(tx.init)
        )
        levels.advance(levels.total - levels.done)
    summary.write_csv(rows, workdir / "tickets.csv")
    Console().print(summary_table(rows))
    page = lottery_report(workdir, rows, first_layer.masks, splits.train.images.mean(axis=0))
    Console().print(f"report: {page}", soft_wrap=True)


if __name__ == "__main__":
    run(
        main,
        config_file="lottery_digits.py",
        errors=(DataUnavailable, WorkdirMismatch, CheckpointDamaged, FloatingPointError),
    )
