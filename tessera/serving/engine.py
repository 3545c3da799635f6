"""Continuous batching: requests share the slots of compiled programs and come and go between steps.

A step reads at most one chunk of waiting prompts and then draws the next tokens of all requests that have been read, so
a long prompt never stops the others. Slots are given in the order of arrival. What goes wrong on the host with one
request ends that request alone. One thread calls `step`; `submit` and `cancel` may be called from any.
"""

import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import PyTree

from sharding.inference.sample import Settings, greedy
from tessera.serving.programs import Programs, Rows
from tessera.serving.requests import (
    Constraint,
    OutOfRange,
    PromptTooLong,
    QueueFull,
    Request,
    Sampling,
    check_whole,
    show,
)
from tessera.serving.speculative import Speculating

DEFAULT = Sampling()


class Engine:
    """Serves requests from the slots of some programs.

    Args:
      programs: from `make_programs`, or two of them in `Speculating`.
      params: from `programs.place`.
      queue: requests that may wait for a slot.
      ends: tokens that end every text, the model's end of text; they are not part of it.
      prefix_cache: a prompt that begins like the text in any slot, a finished one's too, takes the tokens they share
        from there, if they are so many (prefix caching); 0 reads every prompt whole.
    """

    def __init__(
        self,
        programs: Programs | Speculating,
        params: PyTree,
        queue: int = 64,
        ends: Collection[int] = (),
        prefix_cache: int = 0,
    ):
        self.programs, self.params, self.queue, self.ends = programs, params, queue, frozenset(ends)
        self.prefix_cache = prefix_cache
        slots = programs.config.slots
        self.waiting: deque[Request] = deque()
        self.slots: list[Request | None] = [None] * slots
        self._held: list[tuple[int, ...]] = [()] * slots  # tokens in the cache of a slot that is free
        self._free: dict[int, None] = dict.fromkeys(range(slots))  # the one that ended longest ago first
        self.counts: Counter[str] = Counter()
        self._state: Any = programs.start()
        self._last = np.zeros(slots, np.int32)
        self._settings = Settings(*(np.array(leaf) for leaf in greedy(slots)))
        self._lock = threading.Lock()
        self._cancelled: set[Request] = set()

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting) or any(request is not None for request in self.slots)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return sum(request is not None for request in self.slots)

    def warm_up(self) -> None:
        """Compile the programs of all shapes, by running them without a text; before the first step."""
        sizes = self.programs.config
        rows, longest = sizes.rows * self.programs.parts, min(sizes.chunk, sizes.length - 1)
        widths = [size for size in sizes.buckets() if size // 2 < longest]
        for width in widths:
            for fresh in (True, False) if sizes.length - 1 > sizes.chunk else (True,):
                chunk = Rows(np.zeros((rows, width), np.int32), *np.zeros((3, rows), np.int32))
                settings = Settings(*(array[[0] * rows] for array in self._settings))
                self._state, _ = self.programs.extend(self.params, self._state, chunk, settings, fresh=fresh)
        settings = Settings(*(array.copy() for array in self._settings))
        budget = np.zeros(len(self.slots), np.int32)
        self._state, _ = self.programs.generate(self.params, self._state, self._last, budget, settings)
        if self.prefix_cache:
            self._state = self.programs.reuse(self._state, 0, 0, [0])
        jax.block_until_ready(self._state)

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling = DEFAULT,
        notify: Callable[[Request], None] | None = None,
        constraint: Constraint | None = None,
    ) -> Request:
        """Queue a request.

        Args:
          prompt: token ids.
          sampling: how it goes on.
          notify: see `Request`; called from the thread that calls `step`.
          constraint: what the text may be, see `tessera.serving.constrain`; of this request alone.

        Raises:
          QueueFull: too many requests wait.
          PromptTooLong: a prompt that fills the context length, or no prompt.
          OutOfRange: a token outside the vocabulary, or no `Sampling`; a logit bias or a constraint beside a draft.
        """
        if not isinstance(sampling, Sampling):
            raise OutOfRange("sampling", sampling, "a Sampling")
        length, vocabulary = self.programs.config.length, self.programs.decoder.config.vocab_size
        if not 0 < len(prompt) < length:
            raise PromptTooLong(f"the prompt has {len(prompt)} tokens; 1 to {length - 1} fit")
        if isinstance(self.programs, Speculating) and (sampling.logit_bias or constraint is not None):
            name = "logit_bias" if sampling.logit_bias else "response_format"
            raise OutOfRange(name, sampling.logit_bias or "of tokens", "left out beside a draft model")
        biased = [token for token, _ in sampling.logit_bias]
        for name, tokens in (("prompt", prompt), ("stop_tokens", sampling.stop_tokens), ("logit_bias", biased)):
            for token in tokens:
                try:
                    check_whole(name, token, 0, vocabulary - 1)
                except OutOfRange as error:
                    valid = f"in 0..{vocabulary - 1}: token {show(token)} is not in the vocabulary of {vocabulary}"
                    raise OutOfRange(name, token, valid) from error
        request = Request(tuple(int(token) for token in prompt), sampling, constraint=constraint)
        if notify is not None:
            request.notify = notify
        with self._lock:
            if len(self.waiting) >= self.queue + self.slots.count(None):
                raise QueueFull(f"{len(self.waiting)} requests are waiting, and no more can")
            request.number = self.counts["requests"]
            self.waiting.append(request)
            self.counts["requests"] += 1
        return request

    def cancel(self, request: Request) -> None:
        """Let go of a request at the next step, wherever it is."""
        with self._lock:
            if not request.finish:
                self._cancelled.add(request)

    def step(self) -> None:
        """Admit, read one chunk of waiting prompts, draw the next tokens of the rest."""
        self._admit()
        self._read()
        self._draw()

    def run(self) -> None:
        """Step until nothing waits or runs."""
        while self.busy:
            self.step()

    def fail(self, reason: str = "error", *, restart: bool = True) -> None:
        """End every request, after an exception in `step` or at shutdown; the slots are empty afterwards.

        Args:
          reason: why they end, see `Request`.
          restart: first make a new state, as the old one was given away to the step that failed; False is for an
            engine that will take no more steps.
        """
        if restart:  # first: where it fails, the requests end with the engine
            self._state = None  # two may not fit
            self._state = jax.block_until_ready(self.programs.start())
        with self._lock:
            requests = [*self.waiting, *(request for request in self.slots if request is not None)]
            self.waiting.clear()
        for request in requests:
            self._end(request, reason)
        self._held = [()] * len(self.slots)

    @contextlib.contextmanager
    def _alone(self, request: Request) -> Iterator[None]:
        """End one request, and go on with the others, where the host's work on it raises."""
        try:
            yield
        except Exception:
            logging.exception("request %d failed and ends with finish reason 'error'; the others go on", request.number)
            if not request.finish:
                self._end(request, "error")

    def _admit(self) -> None:
        with self._lock:
            gone, self._cancelled = self._cancelled, set()
            self.waiting = deque(request for request in self.waiting if request not in gone)
        for request in gone:
            if not request.finish:
                self._end(request, "cancelled")
        while self._free:
            with self._lock:
                if not self.waiting:
                    return
                request = self.waiting.popleft()
            slot, source, shared = self._choose(request)
            del self._free[slot]
            self.slots[slot], request.slot = request, slot
            with self._alone(request):
                self._set(request)
                if shared:
                    self._state = self.programs.reuse(self._state, source, slot, request.prompt[:shared])
                    request.read = shared
                    self.counts["prefix_tokens"] += shared

    def _choose(self, request: Request) -> tuple[int, int, int]:
        """A free slot, and the slot that has most tokens of the prompt's beginning, with their number."""
        slot = next(iter(self._free))
        if not self.prefix_cache or request.sampling.prompt_logprobs:
            return slot, slot, 0
        self.counts["prefix_queries"] += len(request.prompt)
        prompt = np.asarray(request.prompt[:-1], np.int32)  # the last one is read for the logits of the next
        best = (slot, slot, 0)
        local = len(self.slots) // self.programs.parts
        for source, holder in enumerate(self.slots):
            held = self._held[source] if holder is None else self._in_cache(holder)
            start = np.asarray(held[: len(prompt)], np.int32)
            differs = np.flatnonzero(start != prompt[: len(start)])
            shared = int(differs[0]) if len(differs) else len(start)
            free = [i for i in self._free if i // local == source // local]
            if holder is None and shared >= len(held) - 1:
                target: int | None = source  # what it continues; else what it holds beyond is left to others
            else:
                target = next((i for i in free if i != source), source if holder is None else None)
            if shared > best[2] and target is not None:
                best = (target, source, shared)
        return best if best[2] >= self.prefix_cache else (slot, slot, 0)

    def _in_cache(self, request: Request) -> tuple[int, ...]:
        """Tokens of a running request that its slot holds for sure: the last one drawn is read with the next step."""
        return (*request.prompt[: request.read], *request.tokens[:-1])

    def _set(self, request: Request) -> None:
        """Write how a request is sampled into the row of its slot."""
        values = request.sampling
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
            values.top_logprobs,
        )
        for array, value in zip(self._settings, row, strict=True):
            array[request.slot] = value

    def _read(self) -> None:
        found = [self._next(request) for request in self.slots if request is not None and request.reading]
        reading = sorted((one for one in found if one is not None), key=lambda one: one[0].number)
        if not reading:
            return
        width, fresh = reading[0][1]
        rows, local = self.programs.config.rows, len(self.slots) // self.programs.parts
        chosen: dict[int, tuple[Request, np.ndarray]] = {}  # place in the call; those of equal shape are read together
        for request, shape, part in reading:
            first = request.slot // local * rows
            place = next((i for i in range(first, first + rows) if i not in chosen), None)
            if shape == (width, fresh) and place is not None:
                chosen[place] = request, part
        count = rows * self.programs.parts
        chunk = Rows(*(np.zeros((count, width) if i == 0 else count, np.int32) for i in range(4)))
        for place, (request, part) in chosen.items():
            chunk.tokens[place, : len(part)] = part
            chunk.slots[place], chunk.starts[place] = request.slot % local, request.read
            chunk.counts[place] = len(part)
        where = [chosen[i][0].slot if i in chosen else 0 for i in range(count)]
        settings = Settings(*(array[where] for array in self._settings))
        bias = self._bias({place: request for place, (request, _) in chosen.items()}, count)
        chosen = {place: one for place, one in chosen.items() if not one[0].finish}
        targets = None
        if any(request.sampling.prompt_logprobs for request, _ in chosen.values()):
            targets = np.zeros((count, width), np.int32)
            for place, (request, part) in chosen.items():
                after = request.prompt[request.read + 1 : request.read + len(part) + 1]
                targets[place, : len(after)] = after
        options: dict[str, Any] = {"fresh": fresh, "bias": bias, "targets": targets}
        self._state, drawn = self.programs.extend(self.params, self._state, chunk, settings, **options)
        tokens, logprobs, top, read = jax.device_get((drawn.tokens, drawn.logprobs, drawn.top, drawn.read))
        for place, (request, part) in chosen.items():
            with self._alone(request):
                if request.sampling.prompt_logprobs:
                    self._add_read(request, len(part), read[0][place], [x[place] for x in read[1]])
                request.read += len(part)
                self.counts["prompt_tokens"] += len(part)
                if not request.reading:
                    self._add(request, int(tokens[place]), float(logprobs[place]), [x[place] for x in top])

    def _bias(self, rows: dict[int, Request], count: int) -> np.ndarray | None:
        """What is added to the logits [count, V] of some rows; None where no request asks for anything."""
        rows = {row: one for row, one in rows.items() if one.sampling.logit_bias or one.constraint is not None}
        if not rows:
            return None
        bias = np.zeros((count, self.programs.decoder.config.vocab_size), np.float32)
        for row, request in rows.items():
            with self._alone(request):
                for token, value in request.sampling.logit_bias:
                    bias[row, token] += value
                if request.constraint is not None:
                    bias[row, ~request.constraint.allowed()] = -np.inf
        return bias

    def _add_read(self, request: Request, count: int, logprobs: np.ndarray, top: list[np.ndarray]) -> None:
        """Add the log-probabilities of a chunk of the prompt, each of the token after one of the chunk's."""
        count = min(count, len(request.prompt) - 1 - request.read)
        most = request.sampling.top_logprobs
        request.prompt_logprobs += logprobs[:count].tolist()
        ids, values = (x[:count, :most].tolist() for x in top)
        request.prompt_top += [tuple(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]

    def _next(self, request: Request) -> tuple[Request, tuple[int, bool], np.ndarray] | None:
        """A request with the shape and the tokens of the next chunk of its prompt; None if it failed."""
        with self._alone(request):
            shape = self._chunk(request)
            return request, shape, np.asarray(request.prompt[request.read : request.read + shape[0]], np.int32)
        return None

    def _chunk(self, request: Request) -> tuple[int, bool]:
        """Width of the next chunk of a request's prompt, and whether it is the first."""
        left = min(len(request.prompt) - request.read, self.programs.config.chunk)
        return next(size for size in self.programs.config.buckets() if size >= left), request.read == 0

    def _draw(self) -> None:
        budget = np.zeros(len(self.slots), np.int32)
        running: list[Request] = []
        for request in self.slots:
            if request is not None and not request.reading:
                with self._alone(request):
                    budget[request.slot] = self._left(request)
                    running.append(request)
        options: dict[str, Any] = {}
        if (bias := self._bias({request.slot: request for request in running}, len(self.slots))) is not None:
            options["bias"] = bias
            if any(request.constraint is not None for request in running):
                options["steps"] = 1  # what may come next is known when a token has come
        running = [request for request in running if not request.finish]
        if not running:
            return
        settings = Settings(*(array.copy() for array in self._settings))
        self._state, drawn = self.programs.generate(self.params, self._state, self._last, budget, settings, **options)
        tokens, logprobs, top = jax.device_get((drawn.tokens, drawn.logprobs, drawn.top))
        self.counts["decode_steps"] += len(tokens)
        for request in running:
            with self._alone(request):
                mine = (tokens[:, request.slot], logprobs[:, request.slot], [x[:, request.slot] for x in top])
                self._advance(request, *mine, int(budget[request.slot]))

    def _advance(
        self, request: Request, tokens: np.ndarray, logprobs: np.ndarray, top: list[np.ndarray], budget: int
    ) -> None:
        """Add what was drawn in a request's slot."""
        found = tokens[:budget]
        found = found[found >= 0]
        if isinstance(self.programs, Speculating):
            self.counts["drafted"] += self.programs.drafted
            self.counts["accepted"] += int((tokens >= 0).sum()) - 1
        for step, token in enumerate(found):
            if not request.finish:
                self._add(
                    request, int(token), float(logprobs[step]), [x[step] for x in top], last=step == len(found) - 1
                )

    def _left(self, request: Request) -> int:
        context = self.programs.config.length - len(request.prompt)
        return min(request.sampling.max_tokens, context) - len(request.tokens)

    def _add(self, request: Request, token: int, logprob: float, top: list[np.ndarray], *, last: bool = True) -> None:
        if request.sampling.max_tokens == 0:
            self._end(request, "length")
            return
        ids, values = (x[: request.sampling.top_logprobs].tolist() for x in top)
        alternatives = tuple(zip(ids, values, strict=True))
        if token in self.ends or token in request.sampling.stop_tokens:
            request.end = (logprob, alternatives)
            self._end(request, "stop")
            return
        request.tokens.append(token)
        request.top.append(alternatives)
        request.logprobs.append(logprob)
        self.counts["tokens"] += 1
        self._last[request.slot], self._settings.index[request.slot] = token, len(request.tokens)
        if request.constraint is not None:
            request.constraint.accept(token)
        if request.constraint is not None and request.constraint.ended:
            self._end(request, "stop")
        elif self._left(request) <= 0:
            self._end(request, "length")
        elif last:
            request.notify(request)

    def _end(self, request: Request, reason: str) -> None:
        if request.slot >= 0:
            self.slots[request.slot], self._held[request.slot] = None, self._in_cache(request)
            self._free[request.slot] = None
        request.slot, request.finish = -1, reason
        self.counts[f"finished_{reason}"] += 1
        try:
            request.notify(request)
        except Exception:  # of whoever listens: nothing is left to end
            logging.exception("what listens to request %d failed as it ended", request.number)


def generate_all(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    notify: Sequence[Callable[[Request], None]] = (),
) -> list[Request]:
    """Run requests through an engine to their end, however many wait; `notify` is that of each, see `Engine.submit`."""
    requests = []
    listeners = notify or [lambda request: None] * len(prompts)
    for prompt, sampling, listener in zip(prompts, samplings, listeners, strict=True):
        while True:
            try:
                requests.append(engine.submit(prompt, sampling, listener))
                break
            except QueueFull:
                engine.step()
    engine.run()
    return requests
