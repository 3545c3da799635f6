from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
import tiny_model as tiny

from moe.gate import RouterConfig
from moe.layer import MoEConfig
from tessera.serving.engine import Engine, generate_all
from tessera.serving.programs import make_programs
from tessera.serving.requests import OutOfRange, PromptTooLong, QueueFull, Sampling

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


@pytest.mark.long
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


@pytest.mark.parametrize(
    "axes", ["", *(pytest.param(axes, marks=pytest.mark.slow) for axes in ("dp=2, tp=2, cp=2", "pp=2, dp=2"))]
)
def test_alternatives_are_the_most_probable_tokens_of_the_model(axes):
    """Against a log-softmax in float64 of the decoder's logits; nothing that changes the draw changes them."""
    asked = [replace(one, top_logprobs=count) for one, count in zip(SAMPLINGS[:4], (20, 1, 0, 5), strict=True)]
    found = generate_all(tiny.engine(axes=axes), PROMPTS[:4], asked)
    plain = generate_all(tiny.engine(axes=axes), PROMPTS[:4], SAMPLINGS[:4])
    for prompt, text, other, sampling in zip(PROMPTS, found, plain, asked, strict=False):
        assert text.tokens == other.tokens and len(text.top) == len(text.tokens)
        reference = tiny.logprobs([*prompt, *text.tokens])
        for step, top in enumerate(text.top):
            expected = reference[len(prompt) - 1 + step]
            ids = np.argsort(-expected, kind="stable")[: sampling.top_logprobs]
            assert [token for token, _ in top] == ids.tolist()
            np.testing.assert_allclose([value for _, value in top], expected[ids], atol=2e-5)
            assert text.logprobs[step] == pytest.approx(expected[text.tokens[step]], abs=2e-5)


@pytest.mark.parametrize(
    "axes", ["", *(pytest.param(axes, marks=pytest.mark.slow) for axes in ("dp=2, tp=2, cp=2", "pp=2, dp=2"))]
)
def test_a_prompt_has_log_probabilities_too(axes):
    """Prompts of one chunk and of several, beside one that asks for none; against the decoder without a cache."""
    asked = [Sampling(temperature=0.0, max_tokens=2, top_logprobs=3, prompt_logprobs=True)] * 5
    asked[2] = replace(asked[2], prompt_logprobs=False)
    asked[3] = replace(asked[3], max_tokens=0)
    prompts = [*PROMPTS[:2], *PROMPTS[4:7]]
    for prompt, one, text in zip(prompts, asked, generate_all(tiny.engine(axes=axes), prompts, asked), strict=True):
        assert len(text.tokens) == one.max_tokens and text.finish == "length"
        if not one.prompt_logprobs:
            assert text.prompt_logprobs == text.prompt_top == []
            continue
        expected = tiny.logprobs(prompt)[:-1]
        np.testing.assert_allclose(text.prompt_logprobs, expected[np.arange(len(prompt) - 1), prompt[1:]], atol=2e-5)
        best = np.argsort(-expected, axis=1, kind="stable")[:, :3]
        assert [[token for token, _ in top] for top in text.prompt_top] == best.tolist()


def test_a_bias_is_added_before_all_else_and_infinity_forbids():
    """Against an argmax over logits that were biased, then penalized (Keskar et al. 2019), in float64."""
    bias = ((7, 30.0), (9, 29.0), (7, 2.0), (11, -100.0))
    text = generate_all(
        tiny.engine(), [[9, 3]], [Sampling(temperature=0.0, max_tokens=5, logit_bias=bias, repetition_penalty=3.0)]
    )[0]
    seen, tokens = {9, 3}, [9, 3]
    for token, logprob in zip(text.tokens, text.logprobs, strict=True):
        reference = tiny.logprobs(tokens)[-1]
        logits = np.array(tiny.logits(tokens)[-1])
        for number, value in bias:
            logits[number] += value
        for one in seen:
            logits[one] = logits[one] / 3 if logits[one] > 0 else logits[one] * 3
        assert token == logits.argmax() and logprob == pytest.approx(reference[token], abs=2e-5)
        seen.add(token)
        tokens.append(token)


class Allowed:
    """A constraint: tokens of one parity in turns, six of them."""

    def __init__(self, length=6):
        self.length, self.tokens = length, []

    def allowed(self):
        return np.arange(256) % 2 == len(self.tokens) % 2

    def accept(self, token):
        self.tokens.append(token)

    @property
    def ended(self):
        return len(self.tokens) == self.length


@pytest.mark.parametrize("axes", ["", pytest.param("dp=2, tp=2", marks=pytest.mark.slow)])
def test_a_constraint_is_asked_before_every_token_whatever_the_steps_of_a_call(axes):
    engine = tiny.engine(replace(tiny.SIZES, steps=4), axes=axes)
    sampling = Sampling(temperature=0.0, max_tokens=20)
    free = generate_all(tiny.engine(), [[1, 2]], [sampling])[0].tokens
    constraints = [Allowed(), None, Allowed(30)]
    texts = [engine.submit([1, 2], sampling, constraint=one) for one in constraints]
    engine.run()
    assert texts[1].tokens == free
    tokens = [1, 2]
    for i in range(6):
        tokens.append(int(np.where(np.arange(256) % 2 == i % 2, tiny.logprobs(tokens)[-1], -np.inf).argmax()))
    assert texts[0].tokens == tokens[2:] and texts[0].finish == "stop" and constraints[0].tokens == tokens[2:]
    assert len(texts[2].tokens) == 20 and texts[2].tokens[:6] == tokens[2:] and texts[2].finish == "length"


@pytest.mark.parametrize(
    "axes", ["", *(pytest.param(axes, marks=pytest.mark.slow) for axes in ("dp=2, tp=2, cp=2", "pp=2, dp=2"))]
)
def test_a_prefix_is_read_once_and_the_texts_are_the_same(axes):
    """Prompts that begin alike, one after another, at once and after a text that they continue, with penalties."""
    begin = PROMPTS[1][:37]
    prompts = [begin + [1, 2], begin + [3], begin[:20] + [4, 5], [5] + begin, begin + [3, 9, 9]]
    asked = [replace(one, max_tokens=6) for one in SAMPLINGS[3:8]]
    plain = generate_all(tiny.engine(axes=axes), prompts, asked)
    engine = tiny.engine(axes=axes, prefix_cache=8)
    parts = engine.programs.parts
    first = generate_all(engine, prompts[:1], asked[:1])
    assert engine.counts["prefix_tokens"] == 0
    one = generate_all(engine, prompts[1:2], asked[1:2])
    assert engine.counts["prefix_tokens"] == 37 and engine.counts["prompt_tokens"] == 39 + 1
    rest = generate_all(engine, prompts[2:], asked[2:])
    if parts == 1:
        assert engine.counts["prefix_tokens"] == 37 + 20 + 38, "the last begins like the second, which is still there"
    for text, other in zip([*first, *one, *rest], plain, strict=True):
        assert text.tokens == other.tokens
        np.testing.assert_allclose(text.logprobs, other.logprobs, atol=1e-5)
    # What continues a text takes the tokens that were drawn, but the last, which was never read.
    before = engine.counts["prefix_tokens"]
    whole = [*prompts[0], *first[0].tokens, 8]
    again = tiny.engine(axes=axes, prefix_cache=8)
    generate_all(again, prompts[:1], asked[:1])
    found = generate_all(again, [whole], asked[:1])[0]
    assert again.counts["prefix_tokens"] == len(whole) - 2 and before > 0
    assert found.tokens == generate_all(tiny.engine(axes=axes), [whole], asked[:1])[0].tokens
    # Log-probabilities of a prompt need all of it read, whatever is in the cache.
    told = replace(asked[0], prompt_logprobs=True)
    (found,), (wanted,) = (generate_all(one, [whole], [told]) for one in (again, tiny.engine(axes=axes)))
    assert len(found.prompt_logprobs) == len(whole) - 1
    np.testing.assert_allclose(found.prompt_logprobs, wanted.prompt_logprobs, atol=1e-5)


def test_a_prefix_is_copied_from_a_text_that_still_runs():
    engine = tiny.engine(prefix_cache=8)
    long = Sampling(temperature=0.0, max_tokens=20)
    running = engine.submit(PROMPTS[6], long)
    for _ in range(4):
        engine.step()
    assert running.slot >= 0
    assert engine.usage == (30 + len(running.tokens) - 1) / (4 * 64) and len(running.tokens) > 1
    other = engine.submit([*PROMPTS[6][:25], 7], long)
    engine.run()
    assert engine.counts["prefix_tokens"] == 25
    plain = generate_all(tiny.engine(), [running.prompt, other.prompt], [long] * 2)
    assert [running.tokens, other.tokens] == [text.tokens for text in plain]


ROUTED = replace(tiny.CONFIG, mlp="routed", moe=MoEConfig(every=2, router=RouterConfig(experts=4, k=2)))


@pytest.mark.parametrize(
    "config", [pytest.param(tiny.CONFIG, id="dense"), pytest.param(ROUTED, id="routed", marks=pytest.mark.long)]
)
def test_batch_invariance_a_texts_numbers_are_the_same_bits_whatever_its_neighbors(config):
    """Alone, after others in the same slots, and among three neighbors that come and go."""
    made, params = tiny.programs(tiny.SIZES, config)
    text, sampling = PROMPTS[6], Sampling(temperature=0.8, seed=3, max_tokens=12, top_logprobs=4)
    alone = generate_all(Engine(made, params), [text], [sampling])[0]
    engine = Engine(made, params)
    generate_all(engine, PROMPTS[:3], SAMPLINGS[:3])
    others = [engine.submit(prompt, one) for prompt, one in zip(PROMPTS[3:6], SAMPLINGS[3:6], strict=True)]
    for _ in range(3):
        engine.step()
    among = engine.submit(text, sampling)
    others += [engine.submit(prompt, one) for prompt, one in zip(PROMPTS[7:], SAMPLINGS[7:], strict=True)]
    engine.run()
    assert among.tokens == alone.tokens and all(one.finish == "length" for one in others)
    assert among.logprobs == alone.logprobs and among.top == alone.top


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["", "pp=2, dp=2"])
def test_several_tokens_a_call_are_the_same_tokens(axes):
    """With penalties too: every stage has to know what was drawn within the call."""
    one = generate_all(tiny.engine(), PROMPTS, SAMPLINGS)
    four = generate_all(tiny.engine(replace(tiny.SIZES, steps=4, rows=2), axes=axes), PROMPTS, SAMPLINGS)
    assert [text.tokens for text in four] == [text.tokens for text in one]


def test_the_end_of_text_ends_a_text_and_is_not_part_of_it():
    made, params = tiny.programs()
    asked = Sampling(temperature=0.0, max_tokens=20)
    whole = generate_all(tiny.engine(), [[1, 2, 3]], [asked])[0].tokens
    end = next(token for i, token in enumerate(whole) if i and token not in whole[:i])
    text = generate_all(Engine(made, params, ends=(end,)), [[1, 2, 3]], [asked])[0]
    assert text.tokens == whole[: whole.index(end)] and text.finish == "stop"


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


@pytest.mark.long
@pytest.mark.parametrize("pages", [0, pytest.param(12, marks=pytest.mark.slow)])
def test_after_the_warm_up_nothing_is_compiled(caplog, pages):
    """Prompts of all lengths, chunked and not, and texts that lose their pages; and the warm-up changes no text."""
    made = make_programs(tiny.programs()[0].decoder, replace(tiny.SIZES, pages=pages, page_size=8))
    engine, expected = Engine(made, tiny.programs()[1], queue=100), generate_all(tiny.engine(), PROMPTS, SAMPLINGS)
    engine.warm_up()
    with jax.log_compiles():
        texts = generate_all(engine, [*PROMPTS, *([1] * n for n in range(1, 64))], [*SAMPLINGS, *[Sampling()] * 63])
    assert not [record.getMessage() for record in caplog.records if "ompil" in record.getMessage()]
    assert [text.tokens for text in texts[: len(PROMPTS)]] == [text.tokens for text in expected]


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
        {"max_tokens": -1},
        {"seed": -1},
        {"presence_penalty": 3.0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Sampling(**wrong)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "name, values, valid",
    [
        ("temperature", (-1.0, NAN, INF, 101, 1e-300, 10**400, "1", None, True, 1j), r"1e-10\.\.100, or 0"),
        ("top_k", (2**31, -1, 10**400, 5.0, 1e30, NAN, "5", True, None), r"0\.\.2147483647"),
        ("top_p", (0.0, 1.5, NAN, INF, -INF, 10**400, "1"), r"\(0, 1\]"),
        ("min_p", (-0.1, 2.0, NAN, INF, "0"), r"0\.\.1"),
        ("repetition_penalty", (0.0, 1e-300, 101, NAN, INF, 10**400), r"0\.01\.\.100"),
        ("presence_penalty", (3.0, -2.1, NAN, INF, 10**400), r"-2\.\.2"),
        ("frequency_penalty", (3.0, -2.1, NAN, -INF, [0]), r"-2\.\.2"),
        ("seed", (-1, 2**32, 1.0, NAN), r"0\.\.4294967295"),
        ("max_tokens", (-1, 2**31, 10**5000, 1e30, 3.0, INF), r"0\.\.2147483647"),
        ("stop_tokens", ((-1,), (2**31,), (1.0,), (NAN,), "ab", 5, (1,) * 1025), "token ids|whole number"),
    ],
)
def test_a_sampling_of_wrong_numbers_is_refused_with_name_and_range(name, values, valid):
    with pytest.raises(OutOfRange, match=name):
        Sampling(**{name: values[0]})
    for value in values:
        made = Sampling()
        object.__setattr__(made, name, value)  # past the type checks that only tests have
        with pytest.raises(OutOfRange, match=rf"(?s)^{name}=.*must be .*({valid})") as error:
            made.__post_init__()
        assert error.value.parameter == name and len(str(error.value)) < 200


def test_the_largest_and_smallest_numbers_are_served():
    ends = [
        Sampling(top_k=2**31 - 1, max_tokens=2**31 - 1, seed=2**32 - 1, temperature=100.0, top_p=1e-300, min_p=1.0),
        Sampling(temperature=1e-10, top_p=0.5, repetition_penalty=0.01, presence_penalty=-2.0, frequency_penalty=2.0),
        Sampling(temperature=0.5, top_k=3, stop_tokens=(1, 2)),
    ]
    for text in generate_all(tiny.engine(), [[1, 2]] * 3, ends):
        assert text.finish in ("length", "stop") and np.isfinite(text.logprobs).all()


def test_an_engine_refuses_tokens_outside_the_vocabulary():
    engine = tiny.engine()
    for token in (256, -1, 10**400):
        with pytest.raises(OutOfRange, match=r"prompt=.*0\.\.255.*vocabulary of 256"):
            engine.submit([1, token])
    with pytest.raises(OutOfRange, match=r"stop_tokens=300 .*0\.\.255"):
        engine.submit([1], Sampling(stop_tokens=(300,)))
    assert not engine.busy and engine.submit(np.array([1, 2]).tolist(), Sampling(max_tokens=1)).prompt == (1, 2)


@cache
def undisturbed():
    return generate_all(tiny.engine(), PROMPTS, SAMPLINGS)


def bad(name):
    def raises(*_, **__):
        raise OverflowError(f"in {name}")

    return raises


@pytest.mark.parametrize("where", ["top_k", "_set", "_chunk", "_add", "_left", "_advance", "notify"])
@pytest.mark.parametrize("late", [False, True], ids=["at-once", "after-a-while"])
def test_a_text_that_fails_on_the_host_ends_alone(where, late, monkeypatch):
    """Before and while it decodes; the others, running and waiting, draw what they draw without it."""
    expected = undisturbed()
    engine = tiny.engine()
    texts = [engine.submit(p, s) for p, s in zip(PROMPTS, SAMPLINGS, strict=True)]
    ill = texts[2]
    for _ in range(7 if late else 0):
        engine.step()
    if where == "notify":
        ill.notify = bad(where)
    elif where == "top_k":  # what no check has seen
        object.__setattr__(ill.sampling, "top_k", 2**31)
    else:
        method = getattr(Engine, where)
        monkeypatch.setattr(
            Engine,
            where,
            lambda self, text, *rest, **more: (bad(where) if text is ill else method)(
                *(() if text is ill else (self, text, *rest)), **more
            ),
        )
    try:
        engine.run()
    finally:
        object.__setattr__(ill.sampling, "top_k", 0)
    for i, (text, alone) in enumerate(zip(texts, expected, strict=True)):
        if text is not ill:
            assert (text.finish, text.tokens) == ("length", alone.tokens), i
    reached = not (late and where in ("top_k", "_set", "_chunk"))  # a text is admitted and read only once
    assert ill.finish == ("error" if reached else "length") and ill.slot == -1 and not engine.busy
    assert generate_all(engine, PROMPTS[:1], SAMPLINGS[:1])[0].tokens == expected[0].tokens
