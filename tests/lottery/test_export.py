"""Tickets on disk, read by a function that knows nothing of the package, and by safetensors itself."""

import inspect
import itertools
import json
import re

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
    for data, message in [
        (whole[:-5], "cut off"),
        (whole[:20], "cut off"),
        (b"", "cut off"),
        (whole + b"0", "SHA-256"),
    ]:
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


def test_scalars_and_empty_leaves_come_back_in_their_shapes(tmp_path):
    params = {"scalar": jnp.float32(2), "empty": jnp.zeros((0, 3)), "pruned": jnp.ones((2, 2))}
    mask = jax.tree.map(lambda p: jnp.full(p.shape, p.shape != (2, 2)), params)
    found, masks_found, _ = export.load(export.save(tmp_path / "t.safetensors", params, mask))
    for name, leaf in params.items():
        assert found[name].shape == masks_found[name].shape == leaf.shape
    assert found["scalar"] == 2 and not found["pruned"].any()


def test_paths_that_collide_are_refused(tmp_path):
    twice = {"a/b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}
    with pytest.raises(ValueError, match="two leaves have the path a/b"):
        export.save(tmp_path / "t.safetensors", twice, masks.ones(twice))
    for flat in ({"a": np.zeros(1), "a/b": np.zeros(1)}, {"a/b": np.zeros(1), "a": np.zeros(1)}):
        with pytest.raises(ValueError, match="a leaf and a folder"):
            export.unflatten(flat)


def small(tmp_path):
    params = {"a": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "b": jnp.arange(3)}
    return export.save(tmp_path / "t.safetensors", params, {"a": params["a"] > 2, "b": jnp.ones(3, bool)})


@pytest.mark.parametrize("bits", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_seen(tmp_path, bits):
    """One of every byte, in turn another, and among the slow tests all."""
    path = small(tmp_path)
    whole = path.read_bytes()
    for byte, bit in itertools.product(range(len(whole)), range(bits)):
        damaged = bytearray(whole)
        damaged[byte] ^= 1 << (3 * byte + bit) % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            export.load(path)


def first_format(header):
    """A file as it was before there were checksums, of any header."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


A = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
MASK = {"dtype": "U8", "shape": [1], "data_offsets": [4, 5]}
META = {"format": "tessera-ticket-1", "shapes": '{"a": [2, 2]}'}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": A, "a.mask": MASK}, "has not as many values"),
        (
            {"a": A, "a.mask": MASK, "__metadata__": META | {"shapes": '{"a": [1000000, 1000000]}'}},
            "1000000000000 bits",
        ),
        ({"a": A | {"shape": [10**12]}}, "damaged: a is not"),
        ({"a": A | {"data_offsets": [-8, -4]}}, "shape or offsets of a"),
        ({"a": A | {"data_offsets": [0, 400]}}, "a is cut off"),
        ({"a": A | {"data_offsets": [4]}}, "shape or offsets of a"),
        ({"a": A | {"dtype": "F8"}}, "header that `save` does not write"),
        ({"a": A}, "a.mask does not hold 4 bits"),
        ({"a": A | {"shape": [0, 10**30], "data_offsets": [0, 0]}}, "shape or offsets of a"),
        ({"a": 3}, "header that `save` does not write"),
        ({"a": A, "__metadata__": META | {"shapes": "[]"}}, "lists of sizes"),
        ({"a": A, "__metadata__": 3}, "no JSON object"),
        ([], "no JSON object"),
    ],
)
def test_damaged_headers_without_a_checksum_are_named(tmp_path, header, message):
    path = tmp_path / "t.safetensors"
    path.write_bytes(first_format({"__metadata__": META} | header if isinstance(header, dict) else header))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{re.escape(message)}"):
        export.load(path)


def test_a_file_of_the_first_format_is_read(tmp_path):
    path = tmp_path / "t.safetensors"
    header = {
        "__metadata__": META,
        "a": A | {"shape": [2], "data_offsets": [0, 8]},
        "a.mask": MASK | {"data_offsets": [8, 9]},
    }
    data = first_format(header)[:-16] + np.array([1.5, -2], "<f4").tobytes() + bytes([0b01010000])
    path.write_bytes(data)
    params, found, _ = export.load(path)
    assert params["a"].tolist() == [[0, 1.5], [0, -2]]
    assert found["a"].tolist() == [[False, True], [False, True]]
