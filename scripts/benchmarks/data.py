"""A token file larger than memory should be: time to the first batch, resident memory, tokens per second, and kills.

The file is made here and removed afterwards. Every figure is of processes of their own, which start cold.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scripts.benchmarks.timing import Row
from tessera.infra.schema import Schema

VOCABULARY = 50257


@dataclass(frozen=True)
class DataBenchmark:
    """A memory-mapped token file, read in a random order.

    Attributes:
      suite: the benchmark's name.
      cores: that the process may use; 0 is all.
      gigabytes: size of the token file, in 10^9 bytes of uint16.
      dir: where it is made; "" is the system's directory for temporary files.
      length: tokens of a window.
      batch_size: windows of a batch.
      batches: batches that are timed.
      steps: steps of `lm:tiny` that are timed; 0 leaves that out.
      kills: moments at which all hosts are killed (SIGKILL), for every number of hosts.
      hosts: numbers of hosts that read the same order.
    """

    suite: str = "data"
    cores: int = 0
    gigabytes: float = 4.0
    dir: str = ""
    length: int = 128
    batch_size: int = 48
    batches: int = 1000
    steps: int = 10
    kills: int = 10
    hosts: tuple[int, ...] = (1, 2, 3)


SCHEMA = Schema(DataBenchmark)


def rows(config: Any) -> Iterator[Row]:
    """The loader beside `lm:tiny`, then the order after kills."""
    with tempfile.TemporaryDirectory(dir=config.dir or None) as directory:
        size = make_file(Path(directory), int(config.gigabytes * 1e9))
        case = f"{size / 1e9:.1f} GB of uint16"
        shape = {"batch_size": config.batch_size, "length": config.length}
        found = child("measure", directory=directory, batches=config.batches, **shape)
        used = child("lm_tiny", steps=config.steps) if config.steps else {}
        ratio = (found["rate"] / used["rate"],) * 3 if used else None
        more = {name: found[name] for name in found if name not in ("seconds", "rate")}
        yield Row(case, "loader", found["seconds"], found["rate"], ratio, "lm:tiny" if used else "", more)
        if used:
            yield Row(case, "lm:tiny", used["seconds"], used["rate"])
        for hosts in config.hosts if config.kills else ():
            began = time.perf_counter()
            same, total = kill_and_compare(directory, hosts, config.kills, shape)
            seconds = time.perf_counter() - began
            more = {"kills": config.kills, "batches equal": f"{same} of {total}"}
            yield Row(f"killed, {hosts} hosts", "order", seconds, total / seconds, more=more)


def make_file(directory: Path, size: int) -> int:
    """Write random tokens as documents of log-normal length, in the layout of `tessera tokenize`; returns its bytes."""
    rng, count = np.random.default_rng(0), size // 2
    with (directory / "tokens.bin").open("wb") as file:
        left = count
        while left:
            part = min(left, 1 << 25)
            file.write(rng.integers(0, VOCABULARY, part, np.uint16).tobytes())
            left -= part
        os.fsync(file.fileno())
        # What was just written lies in memory: out with it, so that reading begins at the disk.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    lengths = np.maximum(1, rng.lognormal(6, 1, count // 300)).astype(np.int64)
    ends = np.cumsum(lengths)
    ends = np.append(ends[ends < count], count)
    hashes = rng.integers(0, 2**63, len(ends)) * 2
    np.stack([ends, hashes, np.diff(ends, prepend=0) * 4], 1).astype("<i8").tofile(directory / "tokens.documents.bin")
    said = {"dtype": "uint16", "vocab_size": VOCABULARY, "tokens": count, "separator": 0}
    (directory / "tokens.json").write_text(json.dumps(said))
    return count * 2


def child(function: str, **options: Any) -> Any:
    """Call a function of this module in a process of its own and return what it returns."""
    return json.loads(start(function, **options).communicate()[0].splitlines()[-1])


def start(function: str, **options: Any) -> subprocess.Popen:
    """Start a process that calls a function of this module and prints its result as JSON."""
    code = f"import json; from scripts.benchmarks import data; print(json.dumps(data.{function}(**{options!r})))"
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)


def resident() -> dict[str, float]:
    """Resident memory of this process in 10^9 bytes: its own, pages of files, and the most of both there was."""
    status = Path("/proc/self/status").read_text().splitlines()
    names = ("Rss", "VmHWM")
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e9 for line in status if line.startswith(names)}
    peak = found["VmHWM"]
    return {"own": found["RssAnon"], "files": found["RssFile"], "at most": peak}


def loader(directory: str, batch_size: int, length: int, **share: Any) -> Any:
    """The splits of the file and its training batches."""
    from tessera.data.loader import token_batches
    from tessera.data.text import TextConfig, load_text

    splits = load_text(TextConfig(name=directory, tokenizer="ids"))
    return splits, token_batches(splits.train, batch_size=batch_size, length=length, seed=0, **share)


def measure(directory: str, batch_size: int, length: int, batches: int) -> dict[str, float]:
    """Seconds to the first batch on the device, memory before and after, and tokens per second."""
    import jax

    from tessera.data.text import TextConfig
    from tessera.lm.run import overlap_line

    jax.block_until_ready(jax.device_put(np.zeros(1)))
    before, began, used = resident(), time.perf_counter(), time.process_time()
    splits, made = loader(directory, batch_size, length)
    jax.block_until_ready(jax.device_put(next(made)["tokens"]))
    first, used = time.perf_counter() - began, time.process_time() - used
    began = time.perf_counter()
    overlap_line(TextConfig(name=directory, tokenizer="ids"), splits)
    leak = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(batches):
        next(made)
    seconds = (time.perf_counter() - began) / batches
    more = {f"GB resident more, {name}": value - before[name] for name, value in resident().items()}
    more |= {"s to the first batch": first, "of them s of a processor": used, "s of the overlap": leak}
    return {"seconds": seconds, "rate": batch_size * length / seconds} | more


def lm_tiny(steps: int) -> dict[str, float]:
    """Seconds of a training step of `lm:tiny` without its data, and tokens per second."""
    import jax

    from tessera.configs import lm
    from tessera.infra.schema import completed
    from tessera.lm.run import build_run
    from tessera.lm.schema import SCHEMA as LM

    config = completed(LM, lm.get_config("tiny"))
    run = build_run(config)
    state, step = run.init_fn(False), jax.jit(run.step_fn, donate_argnums=0)
    batch = run.placement.place({"tokens": next(run.loader("train"))["tokens"]})
    state, _ = step(state, batch, run.key)
    jax.block_until_ready(state.params)
    began = time.perf_counter()
    for _ in range(steps):
        state, _ = step(state, batch, run.key)
    jax.block_until_ready(state.params)
    seconds = (time.perf_counter() - began) / steps
    return {"seconds": seconds, "rate": config.batch_size * config.length / seconds}


TOTAL, SAVED = 600, 7  # batches of a run that is killed, and batches between two saves


def host(directory: str, log: str, total: int, pause: float, **options: int) -> int:
    """Read batches and log what is in them; the iterator's state is saved as a checkpoint has it."""
    made, place, done = loader(directory, **options)[1], Path(f"{log}.state"), 0
    if place.exists():
        saved = json.loads(place.read_text())
        made.set_state(saved["state"])
        done = saved["done"]
    lines = Path(log).read_text().splitlines()[:done] if done else []
    Path(log).write_text("".join(line + "\n" for line in lines))
    with Path(log).open("a") as file:
        for step in range(done + 1, total + 1):
            batch = next(made)
            sums = [zlib.crc32(row.tobytes()) for row in batch["tokens"]]
            file.write(json.dumps([batch["ids"].tolist(), sums]) + "\n")
            file.flush()
            if step % SAVED == 0:
                place.with_suffix(".new").write_text(json.dumps({"done": step, "state": made.get_state()}))
                place.with_suffix(".new").replace(place)
            time.sleep(pause)
    return total


def kill_and_compare(directory: str, hosts: int, kills: int, shape: dict[str, int]) -> tuple[int, int]:
    """Kill all hosts at random moments until they are through; how many of the batches are those of one host."""
    rng = np.random.default_rng(hosts)
    with tempfile.TemporaryDirectory() as folder:
        logs = [f"{folder}/{p}" for p in range(hosts)]
        shares = [{"process_index": p, "process_count": hosts} for p in range(hosts)]
        options = {"directory": directory, "total": TOTAL, **shape}
        for turn in range(kills + 1):
            pause = 0.0 if turn == kills else 0.02
            running = [
                start("host", log=log, pause=pause, **share, **options) for log, share in zip(logs, shares, strict=True)
            ]
            if turn < kills:
                # Some moments are before the first batch, some in between.
                while rng.random() < 0.9 and not all(Path(log).exists() for log in logs):
                    time.sleep(0.05)
                time.sleep(rng.uniform(0, 1.2))
                for process in running:
                    process.send_signal(signal.SIGKILL)
            for process in running:
                process.communicate()
        _, whole = loader(directory, **shape)
        parts = [[json.loads(line) for line in Path(log).read_text().splitlines()] for log in logs]
        same = 0
        for step in range(TOTAL):
            batch = next(whole)
            wanted = batch["ids"].tolist(), [zlib.crc32(row.tobytes()) for row in batch["tokens"]]
            found = [
                [one for group in zip(*(part[step][i] for part in parts), strict=True) for one in group] for i in (0, 1)
            ]
            same += list(wanted) == found
    return same, TOTAL
