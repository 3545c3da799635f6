"""The race: budgets are counted and enforced, rows have all that they need, records rank equal data alone."""

import json

import jax
import pytest
from ml_collections import ConfigDict

from scripts.race import digits, run, text
from tessera.cli import main as cli
from tessera.cli import train
from tessera.infra.config_files import load_config
from tessera.infra.schema import completed
from tessera.tickets.setup import make_setup


@pytest.fixture(autouse=True)
def stays(monkeypatch):
    """A command that failed does not end the process of the tests, as it would end its own after a minute."""
    monkeypatch.setattr(cli, "LINGER", 1e6)


def row_of(track, score, content_hash="a" * 64, **more):
    versions = {"python": "3.11.7", "jax": "0.10.2"}
    row = {"track": track, "config": "mine", "score": score, "half_width": 0.01, "seeds": [0, 1], "cost": 1.9e12}
    return row | {"content_hash": content_hash, "revision": "0123456789", "changed": False, "versions": versions} | more


@pytest.mark.slow
@pytest.mark.parametrize("track", ["2e12", "2e13"])
def test_the_records_configs_are_within_their_budget(track):
    """6 N D by hand: N of the parameters themselves, without norms, D of steps, batch and length."""
    config = ConfigDict(completed(text.SCHEMA, load_config(run.TRACKS[track].config)[0]))
    _, made = train.prepare_run(config)
    params = jax.tree_util.tree_leaves_with_path(made.init_fn(False).params)
    matrices = sum(leaf.size for path, leaf in params if "norm" not in jax.tree_util.keystr(path))
    cost = text.training_cost(made, config.steps)
    assert cost == 6 * matrices * config.steps * config.batch_size * config.length
    assert 0.98 * run.TRACKS[track].budget < cost <= run.TRACKS[track].budget
    run.check_budget(track, cost, "the record")
    with pytest.raises(run.OverBudget, match=f"the track {track} allows"):
        run.check_budget(track, text.training_cost(made, config.steps + 1 + config.steps // 50), "more steps")


@pytest.mark.long
def test_more_than_the_budget_is_refused_before_anything_is_trained(tmp_path, capsys):
    for flags, said in (
        (["--track=digits", "--config.search.density=0.05"], "live weights; the track digits allows 2000"),
        (["--track=2e12", "--config.data.name=tinyshakespeare"], "this track is on stdlib"),
        (["--track=2e12", "--config.start.workdir=runs/other"], "trained elsewhere"),
    ):
        with pytest.raises(SystemExit) as stop:
            run.main([*flags, f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'rows.jsonl'}"])
        assert stop.value.code == 1 and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_live_weights_are_those_of_the_masks_and_what_is_never_pruned():
    config = ConfigDict(completed(digits.SCHEMA, load_config("race_digits")[0]))
    config.seeds, config.model.hidden, config.search.density = (3,), (10,), 0.5
    setup = make_setup(config)
    counts = {"dense0/kernel": 640, "output/kernel": 100}
    from lottery import imp

    last = imp.level_counts(setup.search, counts, {})[-1]
    assert digits.live_weights(setup) == sum(last.values()) + 10 + 10  # two biases


@pytest.mark.long
def test_a_row_has_all_that_a_score_depends_on(tmp_path, capsys):
    flags = ["--track=digits", "--seeds=1,2", "--config.train.steps=20it", "--config.train.eval_every=10"]
    flags += ["--config.search.levels=1", "--config.model.hidden=(8,)", f"--out={tmp_path / 'rows.jsonl'}"]
    with pytest.raises(SystemExit) as stop:
        run.main([*flags, f"--workdir={tmp_path / 'run'}"])
    assert stop.value.code == 0
    (row,) = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["seeds"] == [1, 2] and len(row["scores"]) == 2 and row["score"] == pytest.approx(sum(row["scores"]) / 2)
    assert len(row["content_hash"]) == 64 and row["revision"] and row["settings"]["search"]["levels"] == 1
    assert row["differs"]["model.hidden"] == [8] and row["versions"]["jax"] == jax.__version__
    assert "test accuracy" in capsys.readouterr().out


def test_records_rank_only_rows_of_equal_data():
    rows = [row_of("2e12", 2.5), row_of("2e12", 2.25), row_of("2e12", 2.0, "b" * 64), row_of("digits", 95.0)]
    lines = run.records([*rows, row_of("digits", 96.0, changed=True)]).splitlines()
    table = [line.split(" | ") for line in lines if line.startswith("| ")]
    places = [(cells[0].strip("| "), cells[2].split(" ")[0]) for cells in table if cells[0] != "| rank"]
    assert places == [("1", "2.2500"), ("2", "2.5000"), ("1", "2.0000"), ("1", "96.00"), ("2", "95.00")]
    assert "Not measured." in lines and any("0123456+" in line for line in lines)


def test_the_page_has_the_records_of_its_file():
    rows = [json.loads(line) for line in run.ROWS.read_text(encoding="utf-8").splitlines()]
    assert run.records(rows) in run.PAGE.read_text(encoding="utf-8")
    assert all(len(row["seeds"]) == 5 for row in rows)


def test_an_unknown_track_is_named(capsys):
    with pytest.raises(SystemExit):
        run.main(["--track=2e14"])
    assert "choose one of 2e12, 2e13, digits" in capsys.readouterr().err
