"""OpenAI's request and response bodies (extra `serve`): JSON becomes prompts and `Sampling`, a text becomes JSON.

The pydantic models are what the server accepts, and its OpenAPI document (`openapi`): a field that is not in them is
refused by its name, one that is in them is done, and one of OpenAI's that is not done here has the one value that asks
for nothing.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tessera.data.text import Tokenizer
from tessera.serving.requests import (
    ALTERNATIVES,
    LARGEST,
    MAX_STOP_TOKENS,
    NUMBERS,
    OutOfRange,
    Request,
    Sampling,
    show,
)
from tessera.serving.text import Delta

MAX_STOP_LETTERS = 256
Token = Annotated[int, Field(ge=0, le=LARGEST)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LETTERS)]


def _number(name: str, default: float) -> Any:
    low, high, valid = NUMBERS[name]
    return Field(default, ge=0 if name == "temperature" else low, le=high, description=f"a number {valid}")


def _whole(low: int, high: int, default: int | None = None) -> Any:
    return Field(default, ge=low, le=high, description=f"a whole number in {low}..{high}")


def _off(default: Any, **limits: Any) -> Any:
    return Field(default, description="left out: it is not supported here", **limits)


class _Object(BaseModel):
    """A JSON object: no other fields, no conversions, and null is the same as leaving a field out."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else value


class StreamOptions(_Object):
    """What a stream says beside the text."""

    include_usage: bool = Field(False, description="true or false")


class ResponseFormat(_Object):
    """The form of a text; plain text is the only one."""

    type: Literal["text"] = Field(description='"text"')


class Message(_Object):
    """One message of a chat."""

    role: str = Field(description="a string")
    content: str = Field(description="a string")


class Body(_Object):
    """What both endpoints understand."""

    model: str = Field(description="the name of the model, a string")
    max_tokens: int | None = _whole(1, LARGEST)
    max_completion_tokens: int | None = _whole(1, LARGEST)
    temperature: float = _number("temperature", 1.0)
    top_p: float = _number("top_p", 1.0)
    top_k: int = _whole(-1, LARGEST, 0)
    min_p: float = _number("min_p", 0.0)
    repetition_penalty: float = _number("repetition_penalty", 1.0)
    presence_penalty: float = _number("presence_penalty", 0.0)
    frequency_penalty: float = _number("frequency_penalty", 0.0)
    seed: int | None = _whole(-(2**63), 2**63 - 1)
    n: int = _whole(1, LARGEST, 1)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] = Field(
        [], description=f"a string or a list of up to four strings, of 1 to {MAX_STOP_LETTERS} letters each"
    )
    stop_token_ids: list[Token] = Field(
        [], max_length=MAX_STOP_TOKENS, description=f"a list of at most {MAX_STOP_TOKENS} token ids in the vocabulary"
    )
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions = Field(StreamOptions(include_usage=False), description="an object")
    user: str = Field("", description="a string; it changes nothing")
    logit_bias: dict[str, float] = _off({}, max_length=0)
    response_format: ResponseFormat = _off(ResponseFormat(type="text"))
    metadata: dict[str, str] = _off({}, max_length=0)
    store: Literal[False] = _off(False)
    service_tier: Literal["auto", "default"] = _off("auto")


class CompletionBody(Body):
    """The body of POST /v1/completions."""

    prompt: str | list[str] | list[Token] | list[list[Token]] = Field(
        description="a string, a list of strings, a list of token ids in the vocabulary or a list of such lists"
    )
    logprobs: int | None = Field(
        None, ge=0, le=5, description="a whole number in 0..5, of alternatives beside the tokens drawn"
    )
    echo: Literal[False] = _off(False)
    suffix: Literal[""] = _off("")
    best_of: Annotated[int, Field(ge=1, le=1)] = _off(1)

    def prompts(self, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
        """The prompts as tokens; an empty list of tokens for an empty one."""
        one = isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int)
        texts: Any = [self.prompt] if one else self.prompt
        return [_encode(text, tokenizer) if isinstance(text, str) else tuple(text) for text in texts]


class ChatBody(Body):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, description="a list of {role, content}, both strings")
    logprobs: bool = Field(False, description="true or false")
    top_logprobs: int = _whole(0, ALTERNATIVES, 0)
    tools: list[Any] = _off([], max_length=0)
    tool_choice: Literal["none", "auto"] = _off("none")
    modalities: list[Literal["text"]] = _off(["text"])

    def prompts(self, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
        """One prompt, "role: content" line by line: models trained here have learned no chat format."""
        lines = [f"{message.role}: {message.content}\n" for message in self.messages]
        return [_encode("".join(lines) + "assistant:", tokenizer)]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """An error as OpenAI's clients expect it."""

    error: ErrorDetail


class BadRequest(ValueError):
    """A body that is not understood; `parameter` says which of its fields."""

    def __init__(self, message: str, parameter: str = ""):
        super().__init__(message)
        self.parameter = parameter


@dataclass(frozen=True)
class Asked:
    """A request: prompts in tokens, one for each text, how each is sampled, and the body for what else it says."""

    prompts: tuple[tuple[int, ...], ...]
    samplings: tuple[Sampling, ...]
    body: Body
    chat: bool

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a text."""
        return (self.body.stop,) if isinstance(self.body.stop, str) else tuple(self.body.stop)

    @property
    def logprobs(self) -> bool:
        """Whether the log-probabilities of tokens are asked for."""
        value = self.body.logprobs  # type: ignore[attr-defined]
        return value is not None and value is not False  # 0 asks for those of the tokens drawn


def read_body(data: bytes, tokenizer: Tokenizer, *, chat: bool, limit: int, max_choices: int) -> Asked:
    """Check a body and read it.

    Args:
      data: JSON of POST /v1/completions, or with `chat` /v1/chat/completions.
      tokenizer: of the model.
      chat: messages instead of a prompt.
      limit: tokens to draw where the body does not say.
      max_choices: most choices (prompts times n) of one request.

    Raises:
      BadRequest: no JSON, or anything in it that is unknown, of the wrong type or out of range.
    """
    kind: type[CompletionBody] | type[ChatBody] = ChatBody if chat else CompletionBody
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(kind, error) from error
    prompts = body.prompts(tokenizer)
    if not all(prompts) or not prompts:
        raise BadRequest("an empty prompt", "prompt")
    if body.n * len(prompts) > max_choices:
        raise BadRequest(f"{len(prompts)} prompts with n={show(body.n)}: 1 to {max_choices} texts a request", "n")
    first = int.from_bytes(os.urandom(4), "little") if body.seed is None else body.seed
    most = [count for count in (body.max_completion_tokens, body.max_tokens) if count is not None]
    same = {name: getattr(body, name) for name in NUMBERS}
    if isinstance(body, ChatBody) and body.top_logprobs and not body.logprobs:
        raise BadRequest(f"top_logprobs={body.top_logprobs} needs logprobs=true", "top_logprobs")
    try:
        sampling = Sampling(
            **same,
            top_k=max(body.top_k, 0),
            max_tokens=(most or [limit])[0],
            stop_tokens=tuple(body.stop_token_ids),
            top_logprobs=body.top_logprobs if isinstance(body, ChatBody) else getattr(body, "logprobs", 0) or 0,
        )
    except OutOfRange as error:
        raise BadRequest(str(error), error.parameter) from error
    samplings = [replace(sampling, seed=(first + i) % 2**32) for i in range(body.n)]
    return Asked(tuple(one for one in prompts for _ in range(body.n)), tuple(samplings * len(prompts)), body, chat)


def _refusal(kind: type[Body], failed: ValidationError) -> BadRequest:
    """The first error of a body: the place, the value, and what the field's description calls valid."""
    error = failed.errors(include_url=False, include_context=False)[0]
    place, value = error["loc"], error["input"]
    if not place:
        why = "must be a JSON object" if error["type"] == "model_type" else f"is no valid JSON: {error['msg']}"
        return BadRequest(f"the body {why}")
    name = str(place[0])
    if name not in kind.model_fields:
        return BadRequest(f"unknown field {show(name)}", name[:60])
    where = name
    if name not in ("prompt", "stop"):  # whose places name the alternatives of their types
        where += "".join(f"[{part}]" if isinstance(part, int) else f".{part[:60]}" for part in place[1:])
    found = f"{where} is missing" if error["type"] == "missing" else f"{where}={show(value)}"
    joint = " " if found.startswith(f"{name}=") else f": {name} "
    return BadRequest(f"{found}{joint}must be {kind.model_fields[name].description}", name)


def _encode(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text).tolist())


def choice(asked: Asked, index: int, delta: Delta, finish: str | None, *, streamed: bool) -> dict[str, Any]:
    """One entry of "choices": a text, or a part of it that is new."""
    entry: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": None}
    if not asked.chat:
        logprobs = {
            "tokens": list(delta.tokens),
            "token_logprobs": list(delta.logprobs),
            "top_logprobs": _alternatives(delta) if asked.samplings[0].top_logprobs else None,
            "text_offset": list(delta.offsets),
        }
        return entry | {"text": delta.text, "logprobs": logprobs if asked.logprobs else None}
    if asked.logprobs:
        content = [
            _token(token, value) | {"top_logprobs": [_token(*other) for other in others]}
            for token, value, others in zip(delta.tokens, delta.logprobs, delta.top, strict=True)
        ]
        entry["logprobs"] = {"content": content, "refusal": None}
    return entry | {"delta" if streamed else "message": {"role": "assistant", "content": delta.text}}


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _alternatives(delta: Delta) -> list[dict[str, float]]:
    """Log-probabilities by text, the token drawn among them; of two tokens with the same text the more probable's."""
    found: list[dict[str, float]] = []
    for token, logprob, others in zip(delta.tokens, delta.logprobs, delta.top, strict=True):
        found.append({})
        for text, value in (*others, (token, logprob)):
            found[-1].setdefault(text, value)
    return found


def usage(asked: Asked, requests: Sequence[Request], drawn: int) -> dict[str, int]:
    """Tokens read, every prompt once, and drawn, up to where the texts end."""
    read = sum(len(one.prompt) for one in requests) // asked.body.n
    return {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}


def response(asked: Asked, identity: str, choices: list[dict], model: str, *, streamed: bool) -> dict[str, Any]:
    """The body around choices."""
    kind = "text_completion"
    if asked.chat:
        kind = "chat.completion.chunk" if streamed else "chat.completion"
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model, "choices": choices}


def error_body(message: str, kind: str, parameter: str = "", code: str = "") -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    return Error(error=ErrorDetail(message=message, type=kind, param=parameter or None, code=code or None)).model_dump()


def openapi(version: str, model: str, statuses: dict[int, str]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the server.

    Args:
      version: of this program.
      model: name of the model that is served.
      statuses: of errors, with their meanings.
    """
    from pydantic.json_schema import models_json_schema

    _, found = models_json_schema(
        [(kind, "validation") for kind in (CompletionBody, ChatBody, Error)],
        ref_template="#/components/schemas/{model}",
    )
    for kind in (CompletionBody, ChatBody):
        found["$defs"][kind.__name__]["properties"]["model"]["enum"] = [model]

    def content(name: str) -> dict[str, Any]:
        return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}

    def path(method: str, summary: str, body: str = "", kind: str = "application/json", public: bool = False) -> dict:
        answers = {
            str(status): {"description": meaning, "content": content("Error")} for status, meaning in statuses.items()
        }
        answers["200"] = {"description": "done", "content": {kind: {}}}
        about: dict[str, Any] = {"summary": summary, "responses": answers}
        if body:
            about["requestBody"] = {"required": True, "content": content(body)}
        return {method: about if public else about | {"security": [{"key": []}]}}

    named = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": [model]}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tessera", "version": version},
        "paths": {
            "/v1/completions": path("post", "Continue prompts.", "CompletionBody"),
            "/v1/chat/completions": path("post", "Answer messages.", "ChatBody"),
            "/v1/models": path("get", "The model that is served."),
            "/v1/models/{name}": path("get", "A model by name.") | {"parameters": [named]},
            "/health": path("get", "Whether requests are answered.", public=True),
            "/metrics": path("get", "Prometheus metrics.", kind="text/plain", public=True),
        },
        "components": {
            "schemas": found["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
