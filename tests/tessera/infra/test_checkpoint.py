"""Checkpoints: exact round trips, detection of damage, retention, and atomic artefacts."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from absl import logging as absl_logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tessera.infra.artifacts import load_extra, load_tree, save_tree
from tessera.infra.checkpoint import (
    CheckpointConfig,
    CheckpointDamaged,
    CheckpointMismatch,
    Checkpoints,
    NotOurs,
    abstract,
    checksums,
)


def make_state(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {"kernel": jax.random.normal(keys[0], (40, 30)), "half": jax.random.normal(keys[1], (7,), jnp.bfloat16)}
    return {
        "params": params,
        "opt": optax.adamw(1e-3).init(params),
        "step": jnp.int32(seed),
        "mask": jax.random.bernoulli(keys[2], 0.5, (11, 3)),
        "nothing": None,
    }


def assert_same(a, b):
    a, b = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    assert [path for path, _ in a] == [path for path, _ in b]
    for (path, x), (_, y) in zip(a, b, strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def data_files(directory):
    """Files that hold array values, largest first."""
    files = [path for path in Path(directory).rglob("*") if path.is_file() and path.parent.name == "d"]
    return sorted(files, key=lambda path: -path.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "truncated array file": lambda d: truncate(data_files(d)[0]),
    "flipped bit in an array": lambda d: flip(data_files(d)[0]),
    "array file gone": lambda d: data_files(d)[0].unlink(),
    "array file empty": lambda d: data_files(d)[0].write_bytes(b""),
    "truncated description": lambda d: truncate(d / "meta" / "metadata"),
    "altered description": lambda d: (d / "meta" / "metadata").write_text(
        (d / "meta" / "metadata").read_text().replace("next_index", "next_indey")
    ),
    "state gone": lambda d: shutil.rmtree(d / "state"),
    "state metadata gone": lambda d: (d / "state" / "_METADATA").unlink(),
    "metrics gone, state flipped": lambda d: (shutil.rmtree(d / "metrics"), flip(data_files(d)[0])),
    "truncated root metadata": lambda d: (truncate(d / "_CHECKPOINT_METADATA"), flip(data_files(d)[0])),
    "root metadata gone": lambda d: ((d / "_CHECKPOINT_METADATA").unlink(), flip(data_files(d)[0])),
    "everything empty": lambda d: [p.write_bytes(b"") for p in d.rglob("*") if p.is_file()],
    "nothing inside": lambda d: (shutil.rmtree(d), d.mkdir()),
    "manifest flipped": lambda d: flip(d / "state" / "manifest.ocdbt"),
}


def save_three(directory, **options):
    with Checkpoints(directory, CheckpointConfig(**options)) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(
                step, make_state(step), data={"next_index": step}, extra={"note": [1, "x"]}, metrics={"loss": 1.0}
            )


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip_is_bit_exact(tmp_path, asynchronous):
    save_three(tmp_path / "c", asynchronous=asynchronous)
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.steps() == [10, 20, 30]
        found = checkpoints.restore_latest(make_state())
        assert_same(found.state, make_state(30))
        assert type(found.state["opt"]) is type(make_state()["opt"])
        assert (found.step, found.data, found.extra, found.skipped) == (30, {"next_index": 30}, {"note": [1, "x"]}, ())
        assert_same(checkpoints.restore(10, abstract(make_state())).state, make_state(10))
        raw = checkpoints.restore(20).state
        np.testing.assert_array_equal(raw["params"]["kernel"], make_state(20)["params"]["kernel"])


def test_no_checkpoint_is_none(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore_latest(make_state()) is None
        assert checkpoints.best_step() is None
        checkpoints.save(3, make_state(3))  # never evaluated
        checkpoints.wait()
        assert checkpoints.steps() == [3] and checkpoints.best_step() is None


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_is_reported_and_passed_over(tmp_path, damage, caplog):
    save_three(tmp_path / "c")
    DAMAGE[damage](tmp_path / "c" / "30")
    absl_logging.get_absl_logger().propagate = True
    with Checkpoints(tmp_path / "c") as checkpoints:
        found = checkpoints.restore_latest(make_state())
        assert found.step == 20
        assert_same(found.state, make_state(20))
        assert [step for step, _ in found.skipped] == [30] and "damaged" in found.skipped[0][1]
        assert (tmp_path / "c_damaged" / "30").exists()
        # The run goes on and writes the same step again.
        checkpoints.save(30, make_state(31))
        checkpoints.wait()
        assert_same(checkpoints.restore_latest(make_state()).state, make_state(31))


def test_an_unreadable_rank_costs_the_rank_only(tmp_path):
    save_three(tmp_path / "c")
    truncate(tmp_path / "c" / "30" / "metrics" / "metrics")
    with Checkpoints(tmp_path / "c") as checkpoints:
        found = checkpoints.restore_latest(make_state())
        assert (found.step, found.skipped, checkpoints.best_step()) == (30, (), 10)


def test_all_damaged_is_an_error(tmp_path):
    save_three(tmp_path / "c")
    for step in (10, 20, 30):
        flip(data_files(tmp_path / "c" / str(step))[0])
    with Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(CheckpointDamaged, match="every checkpoint .* is damaged .*30, 20, 10"):
            checkpoints.restore_latest(make_state())
        assert checkpoints.steps() == [10, 20, 30]  # nothing was moved


def test_another_model_is_a_mismatch_not_damage(tmp_path):
    save_three(tmp_path / "c")
    other = make_state() | {"mask": jnp.ones((11, 4), bool)}
    with Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(CheckpointMismatch, match=r"mask: saved bool\[11, 3\], wanted bool\[11, 4\]"):
            checkpoints.restore_latest(other)


def test_keep_and_best_hold_together(tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: float("nan"), 6: 6.0}
    with Checkpoints(tmp_path / "c", CheckpointConfig(keep=2, best=1)) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, make_state(step), metrics={"loss": loss})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6] and checkpoints.best_step() == 2
    with Checkpoints(tmp_path / "c", CheckpointConfig(keep=2, best=1)) as checkpoints:  # and after a restart
        checkpoints.save(7, make_state(7))
        checkpoints.wait()
        assert checkpoints.steps() == [2, 6, 7] and checkpoints.best_step() == 2


@pytest.mark.parametrize(
    "losses", [(3.0, 1.0, 2.0, 4.0), (1.0, 2.0, 3.0, 4.0), (4.0, 3.0, 2.0, 1.0), (1.0, 2.0, np.nan, 3.0)]
)
def test_ranks_given_after_saving_hold_the_best_as_well(tmp_path, losses):
    best = min((loss, step) for step, loss in enumerate(losses, 1) if np.isfinite(loss))[1]
    with Checkpoints(tmp_path / "c", CheckpointConfig(keep=1, best=1, asynchronous=False)) as checkpoints:
        for step, loss in enumerate(losses, 1):
            checkpoints.save(step, {"w": jnp.float32(step)})
            checkpoints.rank(step, {"loss": loss})
        assert checkpoints.steps() == sorted({best, 4}) and checkpoints.best_step() == best


def test_donation_right_after_an_async_save_is_safe(tmp_path):
    step = jax.jit(lambda x: x * 1.5 + 1.0, donate_argnums=0)
    x, expected = jnp.ones((512, 512)), {}
    with Checkpoints(tmp_path / "c", CheckpointConfig(keep=8)) as checkpoints:
        for i in range(1, 6):
            x = step(x)
            expected[i] = np.array(x)
            checkpoints.save(i, {"x": x})
            x = step(x)
        checkpoints.wait()
        for i, array in expected.items():
            assert_same(checkpoints.restore(i, {"x": x}).state, {"x": array})


def test_another_sharding_reads_the_same_values(tmp_path):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    sharded = NamedSharding(mesh, PartitionSpec("a", "b"))
    array = jax.random.normal(jax.random.key(0), (16, 8))
    state = {"x": jax.device_put(array, sharded)}
    assert checksums(state) == checksums({"x": array})
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        like = {"x": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("b", "a")))}
        found = checkpoints.restore(1, like).state
    assert_same(found, {"x": array})
    assert found["x"].sharding == like["x"].sharding


ARRAYS = {
    "float32": np.linspace(-3, 3, 24, dtype=np.float32).reshape(2, 3, 4),
    "bfloat16": np.linspace(-3, 3, 10).astype(ml_dtypes.bfloat16),
    "float8": np.linspace(-3, 3, 10).astype(ml_dtypes.float8_e4m3fn),
    "bool": np.array([[True, False], [False, False]]),
    "int8": np.arange(-4, 4, dtype=np.int8),
    "uint16": np.arange(9, dtype=np.uint16),
    "int32 scalar": np.array(-7, np.int32),
    "complex64": np.array([1 + 2j, -3j], np.complex64),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_checksums_agree_between_numpy_and_devices_and_see_changes(name):
    array = ARRAYS[name]
    plain = checksums({"x": array})
    assert plain == checksums({"x": jnp.asarray(array)})
    if array.size:
        for position in range(array.size):
            other = array.copy()
            bits = other.reshape(-1).view(np.uint8)
            bits[position * array.dtype.itemsize] ^= 1
            assert checksums({"x": other}) != plain
    if array.ndim == 1 and array.size > 2:
        assert checksums({"x": array[::-1].copy()}) != plain  # order matters


def test_save_tree_round_trip_replace_and_damage(tmp_path):
    path = tmp_path / "levels" / "3"
    tree = make_state(1) | {"numpy": np.arange(5), "wide": np.arange(3, dtype=np.float64)}
    save_tree(path, tree, {"rows": [1.5]})
    found = load_tree(path, tree)
    assert_same(found, tree)
    assert isinstance(found["numpy"], np.ndarray) and load_extra(path) == {"rows": [1.5]}
    save_tree(path, tree | {"step": jnp.int32(9)})
    assert int(load_tree(path, tree)["step"]) == 9
    assert [p.name for p in path.parent.iterdir()] == ["3"]  # no leftovers
    with pytest.raises(CheckpointMismatch, match="more: saved nothing"):
        load_tree(path, tree | {"more": jnp.zeros(3)})
    flip(data_files(path)[0])
    with pytest.raises(CheckpointDamaged, match="levels/3"):
        load_tree(path, tree)
    with pytest.raises(FileNotFoundError, match="nothing saved"):
        load_tree(tmp_path / "absent", tree)


def test_directories_that_no_run_wrote_are_never_removed(tmp_path):
    tree = make_state(1)
    for name in ("3", ".3.new", ".3.old"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "thesis.tex").write_text("years of work")
        with pytest.raises(NotOurs, match=rf"{name} .*thesis\.tex.*another directory"):
            save_tree(tmp_path / "3", tree)
        assert (folder / "thesis.tex").read_text() == "years of work"
        shutil.rmtree(folder)
    save_tree(tmp_path / "3", tree)
    theirs = tmp_path / "checkpoints"
    for step in (100, 200, 300, 400):
        (theirs / str(step) / "items").mkdir(parents=True)
    with pytest.raises(NotOurs, match="100 .*items"):
        Checkpoints(theirs, CheckpointConfig(keep=1))
    assert len(list(theirs.glob("*/items"))) == 4


def test_bad_config():
    with pytest.raises(ValueError, match="keep >= 1"):
        CheckpointConfig(keep=0)


CHILD = """
import sys, jax, jax.numpy as jnp
from tessera.infra.checkpoint import Checkpoints, CheckpointConfig
with Checkpoints(sys.argv[1], CheckpointConfig(keep=2)) as checkpoints:
    found = checkpoints.restore_latest({"x": jnp.zeros((1000, 700)), "step": jnp.int32(0)})
    step = found.step if found else 0
    assert found is None or found.skipped == ()
    assert found is None or (found.state["x"] == float(step)).all() and int(found.state["step"]) == step
    print(step, flush=True)
    while True:
        step += 1
        checkpoints.save(step, {"x": jnp.full((1000, 700), float(step)), "step": jnp.int32(step)})
"""


@pytest.mark.slow
def test_killed_at_random_moments_while_saving(tmp_path):
    moments, last = np.random.default_rng(0), -1
    for _ in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path / "c")],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            cwd=Path(__file__).parents[2],
        )
        line = child.stdout.readline()
        time.sleep(moments.uniform(0.0, 0.6))
        child.kill()
        child.wait()
        assert line.strip().isdigit(), json.dumps(line)
        assert int(line) >= last
        last = int(line)
    assert last > 0


def test_a_checkpoint_is_read_to_the_host_whatever_devices_it_was_saved_from(tmp_path):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("dp", "tp"))
    state = make_state(1)
    where = NamedSharding(mesh, PartitionSpec("dp"))
    state["params"]["kernel"] = jax.device_put(state["params"]["kernel"], where)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        found = checkpoints.restore_whole(1).state
        checkpoints.save(2, make_state(2))
        checkpoints.wait()
        flip(data_files(tmp_path / "2")[0])
        with pytest.raises(CheckpointDamaged):
            checkpoints.restore_whole(2)
    assert {type(leaf) for leaf in jax.tree.leaves(found)} == {np.ndarray}
    for ours, theirs in zip(jax.tree.leaves(found["params"]), jax.tree.leaves(state["params"]), strict=True):
        assert ours.dtype == theirs.dtype and ours.tobytes() == np.asarray(theirs).tobytes()
    assert len(jax.tree.leaves(found)) == len(jax.tree.leaves(state))
