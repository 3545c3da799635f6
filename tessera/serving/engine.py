"""Continuous batching: requests enter and leave slots while others decode.

A step reads at most one piece of waiting prompts and then draws the next tokens of all texts that have been read, so a
long prompt never stops the others. Slots are given in the order of arrival. What goes wrong on the host with one text
ends that text alone. One thread calls `step`; `submit` and `cancel` may be called from any.
"""

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import PyTree

from sharding.inference.sample import Settings, greedy
from tessera.serving.programs import Programs, Rows
from tessera.serving.requests import OutOfRange, PromptTooLong, QueueFull, Sampling, Text, check_whole, show
from tessera.serving.speculative import Speculating

DEFAULT = Sampling()


class Engine:
    """Serves texts from the slots of some programs.

    Args:
      programs: from `make_programs`, or two of them in `Speculating`.
      params: from `programs.place`.
      queue: texts that may wait for a slot.
    """

    def __init__(self, programs: Programs | Speculating, params: PyTree, queue: int = 64):
        self.programs, self.params, self.queue = programs, params, queue
        slots = programs.config.slots
        self.waiting: deque[Text] = deque()
        self.slots: list[Text | None] = [None] * slots
        self.counts: Counter[str] = Counter()
        self._state: Any = programs.start()
        self._last = np.zeros(slots, np.int32)
        self._settings = Settings(*(np.array(leaf) for leaf in greedy(slots)))
        self._lock = threading.Lock()
        self._cancelled: set[Text] = set()

    @property
    def busy(self) -> bool:
        """Whether any text waits or runs."""
        return bool(self.waiting) or any(text is not None for text in self.slots)

    @property
    def running(self) -> int:
        """Texts that have a slot."""
        return sum(text is not None for text in self.slots)

    def submit(
        self, prompt: Sequence[int], sampling: Sampling = DEFAULT, notify: Callable[[Text], None] | None = None
    ) -> Text:
        """Queue a text.

        Args:
          prompt: token ids.
          sampling: how it goes on.
          notify: see `Text`; called from the thread that calls `step`.

        Raises:
          QueueFull: too many texts wait.
          PromptTooLong: no room for a token after the prompt, or no prompt.
          OutOfRange: a token of the prompt or a stop token outside the vocabulary, or no `Sampling`.
        """
        if not isinstance(sampling, Sampling):
            raise OutOfRange("sampling", sampling, "a Sampling")
        length, vocabulary = self.programs.config.length, self.programs.decoder.config.vocab_size
        if not 0 < len(prompt) < length:
            raise PromptTooLong(f"the prompt has {len(prompt)} tokens; 1 to {length - 1} fit")
        for name, tokens in (("prompt", prompt), ("stop_tokens", sampling.stop_tokens)):
            for token in tokens:
                try:
                    check_whole(name, token, 0, vocabulary - 1)
                except OutOfRange as error:
                    valid = f"in 0..{vocabulary - 1}: token {show(token)} is not in the vocabulary of {vocabulary}"
                    raise OutOfRange(name, token, valid) from error
        text = Text(tuple(int(token) for token in prompt), sampling)
        if notify is not None:
            text.notify = notify
        with self._lock:
            if len(self.waiting) >= self.queue + self.slots.count(None):
                raise QueueFull(f"{len(self.waiting)} requests are waiting, and no more can")
            text.number = self.counts["requests"]
            self.waiting.append(text)
            self.counts["requests"] += 1
        return text

    def cancel(self, text: Text) -> None:
        """Let go of a text at the next step, wherever it is."""
        with self._lock:
            if not text.finish:
                self._cancelled.add(text)

    def step(self) -> None:
        """Admit, read one piece of waiting prompts, draw the next tokens of the rest."""
        self._admit()
        self._read()
        self._draw()

    def run(self) -> None:
        """Step until nothing waits or runs."""
        while self.busy:
            self.step()

    def fail(self, reason: str = "error", *, restart: bool = True) -> None:
        """End every text, after an exception in `step` or at shutdown; the slots are empty afterwards.

        Args:
          reason: why they end, see `Text`.
          restart: first make a new state, as the old one was given away to the step that failed; False is for an
            engine that will take no more steps.
        """
        if restart:  # first: where it fails, the texts end with the engine
            self._state = None  # two may not fit
            self._state = jax.block_until_ready(self.programs.start())
        with self._lock:
            texts = [*self.waiting, *(text for text in self.slots if text is not None)]
            self.waiting.clear()
        for text in texts:
            self._end(text, reason)

    @contextlib.contextmanager
    def _alone(self, text: Text) -> Iterator[None]:
        """End one text, and go on with the others, where the host's work on it raises."""
        try:
            yield
        except Exception:
            logging.exception("text %d failed and ends with finish reason 'error'; the others go on", text.number)
            if not text.finish:
                self._end(text, "error")

    def _admit(self) -> None:
        with self._lock:
            gone, self._cancelled = self._cancelled, set()
            self.waiting = deque(text for text in self.waiting if text not in gone)
        for text in gone:
            if not text.finish:
                self._end(text, "cancelled")
        for slot, holder in enumerate(self.slots):
            if holder is not None:
                continue
            with self._lock:
                if not self.waiting:
                    return
                text = self.waiting.popleft()
                self.slots[slot], text.slot = text, slot
            with self._alone(text):
                self._set(text)

    def _set(self, text: Text) -> None:
        """Write how a text is sampled into the row of its slot."""
        values = text.sampling
        row = (
            values.temperature,
            values.top_k,
            values.top_p,
            values.min_p,
            values.repetition_penalty,
            values.presence_penalty,
            values.frequency_penalty,
            values.seed,
            0,
        )
        for array, value in zip(self._settings, row, strict=True):
            array[text.slot] = value

    def _read(self) -> None:
        pieces = [self._next(text) for text in self.slots if text is not None and text.reading]
        reading = sorted((piece for piece in pieces if piece is not None), key=lambda piece: piece[0].number)
        if not reading:
            return
        width, fresh = reading[0][1]
        rows, local = self.programs.config.rows, len(self.slots) // self.programs.parts
        chosen: dict[int, tuple[Text, np.ndarray]] = {}  # place in the call; those of equal shape are read together
        for text, shape, part in reading:
            first = text.slot // local * rows
            place = next((i for i in range(first, first + rows) if i not in chosen), None)
            if shape == (width, fresh) and place is not None:
                chosen[place] = text, part
        count = rows * self.programs.parts
        piece = Rows(*(np.zeros((count, width) if i == 0 else count, np.int32) for i in range(4)))
        for place, (text, part) in chosen.items():
            piece.tokens[place, : len(part)] = part
            piece.slots[place], piece.starts[place] = text.slot % local, text.read
            piece.counts[place] = len(part)
        where = [chosen[i][0].slot if i in chosen else 0 for i in range(count)]
        settings = Settings(*(array[where] for array in self._settings))
        self._state, drawn = self.programs.extend(self.params, self._state, piece, settings, fresh=fresh)
        tokens, logprobs = np.asarray(drawn.tokens), np.asarray(drawn.logprobs)
        for place, (text, part) in chosen.items():
            with self._alone(text):
                text.read += len(part)
                self.counts["prompt_tokens"] += len(part)
                if not text.reading:
                    self._add(text, int(tokens[place]), float(logprobs[place]))

    def _next(self, text: Text) -> tuple[Text, tuple[int, bool], np.ndarray] | None:
        """A text with the shape and the tokens of the next piece of its prompt; None if it failed."""
        with self._alone(text):
            shape = self._piece(text)
            return text, shape, np.asarray(text.prompt[text.read : text.read + shape[0]], np.int32)
        return None

    def _piece(self, text: Text) -> tuple[int, bool]:
        """Width of the next piece of a text's prompt, and whether it is the first."""
        left = min(len(text.prompt) - text.read, self.programs.config.chunk)
        return next(size for size in self.programs.config.buckets() if size >= left), text.read == 0

    def _draw(self) -> None:
        budget = np.zeros(len(self.slots), np.int32)
        running: list[Text] = []
        for text in self.slots:
            if text is not None and not text.reading:
                with self._alone(text):
                    budget[text.slot] = self._left(text)
                    running.append(text)
        if not running:
            return
        self._state, drawn = self.programs.generate(
            self.params, self._state, self._last, budget, Settings(*(array.copy() for array in self._settings))
        )
        tokens, logprobs = np.asarray(drawn.tokens), np.asarray(drawn.logprobs)
        self.counts["decode_steps"] += len(tokens)
        for text in running:
            with self._alone(text):
                self._advance(text, tokens[:, text.slot], logprobs[:, text.slot], int(budget[text.slot]))

    def _advance(self, text: Text, tokens: np.ndarray, logprobs: np.ndarray, budget: int) -> None:
        """Add what was drawn in a text's slot."""
        found = tokens[:budget]
        found = found[found >= 0]
        if isinstance(self.programs, Speculating):
            self.counts["drafted"] += self.programs.drafted
            self.counts["accepted"] += int((tokens >= 0).sum()) - 1
        for step, token in enumerate(found):
            if not text.finish:
                self._add(text, int(token), float(logprobs[step]), last=step == len(found) - 1)

    def _left(self, text: Text) -> int:
        room = self.programs.config.length - len(text.prompt)
        return min(text.sampling.max_tokens, room) - len(text.tokens)

    def _add(self, text: Text, token: int, logprob: float, *, last: bool = True) -> None:
        if token in text.sampling.stop_tokens:
            self._end(text, "stop")
            return
        text.tokens.append(token)
        text.logprobs.append(logprob)
        self.counts["tokens"] += 1
        self._last[text.slot], self._settings.index[text.slot] = token, len(text.tokens)
        if self._left(text) <= 0:
            self._end(text, "length")
        elif last:
            text.notify(text)

    def _end(self, text: Text, reason: str) -> None:
        if text.slot >= 0:
            self.slots[text.slot] = None
        text.slot, text.finish = -1, reason
        self.counts[f"finished_{reason}"] += 1
        try:
            text.notify(text)
        except Exception:  # of whoever listens: nothing is left to end
            logging.exception("what listens to text %d failed as it ended", text.number)


def generate_all(engine: Engine, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> list[Any]:
    """Run texts through an engine to their end; a convenience for scripts and tests."""
    texts = []
    for prompt, sampling in zip(prompts, samplings, strict=True):
        texts.append(engine.submit(prompt, sampling))
    engine.run()
    return texts
