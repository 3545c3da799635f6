"""Continuous batching: requests share the slots of compiled programs and come and go between steps.

A step reads at most one chunk of waiting prompts and then draws the next tokens of all requests that have been read, so
a long prompt never stops the others. Slots are given in the order of arrival. With a paged KV cache a text also waits
for pages, and the one that came last goes back into the queue where there are too few for those that run (preemption):
its tokens are read again later. What goes wrong on the host with one request ends that request alone. One thread calls
`step`; `submit` and `cancel` may be called from any.
"""

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import PyTree

from sharding.inference.sample import Settings, greedy
from tessera.serving.lookup import NGrams
from tessera.serving.pages import NOTHING, Pool, common
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
      prefix_cache: a prompt that begins like a text that runs, or has ended and is still in the cache, takes the tokens
        they share from there, if they are so many (prefix caching); 0 reads every prompt whole.
      lookup: longest n-gram that greedy texts are drafted for by, see `tessera.serving.lookup`; 0 is off.
      drafted: T, most tokens of such a draft.
      adapters: names of the LoRA adapters that the parameters have, in their order; see `Sampling.adapter`.
    """

    def __init__(
        self,
        programs: Programs | Speculating,
        params: PyTree,
        queue: int = 64,
        ends: Collection[int] = (),
        prefix_cache: int = 0,
        lookup: int = 0,
        drafted: int = 4,
        adapters: Sequence[str] = (),
    ):
        if lookup and isinstance(programs, Speculating):
            raise ValueError(f"lookup={lookup} beside a draft model: one of the two drafts")
        self.lookup, self.drafted = lookup, drafted if lookup else 0
        self.programs, self.params, self.queue, self.ends = programs, params, queue, frozenset(ends)
        self.prefix_cache, self.adapters = prefix_cache, tuple(adapters)
        slots = programs.config.slots
        self.waiting: deque[Request] = deque()
        self.slots: list[Request | None] = [None] * slots
        self._free: dict[int, None] = dict.fromkeys(range(slots))  # the one that ended longest ago first
        self._local = slots // programs.parts
        self._empty()
        self.counts: Counter[str] = Counter()
        self._state: Any = programs.start()
        self._last = np.zeros(slots, np.int32)
        self._settings: Settings = jax.tree.map(np.array, greedy(slots))
        if self.adapters:
            self._settings = self._settings._replace(adapter=np.zeros(slots, np.int32))
        self._lock = threading.Lock()
        self._cancelled: set[Request] = set()

    def _empty(self) -> None:
        """Forget what is in the cache."""
        config, parts = self.programs.config, self.programs.parts
        pages, size = (config.pages, config.page_size) if config.pages else (config.slots, config.length)
        self._pools = [Pool(pages // parts, size) for _ in range(parts)]
        self._table = np.full((config.slots, self._pools[0].pages(config.length)), pages, np.int32)
        self._moved = bool(config.pages)  # whether the devices do not have the table yet

    @property
    def usage(self) -> float:
        """Share of the KV cache that running texts fill; of its pages, those that they have."""
        config = self.programs.config
        if config.pages:
            return 1 - sum(pool.obtainable for pool in self._pools) / config.pages
        return sum(request.read for request in self.slots if request is not None) / (config.slots * config.length)

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
        self._point()
        widths = [size for size in sizes.buckets() if size // 2 < longest]
        for width in widths:
            for fresh in (True, False) if sizes.length - 1 > sizes.chunk else (True,):
                chunk = self._rows(rows, width)
                settings = self._settings_of([0] * rows)
                self._state, _ = self.programs.extend(self.params, self._state, chunk, settings, fresh=fresh)
        settings = jax.tree.map(np.copy, self._settings)
        budget = np.zeros(len(self.slots), np.int32)
        self._state, _ = self.programs.generate(self.params, self._state, self._last, budget, settings)
        if self.lookup and isinstance(self.programs, Programs):
            none = np.full((self.drafted, len(budget)), -1, np.int32)
            self._state, _ = self.programs.verify(self.params, self._state, self._last, none, budget, settings)
        if self.prefix_cache:
            self._state = self.programs.reuse(self._state, 0, [0], 0, 0, 1)
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
          OutOfRange: a token outside the vocabulary, or no `Sampling`; a logit bias or a constraint beside a draft; an
            adapter that there is not.
        """
        if not isinstance(sampling, Sampling):
            raise OutOfRange("sampling", sampling, "a Sampling")
        length, vocabulary = self.programs.config.length, self.programs.decoder.vocabulary
        if not 0 < len(prompt) < length:
            raise PromptTooLong(f"the prompt has {len(prompt)} tokens; 1 to {length - 1} fit")
        if isinstance(self.programs, Speculating) and (sampling.logit_bias or constraint is not None):
            name = "logit_bias" if sampling.logit_bias else "response_format"
            raise OutOfRange(name, sampling.logit_bias or "of tokens", "left out beside a draft model")
        if sampling.adapter and sampling.adapter not in self.adapters:
            raise OutOfRange("adapter", sampling.adapter, f'"" or one of the adapters {list(self.adapters)}')
        biased = [token for token, _ in sampling.logit_bias]
        for name, tokens in (("prompt", prompt), ("stop_tokens", sampling.stop_tokens), ("logit_bias", biased)):
            for token in tokens:
                try:
                    check_whole(name, token, 0, vocabulary - 1)
                except OutOfRange as error:
                    valid = f"in 0..{vocabulary - 1}: token {show(token)} is not in the vocabulary of {vocabulary}"
                    raise OutOfRange(name, token, valid) from error
        request = Request(tuple(int(token) for token in prompt), sampling, constraint=constraint)
        request.adapter = self.adapters.index(sampling.adapter) + 1 if sampling.adapter else 0
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
        self._empty()

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
            with self._alone(request):
                if not self._begin(request):
                    self._wait(request)
                    return

    def _wait(self, request: Request) -> None:
        with self._lock:
            self.waiting = deque(sorted((request, *self.waiting), key=lambda one: one.number))

    def _begin(self, request: Request) -> bool:
        """Give a request a slot and pages, and what the cache has of its text.

        False if there are too few pages, or if so far others are reading what they have in common: with pages, many
        texts of one prompt that come at once read it once.
        """
        paged, least = self.programs.config.pages > 0, 0 if request.sampling.prompt_logprobs else self.prefix_cache
        text = np.asarray(request.text[:-1], np.int32)  # the last one is read for the logits of the next
        found = dict.fromkeys((slot // self._local for slot in self._free), NOTHING)
        for part in found if least else ():
            others = [one for one in self._of(part) if one.adapter == request.adapter]
            running = [(one, self._in_cache(one)) for one in others]
            prefix = self._pools[part].find(text, running, request.adapter)
            ahead = [common(text, np.asarray(one.text, np.int32)) for one in others if paged and one.reading]
            if max(ahead, default=0) >= prefix.shared + least:
                return False
            found[part] = prefix if prefix.shared >= least else NOTHING
        for part, prefix in sorted(found.items(), key=lambda one: -one[1].shared):
            pool = self._pools[part]
            if (begun := pool.begin(request, prefix, self._room(request))) is not None:
                break
        else:
            return False
        pages = pool.running[request]
        free = next(slot for slot in self._free if slot // self._local == part)
        slot = free if paged else part * self._local + pages[0]
        del self._free[slot]
        self.slots[slot], request.slot = request, slot
        request.started = request.started or time.monotonic()
        self._write(slot, pages)
        self._set(request)
        self.counts["prefix_queries"] += len(request.text) if least else 0
        if begun.shared:
            self._point()
            known = request.text[: begun.shared]
            self._state = self.programs.reuse(self._state, slot, known, begun.source, begun.target, len(request.prompt))
            request.read = begun.shared
            self.counts["prefix_tokens"] += begun.shared
        return True

    def _of(self, part: int) -> list[Request]:
        """Running requests of a data-parallel part."""
        slots = self.slots[part * self._local : (part + 1) * self._local]
        return [request for request in slots if request is not None]

    def _in_cache(self, request: Request) -> np.ndarray:
        """Tokens of a running request that are in the cache for sure: the last one drawn is read with the next step."""
        return np.asarray(request.text[: request.read], np.int32)

    def _room(self, request: Request) -> int:
        """Tokens that a request has in the cache after it is read and a call has drawn the next ones."""
        return request.known + min(max(self.programs.reach, self.drafted + 1), self._left(request))

    def _grow(self, request: Request) -> bool:
        """Give a running request pages for the next call; False if it goes back into the queue for want of them."""
        part = request.slot // self._local
        pool = self._pools[part]
        before = len(pool.running[request])
        while not pool.grow(request, self._room(request)):
            youngest = max(self._of(part), key=lambda one: one.number)
            self._leave(youngest)
            youngest.read = 0
            self.counts["preemptions"] += 1
            self._wait(youngest)
            if youngest is request:
                return False
        if len(pool.running[request]) > before:
            self._write(request.slot, pool.running[request])
        return True

    def _leave(self, request: Request) -> None:
        """Free a request's slot, and its pages but those that a later text may begin with."""
        pool = self._pools[request.slot // self._local]
        pool.end(request, self._in_cache(request)[: None if self.prefix_cache else 0], request.adapter)
        self._write(request.slot, [])
        self.slots[request.slot], self._free[request.slot] = None, None
        request.slot = -1

    def _write(self, slot: int, pages: Sequence[int]) -> None:
        """Note the pages of a slot in the page table."""
        if self.programs.config.pages:
            self._table[slot] = self.programs.config.pages
            self._table[slot, : len(pages)] = pages
            self._moved = True

    def _point(self) -> None:
        """Tell the devices the page table, before they run a program."""
        if self._moved:
            self._state, self._moved = self.programs.point(self._state, self._table), False

    def _rows(self, count: int, width: int) -> Rows:
        """Rows without tokens."""
        chunk = Rows(np.zeros((count, width), np.int32), *np.zeros((3, count), np.int32))
        return chunk._replace(prompts=np.zeros(count, np.int32)) if self.programs.config.pages else chunk

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
            len(request.tokens),
            values.top_logprobs,
            request.adapter,
        )
        for array, value in zip(self._settings, row, strict=True):
            if array is not None:
                array[request.slot] = value
        self._last[request.slot] = request.tokens[-1] if request.tokens else 0

    def _settings_of(self, slots: Sequence[int]) -> Settings:
        """A copy of the settings of some slots."""
        return jax.tree.map(lambda array: array[slots], self._settings)

    def _read(self) -> None:
        found = [self._next(request) for request in self.slots if request is not None and request.reading]
        reading = sorted((one for one in found if one is not None), key=lambda one: one[0].number)
        if not reading:
            return
        width, fresh = reading[0][1]
        rows, local = self.programs.config.rows, self._local
        chosen: dict[int, tuple[Request, np.ndarray]] = {}  # place in the call; those of equal shape are read together
        for request, shape, part in reading:
            first = request.slot // local * rows
            place = next((i for i in range(first, first + rows) if i not in chosen), None)
            if shape == (width, fresh) and place is not None:
                chosen[place] = request, part
        count = rows * self.programs.parts
        chunk = self._rows(count, width)
        for place, (request, part) in chosen.items():
            chunk.tokens[place, : len(part)] = part
            chunk.slots[place], chunk.starts[place] = request.slot % local, request.read
            chunk.counts[place] = len(part)
            if chunk.prompts is not None:
                chunk.prompts[place] = len(request.prompt)
        where = [chosen[i][0].slot if i in chosen else 0 for i in range(count)]
        settings = self._settings_of(where)
        bias = self._bias({place: request for place, (request, _) in chosen.items()}, count)
        chosen = {place: one for place, one in chosen.items() if not one[0].finish}
        targets = None
        if any(request.sampling.prompt_logprobs for request, _ in chosen.values()):
            targets = np.zeros((count, width), np.int32)
            for place, (request, part) in chosen.items():
                after = request.prompt[request.read + 1 : request.read + len(part) + 1]
                targets[place, : len(after)] = after
        options: dict[str, Any] = {"fresh": fresh, "bias": bias, "targets": targets}
        self._point()
        self._state, drawn = self.programs.extend(self.params, self._state, chunk, settings, **options)
        tokens, logprobs, top, read = jax.device_get((drawn.tokens, drawn.logprobs, drawn.top, drawn.read))
        for place, (request, part) in chosen.items():
            with self._alone(request):
                if request.sampling.prompt_logprobs:
                    self._add_read(request, len(part), read[0][place], [x[place] for x in read[1]])
                request.read += len(part)
                self.counts["prompt_tokens"] += len(part)
                if not (request.reading or request.tokens):
                    self._add(request, int(tokens[place]), float(logprobs[place]), [x[place] for x in top])

    def _bias(self, rows: dict[int, Request], count: int) -> np.ndarray | None:
        """What is added to the logits [count, V] of some rows; None where no request asks for anything."""
        rows = {row: one for row, one in rows.items() if one.sampling.logit_bias or one.constraint is not None}
        if not rows:
            return None
        bias = np.zeros((count, self.programs.decoder.vocabulary), np.float32)
        for row, request in rows.items():
            with self._alone(request):
                for token, value in request.sampling.logit_bias:
                    bias[row, token] += value
                if request.constraint is not None:
                    bias[row, ~request.constraint.allowed()] = -np.inf
        return bias

    def _add_read(self, request: Request, count: int, logprobs: np.ndarray, top: list[np.ndarray]) -> None:
        """Add the log-probabilities of a chunk of the prompt, each of the token after one of the chunk's."""
        new = slice(len(request.prompt_logprobs) - request.read, max(0, len(request.prompt) - 1 - request.read))
        most = request.sampling.top_logprobs
        request.prompt_logprobs += logprobs[:count][new].tolist()
        ids, values = (x[:count][new, :most].tolist() for x in top)
        request.prompt_top += [tuple(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]

    def _next(self, request: Request) -> tuple[Request, tuple[int, bool], np.ndarray] | None:
        """A request with the shape and the tokens of the next chunk of its text; None if it failed."""
        with self._alone(request):
            shape = self._chunk(request)
            return request, shape, np.asarray(request.text[request.read : request.read + shape[0]], np.int32)
        return None

    def _chunk(self, request: Request) -> tuple[int, bool]:
        """Width of the next chunk of a request's text, and whether it is the first."""
        left = min(len(request.text) - request.read, self.programs.config.chunk)
        return next(size for size in self.programs.config.buckets() if size >= left), request.read == 0

    def _draw(self) -> None:
        budget = np.zeros(len(self.slots), np.int32)
        running: list[Request] = []
        drawing = [request for request in self.slots if request is not None and not request.reading]
        for request in sorted(drawing, key=lambda one: one.number):  # those that came last make room for the others
            with self._alone(request):
                if request.slot >= 0 and self._grow(request):
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
        settings = jax.tree.map(np.copy, self._settings)
        guesses = self._look_up(running, budget) if self.lookup and bias is None else None
        self._point()
        given = self.params, self._state, self._last
        if guesses is not None and isinstance(self.programs, Programs):
            self._state, drawn = self.programs.verify(*given, guesses, budget, settings)
        else:
            self._state, drawn = self.programs.generate(*given, budget, settings, **options)
        tokens, logprobs, top = jax.device_get((drawn.tokens, drawn.logprobs, drawn.top))
        self.counts["decode_steps"] += len(tokens) if guesses is None else 1
        if guesses is not None:
            self.counts["accepted"] += int((tokens[1:] >= 0).sum())
        for request in running:
            with self._alone(request):
                mine = (tokens[:, request.slot], logprobs[:, request.slot], [x[:, request.slot] for x in top])
                self._advance(request, *mine, int(budget[request.slot]))

    def _look_up(self, running: Sequence[Request], budget: np.ndarray) -> np.ndarray | None:
        """Drafts [T, B] of greedy texts from themselves, -1 where there is none; None without any."""
        guesses = np.full((self.drafted, len(self.slots)), -1, np.int32)
        for request in running:
            if request.sampling.plain:
                if request.grams is None:
                    request.grams = NGrams(self.lookup)
                    request.grams.add(request.prompt)
                grams = request.grams
                grams.add(request.tokens[len(grams.text) - len(request.prompt) :])
                found = grams.draft(min(self.drafted, int(budget[request.slot]) - 1))
                guesses[: len(found), request.slot] = found
                self.counts["drafted"] += len(found)
        return guesses if (guesses >= 0).any() else None

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
        request.read = len(request.prompt) + len(request.tokens) - 1
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
            self._leave(request)
        request.finish = reason
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
