"""Incremental detokenization: an incomplete character, or what may begin a stop string, is held back."""

from collections.abc import Sequence

import numpy as np

from tessera.data.text import Tokenizer

UNDECODED = "�"  # what a tokenizer shows for bytes that are not UTF-8 (yet)


class TextStream:
    """Decodes one text step by step; what is given out joins to the text that ends before the first stop string.

    Args:
      tokenizer: of the model.
      stop: strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(word for word in stop if word)
        self.stopped = False
        self._given = 0

    def feed(self, tokens: Sequence[int], *, final: bool = False) -> str:
        """The text that is new.

        Args:
          tokens: all tokens so far.
          final: no more will come: give out what waited.
        """
        if self.stopped:
            return ""
        text = self.tokenizer.decode(np.asarray(tokens, np.int32)) if len(tokens) else ""
        ends = [place for word in self.stop if (place := text.find(word)) >= 0]
        if ends:
            self.stopped, end = True, min(ends)
        elif final:
            end = len(text)
        else:
            end = len(text.rstrip(UNDECODED)) - self._held(text.rstrip(UNDECODED))
        new = text[self._given : max(end, self._given)]
        self._given = max(end, self._given)
        return new

    def _held(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max((len(word) for word in self.stop), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(word.startswith(text[-n:]) for word in self.stop)), 0)
