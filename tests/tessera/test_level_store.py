"""Levels on disk: atomic, complete, and honest about damage."""

import jax.numpy as jnp
import numpy as np
import pytest

from tessera.infra.checkpoint import CheckpointDamaged, NotOurs
from tessera.sweeps.programs import State
from tessera.sweeps.train import Trunk
from tessera.tickets.store import FinishedLevels, LevelStore

TREE = {"params": {"w": jnp.arange(6.0).reshape(2, 3)}, "masks": {"w": jnp.ones((2, 3), bool)}}
ROWS = [{"arm": "dense", "seed": 0, "loss": 0.1}]


def damage(directory):
    """Cut every file of an artefact short."""
    for path in directory.rglob("*"):
        if path.is_file() and path.stat().st_size > 4:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_finished_level_comes_back_and_its_leftovers_go(tmp_path):
    store = LevelStore(tmp_path)
    store.unfinished(3).save(10, TREE, [])
    assert not store.has(3)
    store.save(3, TREE, ROWS)
    assert store.has(3) and not store.has(4)
    tree, rows = store.load(3, TREE)
    np.testing.assert_array_equal(tree["params"]["w"], TREE["params"]["w"])
    assert rows == ROWS and store.unfinished(3).load(TREE) is None
    (tmp_path / "03.step10" / "state").mkdir(parents=True)  # killed while it was removed
    store.load(3, TREE)
    assert [path.name for path in tmp_path.iterdir()] == ["03"]


def test_a_damaged_level_is_named(tmp_path):
    store = LevelStore(tmp_path)
    store.save(0, TREE, ROWS)
    damage(store.path(0))
    with pytest.raises(CheckpointDamaged, match=str(store.path(0))):
        store.load(0, TREE)


def test_only_the_newest_unfinished_state_is_kept_and_a_damaged_one_is_passed_over(tmp_path):
    keeper = LevelStore(tmp_path).unfinished(1)
    assert keeper.load(TREE) is None
    keeper.save(10, TREE, [{"step": 10}])
    keeper.save(20, TREE, [{"step": 20}])
    assert [path.name for path in tmp_path.iterdir()] == ["01.step20"]
    assert keeper.load(TREE)[0] == 20
    damage(tmp_path / "01.step20")
    assert keeper.load(TREE) is None


def test_the_levels_of_another_search_are_left_as_they_are(tmp_path):
    store = LevelStore(tmp_path)
    store.save(3, TREE, ROWS)
    for name in ("03.step10", ".04.new"):  # the search that owns them is running
        (tmp_path / name / "state").mkdir(parents=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    levels = FinishedLevels(tmp_path)
    assert levels.has(3) and not levels.has(4) and levels.load(3, TREE)[1] == ROWS
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_directory_of_someone_else_under_such_a_name_stays(tmp_path):
    for name in ("01.step5", "7"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work")
    with pytest.raises(NotOurs, match=r"01\.step5 .*thesis\.tex"):
        LevelStore(tmp_path).save(1, TREE, ROWS)
    state = State(jnp.int32(9), TREE["params"], TREE["params"])
    with pytest.raises(NotOurs, match=r"7 .*thesis\.tex"):
        Trunk(tmp_path).save(state, branch=False)
    assert all((tmp_path / name / "thesis.tex").exists() for name in ("01.step5", "7"))
