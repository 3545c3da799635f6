"""What is asked of a server: a prompt in tokens, how to sample, and what has come of it."""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tessera.serving.lookup import NGrams

ALTERNATIVES = 20  # most probable tokens at each token drawn, at most; as of `sharding.inference.sample`
LARGEST = 2**31 - 1  # what the devices' int32 holds
MAX_STOP_TOKENS = 1024
MAX_BIASES, MAX_BIAS = 1024, 100


class QueueFull(RuntimeError):
    """The queue of waiting requests is full."""


class OutOfRange(ValueError):
    """A setting of the wrong type or out of range; `parameter` is its name."""

    def __init__(self, parameter: str, value: Any, valid: str):
        super().__init__(f"{parameter}={show(value)} must be {valid}")
        self.parameter = parameter


class PromptTooLong(ValueError):
    """A prompt that fills the context length, or an empty one."""


@dataclass(frozen=True)
class Sampling:
    """How a text is continued; see `sharding.inference.sample.Settings`.

    Attributes:
      temperature: 0 takes the most probable token; else 1e-10..100.
      top_k: 0 is off; at most 2^31 - 1.
      top_p: 1 is off.
      min_p: 0 is off.
      repetition_penalty: of tokens in the prompt or drawn before; 1 is off, 0.01..100.
      presence_penalty: subtracted from the logits of tokens drawn before; 0 is off.
      frequency_penalty: the same for every time a token was drawn.
      seed: 0..2^32-1; the same seed gives the same tokens whatever else is decoded.
      max_tokens: tokens to draw at most; 0 reads the prompt only.
      stop_tokens: tokens that end the text; they are not part of it.
      top_logprobs: most probable tokens to give with every token drawn, 0..20, with their log-probabilities.
      prompt_logprobs: give the log-probabilities of the prompt's tokens too, and as many most probable ones.
      logit_bias: (token, number in -100..100) pairs, added to the tokens' logits.
      adapter: name of one of the engine's LoRA adapters; "" is the base.

    Raises:
      OutOfRange: a value of the wrong type, not finite or out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    max_tokens: int = 16
    stop_tokens: tuple[int, ...] = ()
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    adapter: str = ""

    def __post_init__(self) -> None:
        for name in NUMBERS:
            check_number(name, getattr(self, name))
        for name, (low, high) in WHOLE.items():
            check_whole(name, getattr(self, name), low, high)
        if not isinstance(self.stop_tokens, tuple | list) or len(self.stop_tokens) > MAX_STOP_TOKENS:
            raise OutOfRange("stop_tokens", self.stop_tokens, f"a list of at most {MAX_STOP_TOKENS} token ids")
        for token in self.stop_tokens:
            check_whole("stop_tokens", token, 0, LARGEST)
        if len(self.logit_bias) > MAX_BIASES:
            raise OutOfRange("logit_bias", self.logit_bias, f"at most {MAX_BIASES} pairs of a token id and a number")
        for token, bias in self.logit_bias:
            check_whole("logit_bias", token, 0, LARGEST)
            if not (is_number(bias) and abs(bias) <= MAX_BIAS):
                raise OutOfRange("logit_bias", bias, f"a number in -{MAX_BIAS}..{MAX_BIAS} for every token")
        object.__setattr__(self, "stop_tokens", tuple(int(token) for token in self.stop_tokens))

    @property
    def plain(self) -> bool:
        """Whether the next token is always the most probable one."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return self.temperature == 0 and penalties == (1, 0, 0) and not self.logit_bias


SMALLEST = 1e-10  # a logit over a smaller temperature may not be a float32
NUMBERS = {  # lowest, highest, and the range as text
    "temperature": (SMALLEST, 100, f"in {SMALLEST}..100, or 0"),
    "top_p": (math.ulp(0.0), 1, "in (0, 1]"),
    "min_p": (0, 1, "in 0..1"),
    "repetition_penalty": (0.01, 100, "in 0.01..100"),
    "presence_penalty": (-2, 2, "in -2..2"),
    "frequency_penalty": (-2, 2, "in -2..2"),
}
WHOLE = {
    "top_k": (0, LARGEST),
    "seed": (0, 2**32 - 1),
    "max_tokens": (0, LARGEST),
    "top_logprobs": (0, ALTERNATIVES),
}


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return isinstance(value, numbers.Integral) or math.isfinite(value)


def check_number(name: str, value: Any) -> None:
    """Raise OutOfRange unless a value is a number in the range of its setting, one of `NUMBERS`."""
    low, high, valid = NUMBERS[name]
    if not is_number(value):
        raise OutOfRange(name, value, f"a number {valid}")
    if not (low <= value <= high or (name == "temperature" and value == 0)):
        raise OutOfRange(name, value, valid)


def check_whole(name: str, value: Any, low: int, high: int) -> None:
    """Raise OutOfRange unless a value is a whole number (an int, not 3.0) from low to high."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not (whole and low <= value <= high):
        raise OutOfRange(name, value, f"a whole number in {low}..{high}")


def show(value: Any, most: int = 60) -> str:
    """A value for a message, shortened."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


@runtime_checkable
class Constraint(Protocol):
    """What a text may go on with, token by token; see `tessera.serving.constrain`."""

    def allowed(self) -> np.ndarray:
        """Tokens that may come next, bool [V]."""
        ...

    def accept(self, token: int) -> None:
        """Note the token that came."""
        ...

    @property
    def ended(self) -> bool:
        """Whether the text is complete, and nothing may follow."""
        ...


@dataclass(eq=False)
class Request:
    """One request on its way.

    Attributes:
      prompt: its tokens.
      sampling: how it goes on.
      notify: called with the request after tokens came, and once more when it ends; must return quickly.
      tokens: drawn so far.
      logprobs: of each of them under the model.
      top: (token, log-probability) of the most probable tokens at each of them, the most probable first.
      finish: "" while it runs, then "stop" (a stop token, or the model's end of text), "length" (max_tokens, or the
        end of the context), "cancelled" or "error" (its own, or of a step that all requests share).
      read: tokens of `text` in the cache.
      slot: where it is decoded; -1 while it waits, at first or for pages, and when it is done.
      adapter: number of its adapter at the engine; 0 is the base.
      number: order of arrival at its engine.
      constraint: what the text may be; None is anything.
      prompt_logprobs: of the prompt's tokens but the first, if asked for; complete before the first token is drawn.
      prompt_top: as `top`, in place of each of them.
      grams: n-grams of the text that drafts are looked up in, if they are.
      end: log-probability of the token that ended the text, which is no part of it, and `top` in its place.
      started: when it had a slot first, by `time.monotonic`; 0.0 before.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    notify: Callable[["Request"], None] = lambda request: None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    finish: str = ""
    read: int = 0
    slot: int = -1
    adapter: int = 0
    number: int = -1
    constraint: Constraint | None = None
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    grams: NGrams | None = None
    end: tuple[float, tuple[tuple[int, float], ...]] | None = None
    started: float = 0.0

    def since(self, start: int) -> tuple[list[int], list[float], list[tuple[tuple[int, float], ...]], str]:
        """Tokens from number `start` on, `logprobs` and `top` of each, and `finish`, of one moment; from any thread."""
        finish = self.finish  # first: what is added after it is read was not the end
        count = len(self.logprobs)  # each is added after its token and the most probable ones
        return self.tokens[start:count], self.logprobs[start:count], self.top[start:count], finish

    @property
    def text(self) -> tuple[int, ...]:
        """What has to be in the cache before the next token is drawn: all but the last one that was drawn."""
        return (*self.prompt, *self.tokens[:-1])

    @property
    def reading(self) -> bool:
        """Whether part of the prompt, or of a text that lost its pages, is still to be read."""
        return self.read < self.known

    @property
    def known(self) -> int:
        """Tokens of `text`."""
        return len(self.prompt) + max(len(self.tokens) - 1, 0)
