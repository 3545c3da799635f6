"""Token files: each format by its published layout, equal to the tokens of the text, and damage named."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.data.text import TextConfig, load_text
from tessera.data.token_files import TokenStream, joined, open_tokens
from tessera.infra.errors import ConfigError

RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(0, 300, n) for n in RNG.integers(1, 40, 50)]
TOKENS = np.concatenate(DOCUMENTS)
SHARES = {"validation": 0.2, "test": 0.2}


def raw(path, tokens=TOKENS, dtype="uint16", **said):
    path.write_bytes(tokens.astype(dtype).tobytes())
    path.with_suffix(".json").write_text(json.dumps({"dtype": dtype, "vocab_size": 300} | said))
    return path


def megatron(path, code=8, dtype="uint16", documents=DOCUMENTS):
    """As megatron/core/datasets/indexed_dataset.py writes it, every document two sequences where it can be."""
    sequences = [part for one in documents for part in ((one[:1], one[1:]) if len(one) > 1 else (one,))]
    first = np.cumsum([0] + [2 if len(one) > 1 else 1 for one in documents])
    lengths = np.array([len(one) for one in sequences])
    places = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    path.write_bytes(np.concatenate(sequences).astype(dtype).tobytes())
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(first))
    body = lengths.astype("<i4").tobytes() + places.astype("<i8").tobytes() + first.astype("<i8").tobytes()
    path.with_suffix(".idx").write_bytes(header + body)
    return path


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
def test_npy_and_raw_are_cut_into_three(dtype, tmp_path):
    np.save(tmp_path / "a.npy", TOKENS.astype(dtype))
    by_npy = load_text(TextConfig(name=str(tmp_path / "a.npy"), tokenizer="ids", vocab_size=300, **SHARES))
    by_raw = load_text(TextConfig(name=str(raw(tmp_path / "b.bin", dtype=dtype)), **SHARES))
    cuts = np.round(len(TOKENS) * np.array([0, 0.6, 0.8, 1])).astype(int)
    for found in (by_npy, by_raw):
        assert found.vocab_size == 300 and found.tokenizer is None
        for i, split in enumerate(found[:3]):
            np.testing.assert_array_equal(split[:], TOKENS[cuts[i] : cuts[i + 1]])
    raw(tmp_path / "b.bin", TOKENS[::-1], dtype=dtype)
    other = load_text(TextConfig(name=str(tmp_path / "b.bin"), **SHARES))
    assert by_npy.content_hash == by_raw.content_hash != other.content_hash


def splitmix64(i):
    """Steele et al. (2014), with Python's whole numbers: the output after i + 1 steps from state 0."""
    x = (i + 1) * 0x9E3779B97F4A7C15 % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@pytest.mark.parametrize(("code", "dtype"), [(8, "uint16"), (4, "int32"), (5, "int64")])
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_megatron_keeps_documents_whole(code, dtype, suffix, tmp_path):
    path = megatron(tmp_path / "a.bin", code, dtype)
    np.testing.assert_array_equal(open_tokens(path).ends, np.cumsum([len(one) for one in DOCUMENTS]))
    found = load_text(TextConfig(name=str(path.with_suffix(suffix)), tokenizer="ids", vocab_size=300, **SHARES))
    parts = [[], [], []]
    for i, one in enumerate(DOCUMENTS):
        place = splitmix64(i) / 2**64
        parts[1 if place < 0.2 else 2 if place < 0.4 else 0].append(one)
    for split, documents in zip(found[:3], parts, strict=True):
        np.testing.assert_array_equal(split[:], np.concatenate(documents))


def test_a_glob_of_token_files_is_one_stream(tmp_path):
    for i in range(3):
        megatron(tmp_path / f"part{i}.bin", documents=DOCUMENTS[i::3])
    found = load_text(TextConfig(name=str(tmp_path / "*"), tokenizer="ids", vocab_size=300, **SHARES))
    whole = np.sort(np.concatenate([split[:] for split in found[:3]]))
    np.testing.assert_array_equal(whole, np.sort(TOKENS))


def test_several_sources(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("abc" * 200)
    raw(tmp_path / "b.bin", TOKENS % 256, vocab_size=256)
    found = load_text(TextConfig(sources=((str(text), 3.0), (str(tmp_path / "b.bin"), 1.0)), **SHARES))
    assert [weight for _, weight in found.parts] == [3.0, 1.0]
    np.testing.assert_array_equal(found.parts[0][0], np.frombuffer(b"abc" * 120, np.uint8))
    np.testing.assert_array_equal(found.train[:], np.concatenate([found.parts[0][0], found.parts[1][0][:]]))
    raw(tmp_path / "b.bin")
    with pytest.raises(ConfigError, match="vocabularies of 256 and 300 tokens; sources and config.data.tokenizer must"):
        load_text(TextConfig(sources=((str(text), 3.0), (str(tmp_path / "b.bin"), 1.0)), **SHARES))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_stream_is_its_ranges_one_after_another(data):
    files = [np.arange(40, dtype=np.uint16), np.arange(100, 130, dtype=np.int32)]
    ranges, expected = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        which = data.draw(st.integers(0, 1))
        cuts = sorted(data.draw(st.lists(st.integers(0, len(files[which])), min_size=2, max_size=6, unique=True)))
        cuts = cuts[: len(cuts) // 2 * 2]
        ranges.append((which, np.array(cuts[::2]), np.array(cuts[1::2])))
        expected += [files[which][a:b] for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
    whole = np.concatenate(expected)
    stream = TokenStream([(one, 200, Path()) for one in files], ranges)
    stream, whole = (joined([stream, stream]), np.tile(whole, 2)) if data.draw(st.booleans()) else (stream, whole)
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    np.testing.assert_array_equal(stream[a:b], whole[a:b])
    index = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1)))
    np.testing.assert_array_equal(stream[index[:, None]], whole[index[:, None]])
    assert len(stream) == len(whole) and len(stream.first(a)) == a


def described(path, **said):
    path.with_suffix(".json").write_text(json.dumps(said))
    return path


def npy(path, array):
    np.save(path, array)
    return path


def truncated(path, size):
    path.write_bytes(path.read_bytes()[:-size])
    return path


def one_wrong(path, position, token):
    tokens = TOKENS.copy()
    tokens[position] = token
    return raw(path, tokens)


BAD = {
    "truncated raw": (
        lambda d: truncated(raw(d / "a.bin"), 1),
        "bytes are no whole number of uint16; the file is trun",
    ),
    "fewer than said": (
        lambda d: (
            truncated(raw(d / "a.bin", tokens=TOKENS, **{}), 2)
            and described(d / "a.bin", dtype="uint16", tokens=len(TOKENS))
        ),
        rf"{len(TOKENS) - 1} tokens, and a.json says {len(TOKENS)}; the file is truncated",
    ),
    "empty": (lambda d: raw(d / "a.bin", TOKENS[:0]), "a.bin: empty; at least one token"),
    "undescribed": (lambda d: raw(d / "a.bin").with_suffix(".json").unlink() or d / "a.bin", "neither a.json nor Mega"),
    "float": (lambda d: npy(d / "a.npy", np.ones(9)), r"float64 of shape \(9,\); tokens are integers \[N\]"),
    "matrix": (lambda d: npy(d / "a.npy", np.ones((3, 3), int)), r"int64 of shape \(3, 3\); tokens"),
    "cut .npy": (lambda d: truncated(npy(d / "a.npy", TOKENS), 9), "a.npy: no .npy file, or a truncated one"),
    "dtype": (lambda d: described(raw(d / "a.bin"), dtype="float32"), "dtype='float32': choose one of uint8, uint16"),
    "vocab_size": (
        lambda d: described(raw(d / "a.bin"), dtype="uint16", vocab_size="x"),
        "vocab_size='x': a whole num",
    ),
    "id": (
        lambda d: one_wrong(d / "a.bin", 7, 300),
        "a.bin: token 300 at position 7; the vocabulary has 300, so 0 to 299",
    ),
    "last id": (lambda d: one_wrong(d / "a.bin", -1, 999), f"token 999 at position {len(TOKENS) - 1}; the vocab"),
    "bytes": (lambda d: npy(d / "a.npy", TOKENS), "the vocabulary has 256, so 0 to 255 are valid"),
    "negative": (lambda d: npy(d / "a.npy", -TOKENS), "token -[0-9]+ at position"),
    "cut .idx": (
        lambda d: truncated(megatron(d / "a.bin").with_suffix(".idx"), 9),
        "a.idx: no Megatron index, or a truncated one",
    ),
    "cut Megatron": (
        lambda d: truncated(megatron(d / "a.bin"), 2),
        "a.bin: .* bytes, and its index says .*; it is trun",
    ),
    "Megatron of floats": (
        lambda d: megatron(d / "a.bin", 7),
        "a.idx: tokens of type code 7; uint8, int32, int64, uint16",
    ),
    "no Megatron": (
        lambda d: (
            raw(d / "a.idx") and npy(d / "b.npy", TOKENS).rename(d / "a.bin") and (d / "a.json").unlink() or d / "a.bin"
        ),
        "a.idx: no Megatron index",
    ),
    "documents": (
        lambda d: (d / "a.documents.bin").write_bytes(bytes(48)) and raw(d / "a.bin"),
        "a.documents.bin: no ends of the documents",
    ),
    "max_bytes": (lambda d: raw(d / "a.bin"), "max_bytes=5: token files .* are capped by max_tokens"),
    "unfinished": (
        lambda d: (d / "progress.json").write_text("{}") and (d / "tokens.bin").write_bytes(b"12") and d,
        "tokenizing was not finished; run the same `tessera tokenize` again",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, tmp_path):
    make, message = BAD[case]
    with pytest.raises(ConfigError, match=message) as error:
        load_text(TextConfig(name=str(make(tmp_path)), max_bytes=5 * (case == "max_bytes")))
    assert "\n" not in str(error.value)


def test_a_token_inside_is_found_where_it_is_read():
    stream = TokenStream([(np.array([1, 2, 9, 3]), 5, Path("a.bin"))], [(0, np.array([0]), np.array([4]))])
    assert stream[np.array([0, 3])].tolist() == [1, 3]
    with pytest.raises(ConfigError, match="a.bin: token 9 at position 2; the vocabulary has 5"):
        stream[np.array([[0], [2]])]
    with pytest.raises(IndexError, match="position 4 of 4 tokens"):
        stream[np.array([4])]


def test_pages_are_let_go_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr("tessera.data.token_files.RELEASE", 1 << 17)
    tokens = RNG.integers(0, 300, 200_000)
    found = load_text(TextConfig(name=str(raw(tmp_path / "a.bin", tokens)), **SHARES)).train
    for _ in range(20):
        index = RNG.integers(0, len(found), (7, 3))
        np.testing.assert_array_equal(found[index], tokens[index])
        np.testing.assert_array_equal(found[5:90_000], tokens[5:90_000])
