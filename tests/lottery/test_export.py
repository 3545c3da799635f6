"""Tickets on disk, read by a function that knows nothing of the package, and by safetensors itself."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lottery import export, masks

safetensors_numpy = pytest.importorskip("safetensors.numpy")
PARAMS = {
    "dense0": {"kernel": jax.random.normal(jax.random.key(0), (37, 11)), "bias": jnp.arange(11.0)},
    "blocks": {"up": {"kernel": jax.random.normal(jax.random.key(1), (2, 3, 5))}},
    "half": {"kernel": jax.random.normal(jax.random.key(2), (6, 4)).astype(jnp.bfloat16)},
}
MASKS = jax.tree.map(lambda p: jnp.abs(p) > 0.9 if p.ndim > 1 else jnp.ones(p.shape, bool), PARAMS)


def test_a_ticket_comes_back_by_a_copy_of_the_loader_alone(tmp_path):
    path = export.save(tmp_path / "made" / "ticket.safetensors", PARAMS, MASKS, {"note": "level 7"})
    alone: dict = {"__builtins__": __builtins__}
    exec(inspect.getsource(inspect.unwrap(export.load)), alone)
    for load in (alone["load"], export.load):
        params, found, metadata = load(path)
        assert metadata["note"] == "level 7"
        assert set(params) == set(found) == set(masks.flatten(PARAMS))
        want = masks.flatten(masks.apply(PARAMS, MASKS))
        for name, leaf in masks.flatten(MASKS).items():
            np.testing.assert_array_equal(found[name], leaf)
            np.testing.assert_array_equal(params[name], np.asarray(want[name], params[name].dtype))
    tree = export.unflatten(params)
    assert jax.tree.structure(tree) == jax.tree.structure(PARAMS)
    assert list(tmp_path.rglob("*.partial")) == []


def test_a_mask_costs_one_bit_a_weight_and_pruned_weights_nothing(tmp_path):
    path = export.save(tmp_path / "t.safetensors", PARAMS, MASKS)
    tensors = safetensors_numpy.load_file(path)
    kept = int(MASKS["dense0"]["kernel"].sum())
    assert tensors["dense0/kernel"].shape == (kept,)
    assert tensors["dense0/kernel.mask"].nbytes == -(-37 * 11 // 8)
    np.testing.assert_array_equal(tensors["dense0/bias"], PARAMS["dense0"]["bias"])
    assert "dense0/bias.mask" not in tensors


def test_wrong_files_and_masks_are_refused(tmp_path):
    path = export.save(tmp_path / "t.safetensors", PARAMS, MASKS)
    whole = path.read_bytes()
    for data, message in [(whole[:-5], "cut off"), (whole[:20], "cut off"), (b"", "cut off")]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            export.load(path)
    safetensors_numpy.save_file({"a": np.zeros(2)}, path)
    with pytest.raises(ValueError, match="format None"):
        export.load(path)
    with pytest.raises(ValueError, match="no mask for parameter half/kernel"):
        export.save(path, PARAMS, {name: tree for name, tree in MASKS.items() if name != "half"})
    with pytest.raises(ValueError, match="may not end in .mask"):
        export.save(path, {"a.mask": jnp.zeros(2)}, {"a.mask": jnp.ones(2, bool)})


@pytest.mark.parametrize("dtype", [name for name in export.DTYPES if name not in ("float64", "int64", "uint64")])
def test_every_dtype_comes_back(tmp_path, dtype):
    values = jnp.array([[1, 0, 1], [1, 1, 0]]).astype(dtype)
    mask = jnp.array([[True, True, False], [True, False, True]])
    params, found, _ = export.load(export.save(tmp_path / "t.safetensors", {"a": values}, {"a": mask}))
    want = np.asarray(masks.apply({"a": values}, {"a": mask})["a"].astype(jnp.float32))
    assert str(params["a"].dtype) == ("float32" if dtype == "bfloat16" else dtype)
    np.testing.assert_array_equal(params["a"].astype(np.float32), want)
    np.testing.assert_array_equal(found["a"], mask)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int4", "complex64"])
def test_what_numpy_cannot_read_is_refused_when_it_is_saved(tmp_path, dtype):
    with pytest.raises(ValueError, match=f"a has dtype {dtype}; tickets hold float64"):
        export.save(tmp_path / "t.safetensors", {"a": jnp.ones(3).astype(dtype)}, {"a": jnp.ones(3, bool)})


def test_paths_that_collide_are_refused(tmp_path):
    twice = {"a/b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}
    with pytest.raises(ValueError, match="two leaves have the path a/b"):
        export.save(tmp_path / "t.safetensors", twice, masks.ones(twice))
    for flat in ({"a": np.zeros(1), "a/b": np.zeros(1)}, {"a/b": np.zeros(1), "a": np.zeros(1)}):
        with pytest.raises(ValueError, match="a leaf and a folder"):
            export.unflatten(flat)
