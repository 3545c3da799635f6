"""The tour: `tessera demo` runs five ideas on real data, two CPU cores and a few minutes, and writes one page of them.

Each part is commands that a user could give. They run as processes of their own (parts differ in their number of
devices), write below `--workdir`, and are noted in `done.json` when they have ended: the same command goes on with the
first that has not.
"""

import argparse
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from tessera.cli.main import PLAIN
from tessera.infra.errors import ConfigError, WorkdirInUse
from tessera.infra.logger import clock, read_object, write_text
from tessera.pages import tour
from tessera.reports import style

ROOT = Path(__file__).parents[2]
CONSOLE = "from scaling.sweeps.worker import follow; follow({parent}); from tessera.cli.main import main; main()"


class Step(NamedTuple):
    """A command of the tour.

    Attributes:
      words: behind `tessera`; DIR stands for the tour's directory.
      made: file below the directory that is there when it has ended.
      shows: what it prints is that file.
    """

    words: tuple[str, ...]
    made: str
    shows: bool = False

    def command(self, directory: str) -> list[str]:
        """The words for a directory."""
        return [word.replace("DIR", directory) for word in self.words]


def _generate(name: str, plan: str, devices: int) -> Step:
    """A step that continues a text greedily with the model of the part "plan"."""
    words = ("generate", "--config.model.dir=DIR/plan/split", f"--config.prompt={tour.PROMPT}")
    greedy = ("--config.sampling.temperature=0", "--config.sampling.max_tokens=120")
    under = (f"--config.plan={plan}",) * bool(plan)
    return Step((*words, *greedy, *under, f"--cpu_devices={devices}"), f"plan/{name}.txt", True)


def _train(name: str, *flags: str) -> Step:
    """A step that trains the dense arm of part "experts" further.

    A router's choice is a jump: where rounding moves one of them, the losses of a routed model differ by 1e-3.
    """
    dense = ("--config=moe_lm:demo", "--config.model.mlp=swiglu", "--config.model.ff=198")
    short = ("--config.steps=20", "--config.log.every=1", "--config.eval.every=20")
    words = ("train", *dense, *short, "--config.start.workdir=DIR/experts/dense-0", *flags)
    words = (*words, f"--workdir=DIR/plan/{name}")
    return Step(words, f"plan/{name}/report.html")


SEARCH = Step(("find-ticket", "--config=lottery_digits:demo", "--workdir=DIR/ticket"), "ticket/report.html")
COMPARE = Step(("compare", "--config=moe_vs_dense:demo", "--workdir=DIR/experts"), "experts/report.html")
PLANNED = (
    _train("one", "--cpu_devices=1"),
    _train("split", f"--config.plan={tour.PLAN}", "--cpu_devices=8"),
    _generate("one", "", 1),
    _generate("split", tour.SERVED, 2),
)
ROUTED = Step(
    ("report", "DIR/experts/moe-0", f"--tokens={tour.TOKENS}", "--output=DIR/tokens/report.html"), "tokens/report.html"
)
SWEEP = Step(("sweep", "--config=isoflop:demo", "--workdir=DIR/sweep"), "sweep/report.html")
# The parts in the order of the page.
PARTS: Mapping[str, tuple[Step, ...]] = {
    "ticket": (SEARCH,),
    "experts": (COMPARE,),
    "plan": PLANNED,
    "tokens": (ROUTED,),
    "sweep": (SWEEP,),
}


def main(argv: Sequence[str] = ()) -> int:
    """Carry out what is not done, then write the page. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="tessera demo", description=PLAIN["demo"][1])
    parser.add_argument("--workdir", default="runs/demo", help="directory of the tour; one found there goes on")
    options = parser.parse_args(list(argv))
    try:
        style.require_matplotlib()
        status = carry_out(options.workdir)
        return status or finish(options.workdir)
    except (ConfigError, WorkdirInUse, OSError, ValueError, style.MissingMatplotlib) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def carry_out(directory: str, parts: Mapping[str, tuple[Step, ...]] = PARTS) -> int:
    """Run the steps that are not noted as done; the exit status of the first that fails.

    Raises:
      ValueError: done.json is damaged.
    """
    root, begun = Path(directory), time.monotonic()
    root.mkdir(parents=True, exist_ok=True)
    record = root / "done.json"
    done = read_object(record) if record.exists() else {}
    for number, (name, steps) in enumerate(parts.items(), 1):
        title = f"{number} of {len(parts)}  {tour.TITLES[name]}"
        left = [step for step in steps if _key(step) not in done or not (root / step.made).exists()]
        if not left:
            say(f"{title}: done before")
            continue
        after = [tour.TITLES[other] for other in list(parts)[number:]]
        then = f"; then: {', '.join(after)}" if after else "; then the page"
        say(f"{title}  ({clock(time.monotonic() - begun)} elapsed{then})")
        for step in left:
            since, used = time.monotonic(), _processor_seconds()
            status = run(step, directory)
            if status:
                say(f"{title}: stopped with exit code {status}; the same command goes on from here")
                return status
            spent = {"seconds": time.monotonic() - since, "processor": _processor_seconds() - used}
            done[_key(step)] = {name: round(value, 1) for name, value in spent.items()}
            write_text(record, tour.as_json(done))
    say(f"all {len(parts)} parts: {clock(time.monotonic() - begun)}")
    return 0


def finish(directory: str) -> int:
    """Write the page; 1 where what must be equal is not."""
    commands = {name: [" ".join(_shown(step, directory)) for step in steps] for name, steps in PARTS.items()}
    path, wrong = tour.write_tour(Path(directory), commands)
    Console().print(f"report: {path}", soft_wrap=True, markup=False)
    for text in wrong:
        print(f"error: {text}", file=sys.stderr)
    return 1 if wrong else 0


def _key(step: Step) -> str:
    return " ".join(step.words)


def _shown(step: Step, directory: str) -> list[str]:
    return ["tessera", *map(shlex.quote, step.command(directory))]


def _processor_seconds() -> float:
    """Of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def say(text: str) -> None:
    """A line of the tour's own progress."""
    print(f"== {text}", file=sys.stderr, flush=True)


def run(step: Step, directory: str) -> int:
    """Run one step in a process of its own, which ends with this one; its exit status.

    What it prints goes to the file that it makes, or to log.txt of the tour's directory; its progress bars to the
    terminal.
    """
    root = Path(directory)
    target = root / (f"{step.made}.part" if step.shows else "log.txt")
    target.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The eight devices of the third part are a CPU's, whatever else this machine has.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    words = [sys.executable, "-c", CONSOLE.format(parent=os.getpid()), *step.command(directory)]
    with target.open("w" if step.shows else "a", encoding="utf-8") as out:
        child = subprocess.Popen(words, stdout=out, env=environment)
        before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            status = child.wait()
        except KeyboardInterrupt:  # the terminal has told the child too, which saves
            child.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if not status and step.shows:
        os.replace(target, root / step.made)
    return 128 - status if status < 0 else status
