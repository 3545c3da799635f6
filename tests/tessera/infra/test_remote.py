"""Directories at URLs: what is brought, what is uploaded in which order, who may write, and a run that is killed."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest

from tessera.infra import remote
from tessera.infra.errors import RemoteError, RemoteMissing, WorkdirInUse

ROOT = Path(__file__).parents[3]


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A file system in memory, and a cache directory of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    return fs


def files(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in Path(directory).rglob("*") if p.is_file()}


def test_files_directories_and_patterns_are_brought_and_brought_again(store):
    store.pipe({"/b/books/a/x.txt": b"1", "/b/books/y.txt": b"2", "/b/books/z.md": b"3"})
    assert remote.local("memory://b/books/y.txt").read_bytes() == b"2"
    assert files(remote.local("memory://b/books/")) == {"a/x.txt": b"1", "y.txt": b"2", "z.md": b"3"}
    pattern = remote.local("memory://b/books/**/*.txt")
    assert pattern.parts[-2:] == ("**", "*.txt")
    assert files(pattern.parents[1]) == {"a/x.txt": b"1", "y.txt": b"2"}
    store.pipe_file("/b/books/y.txt", b"22")
    store.rm("/b/books/a/x.txt")
    assert files(remote.local("memory://b/books")) == {"y.txt": b"22", "z.md": b"3"}
    assert files(remote.local("memory://b/books/**/*.txt").parents[1]) == {"y.txt": b"22"}
    assert remote.local("~/x") == Path.home() / "x" and remote.local("a/b") == Path("a/b")


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("memory://b/none", RemoteMissing, "nothing is at memory://b/none"),
        ("memory://b/none/*.txt", RemoteMissing, "nothing is at memory://b/none"),
        ("file:///b/x", RemoteError, "file:///b/x: write a local path without file://"),
        ("nope://b/x", RemoteError, "Protocol not known: nope; s3://, gs://"),
    ],
)
def test_what_cannot_be_brought_is_one_line(store, url, kind, message):
    with pytest.raises(kind, match=message) as found:
        remote.local(url)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["../elsewhere", "a/../../b", "/tmp/elsewhere"])
def test_a_manifest_writes_nothing_outside_its_directory(store, name):
    store.pipe({"/b/run/.mirror.json": json.dumps({"files": {name: "0"}}).encode(), "/b/elsewhere": b"x"})
    with pytest.raises(RemoteError, match="lies outside its directory"):
        remote.local("memory://b/run")


def test_a_directory_comes_back_as_it_was_left(store):
    with remote.mirrored("memory://b/runs/lm") as place:
        place = Path(place)
        assert place.name == "lm" and files(place) == {}
        (place / "checkpoints/3").mkdir(parents=True)
        (place / "checkpoints/3/state").write_bytes(b"weights")
        (place / "metrics.jsonl").write_bytes(b"{}\n")
        for name in (".lock", "checkpoints/.new", "checkpoints/6.orbax-checkpoint-tmp-1"):  # under way
            (place / name).write_bytes(b"x")
    expected = {"checkpoints/3/state": b"weights", "metrics.jsonl": b"{}\n"}
    assert files(remote.local("memory://b/runs/lm")) == expected
    (place / "metrics.jsonl").write_bytes(b"what a killed process wrote after the last upload\n")
    with remote.mirrored("memory://b/runs/lm") as place:
        assert files(place) == expected
        (Path(place) / "checkpoints/3/state").unlink()
    assert files(remote.local("memory://b/runs/lm")) == {"metrics.jsonl": b"{}\n"}
    assert not store.exists("/b/runs/lm/checkpoints/3/state")


def test_an_upload_that_is_killed_leaves_the_directory_before_it(store, monkeypatch):
    mirror = remote.Mirror("memory://b/run", every=1000.0)
    (mirror.place / "checkpoints/1").mkdir(parents=True)
    (mirror.place / "checkpoints/1/a").write_bytes(b"1")
    mirror.push()
    (mirror.place / "checkpoints/1/a").unlink()
    (mirror.place / "checkpoints/2").mkdir()
    for name in "ab":
        (mirror.place / f"checkpoints/2/{name}").write_bytes(b"2")

    class Killed(BaseException):
        pass

    write, left = mirror._write, [1]

    def killed(name, data):
        if not left[0]:
            raise Killed
        left[0] -= 1
        write(name, data)

    monkeypatch.setattr(mirror, "_write", killed)
    for _ in range(2):  # at the second file, and before the manifest
        with pytest.raises(Killed):
            mirror.push()
        assert files(remote.local("memory://b/run")) == {"checkpoints/1/a": b"1"}
        left[0] = 2
    monkeypatch.undo()
    mirror.close()
    assert files(remote.local("memory://b/run")).keys() == {"checkpoints/2/a", "checkpoints/2/b"}


def test_one_process_at_a_time_has_a_url(store, monkeypatch):
    monkeypatch.setattr(remote, "SILENT", 0.2)
    monkeypatch.setattr(remote, "SEEN", 0.0)
    first = remote.Lease(store, "/b/run", "memory://b/run")
    with pytest.raises(WorkdirInUse, match=f"in use by pid {os.getpid()} on {socket.gethostname()}"):
        remote.Lease(store, "/b/run", "memory://b/run")
    monkeypatch.setattr(remote, "_host", lambda: "elsewhere")
    alive = first.show_life
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: alive())
    with pytest.raises(WorkdirInUse, match="in use by pid"):
        remote.Lease(store, "/b/run", "memory://b/run")
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    second = remote.Lease(store, "/b/run", "memory://b/run")  # the first shows no sign of life
    with pytest.raises(WorkdirInUse, match="on elsewhere, which found this process silent"):
        first.check()
    first.close()  # takes nothing away from the second
    second.check()
    second.close()
    remote.Lease(store, "/b/run", "memory://b/run").close()
    assert len(store.ls("/b/run")) == 1


def test_of_two_that_find_a_lock_silent_one_gets_it(store, monkeypatch):
    remote.Lease(store, "/b/run", "memory://b/run").close()
    number = remote.Lease._newest

    def between(lease):
        found = number(lease)
        if not other:  # another process comes between the look and the creation
            other.append(None)
            other.append(remote.Lease(store, "/b/run", "memory://b/run"))
        return found

    other = []
    monkeypatch.setattr(remote.Lease, "_newest", between)
    with pytest.raises(WorkdirInUse, match="in use since this moment"):
        remote.Lease(store, "/b/run", "memory://b/run")
    other[1].check()


def test_further_processes_have_a_directory_of_their_own_and_upload_nothing(store):
    with remote.mirrored("memory://b/run") as first:
        (Path(first) / "config.json").write_bytes(b"{}")
    asked = []
    with remote.mirrored("memory://b/run", process=1, agreed=lambda value: asked.append(value) or 1) as second:
        assert second != first and remote.is_mirror(second) and files(second) == {"config.json": b"{}"}
        assert len(asked) == 2  # the first has the URL; all have what was there
        (Path(second) / "mine").write_bytes(b"x")
    assert len(asked) == 3  # the first has uploaded
    assert files(remote.local("memory://b/run")) == {"config.json": b"{}"}
    with pytest.raises(RemoteError, match="the first process says why"):
        with remote.mirrored("memory://b/run", process=1, agreed=lambda value: 0):
            pass


def test_two_that_bring_the_same_leave_each_others_files(store, monkeypatch):
    store.pipe({"/b/books/x.txt": b"1", "/b/books/y.txt": b"2"})
    get = type(store).get_file
    monkeypatch.setattr(type(store), "get_file", lambda self, *a, **k: (get(self, *a, **k), time.sleep(0.1)))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(remote.local, "memory://b/books")
        time.sleep(0.05)  # while the first one has a file half-way
        second = pool.submit(remote.local, "memory://b/books")
        assert files(first.result()) == files(second.result()) == {"x.txt": b"1", "y.txt": b"2"}


def test_an_export_appears_with_its_config_last(store, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "model" / name).write_bytes(b"{}")
    order, put = [], type(store).put_file
    monkeypatch.setattr(type(store), "put_file", lambda self, a, b, **k: (order.append(b), put(self, a, b, **k))[1])
    remote.upload(tmp_path / "model", "memory://b/model", last="config.json")
    assert len(order) == 3 and order[-1] == "/b/model/config.json"
    with pytest.raises(FileExistsError, match="memory://b/model exists"):
        remote.upload(tmp_path / "model", "memory://b/model", last="config.json")


SMALL = [
    "--config=lm:tiny",
    "--config.steps=60",
    "--config.batch_size=4",
    "--config.length=16",
    "--config.model.layers=1",
    "--config.model.width=16",
    "--config.model.heads=2",
    "--config.model.kv_heads=1",
    "--config.checkpoint.every=6",
    "--config.log.every=3",
    "--config.eval.every=12",
    "--config.eval.batches=2",
    "--upload_seconds=0.2",
]


@contextlib.contextmanager
def s3_server():
    """moto's S3 on a free port: the root of a bucket, and the environment that its clients need."""
    for package in ("moto", "s3fs", "flask"):
        if not find_spec(package):
            pytest.skip(f"needs {package}: pip install 'moto[server]' s3fs")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        options = {"key": "none", "secret": "none", "endpoint_url": environment["AWS_ENDPOINT_URL"]}
        fs = fsspec.filesystem("s3", **options)
        fs.mkdir("bucket")
        yield "s3://bucket", environment, fs
    finally:
        server.terminate()
        server.wait()


def text_of(words=4000):
    """Text without a data set: words drawn from a sentence, in lines of nine."""
    found = random.Random(0).choices("the tile token ticket routes experts in parallel and scales".split(), k=words)
    return "\n".join(" ".join(found[i : i + 9]) for i in range(0, len(found), 9)).encode()


def starter(tmp_path, environment):
    """Starts a command on a machine, whose name is that of its cache directory."""

    def start(command, machine, *flags):
        cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / f"jax-{jax.__version__}-scripts")}
        own = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / machine)} | environment | cache
        return subprocess.Popen(
            [sys.executable, "-c", "from tessera.cli.main import main; main()", command, *flags],
            cwd=ROOT,
            env=os.environ | own | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def rows_at(fs, url):
    """Number of lines of an object; 0 where it is not."""
    fs.invalidate_cache()
    with contextlib.suppress(FileNotFoundError):
        return fs.cat_file(url).count(b"\n")
    return 0


@pytest.mark.slow
def test_a_run_at_a_url_that_is_killed_goes_on_elsewhere(tmp_path, monkeypatch):
    """Killed twice; each time another machine, without the local copy, goes on; text and model are at URLs too."""
    text = text_of()
    with s3_server() as (bucket, environment, fs):
        fs.pipe_file(f"{bucket}/books/text.txt", text)
        (tmp_path / "text.txt").write_bytes(text)
        start = starter(tmp_path, environment)
        # The cache of a machine is a directory of its name.
        whole = start("train", "x", *SMALL, f"--config.data.name={tmp_path}/text.txt", f"--workdir={tmp_path}/whole")
        output, _ = whole.communicate(timeout=300)
        assert whole.returncode == 0, output
        flags = [*SMALL, f"--config.data.name={bucket}/books/*.txt", f"--workdir={bucket}/runs/lm"]
        for machine, least in (("a", 4), ("b", 12)):
            process = start("train", machine, *flags)
            while rows_at(fs, f"{bucket}/runs/lm/metrics.jsonl") < least and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            output, _ = process.communicate()
            assert process.returncode == -signal.SIGKILL, output
        process = start("train", "c", *flags)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and f"uploaded to {bucket}/runs/lm" in output, output
        assert fs.cat_file(f"{bucket}/runs/lm/metrics.jsonl") == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
        assert b"<svg" in fs.cat_file(f"{bucket}/runs/lm/report.html")
        again = start("train", "d", *flags)
        output, _ = again.communicate(timeout=300)
        assert again.returncode == 0 and f"already finished: {bucket}/runs/lm/report.html" in output, output

        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "reader"))
        from tessera.lm.warm_start import read_model

        found, _ = read_model(f"{bucket}/runs/lm")
        expected, _ = read_model(tmp_path / "whole")
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        held = json.loads(fs.cat_file(f"{bucket}/runs/lm/.mirror.json"))["files"]
        assert not any("orbax-checkpoint-tmp" in name or "/." in name for name in held)


@pytest.mark.slow
@pytest.mark.multihost
def test_processes_without_a_shared_disk_train_at_a_url(tmp_path):
    """Two processes, each with a cache directory of its own; one is killed, and two others go on, then one alone."""
    with s3_server() as (bucket, environment, fs):
        fs.pipe_file(f"{bucket}/books/text.txt", text_of())
        start = starter(tmp_path, environment | {"JAX_NUM_CPU_DEVICES": "1"})

        def two(machine, workdir, *more):
            with socket.create_server(("127.0.0.1", 0)) as free:
                address = f"localhost:{free.getsockname()[1]}"
            flags = [*SMALL, f"--config.data.name={bucket}/books/*.txt", "--config.plan=fsdp=2", f"--workdir={workdir}"]
            flags += [f"--coordinator={address}", "--processes=2", "--silence_seconds=20", *more]
            return [start("train", f"{machine}{index}", *flags, f"--process={index}") for index in range(2)]

        def finish(processes):
            return [(process.communicate(timeout=300)[0], process.returncode) for process in processes]

        results = finish(two("whole", tmp_path / "whole"))
        assert [status for _, status in results] == [0, 0], results
        wanted = (tmp_path / "whole" / "metrics.jsonl").read_bytes()

        url = f"{bucket}/runs/two"
        for victim, machine, least in ((0, "a", 4), (1, "b", 12)):
            running = two(machine, url)
            while rows_at(fs, f"{url}/metrics.jsonl") < least and all(one.poll() is None for one in running):
                time.sleep(0.01)
            running[victim].send_signal(signal.SIGKILL)
            results = finish(running)
            assert results[victim][1] == -signal.SIGKILL and all(status for _, status in results), results
        results = finish(two("c", url))
        assert [status for _, status in results] == [0, 0] and f"uploaded to {url}" in results[0][0], results
        assert fs.cat_file(f"{url}/metrics.jsonl") == wanted
        assert not (tmp_path / "c1/tessera/mirrors/0").exists()
        results = finish(two("d", url))
        assert all(f"already finished: {url}" in said and status == 0 for said, status in results), results

        # A checkpoint that two processes saved serves one.
        process = start(
            "generate", "e", f"--config.model.dir={url}", "--config.prompt=the ", "--config.sampling.seed=1"
        )
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and said, said


SEARCH = ["--config=lottery_digits", "--config.train.steps=20it", "--config.search.levels=2", "--config.seeds=(0, 1)"]
STUDY = ["--config=study_instability:tiny", "--config.train.steps=20it", "--config.study.steps=0,"]
SWEEP = ["--config=isoflop:tiny", "--config.plan.widths=(8, 12)", "--config.plan.budgets=(2e8, 4e8)"]
SWEEP += ["--config.plan.least_steps=10", "--config.plan.tokens_per_parameter=(0.1, 1e4)", "--config.plan.warmup=4"]
SWEEP += ["--config.train.eval_tokens=4096", "--config.train.noise_batches=2", "--config.report.resamples=20"]
SWEEP += ["--config.data.max_bytes=200000"]
# Command -> its flags, and files that are the same whether the directory is local or at a URL.
EVERYWHERE = {
    "find-ticket": (SEARCH, ("tickets.csv",)),
    "study": (STUDY, ()),
    "sweep": (SWEEP, ("runs.csv",)),
}


@pytest.mark.slow
def test_every_command_takes_urls(tmp_path):
    with s3_server() as (bucket, environment, fs):
        start = starter(tmp_path, environment)

        def done(command, *flags, status=0):
            process = start(command, "machine", *flags)
            said, _ = process.communicate(timeout=600)
            assert process.returncode == status and "Traceback" not in said, said
            return said

        for command, (flags, same) in EVERYWHERE.items():
            done(command, *flags, f"--workdir={tmp_path}/{command}")
            done(command, *flags, f"--workdir={bucket}/{command}")
            assert "already finished" in done(command, *flags, f"--workdir={bucket}/{command}")
            for name in same:
                assert fs.cat_file(f"{bucket}/{command}/{name}") == (tmp_path / command / name).read_bytes()
            assert b"</html>" in fs.cat_file(f"{bucket}/{command}/report.html")
        looked_at = f"--config.search={bucket}/find-ticket"
        assert "--workdir=DIR is needed" in done("analyze-ticket", looked_at, status=2)
        done("analyze-ticket", looked_at, f"--workdir={bucket}/analysis")
        assert b"</html>" in fs.cat_file(f"{bucket}/analysis/report.html")
        rows = [(1e6 * 4**i, 1e8 * 4**j) for i in range(4) for j in range(4)]
        table = [f"{n},{d},{1.7 + 400 / n**0.34 + 410 / d**0.28}" for n, d in rows]
        fs.pipe_file(f"{bucket}/runs.csv", "\n".join(["params,tokens,loss", *table]).encode())
        fit = [f"--config.runs={bucket}/runs.csv", "--config.resamples=20", f"--workdir={bucket}/fit"]
        done("fit", *fit)
        assert b"<svg" in fs.cat_file(f"{bucket}/fit/report.html")
        (tmp_path / "text.txt").write_bytes(text_of())
        done("train", *SMALL, f"--config.data.name={tmp_path}/text.txt", f"--workdir={bucket}/lm")
        done("export-hf", f"{bucket}/lm", f"{bucket}/model")
        assert "exists" in done("export-hf", f"{bucket}/lm", f"{bucket}/model", status=1)
        greedy = ["--config.prompt=the ", "--config.sampling.max_tokens=8", "--config.sampling.temperature=0.0"]
        first, second = (done("generate", f"--config.model.dir={bucket}/{name}", *greedy) for name in ("lm", "model"))
        assert first == second and first
        server = start("serve", "server", f"--config.model.dir={bucket}/model", "--config.port=0")
        try:
            address = next(line.split()[-1] for line in server.stdout if line.startswith("serving "))
            asked = {"model": "tessera", "prompt": "the ", "max_tokens": 8, "temperature": 0}
            request = urllib.request.Request(
                f"{address}/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as answer:
                text = json.load(answer)["choices"][0]["text"]
        finally:
            server.terminate()
            said, _ = server.communicate(timeout=60)
        assert text and text in first, said
        assert f"nothing is at {bucket}/none" in done("generate", f"--config.model.dir={bucket}/none", status=2)
