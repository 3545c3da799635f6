"""The process of a server: its port, its signals, and time limits for clients that are slow (extra `serve`)."""

import asyncio
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tessera.infra.errors import ConfigError
from tessera.serving.schema import AppConfig
from tessera.serving.service import Service

GRACE = 5  # seconds after the patience, in which the answers of what was ended are sent


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, which accepts nothing yet.

    Raises:
      ConfigError: no such address, or it is in use.
    """
    found = None
    try:
        if not 0 <= port < 2**16:
            raise OverflowError("a port is a whole number in 0..65535")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError) as error:
        if found is not None:
            found.close()
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"config.host={host!r}, config.port={port}: {why}; choose another (port 0: any)") from error
    return found


def make_server(app: Any, service: Service, config: AppConfig, ready: Callable[[], None] = lambda: None) -> "Server":
    """A server of an app from `make_app`; `ready` is called once it answers."""
    options = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=int(config.patience) + GRACE,
        http=type("Timed", (TimedProtocol,), {"slow": config.slow}),
    )
    return Server(options, service, config.patience, ready)


class Server(uvicorn.Server):
    """Begins to drain at the signal, not when the connections are gone.

    Attributes:
      signum: the signal that ended it; 0 without one.
      failed: whether the engine died before it was ready.
    """

    def __init__(self, options: uvicorn.Config, service: Service, patience: float, ready: Callable[[], None]):
        super().__init__(options)
        self.service, self.patience, self.ready = service, patience, ready
        self.signum, self.failed = 0, False

    def handle_exit(self, sig: int, frame: Any) -> None:
        """End at SIGTERM or SIGINT; at once at a second SIGINT."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit, self.signum = True, sig
        self.service.drain(self.patience)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then wait for the engine in the background."""
        await super().startup(sockets)
        self._waiting = asyncio.create_task(self._wait())

    async def _wait(self) -> None:
        while self.service.unready == "compiling":
            await asyncio.sleep(0.05)
        self.failed = self.service.dead
        if self.failed:
            self.should_exit = True
        elif not self.service.draining:
            self.ready()


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection whose client does not send a request or does not read an answer in time.

    Attributes:
      slow: seconds for either.
    """

    slow = 30.0

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._reads: asyncio.TimerHandle | None = None
        self._sends = self.loop.call_later(self.slow, self._idle)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all waiting."""
        self._sends.cancel()
        self.resume_writing()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        self._sends.cancel()
        self._sends = self.loop.call_later(self.slow, self._idle)
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Begin to wait for the client to read."""
        super().pause_writing()
        self._reads = self.loop.call_later(self.slow, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        if self._reads is not None:
            self._reads.cancel()
            self._reads = None
        super().resume_writing()

    def _idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
