"""Text cut into equal windows that fit in memory, so that a stack of language models trains like one of images."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from tessera.data.text import TextConfig, load_text


@dataclass(frozen=True)
class WindowConfig:
    """Which text, and how it is cut.

    Attributes:
      text: see `tessera.data.text.TextConfig`.
      length: inputs per window.
      limit: windows of the training text to keep, the first ones; 0 keeps all.
      test_limit: the same for validation and test.
    """

    text: TextConfig = TextConfig()
    length: int = 64
    limit: int = 0
    test_limit: int = 0

    def __post_init__(self):
        if self.length < 1 or self.limit < 0 or self.test_limit < 0:
            raise ValueError(
                f"length={self.length} must be at least 1, limit={self.limit} and {self.test_limit} 0 or more"
            )
        if self.text.packing:
            raise ValueError(f"packing={self.text.packing!r}: the windows of a stack of models are not packed")


class Windows(NamedTuple):
    """Tokens and the next ones; named as the fields of `tessera.data.images.Images` are."""

    images: Int32[np.ndarray, "N T"]
    labels: Int32[np.ndarray, "N T"]


class WindowSplits(NamedTuple):
    """Windows for training, choosing and reporting; `num_classes` is the size of the vocabulary."""

    train: Windows
    validation: Windows
    test: Windows
    num_classes: int


def load_windows(config: WindowConfig) -> WindowSplits:
    """Read the text, tokenize it and cut it.

    Raises:
      ValueError: a split shorter than one window, or what `load_text` raises.
    """
    text = load_text(config.text)
    cut = {name: windows(getattr(text, name), config.length, name) for name in ("train", "validation", "test")}
    limits = {"train": config.limit, "validation": config.test_limit, "test": config.test_limit}
    parts = {name: Windows(*(part[: limits[name] or None] for part in pair)) for name, pair in cut.items()}
    return WindowSplits(**parts, num_classes=text.vocab_size)


def windows(tokens: np.ndarray, length: int, what: str = "text") -> Windows:
    """Window i holds tokens [i * length, (i + 1) * length) and, one to the right, their targets; a tail is left out.

    Raises:
      ValueError: fewer than length + 1 tokens.
    """
    count = (len(tokens) - 1) // length
    if count < 1:
        raise ValueError(f"{what}: {len(tokens)} tokens do not fill one window of length={length}")
    inputs = tokens[: count * length].reshape(count, length)
    targets = tokens[1 : count * length + 1].reshape(count, length)
    return Windows(inputs.astype(np.int32), targets.astype(np.int32))
