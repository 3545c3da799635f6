"""Scores of texts against a decoder without a cache, in float64."""

import math

import numpy as np
import pytest
import tiny_model as tiny
from hypothesis import given
from hypothesis import strategies as st

from tessera.serving.scoring import Part, perplexity, score, windows

RNG = np.random.default_rng(3)


@given(st.integers(0, 40), st.integers(2, 12), st.integers(0, 11))
def test_windows_score_every_token_once_after_enough_context(count, length, stride):
    if stride >= length:
        with pytest.raises(ValueError, match="stride"):
            windows(range(1, count + 1), 0, length, stride)
        return
    parts = windows(range(1, count + 1), 0, length, stride)
    assert [token for part in parts for token in part.tokens] == list(range(1, count + 1))
    for part in parts:
        together = (*part.context, *part.tokens)
        assert together == tuple(range(together[0], together[0] + len(together))) and len(together) <= length
    for part in parts[1:]:
        assert len(part.context) == length - (stride or length - 1), "disjoint ones have one token, as in lm-eval"


def test_scores_are_those_of_a_decoder_without_a_cache():
    """More parts than slots and queue, contexts of all lengths, one that is too long, and the greedy continuation."""
    texts = [RNG.integers(0, 256, size).tolist() for size in (2, 9, 30, 63, 17, 5, 40)]
    parts = [
        Part(tuple(text[:cut]), tuple(text[cut:])) for text, cut in zip(texts, (1, 3, 29, 60, 9, 1, 2), strict=True)
    ]
    best = tiny.logprobs([1, 2, 3]).argmax(-1)[-1]
    parts += [Part((1, 2, 3), (int(best),)), Part((1, 2, 3), (int(best) ^ 1,))]
    engine = tiny.engine(queue=1)
    counted = []
    scores = score(engine, parts, counted.append)
    for part, one in zip(parts, scores, strict=True):
        expected = tiny.logprobs([*part.context, *part.tokens])[-1 - len(part.tokens) : -1]
        np.testing.assert_allclose(one.logprobs, expected[np.arange(len(part.tokens)), part.tokens], atol=3e-5)
        assert one.greedy == (list(expected.argmax(-1)) == list(part.tokens))
    assert [one.greedy for one in scores[-2:]] == [True, False]
    assert sum(counted) == sum(len(part.tokens) for part in parts)
    long = Part(tuple(range(100)), (7, 8))
    cut = tiny.logprobs([*long.context[-61:], 7, 8])
    np.testing.assert_allclose(score(engine, [long])[0].logprobs, [cut[60, 7], cut[61, 8]], atol=3e-5)
    for part in (Part((), (1,)), Part((1,), ()), Part((1,), (2,) * 63)):
        with pytest.raises(ValueError, match="1 to 62 to score fit"):
            score(engine, [part])


def test_perplexity_and_bits_per_byte_by_their_definitions():
    texts = [[0, *range(30, 90)], [], [5, 6]]
    found = perplexity(tiny.engine(), texts, 70, 0, length=20, stride=5)
    nats = 0.0
    for text in ([*range(30, 90)], [5, 6]):
        for place in range(len(text)):
            first = 20 + (place + 1 - 20) // 5 * 5  # of the window's tokens that are scored, in [0, *text]
            window = [0, *text][max(0, first - 15) if place + 1 >= 20 else 0 : place + 1]
            nats -= tiny.logprobs(window)[-1][text[place]]
    assert found.tokens == 62 and found.bytes == 70
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / 62)) and found.loss == pytest.approx(nats / 62)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 70)
    with pytest.raises(ValueError, match="no text"):
        perplexity(tiny.engine(), [[], [0]], 0, 0)
