"""Damaged files of every format, requests that vanish, and inputs that nobody would send."""

import asyncio
import gc
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faults


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
      source: a sound file or directory.
      files: pattern of those to damage, under the source.
      read: called with the path of the copy; what it gives can be compared by its `repr`.
      checked: it holds checksums, so that other contents than the sound ones are never given.
    """

    source: Path
    files: str
    read: Callable[[Path], Any]
    checked: bool = True


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file; says how."""
    data = bytearray(path.read_bytes())
    kinds = ["flip a bit", "cut off", "zeros", "empty", "garbage", "append"] if data else ["garbage"]
    kind = rng.choice(kinds)
    at = rng.randrange(len(data)) if data else 0
    if kind == "flip a bit":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "cut off":
        del data[at:]
    elif kind == "zeros":
        data[at : at + 512] = bytes(len(data[at : at + 512]))
    elif kind == "empty":
        data.clear()
    elif kind == "garbage":
        data[at : at + 64] = rng.randbytes(64)
    else:
        data += rng.randbytes(16)
    path.write_bytes(bytes(data))
    return f"{kind} at {at}"


def formats(lab: faults.Lab) -> dict[str, Format]:
    """Every format, with files that the undisturbed commands wrote, that are written here, or of `test_readers`."""
    import gzip

    import jax
    import numpy as np

    from lottery import export
    from scaling import tables
    from tessera.data.images import read_idx
    from tessera.data.text import BPETokenizer
    from tessera.infra import logger, workdir
    from tessera.infra.artifacts import load_extra, open_item, read_meta, read_state
    from tessera.infra.checkpoint import CheckpointReader, Checkpoints
    from tessera.infra.memo import Memo
    from tessera.serving.huggingface import load_directory
    from tessera.serving.load import SourceConfig, load

    sound, made = lab.place / "sound", lab.place / "made"
    made.mkdir(exist_ok=True)
    runs = {name: sound / faults.slug(name) for name in lab.jobs}

    def sums(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return [(jax.tree_util.keystr(path), hash(np.asarray(x).tobytes())) for path, x in leaves]

    def newest(path):
        found = CheckpointReader(path).restore_newest()
        return found.step, found.extra, sums(found.state)

    def trained(path):
        """As a run that goes on: it may end at the checkpoint before."""
        with Checkpoints(path) as checkpoints:
            like = CheckpointReader(sound / "train_dense" / "checkpoints").restore_newest().state
            found = checkpoints.restore_latest(like)
        whole = CheckpointReader(sound / "train_dense" / "checkpoints").restore_whole(found.step)
        return sums(found.state) == sums(whole.state)

    def artifact(path):
        read = partial(open_item, path)
        meta = read_meta(read, str(path))
        return meta["extra"], sums(read_state(read, None, meta, str(path)))

    rng = np.random.default_rng(0)
    params = {"a": {"kernel": rng.normal(size=(12, 8)).astype(np.float32)}, "b": np.arange(5.0, dtype=np.float32)}
    mask = {"a": {"kernel": rng.random((12, 8)) < 0.5}, "b": np.ones(5, bool)}
    export.save(made / "ticket.safetensors", params, mask)
    images, labels = made / "images.gz", made / "labels.gz"
    images.write_bytes(gzip.compress(b"\0\0\x08\3" + b"\0\0\0\x10" * 3 + rng.bytes(4096)))
    labels.write_bytes(gzip.compress(b"\0\0\x08\1" + b"\0\0\1\0" + rng.bytes(256)))
    (made / "runs.csv").write_text(
        "params,tokens,loss\n" + "".join(f"{n}e6,{n}e8,{3 - n / 99}\n" for n in range(1, 40))
    )
    (made / "runs.jsonl").write_text(
        "".join(f'{{"params": {n}e6, "tokens": {n}e8, "loss": 2.5}}\n' for n in range(1, 9))
    )
    found = {
        "checkpoint, read": Format(runs["train, dense"] / "checkpoints", "*/**/*", newest),
        "checkpoint, resumed": Format(runs["train, dense"] / "checkpoints", "*/**/*", trained),
        "config.json": Format(runs["train, dense"], "config.json", workdir.read_settings, False),
        "run.json": Format(runs["train, dense"], "run.json", workdir.read_settings, False),
        "finished.json": Format(
            runs["train, dense"], "finished.json", lambda path: workdir.was_finished(path, ""), False
        ),
        "metrics.jsonl": Format(runs["train, dense"] / "metrics.jsonl", "", logger.read_rows, False),
        "ticket": Format(made / "ticket.safetensors", "", lambda path: [sums(x) for x in export.load(path)[:2]]),
        "IDX images": Format(images, "", lambda path: read_idx(path, 3).tobytes().__hash__()),
        "IDX labels": Format(labels, "", lambda path: read_idx(path, 1).tobytes().__hash__()),
        "CSV": Format(made / "runs.csv", "", tables.read_csv, False),
        "JSON lines": Format(made / "runs.jsonl", "", tables.read_rows, False),
        "model directory of a run": Format(
            runs["train, dense"], "**/*", lambda path: sums(load(SourceConfig(str(path))).params)
        ),
    }
    found |= {f"{name} alone": one for name, one in of_readers(made).items()}
    if "search" in runs:
        found["search level"] = Format(runs["search"] / "levels" / "01", "**/*", artifact)
        found["search rows"] = Format(runs["search"] / "levels" / "02", "**/*", load_extra)
    if "study" in runs:
        rows = sorted((runs["study"] / "memo").glob("*.json"))[0]
        found["memo rows"] = Format(rows, "", lambda path: Memo(path.parent).rows(path.stem, list), False)
        tree = sorted(p.parent for p in (runs["study"] / "memo").rglob("_CHECKPOINT_METADATA"))
        if tree:
            found["memo arrays"] = Format(tree[0], "**/*", artifact)
    if "sweep" in runs:
        from scaling.sweeps.store import read_row

        found["sweep readout"] = Format(sorted((runs["sweep"]).rglob("readouts/*.json"))[0], "", read_row, False)
        found["sweep trunk"] = Format(sorted(runs["sweep"].rglob("branch-*"))[0], "**/*", artifact)
        found["sweep table"] = Format(runs["sweep"] / "runs.csv", "", tables.read_csv, False)
    if "export" in runs:
        exported = runs["export"] / "exported"
        found["export, weights"] = Format(exported, "*.safetensors", lambda path: sums(load_directory(path)[0]))
        found["export, config"] = Format(exported, "config.json", lambda path: sums(load_directory(path)[0]), False)
        found["tokenizer"] = Format(
            exported / "tokenizer.json", "", lambda path: BPETokenizer.load(path).encode("the tile").tolist(), False
        )
    return found


def of_readers(made: Path) -> dict[str, Format]:
    """The formats of tests/tessera/test_readers.py whose errors have a path."""
    from test_readers import READERS, beside

    found = {}
    for name, reader in READERS.items():
        path = made / faults.slug(name) / name.split()[0]
        path.parent.mkdir(exist_ok=True)
        beside(path, reader)
        path.write_bytes(reader.sound if isinstance(reader.sound, bytes) else json.dumps(reader.sound).encode())
        if reader.whole_path and name != "cifar.tar.gz":  # which no one has sound here
            found[name] = Format(path.parent, path.name, partial(_read_inside, reader.read, path.name), False)
    return found


def _read_inside(read: Callable[[Path], Any], name: str, directory: Path) -> Any:
    return read(directory / name)


def files(lab: faults.Lab, most: int) -> None:
    """Damage files; readers give what was saved, or one line that names the file; commands end as they should."""
    out = lab.place / "files.json"
    log = lab.place / "files.log"
    status = faults.fork(lambda: out.write_text(json.dumps(_files(lab, most))) and 0, log, 1800)
    if status:
        lab.count("damaged files").add("all", f"exit {status}: {faults.tail(log, 3000)}")
        return
    for kind, what, problem, note in json.loads(out.read_text()):
        count = lab.count(f"damaged files: {kind}")
        count.add(what, problem)
        count.notes[note] += 1
    resumed(lab, max(1, most // 10))


def _files(lab: faults.Lab, most: int) -> list[tuple[str, str, str, str]]:
    rng, done = random.Random(lab.random.random()), []
    kinds = formats(lab)
    sound = {name: repr(one.read(one.source)) for name, one in kinds.items()}
    for number in range(most):
        name = list(kinds)[number % len(kinds)]
        one, copy = kinds[name], lab.place / "copy" / kinds[name].source.name
        shutil.rmtree(copy.parent, ignore_errors=True)
        copy.parent.mkdir()
        (shutil.copytree if one.source.is_dir() else shutil.copy)(one.source, copy)
        candidates = sorted(p for p in copy.glob(one.files) if p.is_file()) if one.files else [copy]
        candidates = [p for p in candidates if p.suffix not in (".html", ".png") or p.name == one.files]
        path = rng.choice(candidates)
        what = f"{name}: {path.relative_to(copy.parent)}, {damage(path, rng)}"
        done.append((name, what, *judge(one, copy, sound[name])))
    return done


def judge(one: Format, copy: Path, sound: str) -> tuple[str, str]:
    """(what is wrong, or "", and how it ended) of reading a damaged copy."""
    from tessera.infra.checkpoint import CheckpointDamaged

    try:
        found = repr(one.read(copy))
    except (ValueError, FileNotFoundError, CheckpointDamaged) as error:
        text = str(error)
        if isinstance(error, UnicodeError | json.JSONDecodeError) or copy.name not in text:
            return f"{type(error).__name__} without the file's name: {text[:200]}", ""
        # Of a table every wrong cell is listed.
        short = "\n" not in text or not one.checked
        return ("", "refused by name") if short else (f"more than a line: {text[:300]}", "")
    except BaseException:
        return f"a traceback: {traceback.format_exc()[-700:]}", ""
    if found == sound:
        return "", "read as saved"
    return ("other contents than were saved", "") if one.checked else ("", "read as other text")


def resumed(lab: faults.Lab, most: int) -> None:
    """Damage a file of a run that was killed half-way, and run the same command again."""
    moments = {
        "train, dense": faults.Moment("tessera.infra.logger:Logger.write", match=r"\(<.*>, 9,"),
        "search": faults.Moment(event="os.rename", match=r"levels/02'"),
        "study": faults.Moment("tessera.cli.study:print_report"),
        "sweep": faults.Moment(event="os.rename", match=r"readouts/\d", number=2),
    }
    names = [name for name in moments if name in lab.jobs]
    half = {}
    for name in names:
        half[name] = lab.new(f"half {name}")
        faults.fork(faults.command(lab.jobs[name], half[name], moments[name]), half[name].with_suffix(".log"))
    for number in range(most):
        name = names[number % len(names)]
        path = lab.new(f"damaged {name}")
        shutil.copytree(half[name], path)
        seen = [p for p in sorted(path.rglob("*")) if p.is_file() and p.stat().st_size and p.name != ".lock"]
        seen = [
            p for p in seen if not re.search(r"\.html|\.png|\.log|versions|compiled/|\.orbax-checkpoint-tmp", str(p))
        ]
        chosen = lab.random.choice(seen)
        what = f"{name} resumed: {chosen.relative_to(path)}, {damage(chosen, lab.random)}"
        log = path.with_suffix(".log")
        status = faults.fork(faults.command(lab.jobs[name], path), log)
        output, count = log.read_text(errors="replace"), lab.count("damaged files: commands that go on")
        if status == 0:
            found = faults.result(lab.jobs[name], path, log)
            same = found == lab.sound[name]
            # A digit of a file that is plain text for people and has no checksum: known, and counted.
            plain = chosen.suffix in (".json", ".jsonl", ".csv") and "checkpoints" not in str(chosen.relative_to(path))
            count.notes["ended as undisturbed" if same else "plain text altered"] += 1
            count.add(what, "" if same or plain else f"another result: {list(found)[:4]}")
        else:
            refused = status in (1, 2) and "Traceback" not in output and "error:" in output
            count.notes["refused in one line"] += refused
            count.add(what, "" if refused else f"exit {status}: {faults.tail(log, 900)}")
        shutil.rmtree(path, ignore_errors=True)


def requests(lab: faults.Lab, most: int) -> None:
    """Send requests, 200 at once; a third of the clients leave, a tenth read slowly.

    The others get what their seed gives, all ends, and the memory after a fifth of them is that after all.
    """
    log, out = lab.place / "requests.log", lab.place / "requests.json"
    status = faults.fork(lambda: out.write_text(json.dumps(_requests(most, lab.random.random()))) and 0, log, 1800)
    count = lab.count("requests")
    if status:
        count.add("all", f"exit {status}: {faults.tail(log, 3000)}")
        return
    for what, problem, note in json.loads(out.read_text()):
        count.add(what, problem)
        count.notes[note] += 1


def schemathesis(lab: faults.Lab, most: int) -> None:
    """Send what the server's OpenAPI document allows, and what it does not, to every operation."""
    log = lab.place / "schemathesis.log"
    status = faults.fork(lambda: _schemathesis(most), log, 1800)
    text = log.read_text(errors="replace")
    found = re.search(r"(\d+) generated", text)
    if "not installed" in text:
        lab.count("schemathesis").notes["skipped: pip install schemathesis"] = 1
    else:
        lab.count("schemathesis").tried = int(found[1]) if found else 0
        lab.count("schemathesis").lost += [faults.tail(log, 2000)] if status else []


def _requests(most: int, seed: float) -> list[tuple[str, str, str]]:
    import openai
    from test_server import running

    rng = random.Random(seed)
    done: list[tuple[str, str, str]] = []
    expected: dict[int, str] = {}

    async def ask(client: openai.AsyncOpenAI, number: int, limit: asyncio.Semaphore) -> None:
        kind, leaves, slow = number % 50, rng.random() < 1 / 3, rng.random() < 0.1
        body = {"model": "tiny", "prompt": f"{kind} ", "max_tokens": 8, "seed": kind, "stream": rng.random() < 0.5}
        async with limit:
            task = asyncio.create_task(send(client, body, 0.3 if slow else 0.0))
            if leaves:
                await asyncio.sleep(rng.uniform(0, 0.5))
                gone = not task.done()
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                done.append((f"request {number}", "", "left" if gone else "left after the answer"))
                return
            try:
                text = await task
            except Exception as error:
                done.append((f"request {number}", repr(error)[:300], ""))
                return
        first = expected.setdefault(kind, text)
        note = "read slowly" if slow and body["stream"] else "answered"
        done.append((f"request {number}", "" if text == first else f"{text!r}, and {first!r} before", note))

    async def send(client: openai.AsyncOpenAI, body: dict, pause: float) -> str:
        answer = await client.completions.create(**body)
        if not body["stream"]:
            return answer.choices[0].text
        texts = []
        async for chunk in answer:
            texts.append(chunk.choices[0].text)
            await asyncio.sleep(pause)
        return "".join(texts)

    async def everybody(server: Any, numbers: range) -> None:
        limit = asyncio.Semaphore(200)
        async with server.client(kind=openai.AsyncOpenAI) as client:
            await asyncio.gather(*(ask(client, number, limit) for number in numbers))

    with running(queue=256) as server:
        threads = threading.active_count()
        first = max(most // 5, 1)
        asyncio.run(everybody(server, range(first)))
        before = resident()
        asyncio.run(everybody(server, range(first, most)))
        after = resident()
        grown = after - before > GROWTH
        note = f"{before:.0f} MB resident after {first} requests, {after:.0f} MB after {most}"
        done.append(("memory", note if grown else "", note))
        until = time.monotonic() + 30
        while time.monotonic() < until and not idle(server.engine):
            time.sleep(0.05)
        problem = "" if idle(server.engine) else "slots or queue are not empty"
        if threading.active_count() > threads + 45:  # the event loop's pool for reading files is at most 40
            problem = f"{threading.active_count()} threads, {threads} before"
        done.append(("the engine afterwards", problem, ""))
        status, _ = server.post({"model": "tiny", "prompt": "a", "max_tokens": 2})
        done.append(("a request afterwards", "" if status == 200 else f"status {status}", "answered"))
    return done


GROWTH = 64.0  # MB that the process (server and clients) may grow by after the first fifth of the requests


def resident() -> float:
    """Memory of this process in MB."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def idle(engine: Any) -> bool:
    """Whether nothing runs and nothing waits."""
    return not engine.busy


def _schemathesis(most: int) -> int:
    from importlib.util import find_spec

    if not find_spec("schemathesis"):
        print("schemathesis is not installed")
        return 0
    from test_server import KEY, running

    with running() as server:
        return subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.address}/openapi.json"),
                *("--header", f"Authorization: Bearer {KEY}", "--checks", "not_a_server_error"),
                *("--max-examples", str(most), "--request-timeout", "120", "--no-color"),
            ],
            check=False,
            timeout=1700,
        ).returncode


def fuzz(lab: faults.Lab, most: int) -> None:
    """Every reader of files and of requests with inputs that hypothesis draws."""
    log, count = lab.place / "fuzz.log", lab.count("fuzzed inputs of readers")
    command = [sys.executable, "-m", "pytest", "-n0", "-rA", "-p", "no:cacheprovider", "-m", "", "-k", "damaged or any"]
    tests = ["tests/tessera/test_readers.py", "tests/tessera/serving/test_protocol.py"]
    with log.open("wb") as file:
        status = subprocess.run(
            [*command, *tests],
            cwd=faults.ROOT,
            env=os.environ | {"TESSERA_FUZZ": str(most), "PYTHONPATH": str(faults.ROOT)},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    for outcome, name in re.findall(
        r"^(PASSED|FAILED|ERROR) (\S+::.*)$", log.read_text(errors="replace"), re.MULTILINE
    ):
        count.tried += most
        count.notes["readers"] += 1
        if outcome != "PASSED":
            count.lost.append(f"{name}: see {log}")
    if status and not count.lost:
        count.lost.append(f"exit {status}: {faults.tail(log)}")
