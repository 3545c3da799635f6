"""Two models behind one engine: what comes out is the large one's, however well the small one guesses."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_model as tiny

from lottery import export
from sharding.errors import PlanError
from sharding.plan import Plan
from tessera.data.text import BPETokenizer
from tessera.serving.engine import Engine, generate_all
from tessera.serving.load import DraftConfig, Loaded, SourceConfig, export_directory, load, make_engine
from tessera.serving.lookup import NGrams
from tessera.serving.requests import Sampling
from tessera.serving.speculative import Speculating

SMALL, DEEP = (replace(tiny.CONFIG, layers=layers) for layers in (1, 3))
PROMPTS = [[5, 6, 7], list(range(14)), [1], list(range(9, 25)), [200], [3, 1, 4, 1, 5]]
LONG = list(range(40))  # read in pieces
GREEDY = [
    Sampling(temperature=0.0, max_tokens=12),
    Sampling(temperature=0.0, max_tokens=60),
    Sampling(temperature=0.0, max_tokens=1),
    Sampling(temperature=0.0, repetition_penalty=1.4, max_tokens=15),
    Sampling(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.5, max_tokens=14),
    Sampling(temperature=0.0, max_tokens=9),
]
SAMPLED = [replace(one, temperature=0.6 + 0.1 * i, top_p=0.9, seed=i) for i, one in enumerate(GREEDY)]


def engine(axes="", small=SMALL, draft_axes=None, drafted=3, **options):
    (target, params), (draft, draft_params) = (
        tiny.programs(tiny.SIZES, config, split)
        for config, split in ((tiny.CONFIG, axes), (small, axes if draft_axes is None else draft_axes))
    )
    both = Speculating(target, draft, drafted)
    return Engine(both, both.place(params, draft_params), **options)


@pytest.mark.long
@pytest.mark.parametrize(
    "axes, draft_axes",
    [
        ("", ""),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("dp=2, tp=2", "dp=2, tp=2"), ("pp=2, cp=2", ""), ("dp=2, tp=4", "dp=2"))
        ),
    ],
)
def test_greedy_texts_are_the_large_models_own(axes, draft_axes):
    """Six texts through four slots, with penalties, one until there is no room, one to a stop token."""
    prompts = [PROMPTS[0], LONG if axes else PROMPTS[1], *PROMPTS[2:]]
    plain = generate_all(tiny.engine(axes=axes), prompts, GREEDY)
    stop = plain[5].tokens[4]
    asked = [replace(one, top_logprobs=3) for one in (*GREEDY[:5], replace(GREEDY[5], stop_tokens=(stop,)))]
    both = engine(axes, draft_axes=draft_axes)
    found = generate_all(both, prompts, asked)
    for one, other in zip(found[:5], plain[:5], strict=True):
        assert one.tokens == other.tokens and one.finish == other.finish == "length"
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        # Without penalties a greedy text takes the most probable token.
        assert all(top[0] == pytest.approx(max(top, key=lambda one: one[1])) for top in one.top)
    for token, logprob, top in zip(found[0].tokens, found[0].logprobs, found[0].top, strict=True):
        assert top[0] == pytest.approx((token, logprob), abs=1e-5)
    assert len(found[1].tokens) == tiny.SIZES.length - len(prompts[1])
    assert found[5].finish == "stop" and found[5].tokens == plain[5].tokens[: plain[5].tokens.index(stop)]
    assert 0 < both.counts["accepted"] < both.counts["drafted"]


def test_a_sampled_text_depends_on_its_seed_and_not_on_its_neighbours():
    both = engine()
    together = generate_all(both, PROMPTS, SAMPLED)
    for prompt, sampling, text in zip(PROMPTS[::2], SAMPLED[::2], together[::2], strict=True):
        assert generate_all(both, [prompt], [sampling])[0].tokens == text.tokens
    again = generate_all(both, PROMPTS[:1], [replace(SAMPLED[0], seed=99)])[0]
    assert again.tokens != together[0].tokens
    assert both.counts["accepted"] < both.counts["drafted"]


@pytest.mark.slow
def test_a_model_that_drafts_for_itself_is_always_right():
    itself = engine(small=tiny.CONFIG)
    texts = generate_all(itself, [PROMPTS[0], LONG, *PROMPTS[2:]], SAMPLED)
    assert [len(text.tokens) for text in texts] == [12, 24, 1, 15, 14, 9]
    assert itself.counts["accepted"] > 0.98 * itself.counts["drafted"]  # p / q is 1 but for rounding
    assert itself.counts["decode_steps"] < 0.6 * sum(len(text.tokens) for text in texts)


@pytest.mark.slow
def test_a_cancelled_text_leaves_its_slot_to_the_next():
    both = engine()
    texts = [both.submit(prompt, replace(GREEDY[0], max_tokens=20)) for prompt in PROMPTS]
    both.step()
    both.cancel(texts[1])
    both.run()
    plain = generate_all(tiny.engine(), PROMPTS, [replace(GREEDY[0], max_tokens=20)] * 6)
    assert texts[1].finish == "cancelled"
    assert [text.tokens for i, text in enumerate(texts) if i != 1] == [
        text.tokens for i, text in enumerate(plain) if i != 1
    ]


class Anything:
    """A constraint that allows every token."""

    ended = False

    def allowed(self):
        return np.ones(256, bool)

    def accept(self, token):
        pass


def test_what_a_draft_cannot_keep_to_is_refused():
    both = engine()
    with pytest.raises(ValueError, match="logit_bias=.* must be left out beside a draft model"):
        both.submit([1], Sampling(logit_bias=((3, 1.0),)))
    with pytest.raises(ValueError, match="response_format=.* must be left out beside a draft model"):
        both.submit([1], constraint=Anything())
    assert not both.busy


def test_a_prompts_log_probabilities_and_prefixes_are_the_large_models():
    both = engine(prefix_cache=2)
    asked = [Sampling(temperature=0.0, max_tokens=6, prompt_logprobs=True), Sampling(temperature=0.0, max_tokens=9)]
    found = [generate_all(both, [LONG], [one])[0] for one in asked]
    plain = [generate_all(tiny.engine(), [LONG], [one])[0] for one in asked]
    assert [text.tokens for text in found] == [text.tokens for text in plain]
    np.testing.assert_allclose(found[0].prompt_logprobs, plain[0].prompt_logprobs, atol=1e-5)
    assert both.counts["prefix_tokens"] == len(LONG) - 1


def test_models_that_do_not_go_together_are_refused():
    target, _ = tiny.programs()
    for name, size in (("slots", 8), ("length", 32)):
        with pytest.raises(PlanError, match=name):
            Speculating(target, replace(target, config=replace(target.config, **{name: size})))
    other = replace(target.decoder, config=replace(target.decoder.config, vocab_size=128))
    with pytest.raises(PlanError, match="vocabulary: 256, and 128"):
        Speculating(target, replace(target, decoder=other))
    with pytest.raises(PlanError, match="parts"):
        Speculating(target, replace(target, decoder=replace(target.decoder, plan=Plan("dp=2"))))
    with pytest.raises(ValueError, match="drafted=0"):
        Speculating(target, target, 0)


@pytest.mark.parametrize("axes", ["", pytest.param("dp=2, tp=2", marks=pytest.mark.slow)])
def test_texts_that_are_looked_up_in_themselves_are_the_same_texts(axes):
    """Greedy ones take drafts; beside them, in the same steps, penalties and sampled texts go on without."""
    prompts = [PROMPTS[0], LONG, *PROMPTS[2:], PROMPTS[3]]
    asked = [*GREEDY, replace(SAMPLED[3], max_tokens=30)]
    asked[0] = replace(asked[0], max_tokens=50, top_logprobs=2)
    asked[5] = replace(asked[5], max_tokens=40)
    plain = generate_all(tiny.engine(axes=axes), prompts, asked)
    drafting = tiny.engine(axes=axes, lookup=3, drafted=3)
    found = generate_all(drafting, prompts, asked)
    for one, other in zip(found, plain, strict=True):
        assert one.tokens == other.tokens and one.finish == other.finish
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert [top[0][0] for top in found[0].top] == found[0].tokens
    assert 0 < drafting.counts["accepted"] < drafting.counts["drafted"]


def test_an_n_gram_is_found_where_it_came_last():
    """Against a search from the end, the longest n-gram first, in texts of three different tokens."""
    rng, grams, text = np.random.default_rng(0), NGrams(most=4), []
    for _ in range(200):
        new = rng.integers(0, 3, rng.integers(1, 4)).tolist()
        grams.add(new)
        text += new
        ends = (end for n in (4, 3, 2) for end in range(len(text) - 1, n - 1, -1) if text[end - n : end] == text[-n:])
        end = next(ends, len(text))
        assert grams.draft(5) == text[end : end + 5]


@pytest.mark.parametrize("given", [{"dir": "runs/small"}, {"layers": 1}, {"ticket": "own.safetensors"}])
def test_the_text_or_a_model_drafts(given):
    with pytest.raises(ValueError, match="leave the other out"):
        DraftConfig(lookup=3, **given)


@pytest.fixture(scope="module")
def own_drafts(tmp_path_factory):
    """Decoders of three layers, as Hugging Face directories: one as it is, one whose last two layers add zeros."""
    params = jax.tree.map(np.array, tiny.weights(DEEP))
    made = {}
    for name in ("deep", "last add nothing"):
        directory = tmp_path_factory.mktemp("models") / "model"
        export_directory(Loaded(params, DEEP, BPETokenizer.of_bytes()), directory)
        made[name] = SourceConfig(str(directory))
        params["blocks"]["attention"]["output"]["kernel"][1:] = 0
        params["blocks"]["mlp"]["down"]["kernel"][1:] = 0
    return made


@pytest.mark.parametrize("name", [pytest.param("deep", marks=pytest.mark.long), "last add nothing"])
def test_a_models_first_layers_draft_for_it(own_drafts, name):
    plain, _ = make_engine(own_drafts[name], Plan(), tiny.SIZES)
    both, _ = make_engine(own_drafts[name], Plan(), tiny.SIZES, draft=DraftConfig(layers=1, tokens=3))
    assert isinstance(both.programs, Speculating) and both.programs.draft.decoder.config.layers == 1
    texts = [generate_all(one, PROMPTS[:1], GREEDY[:1])[0].tokens for one in (plain, both)]
    assert texts[0] == texts[1]
    if name == "deep":
        assert both.counts["accepted"] < both.counts["drafted"]
    else:  # both compute the same: after the prompt's token 11 more, 3 drafted and one drawn in each of 3 rounds
        assert both.counts["accepted"] == both.counts["drafted"] == 9


def test_a_models_ticket_drafts_for_it(own_drafts, tmp_path):
    params = load(own_drafts["deep"]).params
    masks = jax.tree.map(lambda leaf: np.arange(leaf.size).reshape(leaf.shape) % 4 > 0, params)
    export.save(tmp_path / "own.safetensors", params, masks)
    sizes, draft = replace(tiny.SIZES, layout="stacked"), DraftConfig(ticket=str(tmp_path / "own.safetensors"))
    both, _ = make_engine(own_drafts["deep"], Plan(), sizes, draft=draft)
    for large, small, mask in zip(*map(jax.tree.leaves, (*both.params, masks)), strict=True):
        np.testing.assert_array_equal(np.asarray(small), np.where(mask, large, 0))
    rounded = make_engine(replace(own_drafts["deep"], bits=8), Plan(), sizes, draft=replace(draft, layers=2))[0]
    for part, layers in zip(rounded.params, (3, 2), strict=True):
        assert part["blocks"]["mlp"]["up"]["kernel"].values.dtype == np.int8
        assert part["blocks"]["mlp"]["up"]["kernel"].values.shape[0] == layers


@pytest.mark.parametrize("layers", [3, 4])
def test_a_draft_has_fewer_layers_than_the_model(own_drafts, layers):
    with pytest.raises(ValueError, match=rf"layers={layers}: the model has 3; 1 to 2 of them can draft"):
        make_engine(own_drafts["deep"], Plan(), tiny.SIZES, draft=DraftConfig(layers=layers))
