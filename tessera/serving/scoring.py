"""Log-probabilities of given texts: windows of long ones, perplexity, bits per byte."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from tessera.serving.engine import Engine, generate_all
from tessera.serving.requests import Request, Sampling


class Part(NamedTuple):
    """Tokens to score, after tokens that are only read: at least one."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]


class Score(NamedTuple):
    """What a model makes of the tokens of a `Part`.

    Attributes:
      logprobs: of each token (natural logarithm).
      greedy: whether each was the most probable one.
    """

    logprobs: tuple[float, ...]
    greedy: bool


class Perplexity(NamedTuple):
    """Cross-entropy of a text.

    Attributes:
      tokens: that were scored.
      bytes: of the text in UTF-8.
      nats: the sum of the tokens' negative log-probabilities.
    """

    tokens: int
    bytes: int
    nats: float

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token): compares models of one tokenizer."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text: compares models of different tokenizers."""
        return self.nats / math.log(2) / self.bytes


READ = Sampling(temperature=0.0, max_tokens=0, prompt_logprobs=True, top_logprobs=1)


def score(
    engine: Engine, parts: Sequence[Part], progress: Callable[[int], None] = lambda tokens: None, adapter: str = ""
) -> list[Score]:
    """Score parts of texts, as many at once as the engine has slots.

    Args:
      engine: that nobody else steps.
      parts: a context too long for the engine loses its first tokens.
      progress: called with the number of scored tokens of a part when it is done.
      adapter: see `Sampling.adapter`.

    Raises:
      ValueError: a part without context or tokens, or with more tokens than fit behind one of context.
    """
    most = engine.programs.config.length - 1
    for part in parts:
        if not (part.context and 0 < len(part.tokens) < most):
            raise ValueError(
                f"a part of {len(part.context)} tokens of context and {len(part.tokens)} to score: at least one of "
                f"context and 1 to {most - 1} to score fit"
            )

    def listener(count: int) -> Callable[[Request], None]:
        return lambda request: progress(count) if request.finish else None

    prompts = [(*part.context, *part.tokens)[-most:] for part in parts]
    listeners = [listener(len(part.tokens)) for part in parts]
    requests = generate_all(engine, prompts, [replace(READ, adapter=adapter)] * len(parts), listeners)
    scores = []
    for part, request in zip(parts, requests, strict=True):
        if request.finish != "length":
            raise RuntimeError("the engine failed; the log says why")
        count = len(part.tokens)
        best = [top[0][0] for top in request.prompt_top[-count:]]
        scores.append(Score(tuple(request.prompt_logprobs[-count:]), best == list(part.tokens)))
    return scores


def windows(tokens: Sequence[int], begin: int, length: int, stride: int = 0) -> list[Part]:
    """Cut a text into parts that score every token once, those past the first window after at least `length - stride`.

    Args:
      tokens: of the text.
      begin: token that the first one follows.
      length: tokens of a window, of which the first is context only.
      stride: tokens scored by each window after the first; 0 takes all but one (disjoint windows).

    Example:
      >>> [(part.context, part.tokens) for part in windows([1, 2, 3, 4, 5], begin=0, length=4, stride=1)]
      [((0,), (1, 2, 3)), ((1, 2, 3), (4,)), ((2, 3, 4), (5,))]
    """
    if length < 2:
        raise ValueError(f"length={length}: a window has a token of context and one to score, so at least 2")
    if not 0 <= stride < length:
        raise ValueError(f"stride={stride} must be in 1..{length - 1}, or 0 for windows that do not overlap")
    stride = stride or length - 1
    text = [begin, *tokens]
    parts = [Part((begin,), tuple(text[1:length]))] if tokens else []
    for first in range(length, len(text), stride):
        end = min(first + stride, len(text))
        parts.append(Part(tuple(text[first + stride - length : first]), tuple(text[first:end])))
    return parts


def perplexity(
    engine: Engine,
    texts: Sequence[Sequence[int]],
    size: int,
    begin: int,
    *,
    length: int = 0,
    stride: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
    adapter: str = "",
) -> Perplexity:
    """Score all tokens of some texts, each by itself.

    Args:
      engine: that nobody else steps.
      texts: their tokens; a `begin` that the tokenizer put before a text is not scored.
      size: bytes of the texts together.
      begin: token that a text follows, the model's beginning or end of text.
      length: see `windows`; 0 is the engine's.
      stride: see `windows`.
      progress, adapter: see `score`.

    Raises:
      ValueError: no tokens; a length that does not fit.
    """
    length = length or engine.programs.config.length - 1
    texts = [text[1:] if list(text[:1]) == [begin] else text for text in texts]
    parts = [part for text in texts for part in windows(text, begin, length, stride)]
    if not parts:
        raise ValueError("no text to score: every document is empty")
    scores = score(engine, parts, progress, adapter)
    nats = -math.fsum(logprob for one in scores for logprob in one.logprobs)
    return Perplexity(sum(len(part.tokens) for part in parts), size, nats)
