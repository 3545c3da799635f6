"""The HTTP API: OpenAI's completions, chat and models, health, Prometheus metrics, OpenAPI document (extra `serve`).

Every error is JSON as OpenAI's clients expect it, with one of the statuses `STATUSES`.
"""

import asyncio
import contextlib
import functools
import hmac
import ipaddress
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import tessera
from tessera.data.text import Tokenizer
from tessera.serving import metrics
from tessera.serving.chat import PLAIN, CallStream
from tessera.serving.huggingface import TextFormat
from tessera.serving.protocol import (
    Asked,
    BadRequest,
    Reader,
    best,
    choice,
    echoed,
    ending,
    error_body,
    openapi,
    read_body,
    response,
    usage,
)
from tessera.serving.requests import OutOfRange, PromptTooLong, QueueFull, Request, show
from tessera.serving.schema import AppConfig
from tessera.serving.service import DEAD, Draining, EngineDead, Service
from tessera.serving.text import Delta, TextStream

NAMES = {"stop_tokens": "stop_token_ids"}  # settings that a body calls otherwise
FAILED = "the model failed; the log says why"
LOOK = 0.25  # seconds between two looks at whether the client is still there
STATUSES = {
    400: "a body or a host name that is not understood",
    401: "a wrong or missing API key",
    403: "a page of another site asks",
    404: "another model, or no such path",
    405: "another method",
    408: "a body that took too long to arrive",
    413: "a body too large",
    415: "a body that is not declared as JSON",
    429: "a full queue",
    500: "a text that failed",
    503: "shutting down, or a dead engine",
    504: "a request that took too long",
}
INVALID = "invalid_request_error"


class Refused(Exception):
    """An answer other than 200: its status, message, kind, parameter and code."""

    def __init__(self, status: int, message: str, kind: str = INVALID, parameter: str = "", code: str = ""):
        super().__init__(message)
        self.status, self.kind, self.parameter, self.code = status, kind, parameter, code

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        return error_body(str(self), self.kind, self.parameter, self.code)


def make_app(service: Service, tokenizer: Tokenizer, config: AppConfig, text: TextFormat = PLAIN) -> Starlette:
    """The ASGI application; starting it starts the service, stopping it stops the service.

    Args:
      service: that answers.
      tokenizer: of the model.
      config: what is promised and refused.
      text: the model's special tokens and chat template.
    """
    pages = Pages(service, tokenizer, config, text)

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop, config.patience)

    async def refused(request: Any, error: Any) -> Response:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body, error.status, headers)

    async def unrouted(request: Any, error: Any) -> Response:
        return JSONResponse(error_body(str(error.detail), INVALID), error.status_code, error.headers)

    async def failed(request: Any, error: Any) -> Response:
        return JSONResponse(error_body(FAILED, "server_error"), 500)

    async def left(request: Any, error: Any) -> Response:
        return Response(status_code=400)  # nobody is there to read it

    routes = [
        Route("/v1/completions", pages.completions, methods=["POST"]),
        Route("/v1/chat/completions", pages.chat, methods=["POST"]),
        Route("/v1/models", pages.models),
        Route("/v1/models/{name:path}", pages.models),
        Route("/health", pages.health),
        Route("/metrics", pages.metrics),
        Route("/openapi.json", pages.openapi),
    ]
    handlers = {Refused: refused, HTTPException: unrouted, ClientDisconnect: left, Exception: failed}
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


class Pages:
    """The handlers of the routes."""

    def __init__(self, service: Service, tokenizer: Tokenizer, config: AppConfig, text: TextFormat):
        self.service, self.tokenizer, self.config = service, tokenizer, config
        self.names = (config.model, *service.engine.adapters)
        self.reader = Reader(tokenizer, service.engine.programs.decoder.vocabulary, text)

    async def completions(self, request: Any) -> Any:
        """POST /v1/completions."""
        return await self._answer(request, chat=False)

    async def chat(self, request: Any) -> Any:
        """POST /v1/chat/completions."""
        return await self._answer(request, chat=True)

    async def models(self, request: Any) -> Any:
        """GET /v1/models and /v1/models/NAME."""
        self._admit(request)
        same = {"object": "model", "created": 0, "owned_by": "tessera"}
        every = {name: {"id": name} | same | {"parent": self.config.model} for name in self.names}
        del every[self.config.model]["parent"]
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": list(every.values())})
        return JSONResponse(every[self._name(name)])

    async def openapi(self, request: Any) -> Any:
        """GET /openapi.json."""
        return JSONResponse(openapi(tessera.__version__, self.names, STATUSES))

    async def health(self, request: Any) -> Any:
        """GET /health: 200 while the engine runs, its programs are compiled, and it takes requests."""
        reason = self.service.unready
        if not reason:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "unavailable", "reason": reason}, 503)

    async def metrics(self, request: Any) -> Any:
        """GET /metrics."""
        return Response(metrics.page(self.service, self.config.model), media_type=metrics.CONTENT_TYPE)

    async def _answer(self, request: Any, *, chat: bool) -> Any:
        self._admit(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the body must be JSON: send the header Content-Type: application/json")
        data, c = await self._body(request), self.config
        read = functools.partial(read_body, chat=chat, limit=c.max_tokens, max_choices=c.max_choices)
        try:
            asked = await asyncio.to_thread(read, data, self.reader)  # a long prompt takes a while
            model = self._name(asked.body.model)
            if model != c.model:
                asked = replace(asked, samplings=tuple(replace(one, adapter=model) for one in asked.samplings))
            requests, events = self.service.submit(asked.prompts, asked.samplings, asked.constraints)
        except BadRequest as error:
            raise Refused(400, str(error), parameter=error.parameter) from error
        except PromptTooLong as error:
            raise Refused(400, str(error), INVALID, "prompt", "context_length_exceeded") from error
        except QueueFull as error:
            raise Refused(429, str(error), "rate_limit_error", code="queue_full") from error
        except (Draining, EngineDead) as error:
            raise _unavailable(error) from error
        except OutOfRange as error:  # a token outside the vocabulary
            name = NAMES.get(error.parameter, error.parameter)
            message = str(error).replace(f"{error.parameter}=", f"{name}=", 1)
            raise Refused(400, message, INVALID, name) from error
        shown = self.reader.chat.shown if asked.tools else {}
        streams = [TextStream(self.tokenizer, asked.stop, one.prompt, shown=shown) for one in requests]
        follow = self._follow(request, asked, requests, events, streams)
        if asked.body.stream:
            stream = self._stream(asked, model, requests, streams, follow)
            return StreamingResponse(stream, media_type="text/event-stream")
        texts, ends = [Delta()] * len(requests), [""] * len(requests)
        async for index, delta, finish in follow:
            texts[index] += delta
            ends[index] = finish
        choices = []
        for number, i in enumerate(best(asked, requests)):
            calls: list[dict[str, Any]] = []
            if asked.tools:
                text, calls = self.reader.chat.read_calls(texts[i].text, asked.tools)
                calls = calls[: asked.most_calls]
                texts[i] = replace(texts[i], text=text)
            choices.append(choice(asked, number, texts[i], ends[i], streamed=False, calls=calls))
        answer = response(asked, _identity(), choices, model, streamed=False)
        return JSONResponse(answer | {"usage": usage(asked, requests, sum(one.count for one in streams))})

    async def _stream(
        self,
        asked: Asked,
        model: str,
        requests: list[Request],
        streams: list[TextStream],
        follow: AsyncIterator[tuple[int, Delta, str]],
    ) -> AsyncIterator[str]:
        identity = _identity()
        chats = [CallStream(self.reader.chat, asked.tools) for _ in requests] if asked.tools else []
        try:
            async for index, delta, finish in follow:
                calls: list[dict[str, Any]] = []
                if chats:
                    text, calls = chats[index].feed(delta.text, final=bool(finish))
                    calls = calls[: asked.most_calls]
                    delta = replace(delta, text=text)
                if delta or finish:
                    entry = choice(asked, index, delta, finish or None, streamed=True, calls=calls)
                    yield _event(response(asked, identity, [entry], model, streamed=True))
        except Refused as error:
            yield _event(error.body)
            return
        if asked.body.stream_options.include_usage:
            counts = usage(asked, requests, sum(one.count for one in streams))
            yield _event(response(asked, identity, [], model, streamed=True) | {"usage": counts})
        yield "data: [DONE]\n\n"

    async def _follow(
        self,
        request: Any,
        asked: Asked,
        requests: list[Request],
        events: asyncio.Queue[int],
        streams: list[TextStream],
    ) -> AsyncIterator[tuple[int, Delta, str]]:
        """(index, what is new, reason it ended or ""); lets go of requests when the client has left.

        Raises:
          Refused: it took too long, failed, or was ended by a shutdown or a dead engine.
        """
        given, done, echo = [0] * len(requests), [False] * len(requests), [asked.echo] * len(requests)
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
                    raise Refused(504, f"not done within {self.config.timeout} s", "server_error", code="timeout")
                if self.service.dead and (index < 0 or requests[index].finish == "error"):
                    raise _unavailable(EngineDead(DEAD))
                if self.service.expired or (index >= 0 and requests[index].finish == "cancelled" and not done[index]):
                    raise _unavailable(Draining("the server shut down before the text was done"))
                if index < 0 or done[index]:
                    continue
                one, stream = requests[index], streams[index]
                tokens, logprobs, top, finish = one.since(given[index])
                if finish == "error":
                    raise Refused(500, FAILED, "server_error")
                given[index] += len(tokens)
                before = Delta()
                if echo[index]:
                    before, echo[index] = echoed(asked, one, self.tokenizer), False
                    stream = streams[index] = TextStream(self.tokenizer, asked.stop, one.prompt, len(before.text))
                delta = before + stream.feed(tokens, logprobs, top, final=bool(finish))
                if finish:
                    delta += ending(asked, one, stream)
                if stream.stopped:
                    finish = "stop"
                    self.service.release([one])
                done[index] = bool(finish)
                yield index, delta, finish
        finally:
            self.service.release(requests)

    async def _body(self, request: Any) -> bytes:
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.config.slow):
                async for part in request.stream():
                    size += len(part)
                    if size > self.config.max_body:
                        raise Refused(413, f"a body has at most {self.config.max_body} bytes")
                    parts.append(part)
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {self.config.slow} s") from None
        return b"".join(parts)

    def _admit(self, request: Any) -> None:
        """Refuse a wrong key, and what a page of another site can send: it knows no key, but reaches this machine."""
        headers = request.headers
        origin, host = headers.get("origin"), headers.get("host", "")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise Refused(403, f"a page of {show(origin)} may not use this server")
        if not self.config.api_key:
            if not _is_own(host, self.config.hosts):
                hint = "name it in config.app.hosts, or set an API key"
                raise Refused(400, f"the host {show(host)} is not a name of this server: {hint}")
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # A header is bytes, shown as latin-1; clients write a key in UTF-8 or in latin-1.
        sent = given.strip().encode("latin-1")
        right = any(
            hmac.compare_digest(sent, self.config.api_key.encode(encoding, "replace"))
            for encoding in ("utf-8", "latin-1")
        )
        if scheme.lower() != "bearer" or not right:
            raise Refused(401, "wrong or missing API key", "authentication_error", code="invalid_api_key")

    def _name(self, name: str | None) -> str:
        """The model or adapter that a request names; the model if it names none."""
        if name is None:
            return self.config.model
        if name not in self.names:
            message = f"the model {show(name)} does not exist; this server has {', '.join(map(repr, self.names))}"
            raise Refused(404, message, INVALID, "model", "model_not_found")
        return name


def _unavailable(error: Draining | EngineDead) -> Refused:
    code = "shutting_down" if isinstance(error, Draining) else "engine_dead"
    return Refused(503, str(error), "server_error", code=code)


def _is_own(host: str, names: tuple[str, ...]) -> bool:
    """Whether a Host header is localhost, an address or one of some names: no name that a stranger's DNS may hold."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name in ("localhost", *(one.lower() for one in names)) or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _identity() -> str:
    return f"cmpl-{uuid.uuid4().hex}"
