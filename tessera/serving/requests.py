"""What is asked of a server: a prompt in tokens, how to sample, and what has come of it."""

from collections.abc import Callable
from dataclasses import dataclass, field


class QueueFull(RuntimeError):
    """As many requests wait as the queue has room for."""


class PromptTooLong(ValueError):
    """A prompt that leaves no room for a token, or an empty one."""


@dataclass(frozen=True)
class Sampling:
    """How a text is continued; see `sharding.inference.sample.Settings`.

    Attributes:
      temperature: 0 takes the most probable token.
      top_k: 0 is off.
      top_p: 1 is off.
      min_p: 0 is off.
      repetition_penalty: of tokens in the prompt or drawn before; 1 is off.
      presence_penalty: taken off the logits of tokens drawn before; 0 is off.
      frequency_penalty: the same for every time a token was drawn.
      seed: 0..2^32-1; the same seed gives the same tokens whatever else is decoded.
      max_tokens: tokens to draw at most.
      stop_tokens: tokens that end the text; they are not part of it.
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

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0 <= self.temperature <= 100, "in 0..100"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in 0..1"),
            "repetition_penalty": (0 < self.repetition_penalty <= 100, "in (0, 100]"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "in -2..2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "in -2..2"),
            "seed": (0 <= self.seed < 2**32, "in 0..2^32-1"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
        }
        for name, (right, valid) in ranges.items():
            if not right:
                raise ValueError(f"{name}={getattr(self, name)} must be {valid}")


@dataclass(eq=False)
class Text:
    """One request on its way.

    Attributes:
      prompt: its tokens.
      sampling: how it goes on.
      notify: called with the text after tokens came, and once more when it ends; must return quickly.
      tokens: drawn so far.
      logprobs: of each of them under the model.
      finish: "" while it runs, then "stop" (a stop token), "length" (max_tokens, or no room), "cancelled" or "error".
      read: tokens of the prompt in the cache.
      slot: where it is decoded; -1 while it waits and when it is done.
      number: order of arrival at its engine.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    notify: Callable[["Text"], None] = lambda text: None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""
    read: int = 0
    slot: int = -1
    number: int = -1

    @property
    def reading(self) -> bool:
        """Whether part of the prompt is still to be read."""
        return self.read < len(self.prompt)
