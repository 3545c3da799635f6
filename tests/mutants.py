"""Mutation testing: plant small realistic bugs one at a time and see whether the tests find them (`make mutants`).

The bugs are data, `tests/mutants.toml`: a file, a text that occurs once in it, the text put in its place, and what is
then wrong for a user. The checkout is never written to: a child process is served the changed source by its import
system (and hands it on to Python processes that tests start), so several mutants can run side by side. Children are
forked from a process that has imported JAX and pytest and has started no backend.

A mutant is tried with the file that mirrors its module, tests/<path>/test_<module>.py, then with the test files below
the same package that import the module, and the examples of its docstrings, shortest first, within --budget seconds of
processor time, those marked long too. It is killed by the first failing test, if that test passes without the
mutant, and also by running out of time.

    python tests/mutants.py --only lottery/ moe/gate.py      # what starts with these
    python tests/mutants.py --sample 60 --seed 1             # as many of each package as its share
    python tests/mutants.py --report                         # the table of what has run so far

Results are appended to runs/mutants/results.jsonl: what has run is not run again while the module, the mutant and the
tests that decided stay the same. The table and the survivors are also in runs/mutants/report.json.
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

PRELOAD = (
    "jax jax.numpy flax.linen optax numpy scipy.optimize scipy.stats chex ml_collections jaxtyping beartype hypothesis "
    "orbax.checkpoint pytest"
)
FINISHED = ("killed", "timeout", "survived")
BROKEN = 70  # exit status of a child that could not run its tests at all

# Serves the changed source instead of the file's, and never from or into a cache of bytecode: an importer takes an
# OSError of path_stats as "no date known".
HOOK = """
import importlib.machinery, os
PATH, SOURCE = {path!r}, {source!r}
Loader = importlib.machinery.SourceFileLoader
def is_mutant(path):
    return path.endswith({name!r}) and os.path.realpath(path) == PATH
def get_data(self, path, read=Loader.get_data):
    return SOURCE if is_mutant(path) else read(self, path)
def path_stats(self, path, stats=Loader.path_stats):
    if is_mutant(path):
        raise OSError("not cached")
    return stats(self, path)
Loader.get_data, Loader.path_stats = get_data, path_stats
"""


class Mutant(NamedTuple):
    """One planted bug: `old`, which occurs once in `file`, becomes `new`."""

    file: str
    old: str
    new: str
    breaks: str
    equivalent: str = ""
    tests: tuple[str, ...] = ()
    fresh: bool = False


def load(path: Path) -> list[Mutant]:
    """Read the list of mutants, each with the tests that the table `tests` names for its module and its own."""
    found = tomllib.loads(path.read_text())
    table = found.get("tests", {})

    def tests(mutant: dict[str, Any]) -> tuple[str, ...]:
        begins = [begin for begin in table if mutant["file"].startswith(begin)]
        return (*table.get(max(begins, key=len, default=""), ()), *mutant.get("tests", ()))

    return [Mutant(**{**mutant, "tests": tests(mutant)}) for mutant in found["mutant"]]


def problem(root: Path, mutant: Mutant) -> str:
    """Say why a mutant cannot be planted; empty where it can."""
    if not (root / mutant.file).exists():
        return "the file is gone"
    source = (root / mutant.file).read_text()
    if (count := source.count(mutant.old)) != 1:
        return f"its text occurs {count} times"
    try:
        changed = ast.dump(ast.parse(source.replace(mutant.old, mutant.new)))
    except SyntaxError as error:
        return f"does not parse: {error.msg}"
    return "changes no code" if changed == ast.dump(ast.parse(source)) else ""


def sha(*texts: str) -> str:
    """Hash texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def module_of(file: str) -> str:
    """Name the module of a file: moe/route/__init__.py is moe.route."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def exports(root: Path, package: str) -> dict[str, str]:
    """Names that a package's __init__ exports -> the module that defines them (imports, or a table of names)."""
    file = root / package.replace(".", "/") / "__init__.py"
    found = {}
    for node in ast.walk(ast.parse(file.read_text())) if file.exists() else ():
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple):
                    found |= {
                        name.value: f"{package}.{key.value}" for name in value.elts if isinstance(name, ast.Constant)
                    }
    return found


@functools.cache
def imported(root: Path, file: Path) -> frozenset[str]:
    """Modules that a test file imports, or names as attributes of packages (`lottery.masks`)."""
    text = file.read_text()
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = exports(root, node.module)
            found |= {node.module}
            for alias in node.names:
                found |= {f"{node.module}.{alias.name}", names.get(alias.name, node.module)}
    for name in re.findall(r"\b[a-z_]+(?:\.[A-Za-z_]\w*)+", text):
        parts = name.split(".")
        for i in range(1, len(parts)):
            package = ".".join(parts[:i])
            found |= {f"{package}.{parts[i]}", exports(root, package).get(parts[i], package)}
    return frozenset(found)


def tests_of(root: Path, mutant: Mutant) -> list[Path]:
    """Find the mirrored test file, those named by the mutant, then the importing ones of its package; unordered."""
    *folder, name = mutant.file.split("/")
    base = root / "tests"
    mirrored = base.joinpath(*folder, f"test_{name}")
    first = [*([mirrored] if mirrored.exists() else []), *(root / test for test in mutant.tests)]
    module = module_of(mutant.file)
    others = [f for f in sorted((base / folder[0]).rglob("test_*.py")) if module in imported(root, f)]
    if not first and not others:  # reached through other modules only
        others = sorted(base.joinpath(*folder).glob("test_*.py"))
    examples = base / folder[0] / "test_examples.py"  # of docstrings, whose modules it imports by name
    return list(dict.fromkeys([*first, *others, *([examples] if examples.exists() else [])]))


class Recorder:
    """A pytest plugin that notes the first failure and stops the session when the importing tests had their time."""

    def __init__(self, first: set[str], budget: float):
        self.failed, self.ran = "", set[str]()
        self._first, self._budget, self._session, self._began = first, budget, None, 0.0

    def pytest_sessionstart(self, session):
        self._session = session

    def pytest_collectreport(self, report):
        if report.failed and not self.failed:
            self.failed = report.nodeid or "collection"

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_runtest_logfinish(self, nodeid, location):
        self.ran.add(nodeid.split("::")[0])
        if self.ran <= self._first:
            self._began = sum(os.times()[:4])
        elif sum(os.times()[:4]) - self._began > self._budget:
            self._session.shouldstop = "the budget is used up"


class Task(NamedTuple):
    """Tests of one child: files or single tests, and the mutant that is planted."""

    tests: list[str]
    mutant: Mutant | None = None
    first: frozenset[str] = frozenset()
    budget: float = float("inf")
    limit: float = 300.0


class Outcome(NamedTuple):
    """What came of a task: pytest's code (-1 is out of time, -2 a process that died) and processor seconds."""

    code: int
    failed: str
    ran: list[str]
    cpu: float
    log: str


def child(root: Path, task: Task, scratch: Path):
    """Run tests in this forked process, under a mutant, and leave what came of it in scratch/result.json."""
    os.setsid()
    log = os.open(scratch / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(task.limit), int(task.limit) + 5))
    os.chdir(root)
    paths, mutant = [str(root)], task.mutant
    if mutant is not None:
        path = root / mutant.file
        source = path.read_text().replace(mutant.old, mutant.new).encode()
        hook = HOOK.format(path=os.path.realpath(path), source=source, name=path.name)
        (scratch / "sitecustomize.py").write_text(hook)  # for Python processes that a test starts
        exec(compile(hook, "mutant", "exec"), {})
        paths.insert(0, str(scratch))
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    if "hypothesis" in sys.modules:  # a mutant's failing examples are nobody else's
        sys.modules["hypothesis"].configuration.set_hypothesis_home_dir(str(scratch / "hypothesis"))
    import pytest

    recorder = Recorder(set(task.first), task.budget)
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={scratch / 'tmp'}"]
    options += ["-m", "not slow and not gpu and not tpu and not docs and not wheel"]
    options += ["-Wignore::pytest.PytestAssertRewriteWarning"]  # plugins that are imported before the fork
    options += ["-n0"] * bool(
        importlib.util.find_spec("xdist") and not os.environ.get("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    )
    code = int(pytest.main([*options, *task.tests], plugins=[recorder]))
    found = {"code": code, "failed": recorder.failed, "ran": sorted(recorder.ran)}
    (scratch / "result.json").write_text(json.dumps(found))
    os._exit(0)


def pool(root: Path, tasks: Iterable[Task], jobs: int = 1) -> Iterator[tuple[Task, Outcome]]:
    """Run tasks in forked processes, and yield each with its outcome."""
    running: dict[int, tuple[Task, Path, float]] = {}
    tasks = iter(tasks)
    exhausted = False
    try:
        while running or not exhausted:
            while not exhausted and len(running) < jobs:
                if (task := next(tasks, None)) is None:
                    exhausted = True
                    break
                scratch = Path(tempfile.mkdtemp(prefix="mutant-"))
                sys.stdout.flush()
                if (pid := os.fork()) == 0:
                    try:
                        child(root, task, scratch)
                    except BaseException:
                        traceback.print_exc()
                    finally:
                        os._exit(BROKEN)
                running[pid] = task, scratch, time.monotonic() + 6 * task.limit
            for pid, (task, scratch, deadline) in list(running.items()):
                late = time.monotonic() > deadline
                if late:
                    os.killpg(pid, signal.SIGKILL)
                done, status, usage = os.wait4(pid, 0 if late else os.WNOHANG)
                if done:
                    del running[pid]
                    found = outcome(scratch, late, status, usage.ru_utime + usage.ru_stime)
                    discard(pid, scratch)
                    yield task, found
            time.sleep(0.05)
    finally:
        for pid, (_, scratch, _) in running.items():
            discard(pid, scratch)


def outcome(scratch: Path, late: bool, status: int, cpu: float) -> Outcome:
    """Read what a child left."""
    result = scratch / "result.json"
    out = json.loads(result.read_text()) if result.exists() else {"failed": "", "ran": []}
    out_of_time = late or os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    log = (scratch / "log").read_text(errors="replace") if (scratch / "log").exists() else ""
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == BROKEN:
        raise RuntimeError(f"tests could not be run:\n{log}")
    return Outcome(out.get("code", -1 if out_of_time else -2), out["failed"], out["ran"], cpu, log)


def discard(pid: int, scratch: Path):
    """End a child, what its tests started and left behind, and its files."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    shutil.rmtree(scratch, ignore_errors=True)


def sample(mutants: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """Draw mutants, of each package as many as its share, in an order that goes through all packages."""
    mutants = sorted(mutants, key=lambda m: (m.file.split("/")[0], sha(str(seed), *m[:3])))
    drawn = [mutants[int((i + 0.5) * len(mutants) / count)] for i in range(min(count, len(mutants)))]
    random.Random(seed).shuffle(drawn)
    return drawn


class Store:
    """Results on disk, one line of JSON each; the last line of a key is the one that holds."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.entries: dict[str, dict[str, Any]] = {entry["key"]: entry for entry in map(json.loads, lines)}

    def add(self, **entry):
        """Append one result."""
        self.entries[entry["key"]] = entry
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def summarize(mutants: list[Mutant], status: dict[Mutant, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Count what came of the mutants by package; the score is killed (by time, too) over run."""
    table: dict[str, dict[str, Any]] = {}
    for package in [*dict.fromkeys(m.file.split("/")[0] for m in mutants), "all"]:
        chosen = [m for m in mutants if package in ("all", m.file.split("/")[0])]
        row: dict[str, Any] = {"planted": len(chosen)}
        row |= {s: sum(status[m]["status"] == s for m in chosen) for s in (*FINISHED, "equivalent", "stale", "not run")}
        run = sum(row[s] for s in FINISHED)
        row["score"] = round((row["killed"] + row["timeout"]) / run, 3) if run else None
        row["cpu_seconds"] = round(sum(status[m].get("cpu", 0) for m in chosen), 1)
        table[package] = row
    return table


def main(argv: list[str] | None = None) -> int:
    """Plant, run, report; 0 unless a selected mutant survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent, help="checkout")
    parser.add_argument("--list", type=Path, help="list of mutants; tests/mutants.toml of the checkout")
    parser.add_argument("--out", type=Path, help="folder of the results; runs/mutants of the checkout")
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of file names")
    parser.add_argument("--fresh", action="store_true", help="only those marked as written last")
    parser.add_argument("--tests", nargs="*", help="try these test files alone; what survives them counts as not run")
    parser.add_argument("--sample", type=int, help="how many, drawn by package")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--budget", type=float, default=60.0, help="processor seconds of importing tests a mutant")
    parser.add_argument("--limit", type=float, default=300.0, help="processor seconds after which a mutant is killed")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no mutant after this long")
    parser.add_argument("--preload", default=PRELOAD, help="modules imported once, before forking")
    parser.add_argument("--report", action="store_true", help="run nothing, only report")
    options = parser.parse_args(argv)
    root, began = options.root.resolve(), time.monotonic()
    mutants = [m for m in load(options.list or root / "tests" / "mutants.toml") if m.fresh or not options.fresh]
    out = options.out or root / "runs" / "mutants"
    store = Store(out / "results.jsonl")
    chosen = [m for m in mutants if m.file.startswith(tuple(options.only))]
    if options.sample:
        chosen = sample(chosen, options.sample, options.seed)
    text = functools.cache(lambda file: (root / file).read_text())
    key = {m: sha(*m[:3], text(m.file)) if (root / m.file).exists() else "" for m in mutants}
    problems = {m: problem(root, m) for m in mutants}

    def finished(m: Mutant) -> dict[str, Any] | None:
        """The stored result, if the tests that decided are still the same."""
        entry = store.entries.get(key[m])
        if entry is None:
            return None
        by = entry["by"].split("::")[0]
        deciding = [by] if by in entry["tests"] else [*entry["tests"]]
        same = all((root / f).exists() and sha(text(f)) == entry["tests"][f] for f in deciding)
        if entry["status"] == "survived":
            same &= {str(f.relative_to(root)) for f in tests_of(root, m)} <= {*entry["tests"], *entry["left_out"]}
        return entry if same else None

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # children end with this process
    todo = [m for m in chosen if not m.equivalent and not problems[m]]
    todo = [m for m in todo if not (old := finished(m)) or (options.tests and old["status"] == "survived")]
    if todo and not options.report:
        sys.path[:1] = [str(root)]  # in place of tests/, whose folders have the packages' names
        for name in options.preload.split():
            if importlib.util.find_spec(name.split(".")[0]):
                importlib.import_module(name)
        broken: set[str] = set()  # tests that fail without a mutant, too
        passes: dict[str, bool] = {}

        def task(m: Mutant) -> Task:
            files = options.tests or [str(f.relative_to(root)) for f in tests_of(root, m)]
            own = f"test_{Path(m.file).name}"
            first = frozenset(f for f in files if f in m.tests or f.endswith(f"/{own}"))
            files.sort(key=lambda f: (f not in first, len(text(f))))
            out = [f"--deselect={nodeid}" for nodeid in sorted(broken)]
            return Task([*out, *files], m, first, options.budget, options.limit)

        def tasks() -> Iterator[Task]:
            for m in todo:
                if time.monotonic() - began > 60 * options.minutes:
                    return
                yield task(m)

        def is_real(failed: str) -> bool:
            """Whether a test that failed under a mutant passes without."""
            if failed not in passes:
                how = [failed] if "::" in failed else ["--collect-only", failed]
                ((_, alone),) = pool(root, [Task(how, limit=options.limit)])
                passes[failed] = alone.code == 0
            return passes[failed]

        for done, found in pool(root, tasks(), options.jobs):
            m, spent = done.mutant, found.cpu
            assert m is not None
            while found.failed and found.failed != "collection" and not is_real(found.failed):
                print(f"fails without a mutant and is left out: {found.failed}", flush=True)
                broken.add(found.failed)
                done = task(m)
                ((_, found),) = pool(root, [done])
                spent += found.cpu
            state = {0: "survived", 2: "survived", 5: "survived", -1: "timeout"}.get(found.code, "killed")
            state = "killed" if found.failed else state  # 2 is also a failed collection
            files = [f for f in done.tests if not f.startswith("--")]
            used = found.ran if state == "survived" else [found.failed.split("::")[0]] * bool(found.failed) or files
            by = found.failed or (found.log.strip().splitlines() or [""])[-1][:200] * (state == "killed")
            entry = {"file": m.file, "breaks": m.breaks, "status": state, "by": by, "cpu": round(spent, 2)}
            hashes, rest = {f: sha(text(f)) for f in used}, [f for f in files if f not in used]
            if state != "survived" or not options.tests:
                store.add(key=key[m], **entry, tests=hashes, left_out=rest)
            print(f"{state:9} {spent:6.1f}s  {m.file}: {m.breaks}" + (f"  [{by}]" if by else ""), flush=True)

    status: dict[Mutant, dict[str, Any]] = {}
    for m in mutants:
        if m.equivalent:
            status[m] = {"status": "equivalent"}
        elif problems[m]:
            status[m] = {"status": "stale"}
        else:
            status[m] = finished(m) or {"status": "not run"}
    table = summarize(mutants, status)
    groups: dict[str, list] = defaultdict(list)
    for m in mutants:
        groups[status[m]["status"]].append({**m._asdict(), **status[m], "why": m.equivalent or problems[m]})
    report = {"packages": table} | {name: groups[name] for name in ("survived", "timeout", "equivalent", "stale")}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    columns = [*next(iter(table.values()))]
    print("\n| package | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for package, row in table.items():
        print(f"| {package} | " + " | ".join("" if row[c] is None else str(row[c]) for c in columns) + " |")
    for name in ("survived", "stale"):
        for entry in groups[name]:
            print(f"{name}: {entry['file']}: {entry['breaks']}" + (f" ({entry['why']})" if entry["why"] else ""))
    return int(any(status[m]["status"] == "survived" for m in chosen))


if __name__ == "__main__":
    sys.exit(main())
