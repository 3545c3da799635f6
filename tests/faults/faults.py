"""Faults in numbers: kills, full disks, damaged files, pairs on one directory, requests, inputs nobody would send.

`make test-faults` runs all of it, `python tests/faults/faults.py --kills=10 --disks=0 ...` some. The last table counts
what was tried, what survived (the result is bit for bit that of an undisturbed run, or one line says which file is
wrong) and what was lost. Runs are forks of one process that has imported everything and used nothing.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
for path in (ROOT, ROOT / "tests" / "tessera", ROOT / "tests" / "tessera" / "serving"):
    sys.path.insert(0, str(path))
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-faults"),
    "COLUMNS": "500",  # no line of an error is broken
}
SMALL = [
    "--config.steps=12",
    "--config.batch_size=4",
    "--config.length=16",
    "--config.model.layers=2",
    "--config.model.width=16",
    "--config.model.heads=2",
    "--config.model.kv_heads=1",
    "--config.model.ff=32",
    "--config.optimizer.warmup=2",
    "--config.checkpoint.every=3",
    "--config.checkpoint.keep=2",
    "--config.log.every=3",
    "--config.eval.every=6",
    "--config.eval.batches=2",
]
SLOWEST = 240.0  # seconds after which a run counts as hanging
from moments import Moment, arm, arm_workers  # noqa: E402


@dataclass(frozen=True)
class Job:
    """A command whose result is known.

    Attributes:
      command: of `tessera`.
      flags: without its directory.
      moments: name -> moments at which it is killed.
      workers: the moments are those of its worker processes, except at the start and in the report.
    """

    command: str
    flags: tuple[str, ...]
    moments: dict[str, tuple[Moment, ...]] = field(default_factory=dict)
    workers: bool = False

    def argv(self, directory: Path) -> list[str]:
        """The command line's words behind the command's name."""
        return [*self.flags, f"--workdir={directory}"]


QUANTIZE = ("--config.validation=32", "--config.length=16", "--config.variants=((8, 'rtn', 0), (4, 'rtn', 8))")
COMPILE = Moment("jax._src.compiler:compile_or_get_cached")
BEGIN = (Moment(event="open", match=r"versions\.json"), Moment(event="os.rename", match=r"config\.json'"))
SAVE = Moment("tessera.infra.artifacts:save_args")
TRAINING = {
    "start": (*BEGIN, Moment("tessera.cli.train:hold")),
    "compiling": (replace(COMPILE, number=2, delay=0.02), replace(COMPILE, number=5, delay=0.01)),
    "inside a save": (
        Moment("tessera.infra.checkpoint:save_args", number=1, delay=0.01),
        Moment("tessera.infra.checkpoint:save_args", number=3, delay=0.03),
        Moment(event="open", match=r"checkpoints/9\.orbax-checkpoint-tmp.*'w"),
    ),
    "between save and rename": (
        Moment(event="os.rename", match=r"checkpoints/6'"),
        Moment(event="os.rename", match=r"checkpoints/12'"),
    ),
    "in an evaluation": (
        Moment("tessera.lm.run:evaluate", number=1, delay=0.002),
        Moment("tessera.lm.run:evaluate", number=2, delay=0.002),
    ),
    "in the last step": (
        Moment("tessera.infra.logger:Logger.write", match=r"\(<.*>, 12,"),
        Moment("tessera.loop:NanGuard.add", match=r"\(<.*>, 12,"),
    ),
    "in the report": (Moment("tessera.cli.train:print_report", delay=0.03), Moment(event="os.rename", match="report")),
}


def jobs(text: Path, trained: Path) -> dict[str, Job]:
    """Every command with its moments; `trained` is a finished run of the first."""
    data = [f"--config.data.name={text}"]
    search = {
        "start": (*BEGIN,),
        "compiling": (replace(COMPILE, number=3, delay=0.02), replace(COMPILE, number=6, delay=0.01)),
        "inside a save": (replace(SAVE, number=1, delay=0.01), replace(SAVE, number=4, delay=0.02)),
        "between save and rename": (
            Moment(event="os.rename", match=r"levels/01'"),
            Moment(event="os.rename", match=r"levels/\.?0\d\.step", number=3),
        ),
        "in an evaluation": (Moment("tessera.tickets.train:measure", number=2, delay=0.005),),
        "in the last step": (Moment(event="os.rename", match=r"levels/02'"),),
        "in the report": (
            Moment("tessera.cli.find_ticket:print_report", delay=0.03),
            Moment(event="open", match="csv"),
        ),
    }
    study = {
        "start": (BEGIN[1],),
        "compiling": (replace(COMPILE, number=4, delay=0.03),),
        "inside a save": (replace(SAVE, number=1, delay=0.005), replace(SAVE, number=2, delay=0.01)),
        "between save and rename": (
            Moment(event="os.rename", match="memo"),
            Moment(event="os.rename", match=r"memo/.*json", number=2),
        ),
        "in an evaluation": (Moment("tessera.tickets.studies.instability:_branches", number=2, delay=0.05),),
        "in the last step": (Moment(event="os.rename", match=r"memo/.*json", number=4),),
        "in the report": (Moment("tessera.cli.study:print_report", delay=0.03),),
    }
    sweep = {
        "start": (BEGIN[0],),
        "compiling": (replace(COMPILE, number=2, delay=0.02),),
        "inside a save": (replace(SAVE, delay=0.01), replace(SAVE, number=2, delay=0.02)),
        "between save and rename": (
            Moment(event="os.rename", match="branch-"),
            Moment(event="os.rename", match=r"readouts/\d"),
        ),
        "in an evaluation": (Moment("tessera.sweeps.train:Trainer.read_out", delay=0.1),),
        "in the last step": (Moment(event="os.rename", match=r"readouts/\d", number=2),),
        "in the report": (Moment(event="os.rename", match=r"report\.html'"), Moment(event="open", match=r"fit\.json")),
    }
    export = {
        "start": (Moment("tessera.serving.huggingface:write_config"),),
        "inside a save": (
            Moment("tessera.serving.huggingface:safetensors_module", number=1, delay=0.001),
            Moment("tessera.serving.load:write_text", number=2),
        ),
        "between save and rename": (
            Moment(event="os.rename", match=r"model\.safetensors"),
            Moment(event="os.rename", match=r"generation_config\.json'"),
            Moment(event="os.rename", match=r"exported'"),
        ),
    }
    quantize = {
        "compiling": (replace(COMPILE, number=2, delay=0.02),),
        "in an evaluation": (Moment("tessera.cli.quantize:quantise_decoder", number=2, delay=0.01),),
    }
    return {
        "train, dense": Job("train", ("--config=lm:tiny", *SMALL, *data), TRAINING),
        "train, routed": Job("train", ("--config=moe_lm:tiny", *SMALL, *data), TRAINING),
        "search": Job(
            "find-ticket",
            (
                "--config=lottery_digits",
                "--config.seeds=(0, 3)",
                "--config.model.hidden=(12, 8)",
                "--config.train.steps=40it",
                "--config.train.eval_every=10",
                "--config.train.save_seconds=0.0",
                "--config.search.levels=2",
                "--config.search.rewind=10it",
            ),
            search,
        ),
        "study": Job(
            "study",
            (
                "--config=study_instability:tiny",
                "--config.train.steps=40it",
                "--config.train.eval_every=20",
                "--config.study.steps=(0, 20)",
            ),
            study,
        ),
        "sweep": Job(
            "sweep",
            (
                "--config=isoflop:tiny",
                "--config.plan.widths=(8, 12, 16)",
                "--config.plan.budgets=(5e8, 1e9)",
                "--config.plan.least_steps=10",
                "--config.plan.tokens_per_parameter=(0.1, 1e4)",
                "--config.plan.warmup=4",
                "--config.train.eval_tokens=4096",
                "--config.train.noise_batches=2",
                "--config.train.save_seconds=0.0",
                "--config.report.resamples=20",
                "--config.data.max_bytes=200000",
            ),
            sweep,
            workers=True,
        ),
        "export": Job("export-hf", (str(trained),), export),
        "quantize": Job("quantize", (f"--config.model.dir={trained}", *QUANTIZE), quantize),
    }


def fork(function: Callable[[], int | None], log: Path, seconds: float = SLOWEST) -> int:
    """Exit status of a function in a process of its own (minus the signal that ended it); its output goes to a file."""
    return wait(begin(function, log), log, seconds)


def begin(function: Callable[[], int | None], log: Path) -> int:
    """Process id of a function that runs in a process of its own."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        status = function() or 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def wait(pid: int, log: Path, seconds: float = SLOWEST) -> int:
    """Exit status of a process; one that takes too long is killed, with the processes that it started."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with log.open("a") as file:
        file.write(f"\nno end after {seconds} s\n")
    return -999


def command(job: Job, directory: Path, moment: Moment | None = None, cold: Path | None = None) -> Callable[[], None]:
    """The command as a function for `fork`, armed with a moment; `cold` is a compilation cache of its own."""

    def function() -> None:
        import jax

        from tessera.cli import main as cli

        if cold:
            jax.config.update("jax_compilation_cache_dir", str(cold))
        if moment:
            inner = job.workers and not re.search("versions|report|fit", moment.match)
            arm_workers(moment) if inner else arm(moment)
        if job.command == "export-hf":
            cli.main([job.command, *job.flags, str(directory / "exported")])
        cli.main([job.command, *job.argv(directory)])

    return function


def result(job: Job, directory: Path, log: Path) -> dict:
    """What a finished command left, files by name: a hash of texts, the checked arrays of artifacts."""
    if job.command == "quantize":
        return {"table": [line for line in log.read_text().splitlines() if line.startswith("|")]}
    out = log.with_suffix(".result")
    out.unlink(missing_ok=True)
    status = fork(lambda: out.write_text(json.dumps(contents(directory))) and 0, log.with_suffix(".check"))
    return json.loads(out.read_text()) if status == 0 else {"unreadable": log.with_suffix(".check").read_text()[-2000:]}


TEXTS = r"metrics.jsonl|tickets.csv|runs.csv|table.md|*.safetensors|memo/*.json|exported/*|readouts/*.json".split("|")


def contents(directory: Path) -> dict:
    """See `result`; every array is read and compared with its checksum."""
    from functools import partial

    from tessera.infra.checkpoint import open_item, read_meta, read_state

    found = {}
    for pattern in TEXTS:
        for path in directory.rglob(pattern):
            if path.is_file():
                found[str(path.relative_to(directory))] = hashlib.sha256(canonical(path)).hexdigest()
    for mark in directory.rglob("_CHECKPOINT_METADATA"):
        path = mark.parent
        if path.name.startswith(".") or "orbax-checkpoint-tmp" in path.name or "_damaged" in str(path):
            continue
        read = partial(open_item, path)
        meta = read_meta(read, str(path))
        read_state(read, None, meta, str(path))
        found[str(path.relative_to(directory))] = meta["arrays"]
    return found


def canonical(path: Path) -> bytes:
    """A file's bytes; of safetensors with the header in order, since the package writes its metadata in any."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    size = 8 + int.from_bytes(data[:8], "little")
    return json.dumps(json.loads(data[8:size]), sort_keys=True).encode() + data[size:]


@dataclass
class Count:
    """Tried, survived, lost; and what was lost, in words."""

    tried: int = 0
    lost: list[str] = field(default_factory=list)
    notes: Counter = field(default_factory=Counter)

    def add(self, what: str, problem: str = "") -> None:
        """Count one, which is lost if there is a problem."""
        self.tried += 1
        if problem:
            self.lost.append(f"{what}: {problem}")
            print(f"LOST  {what}: {problem}", flush=True)


class Lab:
    """Directories, the sound results, and the counts."""

    def __init__(self, place: Path, seed: int):
        self.place, self.random, self.counts = place, random.Random(seed), {}
        place.mkdir(parents=True, exist_ok=True)
        self.text = place / "text.txt"
        words = random.Random(0).choices("the tile token ticket routes experts in parallel and scales".split(), k=8000)
        self.text.write_text("\n".join(" ".join(words[i : i + 9]) for i in range(0, len(words), 9)))
        self.jobs = jobs(self.text, place / "sound" / "train_dense")
        self.sound: dict[str, dict] = {}
        self.number = 0

    def count(self, name: str) -> Count:
        """The counts of a kind of fault."""
        return self.counts.setdefault(name, Count())

    def new(self, name: str) -> Path:
        """A directory that does not exist, whose log is beside it."""
        self.number += 1
        path = self.place / "runs" / f"{self.number:04}-{slug(name)}"
        path.parent.mkdir(exist_ok=True)
        return path

    def prepare(self, names: list[str]) -> None:
        """Carry the commands out undisturbed."""
        for name in dict.fromkeys(["train, dense", *names]):
            begun, path = time.monotonic(), self.place / "sound" / slug(name)
            path.parent.mkdir(exist_ok=True)
            log = path.with_suffix(".log")
            status = fork(command(self.jobs[name], path), log)
            if status:
                raise SystemExit(f"{name} does not run undisturbed ({status}):\n{log.read_text()[-3000:]}")
            self.sound[name] = result(self.jobs[name], path, log)
            if "unreadable" in self.sound[name] or not self.sound[name]:
                raise SystemExit(f"{name}: {self.sound[name]}")
            print(f"{name}: {time.monotonic() - begun:.0f} s, {len(self.sound[name])} files compared", flush=True)

    def again(self, name: str, path: Path) -> str:
        """Run the same command again; what is wrong with its result, "" if nothing."""
        job, log = self.jobs[name], path.with_suffix(".again.log")
        status = fork(command(job, path), log)
        if status:
            return f"exit {status} when run again: {tail(log)}"
        found = result(job, path, log)
        if found != self.sound[name]:
            differ = [key for key in found | self.sound[name] if found.get(key) != self.sound[name].get(key)]
            return f"another result: {differ[:5]} {str(found.get('unreadable', ''))[-300:]}"
        return ""


def slug(name: str) -> str:
    """A name for a directory."""
    return "".join(c if c.isalnum() else "_" for c in name.replace(", ", "_"))


def tail(log: Path, length: int = 400) -> str:
    """The end of a log in one line."""
    return " / ".join(log.read_text(errors="replace").strip().splitlines()[-6:])[-length:]


def kills(lab: Lab, most: int) -> None:
    """Kill every command at each of its moments; the same command, run again, ends as if nothing had happened."""
    cases = [
        (name, kind, moment)
        for name, job in lab.jobs.items()
        for kind, moments in job.moments.items()
        for moment in moments
    ]
    lab.random.shuffle(cases)
    for name, kind, moment in cases[:most]:
        path = lab.new(f"kill {name}")
        cold = lab.place / "cold" if kind == "compiling" and lab.random.random() < 0.3 else None
        log = path.with_suffix(".log")
        status = fork(command(lab.jobs[name], path, moment, cold), log)
        count = lab.count("kills " + kind)
        what = f"{name} killed {kind} ({moment.call or moment.event} {moment.match} {moment.number})"
        if status != -signal.SIGKILL:
            count.add(what, f"the moment did not come (exit {status}): {tail(log)}")
        else:
            problem = lab.again(name, path)
            count.add(what, problem)
            print(f"{time.strftime('%H:%M:%S')} {what}: {'lost' if problem else 'survived'}", flush=True)
        hidden = [p for p in path.rglob(".*") if p.name not in (".lock",) and ".orbax" not in p.name]
        count.notes["temporary files left behind"] += len(hidden)
        if cold:
            shutil.rmtree(cold, ignore_errors=True)
        if not count.lost or what not in count.lost[-1]:
            shutil.rmtree(path, ignore_errors=True)


def size_of(path: Path) -> int:
    """Bytes on a tmpfs: whole pages."""
    return sum(4096 * -(-p.stat().st_size // 4096) for p in path.rglob("*") if p.is_file())


def disks(lab: Lab, most: int) -> None:
    """Run on disks that become full; one line says so, and with more space the same command ends as it should."""
    names = [name for name in lab.jobs if name != "quantize"]
    for number in range(most):
        name = names[number % len(names)]
        path = lab.new(f"disk {name}")
        path.mkdir()
        whole = size_of(lab.place / "sound" / slug(name))
        share = (0.05, 0.3, 0.6, 0.85, 0.95)[number // len(names) % 5]
        size = max(16384, int(whole * share))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], check=True)
        log = path.with_suffix(".log")
        try:
            work = path / "run"
            status = fork(command(lab.jobs[name], work), log)
            output, what = log.read_text(errors="replace"), f"{name} on a disk of {size} of {whole} bytes"
            problem = ""
            if status == 0:
                problem = "it was not full"
            elif status != 1 or "Traceback" in output or "full; free space" not in output:
                problem = f"exit {status}: {tail(log)}"
            if not problem:
                subprocess.run(["mount", "-o", f"remount,size={4 * whole + 2**24}", path], check=True)
                problem = lab.again(name, work)
            lab.count("full disks").add(what, problem)
        finally:
            subprocess.run(["umount", "-l", path], check=True)


def pairs(lab: Lab, most: int) -> None:
    """Start a command twice in one directory: one works, the other says who does, or finds it finished."""
    names = [name for name in lab.jobs if name not in ("quantize", "export")]
    for number in range(most):
        name = names[number % len(names)]
        path, count = lab.new(f"pair {name}"), lab.count("pairs in one directory")
        logs = [path.with_suffix(f".{i}.log") for i in range(2)]
        pids = [begin(command(lab.jobs[name], path), logs[0])]
        time.sleep(lab.random.choice((0.0, 0.0, 0.2, lab.random.uniform(0, 3))))
        pids.append(begin(command(lab.jobs[name], path), logs[1]))
        codes = [wait(pid, log) for pid, log in zip(pids, logs, strict=True)]
        problem = ""
        for code, log in zip(codes, logs, strict=True):
            refused = code == 1 and "in use by pid" in log.read_text() and "Traceback" not in log.read_text()
            if code and not refused:
                problem = f"exit {code}: {tail(log)}"
        if not problem and 0 not in codes:
            problem = f"none of two came to its end: {tail(logs[0])} | {tail(logs[1])}"
        count.notes["refused"] += sum(code == 1 for code in codes)
        count.add(f"two of {name}", problem or lab.again(name, path))
        if not problem:
            shutil.rmtree(path, ignore_errors=True)


def main() -> int:
    """Parse counts, do it, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=90, help="of commands, at named moments (at most all moments)")
    parser.add_argument("--disks", type=int, default=20, help="that become full (mounts a tmpfs: as root)")
    parser.add_argument("--files", type=int, default=300, help="damaged")
    parser.add_argument("--pairs", type=int, default=20, help="of processes in one directory")
    parser.add_argument(
        "--requests", type=int, default=2000, help="to a server, 200 at once, a third of them cancelled"
    )
    parser.add_argument("--schemathesis", type=int, default=200, help="examples for each operation")
    parser.add_argument("--fuzz", type=int, default=10000, help="inputs for each reader")
    parser.add_argument("--at", default="", help="moments of kills: a regular expression, such as 'save|report'")
    parser.add_argument("--only", default="", help="commands, separated by semicolons")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begun = time.monotonic()
    from tessera.cli import main as cli

    for name in ("train", "find-ticket", "study", "sweep", "quantize"):
        importlib.import_module(cli.COMMANDS[name].module)
    import tessera.cli.export_hf  # noqa: F401

    place = Path(tempfile.mkdtemp(prefix="faults-"))
    lab = Lab(place, options.seed)
    if options.only:
        lab.jobs = {name: job for name, job in lab.jobs.items() if name in [*options.only.split(";"), "train, dense"]}
    if options.kills or options.disks or options.pairs or options.files:
        lab.prepare(list(lab.jobs))
    for name, job in lab.jobs.items():
        at = {kind: moments for kind, moments in job.moments.items() if re.search(options.at, kind)}
        lab.jobs[name] = replace(job, moments=at)
    if options.only and "train, dense" not in options.only:
        del lab.jobs["train, dense"]
    import damage

    parts = {
        kills: options.kills,
        disks: options.disks,
        pairs: options.pairs,
        damage.files: options.files,
        damage.requests: options.requests,
        damage.schemathesis: options.schemathesis,
        damage.fuzz: options.fuzz,
    }
    try:
        for part, most in parts.items():
            if most:
                part(lab, most)
    except KeyboardInterrupt:
        print("interrupted: the table is of what was tried", flush=True)
    return report(lab, time.monotonic() - begun)


def report(lab: Lab, seconds: float) -> int:
    """Print the table; 1 if anything was lost."""
    print(f"\n| fault | tried | survived | lost | notes |\n|---|---|---|---|---|  ({seconds:.0f} s)")
    for name, count in lab.counts.items():
        notes = ", ".join(f"{n} {what}" for what, n in count.notes.items() if n)
        print(f"| {name} | {count.tried} | {count.tried - len(count.lost)} | {len(count.lost)} | {notes} |")
    lost = [line for count in lab.counts.values() for line in count.lost]
    print("\n".join(["", *lost]) if lost else "\nlost: 0")
    if not lost:
        shutil.rmtree(lab.place, ignore_errors=True)
    else:
        print(f"logs: {lab.place}")
    return bool(lost)


if __name__ == "__main__":
    raise SystemExit(main())
