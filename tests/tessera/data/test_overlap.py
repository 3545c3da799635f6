"""A planted leak is measured as it was planted, against sets of n-grams written out."""

import numpy as np
import pytest

from tessera.data.text import SAMPLE, ngram_hashes, overlap


@pytest.mark.parametrize("n", [1, 2, 3, 7, 13, 50])
def test_hashes_are_equal_where_the_ngrams_are(n):
    tokens = np.random.default_rng(n).integers(0, 2, 400).astype(np.uint16)
    grams = [tokens[i : i + n].tobytes() for i in range(len(tokens) - n + 1)]
    hashes = ngram_hashes(tokens, n).tolist()
    assert len(hashes) == len(grams)
    assert len(set(hashes)) == len(set(grams)) == len(set(zip(hashes, grams, strict=True)))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1 << 12, 1 << 17])
def test_a_planted_leak(share, chunk, monkeypatch):
    monkeypatch.setattr("tessera.data.text.CHUNK", chunk)
    rng = np.random.default_rng(0)
    train, held_out = rng.integers(0, 50_000, 60_000), rng.integers(0, 50_000, 20_000)
    leaked = int(share * len(held_out))
    train[1000 : 1000 + leaked] = held_out[:leaked]
    texts = {"validation": held_out.astype(np.int32), "test": np.concatenate([held_out[:leaked], held_out[:leaked]])}
    found, looked = overlap(train.astype(np.int32), texts, 13, 10**9)
    assert looked == 1.0 and (leaked == 0 or found["test"] > 0.99)
    found = found["validation"]
    exact = max(0, leaked - 12) / (len(held_out) - 12)
    assert found == pytest.approx(exact, abs=4 * np.sqrt(SAMPLE * exact * (1 - exact) / len(held_out)) + 1e-9)


def test_a_part_is_said_and_short_texts_have_no_ngrams():
    tokens = np.arange(1000)
    assert overlap(tokens, {"a": tokens[:100]}, 13, 250) == ({"a": 1.0}, 0.25)
    assert overlap(tokens, {"a": tokens[:100], "b": tokens[:5]}, 13, 10**9) == ({"a": 1.0, "b": 0.0}, 1.0)
