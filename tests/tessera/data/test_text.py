"""Text: deterministic, split without leakage, capped on request, and errors that say what would be valid."""

import builtins
import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.data.download import DataUnavailable
from tessera.data.text import BPETokenizer, ByteTokenizer, TextConfig, Tokenizer, load_text


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache directory of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def library(tmp_path):
    """60 small files in two folders, with a pattern for them."""
    for i in range(60):
        path = tmp_path / "library" / f"shelf{i % 2}" / f"book{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"[{i:02d}] " + "lorem ipsum dolor é " * (i + 1), encoding="utf-8")
    return str(tmp_path / "library" / "**" / "*.txt")


def documents(splits):
    """For each split its documents, decoded."""
    return [splits.tokenizer.decode(s).split("\0") if len(s) else [] for s in splits[:3]]


def test_stdlib():
    a, b = load_text(TextConfig()), load_text(TextConfig())
    sizes = np.array([len(s) for s in a[:3]])
    assert sizes.sum() > 4e6
    shares = sizes / sizes.sum()
    assert shares[0] > 0.8 and (shares[1:] > 0.02).all() and (shares[1:] < 0.1).all()
    assert a.content_hash == b.content_hash and len(a.content_hash) == 64
    for left, right in zip(a[:3], b[:3], strict=True):
        assert left.dtype == np.uint16 and left.max() < a.vocab_size == 256
        np.testing.assert_array_equal(left, right)
    text = "".join(map(a.tokenizer.decode, a[:3]))
    assert "class Random(_random.Random):" in text
    assert "build_time_vars = {" not in text, "a description of the machine makes the hash differ between machines"


def test_files_stay_whole_and_in_one_split(library, tmp_path):
    splits = load_text(TextConfig(name=library, validation=0.2, test=0.2))
    parts = documents(splits)
    written = [p.read_text(encoding="utf-8") for p in (tmp_path / "library").rglob("*.txt")]
    assert sorted(sum(parts, [])) == sorted(written)
    assert all(parts)


def test_a_file_keeps_its_split_when_others_come_and_go(library, tmp_path):
    config = TextConfig(name=library, validation=0.2, test=0.2)
    before = documents(load_text(config))
    for i in range(0, 60, 4):
        (tmp_path / "library" / f"shelf{i % 2}" / f"book{i:02d}.txt").unlink()
    (tmp_path / "library" / "new.txt").write_text("new")
    after = documents(load_text(config))
    for left, right in zip(before, after, strict=True):
        assert set(right) - {"new"} <= set(left)


def test_split_is_the_hash_of_the_relative_path(library, tmp_path):
    parts = documents(load_text(TextConfig(name=library, validation=0.2, test=0.3)))
    for path in (tmp_path / "library").rglob("*.txt"):
        name = path.relative_to(tmp_path / "library").as_posix()
        place = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 16**16
        split = 1 if place < 0.2 else 2 if place < 0.5 else 0
        assert path.read_text(encoding="utf-8") in parts[split]


def test_content_hash_sees_text_and_split_not_tokenizer_or_place(library, tmp_path):
    base = load_text(TextConfig(name=library, validation=0.2, test=0.2)).content_hash
    assert (
        load_text(TextConfig(name="library/**/*.txt", dir=str(tmp_path), validation=0.2, test=0.2)).content_hash == base
    )
    assert load_text(TextConfig(name=library, validation=0.3, test=0.2)).content_hash != base
    path = tmp_path / "library" / "shelf0" / "book00.txt"
    path.write_bytes(path.read_bytes()[:-1])
    assert load_text(TextConfig(name=library, validation=0.2, test=0.2)).content_hash != base


def test_tinyshakespeare(shared_data):
    path = shared_data("text/tinyshakespeare.txt")
    by_name = load_text(TextConfig(name="tinyshakespeare", dir=str(path.parent)))
    by_path = load_text(TextConfig(name=str(path)))
    text = path.read_bytes()
    assert [len(s) for s in by_name[:3]] == [1_003_855, 55_769, 55_770]  # cut at 90% and 95% of 1,115,394
    assert b"".join(s.astype(np.uint8).tobytes() for s in by_name[:3]) == text
    assert by_name.content_hash == by_path.content_hash


def test_tinyshakespeare_offline(tmp_path, monkeypatch):
    def closed(url, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("pooch.retrieve", closed)
    with pytest.raises(DataUnavailable, match=r"(?s)tinyshakespeare.txt .*https://.*--config.data.dir="):
        load_text(TextConfig(name="tinyshakespeare", dir=str(tmp_path)))


@settings(max_examples=50, deadline=None)
@given(
    text=st.text(st.sampled_from("aé東🙂"), min_size=40, max_size=80),
    shares=st.tuples(st.floats(0, 0.4), st.floats(0, 0.4)),
    cap=st.integers(0, 300),
)
def test_a_single_file_is_cut_between_characters(tmp_path_factory, text, shares, cap):
    path = tmp_path_factory.mktemp("single") / "text.txt"
    path.write_text(text, encoding="utf-8")
    try:
        splits = load_text(TextConfig(name=str(path), max_bytes=cap, validation=shares[0], test=shares[1]))
    except ValueError as error:
        assert "no text for" in str(error)  # a small share of a small text
        return
    whole = "".join(splits.tokenizer.decode(s) for s in splits[:3])
    assert "\ufffd" not in whole
    size = len(whole.encode())
    assert text.startswith(whole) and (size > cap - 4 if 0 < cap < len(text.encode()) else whole == text)
    assert size <= (cap or size)
    assert abs(len(splits.train) - size * (1 - sum(shares))) < 5
    assert abs(len(splits.test) - size * shares[1]) < 5


@pytest.mark.parametrize("cap", [1000, 5000, 10**9])
def test_max_bytes_over_many_files(library, cap):
    whole = load_text(TextConfig(name=library, validation=0.2, test=0.2))
    splits = load_text(TextConfig(name=library, validation=0.2, test=0.2, max_bytes=cap))
    for part, full, share in zip(splits[:3], whole[:3], (0.6, 0.2, 0.2), strict=True):
        room = round(cap * share)
        assert min(room, len(full)) - 2 <= len(part) <= room
        np.testing.assert_array_equal(part[:-1], full[: len(part) - 1])


@pytest.mark.parametrize("source", ["many", "single"])
def test_bpe(library, tmp_path, cache, source):
    pytest.importorskip("tokenizers")
    name = library if source == "many" else str(tmp_path / "library" / "shelf1" / "book59.txt")
    config = TextConfig(name=name, tokenizer="bpe", vocab_size=280, validation=0.2, test=0.2)
    plain = load_text(TextConfig(name=name, validation=0.2, test=0.2))
    splits = load_text(config)
    assert splits.content_hash == plain.content_hash and splits.vocab_size == splits.tokenizer.vocab_size <= 280
    assert documents(splits) == documents(plain)
    assert len(splits.train) < len(plain.train) / 2
    (saved,) = (cache / "tessera" / "tokenizers").iterdir()
    stamp = saved.stat().st_mtime_ns
    again = load_text(config)
    assert saved.stat().st_mtime_ns == stamp, "the second time it comes from the cache"
    np.testing.assert_array_equal(again.train, splits.train)
    smaller = load_text(replace(config, vocab_size=265))  # another tokenizer, and the first one's stays
    assert smaller.vocab_size <= 265 < splits.vocab_size == load_text(config).vocab_size


def test_bpe_learns_from_the_training_split_only(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "text.txt"
    path.write_text("abab " * 400 + "qzqz " * 100)
    splits = load_text(TextConfig(name=str(path), tokenizer="bpe", vocab_size=300, validation=0.1, test=0.1))
    assert len(splits.tokenizer.encode("abab")) < 4
    assert len(splits.tokenizer.encode("qzqz")) == 4


CONFIG_ERRORS = {
    "tokenizer": ({"tokenizer": "byte"}, "tokenizer='byte': choose one of bytes, bpe"),
    "bytes have 256": ({"vocab_size": 512}, "vocab_size=512: 'bytes' has exactly 256"),
    "bpe has 256": ({"tokenizer": "bpe", "vocab_size": 255}, "vocab_size=255: bpe starts from the 256 bytes"),
    "max_bytes": ({"max_bytes": -1}, "max_bytes=-1"),
    "negative share": ({"test": -0.1}, "test=-0.1 must be shares"),
    "nothing left": ({"validation": 0.5, "test": 0.5}, "sum below 1"),
}


@pytest.mark.parametrize("case", CONFIG_ERRORS)
def test_config_errors(case):
    kwargs, message = CONFIG_ERRORS[case]
    with pytest.raises(ValueError, match=message):
        TextConfig(**kwargs)


def test_unknown_name_suggests():
    with pytest.raises(ValueError, match=r"no text file matches 'tinyshakespear'.*did you mean 'tinyshakespeare'\?"):
        load_text(TextConfig(name="tinyshakespear"))


def test_a_directory_is_told_how_to_be_a_glob(tmp_path):
    with pytest.raises(ValueError, match=rf"a directory: for its files, write {tmp_path}/\*\*/\*.txt"):
        load_text(TextConfig(name=str(tmp_path)))


def test_not_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"na" + "ï".encode("latin-1") + b"ve")
    with pytest.raises(ValueError, match="latin.txt is not UTF-8 text: byte 0xef at 2"):
        load_text(TextConfig(name=str(tmp_path / "*.txt")))


def test_too_few_files_for_a_split(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    with pytest.raises(
        ValueError, match=r"no text for (train|validation|test) from .*use more files, a single one, or"
    ):
        load_text(TextConfig(name=str(tmp_path / "*.txt")))


CORPUS = ["the cat sat on the mat\n" * 20, "def f(x):\n    return x + 1\n" * 20, "naïve café — 東京 🙂\0 end " * 5]
texts = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer()
    pytest.importorskip("tokenizers")
    return BPETokenizer.train(CORPUS, 300)


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_nothing_is_lost(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint16 and tokens.ndim == 1
    assert tokens.max(initial=0) < tokenizer.vocab_size
    assert tokenizer.decode(tokens) == text


def test_byte_0_is_one_token(tokenizer):
    assert len(tokenizer.encode("\0")) == 1


def test_half_a_character_decodes_to_a_replacement(tokenizer):
    tokens = ByteTokenizer().encode("é") if isinstance(tokenizer, ByteTokenizer) else tokenizer.encode("\u0416")
    assert len(tokens) == 2
    assert tokenizer.decode(tokens[:1]) == "\ufffd"


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = type(tokenizer).load(path)
    assert isinstance(loaded, Tokenizer) and loaded.vocab_size == tokenizer.vocab_size
    for text in CORPUS:
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_bytes_are_the_utf8_encoding():
    assert ByteTokenizer().encode("aé").tolist() == list("aé".encode())
    assert ByteTokenizer.vocab_size == 256


def test_byte_tokenizer_refuses_another(tmp_path):
    pytest.importorskip("tokenizers")
    BPETokenizer.train(CORPUS, 260).save(tmp_path / "bpe.json")
    with pytest.raises(ValueError, match="bpe.json does not hold a byte tokenizer"):
        ByteTokenizer.load(tmp_path / "bpe.json")


def test_bpe_training_is_deterministic_and_shortens():
    pytest.importorskip("tokenizers")
    a, b = (BPETokenizer.train(CORPUS, 300) for _ in range(2))
    text = "the cat sat on the mat"
    np.testing.assert_array_equal(a.encode(text), b.encode(text))
    assert a.vocab_size == 300 and len(a.encode(text)) < len(text) / 2


def test_bpe_stops_when_the_text_has_no_more_pairs():
    pytest.importorskip("tokenizers")
    assert 256 <= BPETokenizer.train(["ab"], 1000).vocab_size < 1000


def test_bpe_without_the_package_names_the_extra(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "tokenizers":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"extra `data`: pip install 'tessera-jax\[data\]'"):
        BPETokenizer.train(["a"], 256)
