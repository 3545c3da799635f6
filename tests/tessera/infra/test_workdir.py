"""A run's directory says what made it and refuses another config."""

import json

import pytest
from ml_collections import ConfigDict, FieldReference

from tessera.infra.workdir import WorkdirMismatch, config_hash, locate, prepare, resolve


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
