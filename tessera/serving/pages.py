"""Who has which page of a KV cache: reference counts, shared prefixes, and texts that ended and can be gone on with.

Contiguous slots are the case of one page per text, as long as a text can be, whose number is the slot's.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Prefix(NamedTuple):
    """Where the beginning of a text is in the cache.

    Attributes:
      shared: tokens, counted from the first.
      pages: that have them; the last one may have other tokens too.
      whole: whether it is all of a text that ended, but for one token at most.
    """

    shared: int
    pages: Sequence[int]
    whole: bool


NOTHING = Prefix(0, (), False)


class Begun(NamedTuple):
    """How a text begins: `shared` tokens are in its pages, once page `source` is copied to `target`, if they differ."""

    shared: int
    source: int = 0
    target: int = 0


def common(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens that two texts have in common at the beginning."""
    size = min(len(one), len(other))
    differs = np.flatnonzero(one[:size] != other[:size])
    return int(differs[0]) if len(differs) else size


class Pool:
    """Pages of one data-parallel part, of `size` tokens each.

    A page is free, or has owners that read it: running texts, and texts that ended, which lose their last pages when
    others need them, the one that ended longest ago first. Only a page with one owner is written.

    Attributes:
      running: pages of every running text, by its slot.
      ended: tokens, pages and adapter of texts that ended, the oldest first.
      counts: owners of every page, [2, pages]: running texts, and texts that ended.

    Example:
      >>> pool = Pool(pages=4, size=2)
      >>> text = np.array([7, 8, 9])
      >>> pool.begin("a", pool.find(text, []), room=4), pool.running["a"]
      (Begun(shared=0, source=0, target=0), [0, 1])
      >>> pool.begin("b", pool.find(text[:3], [("a", text)]), room=4), pool.running["b"]  # page 0 is shared
      (Begun(shared=3, source=1, target=2), [0, 2])
    """

    def __init__(self, pages: int, size: int):
        self.size = size
        self.running: dict[object, list[int]] = {}
        self.ended: dict[int, tuple[np.ndarray, list[int], int]] = {}
        self.counts = np.zeros((2, pages), np.int64)
        self._free = deque(range(pages))
        self._number = 0

    @property
    def obtainable(self) -> int:
        """Pages that no running text has."""
        return int((self.counts[0] == 0).sum())

    def pages(self, tokens: int) -> int:
        """Pages of so many tokens."""
        return -(-tokens // self.size)

    def find(self, text: np.ndarray, running: Iterable[tuple[object, np.ndarray]], adapter: int = 0) -> Prefix:
        """The longest beginning of a text that is in the cache.

        Args:
          text: its tokens.
          running: slot of every running text with its adapter, and its tokens in the cache.
          adapter: that it is read with: the keys and values of another are others.
        """
        found = NOTHING
        texts = [(tokens, pages, True) for tokens, pages, other in self.ended.values() if other == adapter]
        texts += [(tokens, self.running[slot], False) for slot, tokens in running]
        for tokens, pages, ended in texts:
            shared = common(text, tokens)
            one = Prefix(shared, pages[: self.pages(shared)], ended and shared >= len(tokens) - 1)
            found = max(found, one, key=lambda each: (each.shared, each.whole))
        return found

    def begin(self, slot: object, prefix: Prefix, room: int) -> Begun | None:
        """Give a text pages for `room` tokens, more than the prefix has; None if there are not so many.

        Whole pages of the prefix are shared. A page of which it is a part is copied, as the text writes on in it; but
        if no running text has that page, and it is the end of the text that is gone on with, or there is no page to
        copy it to, then the texts that ended lose it.
        """
        (whole, rest), pages = divmod(prefix.shared, self.size), list(prefix.pages)
        self._hold(0, pages)
        lacking = self.pages(room) - whole - self.obtainable
        own = rest > 0 and int(self.counts[0, pages[-1]]) == 1 and (prefix.whole or lacking > 0)
        if lacking > own:
            self._drop(0, pages)
            return None
        if own:
            for key, (_, others, _) in list(self.ended.items()):
                if pages[-1] in others:
                    self._cut(key, others.index(pages[-1]))
        fresh = self._take(self.pages(room) - whole - own)
        begun = Begun(prefix.shared)
        if rest and not own:
            begun = Begun(prefix.shared, pages.pop(), fresh[0])
            self._drop(0, [begun.source])
        self.running[slot] = pages + fresh
        return begun

    def grow(self, slot: object, room: int) -> bool:
        """Give a running text pages for `room` tokens; False, and none, if there are not so many."""
        lacking = self.pages(room) - len(self.running[slot])
        if lacking > self.obtainable:
            return False
        self.running[slot] += self._take(lacking)
        return True

    def end(self, slot: object, tokens: np.ndarray, adapter: int = 0) -> None:
        """Take the pages of a text back; those of `tokens`, with which it begins, stay until others need them."""
        pages = self.running.pop(slot)
        stay = pages[: self.pages(len(tokens))]
        if stay and self._alone(stay[-1]):  # else another text begins with all of it
            self._hold(1, stay)
            self.ended[self._number] = tokens, stay, adapter
            self._number += 1
        self._drop(0, pages)

    def _take(self, count: int) -> list[int]:
        while len(self._free) < count:
            key, (_, pages, _) = next(iter(self.ended.items()))
            self._cut(key, len(pages) - 1)
        fresh = [self._free.popleft() for _ in range(count)]
        self._hold(0, fresh)
        return fresh

    def _cut(self, key: int, count: int) -> None:
        """Leave a text that ended its first pages; none, if another text has all of them."""
        tokens, pages, adapter = self.ended[key]
        self._drop(1, pages[count:])
        if count and self._alone(pages[count - 1]):
            self.ended[key] = tokens[: count * self.size], pages[:count], adapter
        else:
            self._drop(1, pages[:count])
            del self.ended[key]

    def _alone(self, page: int) -> bool:
        return int(self.counts[:, page].sum()) == 1

    def _hold(self, kind: int, pages: Sequence[int]) -> None:
        for page in pages:
            self.counts[kind, page] += 1

    def _drop(self, kind: int, pages: Sequence[int]) -> None:
        for page in pages:
            self.counts[kind, page] -= 1
            if not self.counts[:, page].any():
                self._free.append(page)
