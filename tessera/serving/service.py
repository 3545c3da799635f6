"""An engine in a thread of its own, and requests as asynchronous streams for a server's event loop."""

import asyncio
import math
import threading
import time
from collections.abc import Sequence

from absl import logging

from tessera.serving.engine import Engine
from tessera.serving.metrics import Latencies
from tessera.serving.requests import Constraint, QueueFull, Request, Sampling
from tessera.serving.schema import AppConfig


class Draining(RuntimeError):
    """The server is shutting down and takes no new requests."""


DEAD = "the engine has failed for good; the log says why, and the server must be started anew"


class EngineDead(RuntimeError):
    """The engine cannot go on; the process has to be started anew."""


FAILURES = 3  # steps that fail in a row, each after a fresh start, until the engine counts as dead


class Service:
    """Runs an engine; every public method but `start` and `stop` may be called from the event loop.

    Args:
      engine: nobody else may call its `step`.
      warm_up: compile its programs before the first step.
      model: its name in the metrics.
    """

    def __init__(self, engine: Engine, *, warm_up: bool = False, model: str = AppConfig.model):
        self.engine, self.model = engine, model
        self.warm = not warm_up
        self._end = math.inf  # when what still runs is ended
        self.latencies = Latencies()
        self.refused = 0
        self._wake = threading.Event()
        self._died = False
        self._stop = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def dead(self) -> bool:
        """Whether the engine has ended other than by `stop`: no request will ever go on."""
        return self._died or (self._thread.ident is not None and not self.alive and not self._stop)

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._end < math.inf

    @property
    def expired(self) -> bool:
        """Whether what still runs is ended."""
        return time.monotonic() >= self._end

    @property
    def unready(self) -> str:
        """Why a request would not be answered now; "" if it would."""
        if self.dead or self.draining:
            return DEAD if self.dead else "shutting down"
        return "" if self.alive and self.warm else "compiling" if self.alive else "not started"

    def drain(self, patience: float) -> None:
        """Refuse new requests from now on, and end what runs in `patience` seconds; a second call changes nothing."""
        if not self.draining:
            self._end = time.monotonic() + patience

    def stop(self, patience: float = 0.0) -> None:
        """`drain`, wait for what runs, end the rest, join the thread."""
        self.drain(patience)
        while self.engine.busy and self.alive and not self.expired:
            time.sleep(0.02)
        self._stop = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()

    def submit(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], constraints: Sequence[Constraint] = ()
    ) -> tuple[list[Request], asyncio.Queue[int]]:
        """Queue requests that belong together, all or none; without `constraints` their texts may be anything.

        Returns:
          The requests, and a queue that gets the index of a request whenever it went on, and once more when it ended.
          Who stops listening calls `release`.

        Raises:
          Draining: at shutdown.
          EngineDead: it failed for good.
          QueueFull, PromptTooLong, ValueError: see `Engine.submit`.
        """
        if self.draining:
            raise Draining("the server is shutting down")
        if self.dead:
            raise EngineDead(DEAD)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[int]()
        requests = list[Request]()

        def listener(index: int):
            went_on = self.latencies.follow(self.model)

            def notify(request: Request) -> None:  # in the engine's thread
                try:
                    loop.call_soon_threadsafe(events.put_nowait, index)
                except RuntimeError:  # the loop closed while the request ran
                    self.engine.cancel(request)
                went_on(request)  # last: whoever waits is told, whatever fails here

            return notify

        try:
            free: list[Constraint | None] = [None] * len(prompts)
            for index, one in enumerate(zip(prompts, samplings, constraints or free, strict=True)):
                prompt, sampling, constraint = one
                requests.append(self.engine.submit(prompt, sampling, listener(index), constraint))
        except BaseException as error:
            self.refused += isinstance(error, QueueFull)
            self.release(requests)
            raise
        self._wake.set()
        return requests, events

    def release(self, requests: Sequence[Request]) -> None:
        """Let go of requests that nobody waits for."""
        for request in requests:
            self.engine.cancel(request)
        self._wake.set()

    def _loop(self) -> None:
        try:
            if not self.warm:
                self.engine.warm_up()
                self.warm = True
            self._steps()
        except BaseException:
            logging.exception("the engine is dead: every request ends, and new ones are refused")
        finally:
            self._died = not self._stop  # before the requests end: who waits for them asks
            try:
                self.engine.fail("cancelled" if self._stop else "error", restart=False)
            except BaseException:
                logging.exception("the engine could not end its requests")

    def _steps(self) -> None:
        failures = 0
        while not self._stop:
            if not self.engine.busy:
                self._wake.wait(1.0)
                self._wake.clear()
                continue
            try:
                self.engine.step()
                failures = 0
            except Exception:
                failures += 1
                if failures == FAILURES:
                    raise
                logging.exception("a step failed; every request in it ends with finish reason 'error'")
                self.engine.fail()
