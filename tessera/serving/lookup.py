"""Drafts without a model: what followed the last n-gram of a text where it came before (prompt lookup decoding).

Saxena (2023), github.com/apoorvumang/prompt-lookup-decoding: code and edited text repeat much of what is there already.
"""

from collections.abc import Sequence


class NGrams:
    """Where the n-grams of a text ended last, for n from `least` to `most`; a token costs as many entries of a dict.

    Example:
      >>> grams = NGrams(most=3)
      >>> grams.add([1, 2, 3, 4, 1, 2])
      >>> grams.draft(3)
      [3, 4, 1]
      >>> grams.add([9])
      >>> grams.draft(3)
      []
    """

    def __init__(self, most: int, least: int = 2):
        self.sizes = range(most, min(least, most) - 1, -1)
        self.text: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._noted = 0

    def add(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        self.text += tokens

    def draft(self, count: int) -> list[int]:
        """Look up the longest n-gram that ends the text: up to `count` tokens that followed it where it came last."""
        length = len(self.text)
        for end in range(self._noted + 1, length):  # an n-gram is noted when something has followed it
            for n in self.sizes:
                if n <= end:
                    self._ends[tuple(self.text[end - n : end])] = end
        self._noted = max(self._noted, length - 1)
        for n in self.sizes:
            found = self._ends.get(tuple(self.text[length - n :])) if n <= length else None
            if found is not None:
                return self.text[found : found + count]
        return []
