"""Documents of every format give the same tokens, tokenizers those of transformers, and bad input one clear line."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from tessera.data import text as text_lib
from tessera.data.text import TextConfig, load_text, load_tokenizer, separator_of
from tessera.infra.errors import ConfigError

GOLDEN = Path(__file__).parents[2] / "golden"
TEXTS = [f"document {i}: " + "naïve café — 東京 🙂 " * (i % 7 + 1) for i in range(60)]
SHARES = {"validation": 0.2, "test": 0.2}


def write(path, texts, column="text"):
    """A file of rows in the format that its name says."""
    rows = [{"id": i, column: text} for i, text in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines[:700]) + gzip.compress(lines[700:]))
    elif path.name.endswith(".zst"):
        import zstandard

        frames = [zstandard.ZstdCompressor().compress(part) for part in (lines[:700], lines[700:])]
        path.write_bytes(b"".join(frames))  # as `zstd` and others append
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    elif path.suffix == ".jsonl":
        path.write_bytes(lines + b"\n")
    else:
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def expected(tokenizer=None, end=0):
    """Splits by the hash of each text (RFC 7693's BLAKE2b, 8 bytes), joined by the separator."""
    import hashlib

    splits = {"train": [], "validation": [], "test": []}
    for text in TEXTS:
        place = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64
        name = "validation" if place < 0.2 else "test" if place < 0.4 else "train"
        tokens = list(text.encode()) if tokenizer is None else tokenizer.encode(text, add_special_tokens=False).ids
        splits[name] += [*tokens, end]
    return {name: tokens[:-1] for name, tokens in splits.items()}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "saved"])
def test_every_format_gives_the_same_tokens(name, tmp_path):
    found = load_text(TextConfig(name=str(write(tmp_path / name, TEXTS, "body")), column="body", **SHARES))
    for split, tokens in expected().items():
        np.testing.assert_array_equal(getattr(found, split), tokens)
        size = sum(len(text.encode()) for text in bytes(tokens).decode().split("\0"))
        assert found.bytes_per_token[split] == pytest.approx(size / len(tokens))


def test_a_local_builder_of_datasets(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", TEXTS)
    found = load_text(TextConfig(name=f"datasets:{tmp_path}/folder", **SHARES))
    np.testing.assert_array_equal(found.train, expected()["train"])
    with pytest.raises(ConfigError, match="datasets:nobody/nothing: datasets cannot open it: "):
        load_text(TextConfig(name="datasets:nobody/nothing"))


def test_a_data_set_of_several_splits_asks_which(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    datasets.DatasetDict({"train": one, "other": one}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ConfigError, match=r"several splits; name one of .*saved/train, .*saved/other"):
        load_text(TextConfig(name=str(tmp_path / "saved")))
    assert len(load_text(TextConfig(name=str(tmp_path / "saved" / "other"), **SHARES)).train)


@pytest.mark.parametrize("name", ["bytelevel", "unigram", "wordpiece"])
def test_tokens_are_those_of_transformers(name):
    golden = np.load(GOLDEN / "tokenizers.npz")
    source = (GOLDEN / "make.py").read_text()
    scope = {}
    exec(source[source.index("TEXTS = (") : source.index("def make_tokenizers")], scope)
    tokenizer = load_tokenizer(GOLDEN / "tokenizers" / f"{name}.json")
    for i, tokens in enumerate(tokenizer.encode_documents(scope["TEXTS"])):
        np.testing.assert_array_equal(tokens, golden[f"{name}/{i}"])


@pytest.mark.parametrize(("name", "end"), [("bytelevel", "<|endoftext|>"), ("unigram", "</s>"), ("wordpiece", "[SEP]")])
def test_a_corpus_with_a_tokenizer_of_a_file(name, end, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    path = GOLDEN / "tokenizers" / f"{name}.json"
    inner = tokenizers.Tokenizer.from_file(str(path))
    inner.no_truncation(), inner.no_padding()
    found = load_text(TextConfig(name=str(write(tmp_path / "a.jsonl", TEXTS)), tokenizer=str(path), **SHARES))
    for split, tokens in expected(inner, inner.token_to_id(end)).items():
        np.testing.assert_array_equal(getattr(found, split), tokens)
    assert found.vocab_size == max(inner.get_vocab().values()) + 1
    assert found.bytes_per_token["train"] > 1


def test_the_end_of_text_is_that_of_the_directory(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((GOLDEN / "tokenizers" / "unigram.json").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert separator_of(tokenizer, str(tmp_path)) == 2  # </s>
    for token in ("<s>", {"content": "<s>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        assert separator_of(tokenizer, str(tmp_path)) == 1
    assert separator_of(tokenizer, str(tmp_path), "<unk>") == 0
    with pytest.raises(ConfigError, match="config.data.separator: .*'<eod>' is no token of it"):
        separator_of(tokenizer, str(tmp_path), "<eod>")


def test_documents_that_are_equal_are_in_one_split(tmp_path):
    path = write(tmp_path / "a.jsonl", [text for text in TEXTS for _ in range(3)])
    found = load_text(TextConfig(name=str(path), **SHARES))
    parts = [set(found.tokenizer.decode(getattr(found, split)).split("\0")) for split in text_lib.SPLITS]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and set().union(*parts) == set(TEXTS)


def test_caps(tmp_path):
    path = str(write(tmp_path / "a.jsonl", TEXTS))
    whole = load_text(TextConfig(name=path, **SHARES))
    for cap in ({"max_bytes": 900}, {"max_tokens": 900}):
        part = load_text(TextConfig(name=path, **SHARES, **cap))
        for split, share in (("train", 0.6), ("validation", 0.2), ("test", 0.2)):
            mine, full = getattr(part, split), getattr(whole, split)
            assert share * 900 - 4 <= len(mine) <= share * 900
            np.testing.assert_array_equal(mine[:-5], full[: len(mine) - 5])  # characters are not cut


def test_empty_documents_are_left_out_with_one_warning(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", ["", *TEXTS, "", ""])
    found = load_text(TextConfig(name=str(path), **SHARES))
    np.testing.assert_array_equal(found.train, expected()["train"])
    assert [r.message for r in caplog.records] == [
        f"{path}, line 1: empty, as are 2 more documents of it; they are left out"
    ]


def raw(path, data):
    path.write_bytes(data)
    return path


BAD = {
    "no JSON": (lambda d: raw(d / "a.jsonl", b'{"text": "x"}\n{"text": \n'), r"a.jsonl, line 2: no JSON \(Expecting"),
    "no object": (lambda d: raw(d / "a.jsonl", b"[1]\n"), r"a.jsonl, line 1: a list; a line is an object such as"),
    "nested": (lambda d: raw(d / "a.jsonl", b"[" * 99999), "a.jsonl, line 1: no JSON"),
    "missing key": (
        lambda d: raw(d / "a.jsonl", b'{"body": "x", "id": 1}\n'),
        r"a.jsonl, line 1: no column 'text'; there are 'body', 'id' \(config.data.column\)",
    ),
    "no text": (lambda d: raw(d / "a.jsonl", b'{"text": null}\n'), "line 1: 'text' holds NoneType; text is needed"),
    "not UTF-8": (lambda d: raw(d / "a.jsonl", b'{"text": "\xe9"}\n'), "a.jsonl, line 1: no JSON"),
    "surrogate": (lambda d: raw(d / "a.jsonl", b'{"text": "a\\ud800"}\n'), "line 1: the text is no UTF-8: half a surr"),
    "cut .gz": (
        lambda d: raw(d / "a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999)[:-9]),
        r"a.jsonl.gz: damaged after line \d+ .* a whole .gz file is needed",
    ),
    "cut .zst": (
        lambda d: raw(d / "b.jsonl.zst", write(d / "a.jsonl.zst", TEXTS).read_bytes()[:-9]),
        r"b.jsonl.zst: damaged after line \d+ .* a whole .zst file is needed",
    ),
    "no .zst": (lambda d: raw(d / "a.jsonl.zst", b"abcdefghijk"), r"a.jsonl.zst: damaged after line 0"),
    "missing column": (
        lambda d: write(d / "a.parquet", TEXTS, "body"),
        r"a.parquet: no column 'text'; there are 'id', 'body'",
    ),
    "no parquet": (lambda d: raw(d / "a.parquet", b"PAR1abcPAR1"), "a.parquet: no Parquet file, or a damaged one"),
    "column of saved": (lambda d: write(d / "saved", TEXTS, "body"), "saved: no column 'text'; there are 'id', 'body'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, tmp_path):
    make, message = BAD[case]
    with pytest.raises(ConfigError, match=message) as error:
        load_text(TextConfig(name=str(make(tmp_path))))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": "ids"}, "text needs a tokenizer"),
        ({"tokenizer": "nowhere/tokenizer.json"}, "nowhere/tokenizer.json: no such tokenizer; bytes, bpe"),
        ({"tokenizer": "x/tokenizer.json", "vocab_size": 300}, "vocab_size=300: .* has its own; leave it out"),
        ({"sources": (("a", 0.0),)}, "weights must be above 0"),
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"overlap": -2}, "overlap=-2 must be -1 or more"),
    ],
)
def test_settings_that_do_not_fit(settings, message, tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_text(TextConfig(name=str(path), **settings))
