"""Tokenizers lose nothing and come back from disk the same."""

import builtins

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer

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
