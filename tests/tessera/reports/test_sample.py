"""A sample of text in a run's report: the model's own tokens, drawn by its probabilities, shown as text."""

import html
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tessera.data.text import ByteTokenizer
from tessera.infra.logger import write_text
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.reports.html import page
from tessera.reports.sample import SAMPLE, continue_text, sample_section, write_sample

CONFIG = TransformerConfig(vocab_size=256, layers=2, width=16, heads=2, kv_heads=2, ff=16, init_scale=2.0)
PROMPT = np.random.default_rng(0).integers(0, 256, 5)


@cache
def made(config=CONFIG):
    model = Decoder(config)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def test_a_cold_sample_is_the_most_probable_token_every_time():
    """As the decoder read again up to each token, without what follows."""
    model, params = made()
    tokens = PROMPT.tolist()
    for _ in range(6):
        logits = model.apply({"params": params}, jnp.asarray([tokens]))[0, -1]
        tokens.append(int(np.argmax(logits)))
    found = continue_text(model, params, jnp.asarray(PROMPT), jax.random.key(1), temperature=1e-4, count=6)
    assert np.asarray(found).tolist() == tokens[5:] and len(set(tokens[5:])) > 1


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tokens_are_drawn_by_their_probability(temperature):
    """4,000 draws of one token against softmax(logits / temperature) in float64: chi-squared of the ten likeliest."""
    model, params = made()
    logits = np.asarray(model.apply({"params": params}, jnp.asarray(PROMPT[None]))[0, -1], np.float64) / temperature
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    draw = jax.vmap(
        lambda key: continue_text(model, params, jnp.asarray(PROMPT), key, temperature=temperature, count=1)
    )
    found = np.bincount(np.asarray(draw(jax.random.split(jax.random.key(2), 4000)))[:, 0], minlength=256)
    best = np.argsort(-expected)[:10]
    seen, due = ([*counts[best], counts.sum() - counts[best].sum()] for counts in (found, 4000 * expected))
    assert stats.chisquare(seen, due).pvalue > 1e-4


@pytest.mark.parametrize(("length", "count", "drawn"), [(16, 64, 8), (200, 64, 64), (200, 500, 136), (2, 9, 1)])
def test_a_sample_is_no_longer_than_the_text_it_was_trained_on(tmp_path, length, count, drawn):
    text = np.frombuffer(b"if a < b & c:\n    " * 20, np.uint8)[:length].astype(np.int32)
    write_sample(tmp_path, *made(), text, ByteTokenizer(), count)
    (section,) = sample_section(tmp_path)
    shown = html.unescape(page("x", [section]))
    assert f"marked {drawn} tokens" in shown and bytes(text[: min(64, length // 2)].tolist()).decode() in shown
    model, params = made()
    key = jax.random.key(0)
    prompt = text[: min(64, length // 2)]
    tokens = continue_text(model, params, jnp.asarray(prompt), key, temperature=0.8, count=drawn)
    whole = np.concatenate([prompt, np.asarray(tokens)]).astype(np.uint8).tobytes().decode(errors="replace")
    assert page("", [section]).count("<mark>") == 1 and "<mark>" not in whole
    assert whole[len(prompt) :].rstrip()[-3:] in shown


def test_nothing_is_drawn_where_none_is_asked_for(tmp_path):
    write_sample(tmp_path, *made(), np.arange(32), ByteTokenizer(), 0)
    assert not (tmp_path / SAMPLE).exists() and sample_section(tmp_path) == []


def test_a_sample_is_text_and_not_markup(tmp_path):
    write_text(tmp_path / SAMPLE, '{"prompt": "<b>", "text": "</mark><script>", "tokens": 1, "temperature": 0.8}')
    shown = page("x", sample_section(tmp_path))
    assert "&lt;b&gt;<mark>&lt;/mark&gt;&lt;script&gt;</mark>" in shown
