"""What a trained language model writes: a sample of text for its report."""

import html
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from tessera.data.text import Tokenizer
from tessera.infra.logger import write_text
from tessera.models.transformer import Decoder
from tessera.reports.html import Section, read_json

SAMPLE = "sample.json"
TEMPERATURE = 0.8
PROMPT = 64  # tokens of held-out text before the sample, at most


@partial(jax.jit, static_argnames=("model", "count", "temperature"))
def continue_text(
    model: Decoder, params: PyTree, prompt_T: Int[Array, " T"], key: Key[Array, ""], *, temperature: float, count: int
) -> Int[Array, " N"]:
    """Draw `count` tokens after a prompt; every token takes a forward pass of all T + N (no KV cache).

    One small program for a few tokens; `tessera.serving` compiles two larger ones and draws many.

    Args:
      model: the decoder.
      params: of the model.
      prompt_T: at least one token.
      key: of the draws.
      temperature: of the softmax, above 0.
      count: N.

    Returns:
      the tokens drawn.
    """
    start = len(prompt_T)

    def draw(t: Int[Array, ""], tokens_L: Int[Array, " L"]) -> Int[Array, " L"]:
        logits_BLV: Any = model.apply({"params": params}, tokens_L[None])
        token = jax.random.categorical(jax.random.fold_in(key, t), logits_BLV[0, t - 1] / temperature)
        return tokens_L.at[t].set(token.astype(tokens_L.dtype))

    tokens_L = jnp.concatenate([prompt_T, jnp.zeros(count, jnp.int32)])
    return jax.lax.fori_loop(start, start + count, draw, tokens_L)[start:]


def write_sample(
    workdir: Path, model: Decoder, params: PyTree, text_T: np.ndarray, tokenizer: Tokenizer, count: int
) -> None:
    """Save what the model writes after the beginning of a held-out text, for `sample_section`.

    Prompt and sample are no longer than the text, which is one of the run's length. Nothing is written for `count` 0.
    """
    if count < 1 or len(text_T) < 2:
        return
    prompt_T = np.asarray(text_T, np.int32)[: min(PROMPT, len(text_T) // 2)]
    count = min(count, len(text_T) - len(prompt_T))
    how = {"temperature": TEMPERATURE, "count": count}
    drawn = np.asarray(continue_text(model, params, jnp.asarray(prompt_T), jax.random.key(0), **how))
    # Together: a character may begin before the cut.
    prompt, whole = (tokenizer.decode(np.asarray(t, np.int64)) for t in (prompt_T, np.concatenate([prompt_T, drawn])))
    same = prompt if whole.startswith(prompt) else ""
    found = {"prompt": same or prompt, "text": whole.removeprefix(same), "tokens": int(count)}
    write_text(workdir / SAMPLE, json.dumps(found | {"temperature": TEMPERATURE}))


def sample_section(workdir: Path) -> list[Section]:
    """The section of `write_sample`'s text; none where there is none."""
    found = read_json(workdir / SAMPLE)
    if not found:
        return []
    style = "white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.6 ui-monospace, monospace"
    shown = f'<div style="{style}">{html.escape(found["prompt"])}<mark>{html.escape(found["text"])}</mark></div>'
    caption = (
        f"Held-out text, and marked {found['tokens']} tokens that the last weights go on with, drawn at temperature "
        f"{found['temperature']} (seed 0). More: tessera generate --config.model.dir=RUN."
    )
    return [Section("A sample", [shown], caption)]
