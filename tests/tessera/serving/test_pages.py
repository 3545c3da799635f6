"""Pages: the bookkeeping against its invariants, and texts of a paged engine against those of contiguous slots."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_model as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.gate import RouterConfig
from moe.layer import MoEConfig
from sharding.errors import PlanError
from sharding.plan import Plan
from tessera.models.attention_forms import LatentConfig
from tessera.serving.engine import Engine, generate_all
from tessera.serving.pages import Pool
from tessera.serving.programs import make_programs
from tessera.serving.requests import Sampling
from tessera.serving.speculative import Speculating

# Bookkeeping.


class Model:
    """What every page of a pool holds, token by token; writes where another text may look are an error."""

    def __init__(self, pages, size):
        self.pool, self.size, self.memory = Pool(pages, size), size, np.full((pages, size), -1)
        self.texts = {}  # tokens in the cache of each running text
        self.adapters = {}  # of each, running or not

    def read(self, pages, count):
        return self.memory[pages].reshape(-1)[:count].tolist()

    def write(self, slot, token):
        place, row = divmod(len(self.texts[slot]), self.size)
        page = self.pool.running[slot][place]
        others = [pages for key, pages in self.pool.running.items() if key != slot and page in pages]
        assert not others, "a page that is written has two owners"
        for tokens, pages, _ in self.pool.ended.values():  # one that ended may have the rows before
            assert page not in pages or len(tokens) <= pages.index(page) * self.size + row
        self.memory[page, row] = token
        self.texts[slot].append(token)

    def check(self):
        pool = self.pool
        counts = np.zeros_like(pool.counts)
        for kind, texts in enumerate((pool.running.values(), (pages for _, pages, _ in pool.ended.values()))):
            for pages in texts:
                assert len(set(pages)) == len(pages)
                for page in pages:
                    counts[kind, page] += 1
        np.testing.assert_array_equal(pool.counts, counts)
        assert sorted(pool._free) == np.flatnonzero(counts.sum(0) == 0).tolist(), "a page is lost, or free twice"
        for slot, tokens in self.texts.items():
            assert self.read(pool.running[slot], len(tokens)) == tokens, "a text changed"
        for tokens, pages, _ in pool.ended.values():
            assert self.read(pages, len(tokens)) == tokens.tolist(), "a text that ended changed"
        assert len(pool.ended) <= len(pool.counts[0])


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from([(3, 5), (8, 2), (5, 1), (12, 3)]), st.booleans())
def test_pages_are_owned_once_or_only_read_and_none_is_lost(data, sizes, keep):
    """Texts over two tokens, so that many begin alike, come, grow and end in any order."""
    pages, size = sizes
    model, number = Model(pages, size), 0
    for _ in range(data.draw(st.integers(1, 25))):
        running = sorted(model.texts)
        act = data.draw(st.sampled_from(["begin", "begin", "grow", "grow", "end"]))
        if act == "begin":
            text = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=(pages * size) - 1))
            adapter = data.draw(st.sampled_from([0, 0, 1]))
            alike = [i for i in running if model.adapters[i] == adapter]
            beside = [(i, np.array(model.texts[i])) for i in alike]
            found = model.pool.find(np.array(text[:-1], np.int32), beside, adapter)
            ended = [tokens for tokens, _, other in model.pool.ended.values() if other == adapter]
            best = max(
                (
                    sum(np.cumprod([a == b for a, b in zip(text[:-1], other, strict=False)]))
                    for other in [*(model.texts[i] for i in alike), *ended]
                ),
                default=0,
            )
            assert found.shared == best
            begun = model.pool.begin(number, found, len(text) + 1)
            if begun is None:
                assert model.pool.obtainable < model.pool.pages(len(text) + 1)
                assert running, "an empty pool has room for one text"
            else:
                if begun.source != begun.target:
                    model.memory[begun.target] = model.memory[begun.source]
                model.texts[number], model.adapters[number] = text[: begun.shared], adapter
                for token in text[begun.shared :]:
                    model.write(number, token)
                number += 1
        elif running:
            slot = data.draw(st.sampled_from(running))
            tokens = model.texts[slot]
            if act == "end":
                del model.texts[slot]
                model.pool.end(slot, np.array(tokens if keep else [], np.int32), model.adapters[slot])
            elif len(tokens) < pages * size:
                before = model.pool.obtainable
                if model.pool.grow(slot, len(tokens) + 1):
                    model.write(slot, data.draw(st.integers(0, 1)))
                else:
                    assert before == 0
        model.check()
    for slot in sorted(model.texts):
        model.pool.end(slot, np.array([], np.int32))
    assert model.pool.obtainable == pages and not model.pool.counts[0].any()
    assert keep or not model.pool.counts.any()


# Engines.

PAGED = replace(tiny.SIZES, steps=2, pages=11, page_size=8)  # a text may have 8 pages, and there are 4 slots
BEGINS = [np.random.default_rng(5).integers(0, 256, n).tolist() for n in (35, 20, 0)]


def requests(count, rng):
    """Prompts that begin alike, with all that sampling knows."""
    prompts, samplings = [], []
    for number in range(count):
        begin = BEGINS[rng.integers(3)]
        prompts.append([*begin[: rng.integers(len(begin) + 1)], *rng.integers(0, 256, rng.integers(1, 12)).tolist()])
        more = [{}, {"repetition_penalty": 1.5}, {"presence_penalty": 1.0, "frequency_penalty": 0.7}][number % 3]
        asked = {"prompt_logprobs": number % 4 == 0, "top_logprobs": number % 3}
        temperature, most = float(rng.choice([0.0, 0.9])), int(rng.integers(1, 28))
        samplings.append(Sampling(temperature, seed=number, max_tokens=most, **more, **asked))
    return prompts, samplings


def alone(engine, prompts, samplings):
    return [generate_all(engine, [prompt], [one])[0] for prompt, one in zip(prompts, samplings, strict=True)]


def is_empty(engine):
    return engine.usage == 0 and not any(pool.running or pool.counts[0].any() for pool in engine._pools)


def at_random(engine, prompts, samplings, rng):
    """Texts that come at any time, some of which are cancelled; and whether one waited while there was a slot."""
    texts, waited = [], False
    while engine.busy or len(texts) < len(prompts):
        for _ in range(rng.integers(3)):
            if len(texts) < len(prompts):
                texts.append(engine.submit(prompts[len(texts)], samplings[len(texts)]))
        if texts and rng.random() < 0.04:
            engine.cancel(texts[rng.integers(len(texts))])
        engine.step()
        waited |= bool(engine.waiting) and None in engine.slots
        assert 0 <= engine.usage <= 1
    return texts, waited


@pytest.mark.parametrize("prefix_cache", [pytest.param(0, marks=pytest.mark.long), 4])
def test_texts_that_come_and_go_where_pages_are_scarce_are_those_of_one_at_a_time(prefix_cache):
    """With penalties, which count what was drawn before a text lost its pages as drawn; beside contiguous slots."""
    rng = np.random.default_rng(prefix_cache)
    prompts, samplings = requests(24, rng)
    expected = alone(tiny.engine(), prompts, [replace(one, prompt_logprobs=False) for one in samplings])
    engine = tiny.engine(PAGED, prefix_cache=prefix_cache)
    texts, waited = at_random(engine, prompts, samplings, rng)
    cancelled = [text.finish == "cancelled" for text in texts]
    for text, other in zip(texts, expected, strict=True):
        if text.finish == "cancelled":
            continue
        assert (text.tokens, text.finish) == (other.tokens, other.finish)
        np.testing.assert_allclose(text.logprobs, other.logprobs, atol=2e-5)
        assert [[token for token, _ in top] for top in text.top] == [[token for token, _ in top] for top in other.top]
        if text.sampling.prompt_logprobs:
            reference = tiny.logprobs(text.prompt)[np.arange(len(text.prompt) - 1), text.prompt[1:]]
            np.testing.assert_allclose(text.prompt_logprobs, reference, atol=2e-5)
            assert len(text.prompt_top) == len(text.prompt) - 1
    assert 0 < sum(cancelled) < 12 and engine.counts["preemptions"] > 2 and waited
    assert (engine.counts["prefix_tokens"] > 50) == bool(prefix_cache) and is_empty(engine)


def test_texts_of_one_prompt_share_its_pages_and_read_it_once():
    """As n and best_of ask for: 4 texts of 35 tokens have 4 whole pages together, and one each."""
    engine, prompt = tiny.engine(PAGED, prefix_cache=4), BEGINS[0]
    texts = [engine.submit(prompt, Sampling(seed=seed, max_tokens=4)) for seed in range(4)]
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, round(engine.usage * 11))
    # When two chunks of 16 are read, so little is left that it is read four times, the last token with it.
    assert engine.counts["prompt_tokens"] == 35 + 3 * 3 and engine.counts["prefix_tokens"] == 3 * 32
    assert most == 4 + 4 and not engine.counts["preemptions"]
    expected = alone(tiny.engine(PAGED), [prompt] * 4, [text.sampling for text in texts])
    assert [text.tokens for text in texts] == [text.tokens for text in expected]


def test_an_engine_that_failed_begins_again_with_all_pages():
    engine, sampling = tiny.engine(PAGED, prefix_cache=4), Sampling(seed=3, max_tokens=6)
    texts = [engine.submit(BEGINS[0], sampling) for _ in range(4)]
    for _ in range(4):
        engine.step()
    engine.fail()
    assert {text.finish for text in texts} == {"error"} and is_empty(engine)
    before = engine.counts["prefix_tokens"]
    text, other = (generate_all(one, [BEGINS[0]], [sampling])[0] for one in (engine, tiny.engine(PAGED)))
    assert text.tokens == other.tokens and engine.counts["prefix_tokens"] == before


def test_the_text_that_ended_first_loses_its_last_page_first():
    engine, greedy = tiny.engine(PAGED, prefix_cache=4), Sampling(temperature=0.0, max_tokens=3)
    old, new = [1] * 21, [2] * 21  # 3 pages of 8 each; 11 - 6 are left
    alone(engine, [old, new], [greedy] * 2)
    generate_all(engine, [[3] * 44], [greedy])  # takes 6: the old text has 2 whole pages then
    generate_all(engine, [[*new, 9]], [greedy])  # shares 2 pages and copies one, to the old text's second
    assert engine.counts["prefix_tokens"] == 21
    generate_all(engine, [[*old, 9]], [greedy])
    assert engine.counts["prefix_tokens"] == 21 + 8


@pytest.mark.long
def test_pages_that_do_not_fit_are_refused_by_name():
    decoder = tiny.programs()[0].decoder
    for axes, more, words in (
        ("", {"pages": 7}, "pages=7 of page_size=8: a text of length=64 needs 8; valid: pages=8 or more"),
        ("dp=2", {"pages": 14}, "needs 8 for each of the 2 data-parallel parts; valid: pages=16 or more"),
        ("dp=2", {"pages": 17}, "pages=17 of the cache does not divide by dp=2; nearest valid: 16"),
        ("cp=2", {"page_size": 9}, "page_size=9 of the cache does not divide by cp=2; nearest valid: 8"),
    ):
        with pytest.raises(PlanError, match=words):
            make_programs(replace(decoder, plan=Plan(axes)), replace(PAGED, **{"pages": 32} | more))
    with pytest.raises(PlanError, match="pages=11: prefill has no page table; use an Engine, or pages=0"):
        tiny.programs(PAGED)[0].prefill(tiny.programs()[1], np.ones((4, 4)), np.ones(4))
    with pytest.raises(ValueError, match="pages=-1 must be at least 1, or 0 for contiguous slots"):
        replace(PAGED, pages=-1)
    with pytest.raises(PlanError, match="differ in pages: 11, and 0 of the draft"):
        Speculating(tiny.programs(PAGED)[0], tiny.programs()[0])


WINDOWS = replace(tiny.CONFIG, window=5, attention_pattern="LG")
LATENT = replace(tiny.CONFIG, kv_heads=0, latent=LatentConfig(kv_rank=8, nope_dim=8, rope_dim=4, value_dim=8))
ROUTED = replace(tiny.CONFIG, mlp="routed", moe=MoEConfig(router=RouterConfig(experts=4, k=2)))
FORMS = {
    "latent": (LATENT, {}, ""),
    "int8": (tiny.CONFIG, {"cache_dtype": "int8"}, ""),
    "draft": (tiny.CONFIG, {}, ""),
    "dp=2, cp=2, tp=2": (WINDOWS, {}, "dp=2, cp=2, tp=2"),
    "pp=2, dp=2": (tiny.CONFIG, {"steps": 3, "rows": 2}, "pp=2, dp=2"),
    "ep=2, tp=2": (ROUTED, {}, "ep=2, tp=2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_attention_and_plan_draws_the_tokens_of_contiguous_slots(name):
    """Texts that share and lose pages, each beside the same one alone in contiguous slots."""
    (config, more, axes), rng = FORMS[name], np.random.default_rng(3)
    parts = Plan(axes).data

    def engine(sizes, **options):
        made, params = tiny.programs(sizes, config, axes)
        if name == "draft":
            small, small_params = tiny.programs(sizes, replace(config, layers=1))
            made = Speculating(made, small, 3)
            params = made.place(params, small_params)
        return Engine(made, params, **options)

    sizes = replace(tiny.SIZES, slots=4 * parts, **more)
    prompts, samplings = requests(16 * parts, rng)
    samplings = [replace(one, prompt_logprobs=False) for one in samplings]
    if name == "int8":  # keys of a text that is read again, in other chunks, may be rounded to the number beside
        samplings = [replace(one, max_tokens=3) for one in samplings]
    paged = engine(replace(sizes, pages=10 * parts, page_size=8), prefix_cache=4)
    expected = alone(engine(sizes), prompts, samplings)
    texts, _ = at_random(paged, prompts, samplings, rng)
    for text, other in zip(texts, expected, strict=True):
        assert text.finish == "cancelled" or text.tokens == other.tokens
    assert sum(text.finish == "cancelled" for text in texts) < len(texts) / 2 and is_empty(paged)
    assert paged.counts["prefix_tokens"] and (name == "int8" or paged.counts["preemptions"])
