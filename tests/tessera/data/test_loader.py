"""The order of examples: complete, reproducible, resumable, and the same on any number of processes."""

import json
import pickle
from itertools import islice

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.data.images import Images
from tessera.data.loader import held_out_batches, image_batches, token_batches
from tessera.infra.config import check_seed

TOKENS = (np.arange(1003) % 256).astype(np.uint16)  # 100 windows of 10, and a tail of 2
PICTURES = Images(np.random.default_rng(0).random((37, 4, 4, 1), np.float32), np.arange(37, dtype=np.int32) % 10)


def make(kind, **kwargs):
    kwargs = {"batch_size": 8, "seed": 0, **kwargs}
    return token_batches(TOKENS, length=10, **kwargs) if kind == "tokens" else image_batches(PICTURES, **kwargs)


def ids(iterator, count=None):
    return np.array([batch["ids"] for batch in islice(iterator, count)])


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


kinds = pytest.mark.parametrize("kind", ["tokens", "images"])


# token_batches and image_batches


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_windows_hold_the_tokens_their_ids_say(dtype):
    tokens = TOKENS.astype(dtype)
    for batch in islice(token_batches(tokens, batch_size=8, length=10, seed=3), 30):
        assert batch["tokens"].dtype == np.int32 and batch["tokens"].shape == (8, 11)
        assert batch["ids"].dtype == np.int64 and batch["ids"].shape == (8,)
        for row, i in zip(batch["tokens"], batch["ids"], strict=True):
            np.testing.assert_array_equal(row, tokens[10 * i : 10 * i + 11])


@pytest.mark.parametrize("size, windows", [(11, 1), (20, 1), (21, 2), (1003, 100)])
def test_every_token_but_the_first_is_a_target_once(size, windows):
    batches = token_batches(TOKENS[:size], batch_size=1, length=10, seed=0, repeat=False, shuffle=False)
    targets = np.concatenate([batch["tokens"][0, 1:] for batch in batches])
    np.testing.assert_array_equal(targets, TOKENS[1 : 10 * windows + 1])


def test_images_are_those_their_ids_say():
    for batch in islice(make("images"), 10):
        assert batch["images"].dtype == np.float32 and batch["labels"].dtype == np.int32
        np.testing.assert_array_equal(batch["images"], PICTURES.images[batch["ids"]])
        np.testing.assert_array_equal(batch["labels"], PICTURES.labels[batch["ids"]])


@kinds
def test_every_epoch_holds_every_example_once_in_a_new_order(kind):
    size = {"tokens": 100, "images": 37}[kind]
    stream = ids(make(kind, batch_size=1), 3 * size).ravel().reshape(3, size)
    assert all(sorted(epoch) == list(range(size)) for epoch in stream.tolist())
    assert len({tuple(epoch) for epoch in stream.tolist()}) == 3


def test_neighbouring_seeds_share_no_epoch():
    epochs = [tuple(ids(make("tokens", batch_size=100, seed=seed), 3)[e]) for seed in range(3) for e in range(3)]
    assert len(set(epochs)) == 9


@kinds
def test_batches_straddle_epochs_or_stop_at_the_last_full_one(kind):
    size = {"tokens": 100, "images": 37}[kind]
    endless = ids(make(kind, batch_size=30), 10).ravel()
    assert sorted(endless[:size]) == list(range(size))
    once = ids(make(kind, batch_size=30, repeat=False))
    np.testing.assert_array_equal(once.ravel(), endless[: size // 30 * 30])
    np.testing.assert_array_equal(
        ids(make(kind, batch_size=30, repeat=False, shuffle=False)).ravel(), np.arange(size // 30 * 30)
    )


@kinds
@pytest.mark.parametrize("taken", [0, 1, 11, 13])
def test_state_resumes_in_a_fresh_iterator(kind, taken):
    original = make(kind)
    list(islice(original, taken))
    state = original.get_state()
    expected = list(islice(original, 12))
    for copy in (json.loads(json.dumps(state)), pickle.loads(pickle.dumps(state))):
        fresh = make(kind)
        fresh.set_state(copy)
        for a, b in zip(expected, islice(fresh, 12), strict=True):
            assert_same(a, b)
    assert isinstance(original, grain.DatasetIterator)


@kinds
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("repeat", [True, False])
def test_shares_of_processes_make_up_the_batch_of_one(kind, processes, repeat):
    whole = list(islice(make(kind, repeat=repeat), 15))
    shares = [
        list(islice(make(kind, repeat=repeat, process_index=p, process_count=processes), 15)) for p in range(processes)
    ]
    assert {len(share) for share in shares} == {len(whole)}
    for step, batch in enumerate(whole):
        for name, rows in batch.items():
            interleaved = np.stack([share[step][name] for share in shares], 1).reshape(rows.shape)
            np.testing.assert_array_equal(interleaved, rows)


def test_uneven_epochs_end_at_the_same_step_everywhere():
    """10 windows for 3 processes: one has 4 rows, the others 3, yet all of them must stop together."""
    lengths = [
        len(
            ids(
                token_batches(
                    TOKENS[:101], batch_size=3, length=10, seed=0, repeat=False, process_index=p, process_count=3
                )
            )
        )
        for p in range(3)
    ]
    assert lengths == [3, 3, 3]


def test_order_does_not_depend_on_the_tokens():
    a = ids(token_batches(TOKENS, batch_size=4, length=10, seed=5), 5)
    np.testing.assert_array_equal(a, ids(token_batches(TOKENS[::-1].copy(), batch_size=4, length=10, seed=5), 5))


@kinds
@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"seed": -1}, "seed=-1: a seed is a whole number in 0"),
        ({"process_index": 2, "process_count": 2}, r"process_index=2 must lie in \[0, process_count=2\)"),
        ({"process_index": -1}, "process_index=-1 must lie"),
        ({"process_count": 3}, "batch_size=8 does not divide by process_count=3"),
        ({"batch_size": 101, "repeat": False}, "examples do not fill one batch of 101, and repeat=False"),
    ],
)
def test_errors(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **wrong)


@pytest.mark.parametrize("size, length, message", [(10, 10, "10 tokens do not fill one window"), (10, 0, "length=0")])
def test_token_errors(size, length, message):
    with pytest.raises(ValueError, match=message):
        token_batches(TOKENS[:size], batch_size=1, length=length, seed=0)


@given(st.integers(8, 40), st.integers(1, 8), st.integers(1, 8), st.sampled_from([1, 2]))
def test_held_out_batches_weigh_every_window_once(windows, batch, limit, processes):
    """The partial batch too: a mean over windows is the weighted mean of the batches' means."""
    batch, length = batch * processes, 3
    if windows < batch:
        return
    tokens = np.random.default_rng(windows).integers(0, 256, windows * length + 2)
    shares = [
        list(
            held_out_batches(
                tokens, batch_size=batch, length=length, limit=limit, process_index=i, process_count=processes
            )
        )
        for i in range(processes)
    ]
    values = tokens[: windows * length].reshape(windows, length)[: limit * batch].sum(1)
    total = sum(weight * np.mean(part["tokens"][:, :length].sum(1)) for share in shares for part, weight in share)
    weights = sum(weight for share in shares for _, weight in share)
    np.testing.assert_allclose(total / weights, values.mean(), rtol=1e-12)
    assert {len(part["ids"]) for share in shares for part, _ in share} == {batch // processes}


@kinds
def test_a_position_in_other_batches_is_refused(kind):
    state = json.loads(json.dumps(make(kind).get_state()))
    for other in (make(kind, seed=1), make(kind, shuffle=False)):
        with pytest.raises(ValueError, match="the position of an iterator over .*8.* is none in one over"):
            other.set_state(state)
    del state["order"]  # of an earlier version
    make(kind).set_state(state)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**40, 10**30, 1.0, True])
def test_a_seed_that_a_generator_would_change_is_refused(seed):
    with pytest.raises(ValueError, match=r"seed=.*: a seed is a whole number in 0\.\.4294967295"):
        check_seed("seed", seed)


def test_another_batch_size_goes_on_in_the_same_order():
    original = make("tokens", batch_size=8)
    order = ids(make("tokens", batch_size=8), 40).ravel()
    list(islice(original, 6))
    state = json.loads(json.dumps(original.get_state()))
    for batch_size, processes in ((16, 1), (4, 2), (3, 1), (12, 3)):
        shares = [
            make("tokens", batch_size=batch_size, process_index=p, process_count=processes) for p in range(processes)
        ]
        for share in shares:
            share.set_state(state)
        rows = np.stack([ids(share, 10) for share in shares], -1).reshape(-1)
        np.testing.assert_array_equal(rows, order[48 : 48 + 10 * batch_size])
    with pytest.raises(ValueError, match="48 examples were read in batches of 8: no whole number of batches of 7"):
        make("tokens", batch_size=7).set_state(state)


PARTS = ((np.arange(401, dtype=np.uint16), 3.0), (np.arange(1000, 1101, dtype=np.uint16), 1.0))  # 40 and 10 windows


def mixed(**kwargs):
    return token_batches(PARTS[0][0], length=10, parts=PARTS, **{"batch_size": 8, "seed": 0} | kwargs)


def test_sources_have_their_shares_and_every_window_once_a_pass():
    batches = list(islice(mixed(), 60))
    rows, tokens = (np.concatenate([batch[name] for batch in batches]) for name in ("ids", "tokens"))
    for row, window in zip(rows, tokens, strict=True):
        stream, i = (PARTS[0][0], row) if row < 40 else (PARTS[1][0], row - 40)
        np.testing.assert_array_equal(window, stream[10 * i : 10 * i + 11])
    assert abs((rows < 40).mean() - 0.75) < 1 / 480 + 1e-9
    for mine, size in ((rows[rows < 40], 40), (rows[rows >= 40] - 40, 10)):
        passes = mine[: len(mine) // size * size].reshape(-1, size)
        assert len(passes) > 5 and all(sorted(one) == list(range(size)) for one in passes.tolist())


def test_mixed_sources_resume_on_other_processes():
    order = ids(mixed(), 20).reshape(-1)
    first = mixed(process_index=1, process_count=2)
    list(islice(first, 5))
    state = json.loads(json.dumps(first.get_state()))
    shares = [mixed(process_index=p, process_count=4) for p in range(4)]
    for share in shares:
        share.set_state(state)
    np.testing.assert_array_equal(np.stack([ids(share, 15) for share in shares], -1).reshape(-1), order[40:])
    for other in (mixed(seed=1), token_batches(TOKENS[:501], length=10, batch_size=8, seed=0)):
        with pytest.raises(ValueError, match="is none in one over"):
            other.set_state(state)
    with pytest.raises(ValueError, match="sources with weights are shuffled and repeated"):
        mixed(shuffle=False)
