"""One process at a time writes a directory, and who it is can be read."""

import json
import os
import socket

import pytest

from tessera.infra.errors import ConfigError, DiskFull, WorkdirInUse
from tessera.infra.lock import LOCK, SILENT, hold
from tessera.infra.workdir import prepare


def test_a_directory_in_use_is_refused_with_its_holder(tmp_path):
    with hold(tmp_path / "run"):
        holder = json.loads((tmp_path / "run" / LOCK).read_text())
        for start in (lambda: hold(tmp_path / "run").__enter__(), lambda: prepare(tmp_path / "run", {"seed": 1})):
            with pytest.raises(WorkdirInUse) as error:
                start()
            place = f"{tmp_path / 'run'} is in use by pid {os.getpid()} on {socket.gethostname()} since "
            assert str(error.value) == place + holder["since"]
        with hold(tmp_path / "other"):
            pass
    prepare(tmp_path / "run", {"seed": 1})
    with hold(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", json.dumps({"host": socket.gethostname(), "pid": 1, "since": "then"})]
)
def test_the_lock_of_a_dead_process_of_this_machine_is_taken_over(tmp_path, text):
    (tmp_path / LOCK).write_text(text)
    with hold(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert (tmp_path / LOCK).read_text() == ""


def test_the_lock_of_another_machine_counts_while_it_shows_life(tmp_path):
    lock = tmp_path / LOCK
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "then"}))
    with pytest.raises(WorkdirInUse, match=f"by pid 7 on elsewhere since then, .* after {SILENT:.0f} s it is dead"):
        hold(tmp_path).__enter__()
    assert "elsewhere" in lock.read_text()
    os.utime(lock, (0, lock.stat().st_mtime - SILENT - 1))
    with hold(tmp_path):
        assert "elsewhere" not in lock.read_text()


def test_a_full_disk_is_named_whatever_it_was_turned_into(tmp_path):
    space = ValueError('RESOURCE_EXHAUSTED: Error writing local file "x": No space left on device [os_error_code=28]')
    for cause in (OSError(28, "No space left on device"), OSError(122, "Disk quota exceeded"), space):
        with pytest.raises(DiskFull, match=f"the disk of {tmp_path} is full; free space and run the same"):
            with hold(tmp_path):
                raise ConfigError("config.search: it failed") from ExceptionGroup("saves", [cause])
    with pytest.raises(ConfigError, match="out of memory"), hold(tmp_path):
        raise ConfigError("RESOURCE_EXHAUSTED: out of memory")


def test_workdirs_that_cannot_be_are_one_line_with_their_flag(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path, why in ((tmp_path / ("a" * 300), "too long"), (tmp_path / "file", "Not a dir")):
        with pytest.raises(ValueError, match=why) as error:
            prepare(path, {"seed": 1})
        assert str(error.value).startswith(f"--workdir={path}: ") and "\n" not in str(error.value)

    def read_only(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", read_only)
    with pytest.raises(ValueError, match="--workdir=.*new: Permission denied; a directory that can be written"):
        prepare(tmp_path / "new", {"seed": 1})
