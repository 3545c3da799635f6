"""Incremental detokenization: an incomplete character, or what may begin a stop string, is held back."""

import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from tessera.data.text import Tokenizer

UNDECODED = "�"  # what a tokenizer shows for bytes that are not UTF-8 (yet)
CHARACTER = 4  # bytes of the longest character, and so the most of UNDECODED that the next token can still change
CONTEXT = 8  # tokens before a text that are decoded with its beginning
WINDOW = 64  # tokens that are decoded together at most


@dataclass(frozen=True)
class Delta:
    """What is new in a text.

    Attributes:
      text: the letters.
      tokens: the text that each of its tokens added.
      logprobs: of each of these tokens; None for a text's first one, which follows none.
      offsets: where each of them begins, in letters from the beginning of the text.
      top: (text, log-probability) of the most probable tokens at each of them.
    """

    text: str = ""
    tokens: tuple[str, ...] = ()
    logprobs: tuple[float | None, ...] = ()
    offsets: tuple[int, ...] = ()
    top: tuple[tuple[tuple[str, float], ...], ...] = ()

    def __add__(self, other: "Delta") -> "Delta":
        """This part and the one after it."""
        return Delta(*(getattr(self, name) + getattr(other, name) for name in vars(self)))

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens)


class TextStream:
    """Decodes one text token by token; its deltas join to the text up to the stop string that is first complete.

    The text of a token is what it adds to the decoded tokens before it, so a tokenizer that drops the space in front of
    a text (SentencePiece's, as in Llama 2) does not drop it here. Every token is decoded together with a few others,
    so time is linear in the text.

    Args:
      tokenizer: of the model.
      stop: strings that end the text; they are not part of it, nor are tokens that begin at or after them.
      prompt: tokens that the text continues.
      offset: letters before the text.
      shown: special tokens that are given out, as this text; others have none.

    Attributes:
      stopped: whether a stop string has ended the text.
      count: tokens given out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        prompt: Sequence[int] = (),
        offset: int = 0,
        shown: Mapping[int, str] = MappingProxyType({}),
    ):
        self.shown = shown
        self.tokenizer, self.stop = tokenizer, tuple(word for word in stop if word)
        self.stopped, self.count = False, 0
        self._window = list(prompt[-CONTEXT:])
        self._complete = len(self._window)  # tokens of the window that are decoded for good
        self._before = self._decode()  # text of the window that has been added
        self._open = False  # whether the window ends in what is not decoded yet
        self._text, self._first = "", offset  # added and not given out, and where it begins
        self._drawn: deque[tuple[int, str, float | None, tuple[tuple[str, float], ...]]] = (
            deque()
        )  # not given out: begin, text, logprob, top

    def feed(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None] | None = None,
        top: Sequence[Sequence[tuple[int, float]]] | None = None,
        *,
        final: bool = False,
    ) -> Delta:
        """What is new.

        Args:
          tokens: that were drawn after those fed before.
          logprobs: of each of them; None for zeros.
          top: (token, log-probability) of the most probable tokens at each of them; None for none.
          final: no more will come: give out what waited.
        """
        if self.stopped:
            return Delta()
        rest_of = (logprobs or [0.0] * len(tokens), top or [()] * len(tokens))
        for token, logprob, others in zip(tokens, *rest_of, strict=True):
            begin = self._first + len(self._text)
            shown = tuple((self.would_add(other), value) for other, value in others)
            added = self._append(token)
            self._drawn.append((begin, added, logprob, shown))
            self._text += added
        if final:
            rest = self._decode()[len(self._before) :]
            self._text += rest
            if rest and self._drawn:
                begin, added, logprob, shown = self._drawn.pop()
                self._drawn.append((begin, added + rest, logprob, shown))
        found = [(place + len(word), place) for word in self.stop if (place := self._text.find(word)) >= 0]
        self.stopped = bool(found)
        size = min(found)[1] if found else len(self._text) - (0 if final else self._held())
        return self._give(size, final=final)

    @property
    def length(self) -> int:
        """Letters before and in the text that was given out."""
        return self._first

    def would_add(self, token: int) -> str:
        """The text that another token would add here; `UNDECODED` in place of what is not yet a character."""
        if name := self.shown.get(token):
            return name
        text = self._decode([*self._window, token])
        return text[len(os.path.commonprefix([text, self._before])) :]

    def _append(self, token: int) -> str:
        """The text that one more token adds."""
        if name := self.shown.get(token):
            rest = self._decode()[len(self._before) :]
            self._window, self._complete, self._before, self._open = [], 0, "", False
            return rest + name
        self._window.append(token)
        text = self._decode()
        undecoded = min(len(text) - len(text.rstrip(UNDECODED)), CHARACTER)
        known = text[: len(text) - undecoded]
        same = len(os.path.commonprefix([known, self._before]))
        added, self._before = known[same:], max(known, self._before, key=len)
        latest, self._open = self._window[self._complete :], bool(undecoded)
        if not undecoded and (text := self._decode(latest)):
            self._window, self._complete, self._before = latest, len(latest), text
        elif len(self._window) > WINDOW:  # a long run of what is no UTF-8, or of tokens without text
            self._window = self._window[-2 * CHARACTER :]
            self._complete = len(self._window)
            text = self._decode()
            self._before = text[: len(text) - undecoded]
        return added

    def _decode(self, tokens: Sequence[int] | None = None) -> str:
        tokens = self._window if tokens is None else tokens
        return self.tokenizer.decode(np.asarray(tokens, np.int32)) if tokens else ""

    def _give(self, size: int, *, final: bool) -> Delta:
        """The first letters that wait, and the tokens that are complete with them."""
        text, end = self._text[:size], self._first + size
        found = []
        while self._drawn:
            begin, added, *_ = self._drawn[0]
            grows = len(self._drawn) == 1 and self._open  # the next token may show more of its bytes
            whole = begin < end and (self.stopped or begin + len(added) <= end and not grows)
            if not whole and (self.stopped or not final):
                break
            begin, added, *more = self._drawn.popleft()
            found.append((begin, added[: end - begin], *more))
        self._first, self._text = end, self._text[size:]
        self.count += len(found)
        offsets, tokens, logprobs, top = zip(*found, strict=True) if found else ((), (), (), ())
        return Delta(text, tokens, logprobs, offsets, top)

    def _held(self) -> int:
        """Letters at the end that may be the beginning of a stop string."""
        longest = max((len(word) for word in self.stop), default=1) - 1
        lengths = range(min(longest, len(self._text)), 0, -1)
        return next((n for n in lengths if any(word.startswith(self._text[-n:]) for word in self.stop)), 0)
