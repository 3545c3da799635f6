from dataclasses import replace

import numpy as np
import pytest
import tiny_model as tiny

from tessera.serving.engine import generate_all
from tessera.serving.requests import PromptTooLong, QueueFull, Sampling

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 256, n).tolist() for n in (3, 40, 1, 16, 17, 9, 30, 5, 2)]
SAMPLINGS = [
    Sampling(temperature=0.0, max_tokens=12),
    Sampling(temperature=1.0, seed=1, max_tokens=9),
    Sampling(temperature=0.7, top_k=5, seed=2, max_tokens=14),
    Sampling(temperature=1.3, top_p=0.8, frequency_penalty=0.5, seed=3, max_tokens=5),
    Sampling(temperature=1.0, min_p=0.1, seed=4, max_tokens=1),
    Sampling(temperature=0.9, repetition_penalty=1.5, seed=5, max_tokens=11),
    Sampling(temperature=0.0, repetition_penalty=1.3, max_tokens=8),
    Sampling(temperature=1.0, top_k=200, presence_penalty=0.7, seed=1, max_tokens=10),
    Sampling(temperature=1.0, top_k=20, top_p=0.9, min_p=0.02, seed=9, max_tokens=6),
]


@pytest.mark.parametrize(
    "axes", ["", *(pytest.param(axes, marks=pytest.mark.slow) for axes in ("dp=2, tp=2, cp=2", "pp=2, dp=2"))]
)
def test_a_text_comes_out_as_if_it_were_alone(axes):
    """Nine requests through four slots, all at once and each by itself: the same tokens, sampled ones too."""
    together = generate_all(tiny.engine(axes=axes), PROMPTS, SAMPLINGS)
    alone = tiny.engine(axes=axes)
    for prompt, sampling, text in zip(PROMPTS, SAMPLINGS, together, strict=True):
        only = generate_all(alone, [prompt], [sampling])[0]
        assert text.tokens == only.tokens and len(text.tokens) == sampling.max_tokens
        assert text.finish == only.finish == "length"
        np.testing.assert_allclose(text.logprobs, only.logprobs, atol=1e-5)
    assert together[1].tokens != together[7].tokens, "the same seed after another prompt"


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["", "pp=2, dp=2"])
def test_several_tokens_a_call_are_the_same_tokens(axes):
    """With penalties too: every stage has to know what was drawn within the call."""
    one = generate_all(tiny.engine(), PROMPTS, SAMPLINGS)
    four = generate_all(tiny.engine(replace(tiny.SIZES, steps=4, rows=2), axes=axes), PROMPTS, SAMPLINGS)
    assert [text.tokens for text in four] == [text.tokens for text in one]


def test_slots_are_given_in_order_and_a_long_prompt_does_not_stop_the_others():
    engine = tiny.engine()
    short = engine.submit([1, 2, 3], Sampling(max_tokens=40))
    engine.step()
    long = engine.submit(PROMPTS[1], Sampling(max_tokens=4))
    others = [engine.submit([i], Sampling(max_tokens=4)) for i in range(5)]
    engine.step()
    assert [text.slot for text in (short, long, *others)] == [0, 1, 2, 3, -1, -1, -1]
    before, pieces = len(short.tokens), 0
    while long.reading:
        engine.step()
        pieces += 1
    assert len(short.tokens) == before + pieces > before
    ends = []
    for text in (long, *others):
        text.notify = lambda text: ends.append(text.number) if text.finish else None
    engine.run()
    waited = [text.number for text in others[2:]]
    assert [number for number in ends if number in waited] == waited


def test_a_cancelled_text_leaves_its_slot_and_the_queue():
    engine = tiny.engine()
    texts = [engine.submit([i, i], Sampling(max_tokens=30, seed=i)) for i in range(6)]
    engine.step()
    engine.cancel(texts[1])
    engine.cancel(texts[4])
    engine.step()
    assert texts[1].finish == texts[4].finish == "cancelled"
    assert texts[5].slot == 1
    engine.run()
    assert [text.finish for text in texts].count("length") == 4
    assert not engine.busy and engine.counts["finished_cancelled"] == 2
    engine.cancel(texts[0])  # too late, and nothing happens
    engine.step()
    assert texts[0].finish == "length"


def test_a_text_ends_at_a_stop_token_at_its_limit_or_where_there_is_no_room():
    engine = tiny.engine()
    free = generate_all(engine, [[5, 6]], [Sampling(temperature=0.0, max_tokens=10)])[0]
    stop = free.tokens[4]
    ended = generate_all(engine, [[5, 6]], [Sampling(temperature=0.0, max_tokens=10, stop_tokens=(stop,))])[0]
    assert ended.finish == "stop" and ended.tokens == free.tokens[: free.tokens.index(stop)]
    full = generate_all(engine, [list(range(60))], [Sampling(max_tokens=50)])[0]
    assert full.finish == "length" and len(full.tokens) == tiny.SIZES.length - 60


def test_what_cannot_be_served_is_refused():
    engine = tiny.engine(queue=1)
    for prompt in ([], list(range(64))):
        with pytest.raises(PromptTooLong, match="1 to 63"):
            engine.submit(prompt)
    with pytest.raises(ValueError, match="token 256"):
        engine.submit([1, 256])
    texts = [engine.submit([1]) for _ in range(5)]  # four slots and one that waits
    with pytest.raises(QueueFull):
        engine.submit([1])
    engine.fail()
    assert {text.finish for text in texts} == {"error"} and not engine.busy
    for wrong in (
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"min_p": 2.0},
        {"max_tokens": 0},
        {"seed": -1},
        {"presence_penalty": 3.0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Sampling(**wrong)
