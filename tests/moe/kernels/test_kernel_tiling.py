import dataclasses
import json
import warnings

import pytest

from moe.kernels import implementations, tiling
from moe.kernels.tiling import Tiling, lookup
from moe.kernels.tpu.tiles import even


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.setattr(tiling, "TABLES", tmp_path)
    tiling.read_table.cache_clear()
    yield tmp_path
    tiling.read_table.cache_clear()


SHAPE = {"rows_per_group": 128, "k": 256, "n": 512, "dtype": "float32"}
ROWS = [
    SHAPE | {"kernel": "grouped", "tiling": {"rows": 32}, "seconds": 1.0},
    SHAPE | {"kernel": "grouped", "rows_per_group": 4096, "tiling": {"rows": 256, "cols": 64}, "seconds": 1.0},
    SHAPE | {"kernel": "contraction", "tiling": {"rows": 8}, "seconds": 1.0},
]


@pytest.mark.parametrize(
    ("kernel", "changes", "expected"),
    [
        ("grouped", {}, Tiling(rows=32)),
        ("grouped", {"rows_per_group": 700}, Tiling(rows=32)),
        ("grouped", {"rows_per_group": 800}, Tiling(rows=256, cols=64)),
        ("grouped", {"rows_per_group": 0, "k": 1}, Tiling(rows=32)),
        ("contraction", {"n": 9}, Tiling(rows=8)),
        ("grouped", {"dtype": "bfloat16"}, Tiling()),
        ("block", {}, Tiling()),
    ],
)
def test_the_nearest_measured_shape_decides(tables, kernel, changes, expected):
    (tables / "nvidia-h200.json").write_text(json.dumps(ROWS))
    assert lookup("NVIDIA H200", kernel, default=Tiling(), **(SHAPE | changes)) == expected


def test_an_unknown_device_gets_the_default_and_says_so_once(tables):
    (tables / "cpu.json").write_text("[]")
    with pytest.warns(UserWarning, match=r"'TPU v9'.*tables: cpu.*tune_kernels"):
        assert lookup("TPU v9", "grouped", default=Tiling(rows=7), **SHAPE) == Tiling(rows=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lookup("TPU v9", "grouped", default=Tiling(), **SHAPE)


@pytest.mark.parametrize(
    ("rows_per_group", "transpose", "rows"),
    [(8, False, 256), (2047, False, 256), (2048, False, 512), (4096, False, 1024), (1e6, True, 1024), (8, True, 512)],
)
def test_tpus_take_taller_tiles_for_larger_groups(rows_per_group, transpose, rows):
    shape = {"rows_per_group": rows_per_group, "k": 4096, "n": 14336, "dtype": "bfloat16", "transpose": transpose}
    assert implementations.tiling("grouped", "tpu_interpret", **shape) == Tiling(rows, 1024, 1024)


def test_a_table_that_was_not_measured_says_so(tables):
    (tables / "nvidia-h200.json").write_text(json.dumps([ROWS[0] | {"seconds": "not tuned"}]))
    with pytest.warns(UserWarning, match="'NVIDIA H200' are not tuned.*tune_kernels"):
        assert lookup("NVIDIA H200", "grouped", default=Tiling(), **SHAPE) == Tiling(rows=32)


def test_the_tables_that_ship_can_be_read():
    paths = sorted(tiling.TABLES.glob("*.json"))
    assert "cpu" in [path.stem for path in paths]
    for path in paths:
        for row in json.loads(path.read_text()):
            assert {"kernel", "rows_per_group", "k", "n", "dtype", "tiling", "seconds"} <= row.keys()
            assert row["kernel"] in ("grouped", "contraction", "block", "block_contraction")
            assert row["seconds"] == "not tuned" or row["seconds"] > 0
            assert all(value >= 1 for value in row["tiling"].values())


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Tiling)])
def test_a_tile_of_nothing_is_refused(field):
    with pytest.raises(ValueError, match=field):
        Tiling(**{field: 0})


@pytest.mark.parametrize("multiple", [8, 32])
def test_even_tiles_are_as_few_as_can_be_and_cover_their_axis(multiple):
    for size in range(1, 300):
        for most in (32, 64, 96, 256):
            tile, count = even(size, most, multiple), -(-size // most)
            assert tile % multiple == 0 and count * tile >= size
            # One more tile would do with less, and one unit less would not cover the axis.
            assert (tile - multiple) * count < size
