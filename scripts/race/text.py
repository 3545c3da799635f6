"""Tracks on text: bits per byte of the whole test split of `stdlib`, for training FLOPs counted as 6 N D."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from scaling.flops import count
from scripts.race.run import OverBudget, check_budget, race
from tessera.cli import train
from tessera.cli.main import Invocation
from tessera.data.rampup import stages
from tessera.infra.checkpoint import CheckpointReader, abstract
from tessera.lm.run import Run
from tessera.loop import without_frozen
from tessera.reports.comparison import finished, shape

SCHEMA = train.SCHEMA
ERRORS = (*train.ERRORS, OverBudget)
CONVENTION = "6ND, active experts"


def main(invocation: Invocation) -> int:
    """Config -> cost -> a run a seed -> row. Returns the exit status."""
    config = invocation.config
    check_rules(config)
    _, run = train.prepare_run(config)
    cost = training_cost(run, config.steps)
    check_budget(invocation.flags["track"], cost, invocation.name)

    def score(seeds: Sequence[int], root: Path) -> list[float]:
        return [trained(invocation, seed, root / f"seed{seed}") for seed in seeds]

    return race(invocation, cost, run.settings["data_sha256"], score)


def check_rules(config: ConfigDict) -> None:
    """Check that nothing but the budget and the text goes into the weights.

    Raises:
      OverBudget: a setting that is against it.
    """
    if config.data.name != "stdlib" or config.data.sources:
        raise OverBudget(f"config.data.name={config.data.name!r}: this track is on stdlib")
    given = {"start.dir": config.start.dir, "start.workdir": config.start.workdir, "distill.dir": config.distill.dir}
    for name, value in given.items():
        if value:
            raise OverBudget(f"config.{name}={value!r}: weights and teachers trained elsewhere are not in the count")


def training_cost(run: Run, steps: int) -> float:
    """6 N D: six times the weights that a token uses, by `scaling.flops`, times the tokens of all steps."""
    config = run.config
    if config.ramp is None:
        sequences = steps * config.batch_size
    else:
        sequences = sum((stage.last - stage.first + 1) * stage.size for stage in stages(config.ramp, steps))
    return count(shape(run.settings), CONVENTION).flops_per_token * sequences * config.length


def trained(invocation: Invocation, seed: int, workdir: Path) -> float:
    """Train one seed, where that is not done, and score its last weights on the whole test split, in bits per byte."""
    one: Any = ConfigDict(invocation.config.to_dict())
    one.seed = seed
    if not finished(workdir):
        defaults = SCHEMA.defaults(one)
        named = replace(invocation, config=one, name=f"seed {seed}", workdir=str(workdir), defaults=defaults)
        if status := train.main(named):
            raise SystemExit(status)
    one.eval.batches = 10**9  # all of them
    _, run = train.prepare_run(one)
    like = abstract(without_frozen(run.init_fn(True)))
    state = CheckpointReader(workdir / "checkpoints").restore(one.steps, like).state
    return run.eval_fn(state, "test")["bits_per_byte"]
