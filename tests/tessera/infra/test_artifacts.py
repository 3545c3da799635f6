"""States of a run under way: the newest sound one is found."""

import jax.numpy as jnp
import numpy as np

from tessera.infra.artifacts import ArtifactStore

TREE = {"params": {"w": jnp.arange(6.0).reshape(2, 3)}}


def damage(directory):
    """Cut every file of an artifact short."""
    for path in directory.rglob("*"):
        if path.is_file() and path.stat().st_size > 4:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_the_newest_state_is_read_and_a_damaged_one_is_passed_over(tmp_path):
    store = ArtifactStore(tmp_path, "01.step")
    assert store.latest(TREE) is None and store.steps() == []
    for step in (10, 9, 20):
        store.save(step, {"params": {"w": TREE["params"]["w"] + step}}, {"rows": [{"step": step}]})
    (tmp_path / "02.step30").mkdir()
    assert store.steps() == [9, 10, 20]
    step, tree, extra = store.latest(TREE)
    assert step == 20 and extra == {"rows": [{"step": 20}]}
    np.testing.assert_array_equal(tree["params"]["w"], TREE["params"]["w"] + 20)
    assert [store.latest(TREE, before=step)[0] for step in (19, 20, 21)] == [10, 20, 20]
    damage(store.path(20))
    assert store.latest(TREE)[0] == 10
    store.clear(before=10)
    assert store.steps() == [10, 20]
    store.clear()
    assert store.latest(TREE) is None and [path.name for path in tmp_path.iterdir()] == ["02.step30"]
