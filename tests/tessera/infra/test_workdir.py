"""A run's directory says what made it and refuses another config."""

import json
import os
import socket

import pytest
from ml_collections import ConfigDict, FieldReference

from tessera.infra import workdir
from tessera.infra.errors import ConfigError, DiskFull, WorkdirInUse
from tessera.infra.workdir import LOCK, SILENT, WorkdirMismatch, config_hash, hold, locate, prepare, resolve


def config(**changes):
    return ConfigDict({"seed": 3, "lr": 0.1, "model": {"width": 8, "sizes": (1, 2)}} | changes)


def test_files(tmp_path):
    path = prepare(tmp_path / "run", config())
    assert json.loads((path / "config.json").read_text()) == {
        "seed": 3,
        "lr": 0.1,
        "model": {"width": 8, "sizes": [1, 2]},
    }
    versions = json.loads((path / "versions.json").read_text())
    assert {"python", "jax", "flax", "optax", "orbax-checkpoint", "numpy", "tessera-jax"} <= set(versions)
    run = json.loads((path / "run.json").read_text())
    assert run["seed"] == 3 and run["command"] and len(run["revision"]) in (7, 40) and run["devices"] == 8


def test_the_same_config_goes_on_and_keeps_the_first_record(tmp_path):
    path = prepare(tmp_path / "run", config())
    first = json.dumps(json.loads((path / "run.json").read_text()) | {"name": "first"})
    (path / "run.json").write_text(first)
    assert prepare(path, config()) == path
    assert (path / "run.json").read_text() == first


def test_a_setting_that_was_added_later_is_its_default(tmp_path):
    path = prepare(tmp_path / "run", config())
    known = {"added": 4, "model.scale": 1.0}
    later = config(added=4, model={"width": 8, "sizes": (1, 2), "scale": 1.0})
    assert prepare(path, later, defaults=known) == path
    with pytest.raises(WorkdirMismatch, match="added: 4 there, 5 now"):
        prepare(path, config(added=5), defaults=known)
    # Nor does it change the name of the default directory.
    names = {locate("", each, name="x", defaults=known).name for each in (config(), later)}
    assert len(names) == 1


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("run.json", "{}", "made by another version of Tessera .*another --workdir"),
        ("run.json", '{"format": 3}', "files of format 3, not 2"),
        ("run.json", "[1", "damaged"),
        ("config.json", "[]", "a JSON object is needed, and it holds a list"),
        ("config.json", "\udcff".encode("utf-8", "surrogatepass"), "damaged"),
    ],
)
def test_a_directory_of_another_version_or_a_damaged_one_is_refused_in_one_line(tmp_path, file, text, message):
    path = prepare(tmp_path / "run", config())
    (path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(WorkdirMismatch, match=message) as caught:
        prepare(path, config())
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_each_differing_setting_is_named_with_both_values(tmp_path):
    prepare(tmp_path / "run", config(gone=1))
    with pytest.raises(WorkdirMismatch) as caught:
        prepare(tmp_path / "run", config(lr=0.2, model={"width": 9, "sizes": (1, 2)}, fresh=None))
    message = str(caught.value)
    for part in (
        "lr: 0.1 there, 0.2 now",
        "model.width: 8 there, 9 now",
        "gone: 1 there, 'absent' now",
        "fresh: 'absent'",
    ):
        assert part in message
    assert "sizes" not in message and "seed" not in message


def test_a_directory_that_no_run_made_must_hold_nothing_it_could_overwrite(tmp_path):
    path = tmp_path / "mine"
    path.mkdir()
    for name in ("versions.json", "train.log", ".hidden"):  # a start that was killed, and the job's own log
        (path / name).write_text("")
    for name in ("metrics.jsonl", "checkpoints"):
        (path / name).mkdir()
        with pytest.raises(WorkdirMismatch, match=f"mine has no config.json.*{name}.*new or empty --workdir"):
            prepare(path, config())
        (path / name).rmdir()
    assert not (path / "config.json").exists()
    prepare(path, config())
    (path / "checkpoints").mkdir()
    prepare(path, config())


def test_default_directory_depends_on_the_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = prepare("", config(), name="lm-tiny"), prepare("", config(lr=0.2), name="lm-tiny")
    assert first != second and first.name.startswith("lm-tiny-") and first.parent.name == "runs"
    assert prepare("", config(), name="lm-tiny") == first


def test_references_are_resolved():
    lr = FieldReference(0.5)
    assert resolve(ConfigDict({"lr": lr, "b": {"lr": lr}})) == {"lr": 0.5, "b": {"lr": 0.5}}
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1}) != config_hash({"a": 1})


def test_a_number_that_may_grow_is_replaced_by_a_larger_one_only(tmp_path):
    path = prepare(tmp_path / "run", config(steps=3))
    assert prepare(path, config(steps=5), grows=("steps",)) == path
    assert json.loads((path / "config.json").read_text())["steps"] == 5
    with pytest.raises(WorkdirMismatch, match="steps: 5 there, 4 now"):
        prepare(path, config(steps=4), grows=("steps",))
    with pytest.raises(WorkdirMismatch, match="steps: 5 there, 6 now"):
        prepare(path, config(steps=6))
    with pytest.raises(WorkdirMismatch, match="lr: 0.1 there, 0.2 now"):
        prepare(path, config(steps=6, lr=0.2), grows=("steps",))


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


def test_a_run_is_finished_with_its_settings_and_its_report(tmp_path):
    assert not workdir.was_finished(tmp_path, "a")
    workdir.mark_finished(tmp_path, "a")
    assert not workdir.was_finished(tmp_path, "a"), "without its report"
    (tmp_path / "report.html").touch()
    assert workdir.was_finished(tmp_path, "a") and not workdir.was_finished(tmp_path, "b")
