"""Files on disk are taken as they are; downloads are verified; without a connection there is one useful error."""

import functools
import hashlib
import http.server
import socket
import threading
from pathlib import Path

import pooch
import pytest

from tessera.data.download import DataUnavailable, Remote, fetch, find, home

CONTENT = b"twelve bytes" * 20_000


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(tmp_path):
    """A real HTTP server on this machine; yields (its address, the folder it serves)."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", folder
        httpd.shutdown()
        thread.join()


@pytest.fixture
def nowhere():
    """An address where nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def remote(filename, *urls, content=CONTENT, kind="sha256", **kwargs):
    return Remote(filename, urls, f"{kind}:{hashlib.new(kind, content).hexdigest()}", **kwargs)


@pytest.mark.parametrize("place", ["set/a.bin", "a.bin"])
def test_a_file_on_disk_is_used_unverified(tmp_path, nowhere, place):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"a variant")
    assert fetch([remote("a.bin", nowhere)], str(tmp_path), name="set") == [path]


def test_the_named_directory_goes_first(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"of another set")
    assert find("a.bin", str(tmp_path), name="set") == tmp_path / "a.bin"
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.bin").write_bytes(b"its own")
    assert find("a.bin", str(tmp_path), name="set") == tmp_path / "set" / "a.bin"
    assert find("b.bin", str(tmp_path), name="set") is None


def test_home(tmp_path, monkeypatch):
    assert home(str(tmp_path), "set") == tmp_path / "set"
    assert home(str(tmp_path / "set"), "set") == tmp_path / "set"
    assert home("~/data", "set") == Path("~/data/set").expanduser()
    assert home("", "set") == Path(pooch.os_cache("tessera")) / "set"


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_download_verifies_and_is_done_once(tmp_path, server, kind):
    address, folder = server
    (folder / "a.bin").write_bytes(CONTENT)
    remotes = [remote("a.bin", f"{address}/a.bin", kind=kind)]
    (path,) = fetch(remotes, str(tmp_path / "data"), name="set")
    assert path == tmp_path / "data" / "set" / "a.bin" and path.read_bytes() == CONTENT
    (folder / "a.bin").unlink()
    assert fetch(remotes, str(tmp_path / "data"), name="set") == [path]


def test_next_address_is_tried_after_a_wrong_checksum_or_no_answer(tmp_path, server, nowhere):
    address, folder = server
    (folder / "bad").write_bytes(CONTENT[:-1])
    (folder / "good").write_bytes(CONTENT)
    urls = (f"{nowhere}/a", f"{address}/absent", f"{address}/bad", f"{address}/good")
    (path,) = fetch([remote("a.bin", *urls)], str(tmp_path / "data"), name="set")
    assert path.read_bytes() == CONTENT


def test_wrong_checksum_leaves_no_file(tmp_path, server):
    address, folder = server
    (folder / "a.bin").write_bytes(b"something else")
    with pytest.raises(DataUnavailable, match=r"(?s)tried .*/a.bin: .*hash"):
        fetch([remote("a.bin", f"{address}/a.bin")], str(tmp_path / "data"), name="set")
    assert [p for p in (tmp_path / "data").rglob("*") if p.is_file()] == []


def test_offline_is_one_error_naming_everything_missing(tmp_path, nowhere, capsys):
    (tmp_path / "b.bin").write_bytes(b"here")
    remotes = [
        remote("a.bin", f"{nowhere}/a1", f"{nowhere}/a2", instead="the folder a"),
        remote("b.bin", f"{nowhere}/b"),
        remote("c.bin", f"{nowhere}/c"),
    ]
    with pytest.raises(DataUnavailable) as caught:
        fetch(remotes, str(tmp_path), name="set")
    message = str(caught.value)
    for part in ("'set' lacks 2 file(s)", "a.bin", "c.bin", f"{nowhere}/a1 or {nowhere}/a2", f"{nowhere}/c"):
        assert part in message
    assert str(tmp_path / "set") in message and "--config.data.dir=" in message and "the folder a" in message
    assert "b.bin" not in message
    assert f"tried {nowhere}/c" not in message, "one failed file is enough to know"
    # Nothing is left that looks like the beginning of a download.
    assert not (tmp_path / "set").exists() and "0/" not in "".join(capsys.readouterr())


def test_what_came_before_a_failure_is_kept_and_not_asked_for(tmp_path, server, nowhere):
    address, folder = server
    (folder / "first.bin").write_bytes(CONTENT)
    remotes = [remote("first.bin", f"{address}/first.bin"), remote("second.bin", f"{nowhere}/second.bin")]
    with pytest.raises(DataUnavailable, match=r"lacks 1 file") as caught:
        fetch(remotes, str(tmp_path / "data"), name="set")
    assert "first.bin" not in str(caught.value)
    assert (tmp_path / "data" / "set" / "first.bin").read_bytes() == CONTENT


def test_a_directory_that_cannot_be_written_is_said_so(tmp_path, server):
    address, folder = server
    (folder / "a.bin").write_bytes(CONTENT)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataUnavailable, match="tried"):
        fetch([remote("a.bin", f"{address}/a.bin")], str(tmp_path / "file"), name="set")
