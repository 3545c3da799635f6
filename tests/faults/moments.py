"""A moment in a process at which it is killed: a call of a function, or a file that is about to be opened or renamed.

SIGKILL reaches the process and, where it is a worker of another one, that one first: as when a machine loses power.
"""

import importlib
import json
import os
import re
import signal
import sys
import threading
from dataclasses import asdict, dataclass

VARIABLE = "TESSERA_FAULT"


@dataclass(frozen=True)
class Moment:
    """When to kill.

    Attributes:
      call: "module:function" or "module:Class.method"; or
      event: audit event of Python, such as "os.rename" (which comes before the file is renamed).
      match: regular expression found in the event's arguments; of a call, in the text of its arguments.
      number: which of these calls or events, from 1.
      delay: seconds after it.
    """

    call: str = ""
    event: str = ""
    match: str = ""
    number: int = 1
    delay: float = 0.0


def arm(moment: Moment, parent: int = 0) -> None:
    """Kill this process, and `parent` before it, at the moment."""
    left = moment.number

    def reached(text: str) -> None:
        nonlocal left
        if moment.match and not re.search(moment.match, text):
            return
        left -= 1
        if left == 0:
            if moment.delay:
                threading.Timer(moment.delay, kill).start()
            else:
                kill()

    def kill() -> None:
        if parent:
            os.kill(parent, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    if moment.event:
        sys.addaudithook(lambda event, found: reached(repr(found)) if event == moment.event and left > 0 else None)
        return
    module, _, path = moment.call.partition(":")
    owner = importlib.import_module(module)
    *parts, name = path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    def wrapped(*arguments, **named):
        reached(repr(arguments) if moment.match else "")
        return original(*arguments, **named)

    setattr(owner, name, wrapped)


def train_run(*arguments, **named):
    """`tessera.sweeps.train.train_run` in a worker of a sweep, with the moment that the environment names."""
    from tessera.sweeps import train

    if VARIABLE in os.environ:
        arm(Moment(**json.loads(os.environ[VARIABLE])), parent=os.getppid())
    return train.train_run(*arguments, **named)


def arm_workers(moment: Moment) -> None:
    """Arm the workers of the sweep that this process is about to begin."""
    import tessera.cli.sweep

    os.environ[VARIABLE] = json.dumps(asdict(moment))
    tessera.cli.sweep.train_run = train_run
