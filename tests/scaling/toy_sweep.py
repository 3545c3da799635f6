"""A sweep without training, for tests that need it in processes of its own: `python -m toy_sweep DIRECTORY`."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from scaling.sweeps.executors import Local
from scaling.sweeps.plan import Family, PlanConfig, Rule, plan_runs
from scaling.sweeps.store import Store
from scaling.sweeps.sweep import SweepConfig, run_sweep

PLAN = PlanConfig(
    widths=(8, 16, 24, 32), budgets=(1e9, 3e9, 9e9), batch=Rule(4.0, multiple=1), warmup=0, least_steps=10
)


FAST = SweepConfig(poll=0.01)


class Inside:
    """Carries calls out in this process, in any order."""

    slots = 2

    def __init__(self, backwards=False):
        self.backwards, self.calls = backwards, 0

    def submit(self, calls):
        self.calls += len(calls)
        jobs = []
        for function, arguments in reversed(calls) if self.backwards else calls:
            try:
                function(*arguments)
                jobs.append(Ended(""))
            except Exception as error:
                jobs.append(Ended(str(error)))
        return list(reversed(jobs)) if self.backwards else jobs

    def wait(self, seconds):
        pass

    def stop(self, jobs):
        pass


class Ended:
    def __init__(self, message):
        self.message = message

    def done(self):
        return True

    def error(self):
        return self.message


def runs(**changes):
    return plan_runs(Family(), PlanConfig(**{**PLAN.__dict__, **changes}), {"data": "toy"})


def loss_of(run, readout):
    return 1.7 + 20 / run.columns["params"] ** 0.4 + 100 / readout.tokens**0.5


def train(run, directory, report, *, seconds=0.01):
    """Goes on from a saved trunk as real training does; its losses depend on the trunk's full course."""
    saved = directory / "trunk.json"
    trunk = json.loads(saved.read_text()) if saved.exists() else {"step": 0, "sum": 0}
    if trunk["step"] > run.readouts[0].branch:
        trunk = {"step": 0, "sum": 0}
    for readout in run.readouts:
        while trunk["step"] < readout.branch:
            steps = min(50, readout.branch - trunk["step"])
            trunk = {
                "step": trunk["step"] + steps,
                "sum": trunk["sum"] + sum(range(trunk["step"], trunk["step"] + steps)),
            }
            time.sleep(seconds)
            report(steps)
        directory.mkdir(parents=True, exist_ok=True)
        temporary = saved.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(trunk))
        os.replace(temporary, saved)
        report(readout.steps - readout.branch)
        yield readout, {"loss": loss_of(run, readout) + trunk["sum"] / 1e12}


def fail_once(run, directory, report):
    """The second run of the plan fails the first time, by an exception or a signal."""
    mark = directory / "tried"
    if run.columns["width"] in (16, 24) and not mark.exists():
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        if run.columns["width"] == 24:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("a disk was away")
    yield from train(run, directory, report, seconds=0.0)


def fail_always(run, directory, report):
    if run.columns["width"] == 16:
        raise OSError("the disk is full")
    yield from train(run, directory, report, seconds=0.0)


def diverge(run, directory, report):
    """Of the second run only the first readout is reached; the third gives no finite loss at all."""
    for readout, measured in train(run, directory, report, seconds=0.0):
        if run.columns["width"] == 16 and readout.budget > 1e9:
            raise FloatingPointError("the loss is nan near step 10")
        yield readout, measured | ({"loss": float("inf")} if run.columns["width"] == 24 else {})


def slow_small(run, directory, report):
    """Small models take longest: runs end in another order than the plan's."""
    time.sleep(0.8 / run.columns["width"])
    yield from train(run, directory, report, seconds=0.0)


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    engine = Local(2, directory / "logs")
    # Imported under its name, as a process that is handed the function will.
    from toy_sweep import train as imported

    if "--main" in sys.argv:
        imported = train
    run_sweep(runs(), imported, Store(directory / "runs"), engine, directory / "runs.csv", SweepConfig(poll=0.02))
    (directory / "finished").touch()
