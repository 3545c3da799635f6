"""The HTTP server: OpenAI's completions, chat and models, health and Prometheus metrics (extra `serve`).

Every error is JSON as OpenAI's clients expect it: 400 a body that is not understood, 401 a wrong key, 404 another
model, 413 a body too large, 429 a full queue, 500 a text that failed, 503 shutting down or a dead engine, 504 a request
that took too long.
"""

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from tessera.data.text import Tokenizer
from tessera.serving import metrics
from tessera.serving.protocol import (
    Asked,
    BadRequest,
    choice,
    error_body,
    read_body,
    response,
    token_logprobs,
    usage,
)
from tessera.serving.requests import LARGEST, OutOfRange, PromptTooLong, QueueFull, Request, check_whole, is_number
from tessera.serving.service import DEAD, Draining, EngineDead, Service
from tessera.serving.text import TextStream

NAMES = {"stop_tokens": "stop_token_ids"}  # settings that a body calls otherwise
FAILED = "the model failed; the log says why"
LOOK = 0.25  # seconds between two looks at whether the client is still there


@dataclass(frozen=True)
class AppConfig:
    """What the server promises and refuses.

    Attributes:
      model: name of the model in the API.
      api_key: that requests must bring; "" asks for none.
      timeout: seconds a request may take, waiting included.
      max_tokens: tokens drawn where a request does not say.
      max_choices: choices (prompts times n) of one HTTP request at most.
      max_body: bytes of a request at most.
      patience: seconds that running requests get at shutdown.
    """

    model: str = "tessera"
    api_key: str = ""
    timeout: float = 300.0
    max_tokens: int = 64
    max_choices: int = 16
    max_body: int = 2**20
    patience: float = 10.0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_choices", "max_body"):
            check_whole(name, getattr(self, name), 1, LARGEST)
        for name in ("timeout", "patience"):
            if not (is_number(getattr(self, name)) and getattr(self, name) >= 0):
                raise OutOfRange(name, getattr(self, name), "a number of seconds, 0 or more")


def make_app(service: Service, tokenizer: Tokenizer, config: AppConfig) -> Any:
    """The ASGI application; starting it starts the service, stopping it stops the service.

    Raises:
      ImportError: the extra `serve` is not installed.
    """
    starlette = _starlette()
    pages = Pages(service, tokenizer, config, starlette)

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop, config.patience)

    routes = [
        starlette.Route("/v1/completions", pages.completions, methods=["POST"]),
        starlette.Route("/v1/chat/completions", pages.chat, methods=["POST"]),
        starlette.Route("/v1/models", pages.models),
        starlette.Route("/v1/models/{name:path}", pages.models),
        starlette.Route("/health", pages.health),
        starlette.Route("/metrics", pages.metrics),
    ]
    return starlette.Starlette(routes=routes, lifespan=lifespan)


class Pages:
    """The handlers of the routes."""

    def __init__(self, service: Service, tokenizer: Tokenizer, config: AppConfig, starlette: Any):
        self.service, self.tokenizer, self.config, self.starlette = service, tokenizer, config, starlette

    async def completions(self, request: Any) -> Any:
        """POST /v1/completions."""
        return await self._answer(request, chat=False)

    async def chat(self, request: Any) -> Any:
        """POST /v1/chat/completions."""
        return await self._answer(request, chat=True)

    async def models(self, request: Any) -> Any:
        """GET /v1/models and /v1/models/NAME."""
        if not self._allowed(request):
            return self._error(401, "wrong or missing API key", "authentication_error", code="invalid_api_key")
        one = {"id": self.config.model, "object": "model", "created": 0, "owned_by": "tessera"}
        name = request.path_params.get("name")
        if name is None:
            return self.starlette.JSONResponse({"object": "list", "data": [one]})
        if name != self.config.model:
            return self._unknown_model(name)
        return self.starlette.JSONResponse(one)

    async def health(self, request: Any) -> Any:
        """GET /health: 200 while the engine runs and takes requests."""
        service = self.service
        if service.alive and not service.draining and not service.dead:
            return self.starlette.JSONResponse({"status": "ok"})
        reason = DEAD if service.dead else "shutting down" if service.draining else "not started"
        return self.starlette.JSONResponse({"status": "unavailable", "reason": reason}, 503)

    async def metrics(self, request: Any) -> Any:
        """GET /metrics."""
        engine, counts = self.service.engine, self.service.engine.counts
        ends = {f'reason="{name}"': counts[f"finished_{name}"] for name in ("stop", "length", "cancelled", "error")}
        lines = [
            *metrics.counter("requests", "Requests accepted.", counts["requests"]),
            *metrics.counter("requests_refused", "Requests refused for a full queue.", self.service.refused),
            *metrics.counter("requests_finished", "Texts ended, by reason.", dict(ends)),
            *metrics.counter("prompt_tokens", "Tokens read.", counts["prompt_tokens"]),
            *metrics.counter("tokens", "Tokens drawn.", counts["tokens"]),
            *metrics.counter("drafted_tokens", "Tokens the draft model guessed.", counts["drafted"]),
            *metrics.counter("accepted_tokens", "Of those, the ones that stayed.", counts["accepted"]),
            *metrics.gauge("alive", "1 while the engine runs.", int(self.service.alive and not self.service.dead)),
            *metrics.gauge("waiting", "Texts waiting for a slot.", len(engine.waiting)),
            *metrics.gauge("running", "Texts that have a slot.", engine.running),
            *metrics.gauge("slots", "Slots there are.", len(engine.slots)),
            *metrics.histogram("first_token_seconds", "From request to first token.", self.service.first_token),
            *metrics.histogram("request_seconds", "From request to last token.", self.service.duration),
        ]
        return self.starlette.Response("\n".join(lines) + "\n", media_type=metrics.CONTENT_TYPE)

    async def _answer(self, request: Any, *, chat: bool) -> Any:
        if not self._allowed(request):
            return self._error(401, "wrong or missing API key", "authentication_error", code="invalid_api_key")
        body = await self._body(request)
        if body is None:
            return self._error(413, f"a body has at most {self.config.max_body} bytes", "invalid_request_error")
        c, invalid = self.config, "invalid_request_error"
        try:
            asked = read_body(
                json.loads(body), self.tokenizer, chat=chat, limit=c.max_tokens, max_choices=c.max_choices
            )
            if asked.model != c.model:
                return self._unknown_model(asked.model)
            requests, events = self.service.submit(asked.prompts, asked.samplings)
        except BadRequest as error:
            return self._error(400, str(error), invalid, error.parameter, error.code)
        except PromptTooLong as error:
            return self._error(400, str(error), invalid, "prompt", "context_length_exceeded")
        except QueueFull as error:
            return self._error(429, str(error), "rate_limit_error", code="queue_full")
        except Draining as error:
            return self._error(503, str(error), "server_error", code="shutting_down")
        except EngineDead as error:
            return self._error(503, str(error), "server_error", code="engine_dead")
        except OutOfRange as error:  # a token outside the vocabulary
            name = NAMES.get(error.parameter, error.parameter)
            message = str(error).replace(f"{error.parameter}=", f"{name}=", 1)
            return self._error(400, message, invalid, name)
        except RecursionError:
            return self._error(400, "the body is nested too deeply", invalid)
        except ValueError as error:  # also a body that is no JSON
            return self._error(400, str(error), invalid)
        if asked.stream:
            stream = self._stream(request, asked, requests, events)
            return self.starlette.StreamingResponse(stream, media_type="text/event-stream")
        return await self._whole(request, asked, requests, events)

    async def _whole(self, request: Any, asked: Asked, requests: list[Request], events: asyncio.Queue[int]) -> Any:
        try:
            texts = [""] * len(requests)
            ends: list[str] = [""] * len(requests)
            async for index, text, finish, _ in self._follow(request, asked, requests, events):
                texts[index] += text
                ends[index] = finish or ends[index]
        except TimeoutError:
            return self._error(504, f"not done within {self.config.timeout} s", "server_error", code="timeout")
        except EngineDead as error:
            return self._error(503, str(error), "server_error", code="engine_dead")
        if any(one.finish == "error" for one in requests):
            return self._error(500, FAILED, "server_error")
        if any(one.finish == "cancelled" for one in requests) and "cancelled" in ends:
            return self._error(503, "the request was let go of", "server_error", code="shutting_down")
        choices = []
        for index, (text, finish) in enumerate(zip(texts, ends, strict=True)):
            logprobs = token_logprobs(requests[index], 0, self.tokenizer) if asked.logprobs else None
            choices.append(choice(asked, index, text, finish, logprobs, delta=False))
        answer = response(asked, _identity(), choices, self.config.model, delta=False)
        return self.starlette.JSONResponse(answer | {"usage": usage(requests)})

    async def _stream(
        self, request: Any, asked: Asked, requests: list[Request], events: asyncio.Queue[int]
    ) -> AsyncIterator[str]:
        identity = _identity()
        try:
            async for index, text, finish, start in self._follow(request, asked, requests, events):
                if requests[index].finish == "error":
                    yield _event(error_body(FAILED, "server_error"))
                    return
                logprobs = token_logprobs(requests[index], start, self.tokenizer) if asked.logprobs else None
                if text or finish or logprobs:
                    entry = choice(asked, index, text, finish or None, logprobs, delta=True)
                    yield _event(response(asked, identity, [entry], self.config.model, delta=True))
        except TimeoutError:
            yield _event(error_body(f"not done within {self.config.timeout} s", "server_error", code="timeout"))
            return
        except EngineDead as error:
            yield _event(error_body(str(error), "server_error", code="engine_dead"))
            return
        if asked.usage:
            yield _event(response(asked, identity, [], self.config.model, delta=True) | {"usage": usage(requests)})
        yield "data: [DONE]\n\n"

    async def _follow(
        self, request: Any, asked: Asked, requests: list[Request], events: asyncio.Queue[int]
    ) -> AsyncIterator[tuple[int, str, str, int]]:
        """(index, new text, reason it ended or "", tokens given before); lets go of requests when the client has left.

        Raises:
          TimeoutError: it took too long.
          EngineDead: nothing will come any more.
        """
        streams = [TextStream(self.tokenizer, asked.stop) for _ in requests]
        given, done = [0] * len(requests), [False] * len(requests)
        until = time.monotonic() + self.config.timeout
        try:
            while not all(done):
                try:
                    index = await asyncio.wait_for(events.get(), LOOK)
                except TimeoutError:
                    index = -1
                if await request.is_disconnected():
                    return
                if time.monotonic() > until:
                    raise TimeoutError
                if self.service.dead and (index < 0 or requests[index].finish == "error"):
                    raise EngineDead(DEAD)
                if index < 0 or done[index]:
                    continue
                one, stream = requests[index], streams[index]
                finish, start = one.finish, given[index]  # read before the tokens: they may still grow
                given[index] = len(one.tokens)
                text = stream.feed(one.tokens[: given[index]], final=bool(finish))
                finish = "stop" if stream.stopped else finish
                done[index] = bool(finish)
                if stream.stopped:
                    self.service.release([one])
                yield index, text, finish, start
        finally:
            self.service.release(requests)

    async def _body(self, request: Any) -> bytes | None:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self.config.max_body:
                return None
            parts.append(part)
        return b"".join(parts)

    def _allowed(self, request: Any) -> bool:
        if not self.config.api_key:
            return True
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode(), self.config.api_key.encode())

    def _unknown_model(self, name: str) -> Any:
        message = f"the model {name!r} does not exist; this server has {self.config.model!r}"
        return self._error(404, message, "invalid_request_error", "model", "model_not_found")

    def _error(self, status: int, message: str, kind: str, parameter: str = "", code: str = "") -> Any:
        headers = {"Retry-After": "1"} if status == 429 else None
        return self.starlette.JSONResponse(error_body(message, kind, parameter, code), status, headers)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _identity() -> str:
    return f"cmpl-{uuid.uuid4().hex}"


@dataclass(frozen=True)
class _Parts:
    Starlette: Callable
    Route: Callable
    JSONResponse: Callable
    Response: Callable
    StreamingResponse: Callable


def _starlette() -> _Parts:
    try:
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse, Response, StreamingResponse
        from starlette.routing import Route
    except ImportError as error:
        raise ImportError("the server needs the extra `serve`: pip install 'tessera-jax[serve]'") from error
    return _Parts(Starlette, Route, JSONResponse, Response, StreamingResponse)
