"""Documents packed into rows: nothing lost, nothing twice, little padding, and the order of windows."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tessera.data.loader import held_out_batches, token_batches
from tessera.data.packing import METHODS, Documents, Packed, joined_documents
from tessera.data.text import SPLITS, ByteTokenizer, TextConfig, load_text
from tessera.infra.config import ConfigError


def made(lengths, length, method, counted=None):
    """Documents whose tokens are all different, as rows."""
    ends = np.cumsum(np.array(lengths, np.int64))
    return Packed(np.arange(ends[-1]), Documents(ends, counted), length, method)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 12))
@example([1, 1, 2], 1)
@example([40, 1, 13], 12)
def test_every_token_of_a_document_but_its_first_is_a_target_once(lengths, length):
    if max(lengths) < 2:
        with pytest.raises(ValueError, match="none has the two"):
            made(lengths, length, "best_fit")
        return
    ends = np.cumsum(lengths)
    document = np.searchsorted(ends, np.arange(ends[-1]), side="right")
    start = ends - lengths
    packed = made(lengths, length, "best_fit")
    batch = packed.rows(np.arange(len(packed)))
    inputs, labels = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    counts = batch["weights"] > 0
    # A target is the token after its input, in the same document.
    assert (labels == inputs + 1)[counts].all() and (document[labels] == document[inputs])[counts].all()
    np.testing.assert_array_equal(np.sort(labels[counts]), np.setdiff1d(np.arange(ends[-1]), start))
    # Tokens of one position after another are of one segment, and a document that fits is one segment.
    live = batch["positions"] >= 0
    later = batch["positions"] > 0
    assert (np.roll(inputs, 1, axis=1) == inputs - 1)[later].all() and not later[:, 0].any()
    fits = np.array(lengths)[document[inputs]] <= length + 1
    np.testing.assert_array_equal(batch["positions"][live & fits], (inputs - start[document[inputs]])[live & fits])
    assert packed.cut == sum(n > length + 1 for n in lengths)
    assert packed.padding == pytest.approx(1 - live.mean())
    assert (batch["tokens"][:, :-1][~live] == 0).all()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 12))
def test_concatenated_documents_are_the_windows_of_the_stream(lengths, length):
    ends = np.cumsum(lengths)
    if ends[-1] <= length:
        return
    packed, document = made(lengths, length, "concatenate"), np.searchsorted(ends, np.arange(ends[-1]), side="right")
    batch = packed.rows(np.arange(len(packed)))
    windows = np.arange(len(packed))[:, None] * length + np.arange(length + 1)
    assert len(packed) == (ends[-1] - 1) // length and packed.padding == 0
    same = document[windows[:, 1:]] == document[windows[:, :-1]]
    np.testing.assert_array_equal(batch["weights"], same)
    # The last token of a row is a label alone, and of none where a document begins there.
    np.testing.assert_array_equal(batch["tokens"][:, :-1], windows[:, :-1])
    np.testing.assert_array_equal(batch["tokens"][:, 1:][same], windows[:, 1:][same])
    begins = np.maximum((ends - lengths)[document[windows]], windows[:, :1])
    np.testing.assert_array_equal(batch["positions"], (windows - begins)[:, :-1])


@pytest.mark.parametrize("length", [256, 1024])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5])
def test_best_fit_wastes_at_most_two_percent_of_log_normal_lengths(length, sigma):
    lengths = np.random.default_rng(0).lognormal(5, sigma, 5000).astype(int) + 1
    packed = made(lengths, length, "best_fit")
    assert packed.padding <= 0.02
    # Beside the least number of rows that hold the segments.
    segments = np.concatenate([[min(length + 1, n - k) for k in range(0, n - 1, length)] for n in lengths])
    assert len(packed) <= 1.02 * np.ceil(segments.sum() / (length + 1))


def test_prompts_do_not_count():
    packed = made([4, 3, 20], 8, "best_fit", counted=np.array([2, 4, 7 + 12]))
    batch = packed.rows(np.arange(len(packed)))
    labels = batch["tokens"][:, 1:][batch["weights"] > 0]
    np.testing.assert_array_equal(np.sort(labels), [2, 3, 5, 6, *range(19, 27)])
    joint = joined_documents([Documents(np.array([3, 5])), Documents(np.array([2, 9]), np.array([1, 4]))])
    np.testing.assert_array_equal(joint.ends, [3, 5, 7, 14])
    np.testing.assert_array_equal(joint.counted, [0, 0, 6, 9])
    assert Documents(np.array([3, 5])).first(4).ends.tolist() == [3, 4]


LENGTHS = np.random.default_rng(1).integers(1, 30, 400)


def batches(**options):
    packed = made(LENGTHS, 16, "best_fit")
    return token_batches(packed, **{"batch_size": 12, "length": 16, "seed": 3} | options)


def rows_of(found):
    return [{name: batch[name].copy() for name in batch} for batch in found]


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_and_resumption_give_the_rows_of_one_process(hosts):
    expected = rows_of(islice(batches(), 9))
    # Stopped after 4 batches on one host, gone on from the saved position on several.
    first = batches()
    before = rows_of(islice(first, 4))
    state = json.loads(json.dumps(first.get_state()))
    shares = [batches(process_index=i, process_count=hosts) for i in range(hosts)]
    for share in shares:
        share.set_state(state)
    after = [rows_of(islice(share, 5)) for share in shares]
    for found, want in zip(before, expected, strict=False):
        assert all((found[name] == want[name]).all() for name in want)
    for step in range(5):
        for i in range(hosts):
            for name, value in expected[4 + step].items():
                np.testing.assert_array_equal(after[i][step][name], value[i::hosts])


def test_other_rows_or_a_batch_that_does_not_go_on_are_refused():
    state = batches().get_state() | {"next_index": 5}
    with pytest.raises(ValueError, match="60 examples were read in batches of 12"):
        batches(batch_size=8).set_state(state)
    other = batches(batch_size=6)
    other.set_state(state)
    assert other.get_state()["next_index"] == 10


@pytest.mark.parametrize("processes", [1, 2])
def test_held_out_rows_count_once(processes):
    packed = made(LENGTHS, 16, "best_fit")
    assert len(packed) % 12
    found = [
        list(held_out_batches(packed, batch_size=12, length=16, limit=99, process_index=i, process_count=processes))
        for i in range(processes)
    ]
    labels = [batch["tokens"][:, 1:][batch["weights"] > 0] for one in found for batch, weight in one if weight == 1]
    starts = np.cumsum(LENGTHS) - LENGTHS
    np.testing.assert_array_equal(np.sort(np.concatenate(labels)), np.setdiff1d(np.arange(LENGTHS.sum()), starts))
    assert {len(batch["tokens"]) for one in found for batch, _ in one} == {12 // processes}


# Texts.


def chat(path, rows=60):
    path.write_text("".join(json.dumps({"ask": f"q{i}: ", "answer": f"a{i}"}) + "\n" for i in range(rows)))
    return TextConfig(name=str(path), column="answer", prompt="ask", packing="best_fit", validation=0.2, test=0.2)


def test_rows_of_text_are_documents_and_only_answers_count(tmp_path):
    splits = load_text(chat(tmp_path / "chat.jsonl"))
    packed, tokenizer = splits.packed(32, "best_fit"), ByteTokenizer()
    assert splits.bytes_per_token == {}  # the loss is of answers, the bytes of all
    seen = set()
    for split in SPLITS:
        rows = getattr(packed, split)
        for i in range(len(rows)):
            batch = rows.rows([i])
            targets = tokenizer.decode(batch["tokens"][0, 1:][batch["weights"][0] > 0])
            texts = tokenizer.decode(batch["tokens"][0][: (batch["positions"][0] >= 0).sum() + 1]).rstrip("\0")
            assert [text.split(": ")[1] for text in texts.split("\0")] == targets.rstrip("\0").split("\0")
            seen |= set(targets.rstrip("\0").split("\0"))
    assert seen == {f"a{i}" for i in range(60)}


def test_token_files_and_sources_pack_the_same_documents(tmp_path):
    from tessera.data.corpus import TokenizeConfig, tokenize_corpus

    for name, rows in (("a", range(80)), ("b", range(80, 140))):
        text = "".join(json.dumps({"text": f"{i} " * (i % 7 + 1)}) + "\n" for i in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    text = TextConfig(name=str(tmp_path / "a.jsonl"), packing="best_fit", validation=0.2, test=0.2)
    tokenize_corpus(text, TokenizeConfig(), tmp_path / "tokens")
    read = load_text(text).packed(20, "best_fit")
    mapped = load_text(replace(text, name=str(tmp_path / "tokens"))).packed(20, "best_fit")
    for split in SPLITS:
        ours, theirs = (getattr(one, split) for one in (mapped, read))
        every = np.arange(len(theirs))
        assert len(ours) == len(theirs)
        np.testing.assert_equal(ours.rows(every), theirs.rows(every))
    both = replace(text, sources=((str(tmp_path / "tokens"), 3.0), (str(tmp_path / "b.jsonl"), 1.0)))
    mixed = load_text(replace(both, max_tokens=600)).packed(20, "best_fit")
    found = next(token_batches(mixed.train, batch_size=400, length=20, seed=0, parts=mixed.parts))
    first = len(mixed.parts[0][0])
    assert (found["ids"] < first).mean() == pytest.approx(0.75, abs=0.01)
    one = np.flatnonzero(found["ids"] == first)[0]  # the first row of the second source
    np.testing.assert_array_equal(found["positions"][one], mixed.parts[1][0].rows([0])["positions"][0])
    assert load_text(replace(both, max_tokens=600)).train[:].size <= 600


def test_what_cannot_be_packed_is_refused(tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(500) % 50)
    tokens = TextConfig(name=str(tmp_path / "tokens.npy"), tokenizer="ids", vocab_size=50, packing="concatenate")
    with pytest.raises(ConfigError, match="documents of .*tokens.npy are not known"):
        load_text(tokens)
    with pytest.raises(ValueError, match="packing='best': choose one of concatenate, best_fit"):
        TextConfig(packing="best")
    with pytest.raises(ValueError, match="prompt='ask' needs documents with ends"):
        TextConfig(prompt="ask")
    with pytest.raises(ConfigError, match=r"no column 'asked'; there are 'ask', 'answer' \(config.data.prompt\)"):
        load_text(replace(chat(tmp_path / "chat.jsonl"), prompt="asked"))
    assert METHODS == ("concatenate", "best_fit")
