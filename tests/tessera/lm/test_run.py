"""A training run's parts: settings and texts that cannot work are refused before anything is trained."""

import io
import random

import jax
import numpy as np
import pytest
from rich.console import Console

from configs import lm
from sharding.mesh import make_mesh
from sharding.plan import Plan
from tessera.infra.config import ConfigError
from tessera.infra.schema import completed
from tessera.lm.run import Placement, batch_share, build_run, data_parallel, results_table
from tessera.lm.schema import SCHEMA
from tessera.models.transformer import TransformerConfig
from tessera.parallel.decoder import ShardedDecoder, batch_sharding

MODEL = TransformerConfig(vocab_size=32, layers=2, width=16, heads=8, ff=16)


def settings(tmp_path, words=600, **changes):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(random.Random(0).choices("the tile token ticket routes experts".split(), k=words)))
    config = completed(SCHEMA, lm.get_config("tiny"))
    config.update({"steps": 40, "batch_size": 4, "length": 16, "data": {"name": str(path)}})
    config.model.update({"layers": 1, "width": 16, "heads": 2, "kv_heads": 1})
    config.update(changes)
    return config


def test_texts_that_are_large_enough_are_taken(tmp_path):
    run = build_run(settings(tmp_path))
    assert sum(1 for _ in run.held_out("test")) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"words": 60},
            r"(?s)the validation text has \d+ tokens; at least 65 are needed .*batch_size=4.*the test text",
        ),
        ({"data": {"validation": 0.0}}, "config.data: the validation text has 0 tokens.*config.data.validation=0.0"),
        ({"data": {"test": 0.01}}, r"the test text has 3\d tokens; .*batch_size of at most 2 or .*length of at most"),
        ({"length": 5000}, r"the train text has \d+ tokens; at least 5001 are needed"),
        ({"batch_size": 0}, "config.batch_size=0: at least 1 is needed"),
        ({"seed": -1}, "config.seed=-1: at least 0 is needed"),
        ({"eval": {"batches": 0}}, "config.eval.batches=0: at least 1 is needed"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_at_the_start(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_run(settings(tmp_path, **changes))


def test_the_sizes_that_the_message_gives_do(tmp_path):
    with pytest.raises(ConfigError) as caught:
        build_run(settings(tmp_path, words=60))
    length = min(int(part.split()[0].rstrip("\n")) for part in str(caught.value).split("config.length of at most ")[1:])
    build_run(settings(tmp_path, words=60, length=length))
    batch = min(int(part.split()[0]) for part in str(caught.value).split("config.batch_size of at most ")[1:])
    build_run(settings(tmp_path, words=60, batch_size=batch))


def test_results_table():
    stream = io.StringIO()
    Console(file=stream, width=80).print(results_table("run", {"test": {"loss": np.log(2), "accuracy": 0.5}}))
    for text in ("run", "test", "0.6931", "1.0000", "0.5000"):
        assert text in stream.getvalue()


@pytest.mark.parametrize(("batch", "devices"), [(16, 8), (12, 6), (7, 7), (1, 1), (11, 1)])
def test_as_many_devices_as_divide_the_batch(batch, devices):
    placement = data_parallel(batch)
    rows = np.arange(batch * 3, dtype=np.float32).reshape(batch, 3)
    placed = placement.place({"x": rows})["x"]
    np.testing.assert_array_equal(placed, rows)
    assert len(placed.sharding.device_set) == devices
    assert placed.addressable_shards[0].data.shape == (batch // devices, 3)
    state = jax.device_put(rows, placement.state)
    assert state.addressable_shards[0].data.shape == rows.shape


@pytest.mark.parametrize(
    "owned, shares",
    [
        ({0: {0, 1}, 1: {2, 3}}, [(0, 2), (1, 2)]),
        ({0: {0}, 1: {0}, 2: {1}, 3: {1}}, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # tensor-parallel over two processes
        ({0: {0, 1}, 1: {0, 1}}, [(0, 1), (0, 1)]),
        ({0: {0, 2}, 1: {1, 3}}, [(0, 2), (1, 2)]),
    ],
)
def test_processes_feed_the_rows_their_devices_hold(owned, shares):
    assert [batch_share(owned, process) for process in owned] == shares


def test_rows_that_processes_share_in_part_are_refused():
    with pytest.raises(ValueError, match="the same rows or none in common"):
        batch_share({0: {0, 1}, 1: {1, 2}}, 0)


@pytest.mark.parametrize("axes", ["dp=8", "tp=8", "dp=2, fsdp=2, tp=2"])
def test_one_process_feeds_the_whole_batch(axes):
    parts = ShardedDecoder(MODEL, Plan(axes))
    assert Placement(None, batch_sharding(parts, make_mesh(Plan(axes)))).share() == (0, 1)
    assert data_parallel(8).share() == (0, 1)
