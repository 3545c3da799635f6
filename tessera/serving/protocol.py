"""OpenAI's request and response bodies (extra `serve`): JSON becomes prompts and `Sampling`, a text becomes JSON.

The pydantic models are what the server accepts, and its OpenAPI document (`openapi`): a field that is not in them is
refused by its name, one that is in them is done, and one of OpenAI's that is not done here has the one value that asks
for nothing.
"""

import functools
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tessera.data.text import NoSuchToken, Tokenizer
from tessera.serving.chat import PLAIN, BadChat, ChatFormat
from tessera.serving.constrain import BadGrammar, Grammars
from tessera.serving.huggingface import TextFormat
from tessera.serving.requests import (
    ALTERNATIVES,
    LARGEST,
    MAX_BIAS,
    MAX_BIASES,
    MAX_STOP_TOKENS,
    NUMBERS,
    Constraint,
    OutOfRange,
    Request,
    Sampling,
    show,
)
from tessera.serving.text import Delta, TextStream

MAX_STOP_LETTERS = 256
MAX_GRAMMAR = 65536  # letters of an expression or a grammar
Token = Annotated[int, Field(ge=0, le=LARGEST)]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
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
    include_obfuscation: Literal[False] = Field(False, description="false: nothing is padded")


class JsonSchema(_Object):
    """A JSON schema by name."""

    name: str = Field("", description="a string; it changes nothing")
    description: str = Field("", description="a string; it changes nothing")
    strict: bool = Field(True, description="true or false; the schema is always kept to")
    schema_: dict[str, Any] = Field(alias="schema", description="a JSON schema")


class ResponseFormat(_Object):
    """The form of a text (structured outputs): any, JSON, or what an expression or a grammar allows."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    regex: str | None = Field(None, max_length=MAX_GRAMMAR)
    grammar: str | None = Field(None, max_length=MAX_GRAMMAR)

    @model_validator(mode="after")
    def _says_what(self) -> "ResponseFormat":
        for name in ("json_schema", "regex", "grammar"):
            if (getattr(self, name) is None) == (self.type == name):
                raise ValueError(f"type {self.type!r} {'needs' if self.type == name else 'has no'} {name}")
        return self


class TextPart(_Object):
    """A part of a message."""

    type: Literal["text"]
    text: str


class FunctionCall(_Object):
    """A function and its arguments, as JSON."""

    name: str
    arguments: str


class ToolCall(_Object):
    """A call that the assistant made before."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Object):
    """One message of a chat."""

    role: str = Field(description="a string")
    content: str | list[TextPart] = Field("", description="a string, or a list of {type: text, text}")
    name: str = ""
    tool_calls: list[ToolCall] = []
    tool_call_id: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The message for a template: what it says, its text in one."""
        said = self.model_dump(include=self.model_fields_set | {"content"})
        if isinstance(self.content, list):
            said["content"] = "".join(part.text for part in self.content)
        return said


class Function(_Object):
    """A function that may be called."""

    name: str = Field(min_length=1, max_length=64)
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool = False


class Tool(_Object):
    """A tool; functions are the only ones."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Object):
    """A function by name."""

    name: str


class ToolChoice(_Object):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


class Body(_Object):
    """What both endpoints understand."""

    model: str | None = Field(None, description="the name of the model or of an adapter, a string")
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
    stream_options: StreamOptions = Field(
        StreamOptions(include_usage=False, include_obfuscation=False), description="an object"
    )
    user: str = Field("", description="a string; it changes nothing")
    logit_bias: dict[str, Bias] = Field(
        {}, max_length=MAX_BIASES, description=f"an object of at most {MAX_BIASES} token ids and numbers in -100..100"
    )
    response_format: ResponseFormat = Field(
        ResponseFormat(type="text", regex=None, grammar=None),
        description="{type: text}, {type: json_object}, {type: json_schema, json_schema: {schema}}, "
        "{type: regex, regex} or {type: grammar, grammar}",
    )
    metadata: dict[str, str] = _off({}, max_length=0)
    store: Literal[False] = _off(False)
    service_tier: Literal["auto", "default"] = _off("auto")


class CompletionBody(Body):
    """The body of POST /v1/completions."""

    prompt: str | list[str] | list[Token] | list[list[Token]] = Field(
        description="a string, a list of strings, a list of token ids in the vocabulary or a list of such lists"
    )
    max_tokens: int | None = _whole(0, LARGEST)
    logprobs: int | None = Field(
        None, ge=0, le=5, description="a whole number in 0..5, of alternatives beside the tokens drawn"
    )
    echo: bool = Field(False, description="true or false")
    suffix: Literal[""] = _off("")
    best_of: int | None = _whole(1, LARGEST)

    def prompts(self, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
        """The prompts as tokens; an empty list of tokens for an empty one."""
        one = isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int)
        texts: Any = [self.prompt] if one else self.prompt
        return [_encode(text, tokenizer) if isinstance(text, str) else tuple(text) for text in texts]


class ChatBody(Body):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(
        min_length=1,
        description="a list of {role, content}, also with tool_calls or tool_call_id; content is a string, or a list "
        "of {type: text, text}",
    )
    logprobs: bool = Field(False, description="true or false")
    top_logprobs: int = _whole(0, ALTERNATIVES, 0)
    tools: list[Tool] = Field(
        [], max_length=128, description="a list of {type: function, function: {name, parameters}}"
    )
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = Field(
        "auto", description='"none", "auto", "required" or {type: function, function: {name}}'
    )
    parallel_tool_calls: bool = Field(True, description="true or false")
    modalities: list[Literal["text"]] = _off(["text"])

    def offered(self) -> list[dict[str, Any]]:
        """The tools that may be called."""
        return [] if self.tool_choice == "none" else [tool.model_dump(exclude_unset=True) for tool in self.tools]

    def demanded(self) -> list[dict[str, Any]]:
        """The tools of which one has to be called; none where the model is free."""
        if isinstance(self.tool_choice, str):
            if self.tool_choice == "required" and not self.tools:
                raise BadRequest('tool_choice="required" needs tools', "tool_choice")
            return self.offered() if self.tool_choice == "required" else []
        name = self.tool_choice.function.name
        found = [tool for tool in self.offered() if tool["function"]["name"] == name]
        if not found:
            raise BadRequest(f"tool_choice: no tool has the name {show(name)}", "tool_choice")
        return found


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


class Reader:
    """What reading a body needs to know of a model.

    Args:
      tokenizer: of the model.
      vocab_size: of the model.
      text: its special tokens and chat template.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, text: TextFormat = PLAIN):
        self.tokenizer, self.vocab_size, self.text = tokenizer, vocab_size, text
        self.chat = ChatFormat(tokenizer, text)

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Of constrained texts; made for the first one, as that takes a moment."""
        return Grammars(self.tokenizer, self.vocab_size, self.text.ends)

    def grammar(self, body: Body) -> str:
        """The grammar of a body's texts, "" for any.

        Raises:
          BadGrammar, BadChat: it cannot be used.
        """
        form = body.response_format
        if isinstance(body, ChatBody) and (demanded := body.demanded()):
            if form.type != "text":
                raise BadRequest("response_format beside a tool_choice that demands a call", "response_format")
            return self.grammars.of_lark(self.chat.calls_grammar(demanded))
        if form.type == "json_object":
            return self.grammars.of_schema({"type": "object"})
        if form.json_schema is not None:
            return self.grammars.of_schema(form.json_schema.schema_)
        if form.regex is not None:
            return self.grammars.of_regex(form.regex)
        return "" if form.grammar is None else self.grammars.of_lark(form.grammar)


@dataclass(frozen=True)
class Asked:
    """A request: prompts in tokens, one for each text, how each is sampled, and the body for what else it says.

    Attributes:
      prompts, samplings: of each text that is drawn.
      constraints: of each text; empty where there are none.
      body: what was sent.
      chat: whether it is of a chat.
    """

    prompts: tuple[tuple[int, ...], ...]
    samplings: tuple[Sampling, ...]
    constraints: tuple[Constraint, ...]
    body: Body
    chat: bool

    @property
    def drawn(self) -> int:
        """Texts drawn for every prompt, of which the best n are given."""
        return getattr(self.body, "best_of", None) or self.body.n

    @property
    def echo(self) -> bool:
        """Whether the prompts are given too."""
        return getattr(self.body, "echo", False)

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The tools that the answer may call."""
        return self.body.offered() if isinstance(self.body, ChatBody) else []

    @property
    def most_calls(self) -> int | None:
        """Tool calls of an answer at most; None for any number."""
        return None if getattr(self.body, "parallel_tool_calls", True) else 1

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a text."""
        return (self.body.stop,) if isinstance(self.body.stop, str) else tuple(self.body.stop)

    @property
    def logprobs(self) -> bool:
        """Whether the log-probabilities of tokens are asked for."""
        value = self.body.logprobs  # type: ignore[attr-defined]
        return value is not None and value is not False  # 0 asks for those of the tokens drawn


def read_body(data: bytes, reader: Reader, *, chat: bool, limit: int, max_choices: int) -> Asked:
    """Check a body and read it.

    Args:
      data: JSON of POST /v1/completions, or with `chat` /v1/chat/completions.
      reader: of the model.
      chat: messages instead of a prompt.
      limit: tokens to draw where the body does not say.
      max_choices: most texts (prompts times the larger of n and best_of) of one request.

    Raises:
      BadRequest: no JSON, or anything in it that is unknown, of the wrong type or out of range.
    """
    kind: type[CompletionBody] | type[ChatBody] = ChatBody if chat else CompletionBody
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(kind, error) from error
    try:
        if isinstance(body, ChatBody):
            prompts = [reader.chat.prompt([message.as_dict() for message in body.messages], body.offered())]
        else:
            prompts = body.prompts(reader.tokenizer)
    except BadChat as error:
        raise BadRequest(str(error), "tools" if "knows no tools" in str(error) else "messages") from error
    except NoSuchToken as error:
        raise BadRequest(str(error), "messages" if chat else "prompt") from error
    if not all(prompts) or not prompts:
        raise BadRequest("an empty prompt", "prompt")
    drawn = body.n
    if isinstance(body, CompletionBody) and body.best_of is not None:
        drawn = body.best_of
        if drawn < body.n:
            raise BadRequest(f"best_of={show(drawn)} is less than n={show(body.n)}", "best_of")
        if drawn > body.n and body.stream:
            raise BadRequest(f"best_of={show(drawn)} cannot be streamed: the best is known at the end", "best_of")
    if drawn * len(prompts) > max_choices:
        what = "n" if drawn == body.n else "best_of"
        raise BadRequest(f"{len(prompts)} prompts with {what}={show(drawn)}: 1 to {max_choices} texts a request", what)
    first = int.from_bytes(os.urandom(4), "little") if body.seed is None else body.seed
    most = [count for count in (body.max_completion_tokens, body.max_tokens) if count is not None]
    same = {name: getattr(body, name) for name in NUMBERS}
    if isinstance(body, ChatBody) and body.top_logprobs and not body.logprobs:
        raise BadRequest(f"top_logprobs={body.top_logprobs} needs logprobs=true", "top_logprobs")
    alternatives = body.top_logprobs if isinstance(body, ChatBody) else body.logprobs
    try:
        sampling = Sampling(
            **same,
            top_k=max(body.top_k, 0),
            max_tokens=(most or [limit])[0],
            stop_tokens=tuple(body.stop_token_ids),
            top_logprobs=alternatives or 0,
            prompt_logprobs=isinstance(body, CompletionBody) and body.echo and body.logprobs is not None,
            logit_bias=tuple((_token_id(name), value) for name, value in body.logit_bias.items()),
        )
        grammar = reader.grammar(body)
    except OutOfRange as error:
        raise BadRequest(str(error), error.parameter) from error
    except (BadGrammar, BadChat) as error:
        raise BadRequest(f"response_format: {error}", "response_format") from error
    samplings = [replace(sampling, seed=(first + i) % 2**32) for i in range(drawn)] * len(prompts)
    constraints = tuple(reader.grammars.constraint(grammar) for _ in samplings) if grammar else ()
    return Asked(tuple(one for one in prompts for _ in range(drawn)), tuple(samplings), constraints, body, chat)


def _token_id(name: str) -> int:
    if not (name.isascii() and name.isdigit() and len(name) < 11):
        raise OutOfRange("logit_bias", name, "an object whose keys are token ids")
    return int(name)


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
    if "content" in place[1:]:  # what follows names the alternatives of its type
        place = place[: place.index("content", 1) + 1]
    if name not in (
        "prompt",
        "stop",
        "response_format",
        "tool_choice",
    ):  # whose places name the alternatives of their types
        where += "".join(f"[{part}]" if isinstance(part, int) else f".{part[:60]}" for part in place[1:])
    found = f"{where} is missing" if error["type"] == "missing" else f"{where}={show(value)}"
    joint = " " if found.startswith(f"{name}=") else f": {name} "
    return BadRequest(f"{found}{joint}must be {kind.model_fields[name].description}", name)


def _encode(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text).tolist())


def echoed(asked: Asked, request: Request, tokenizer: Tokenizer) -> Delta:
    """A prompt as the beginning of its text, with the log-probabilities of its tokens; the first has none."""
    if not asked.echo:
        return Delta()
    none = [None] * len(request.prompt)
    logprobs = [None, *request.prompt_logprobs] if request.sampling.prompt_logprobs else none
    return TextStream(tokenizer).feed(
        request.prompt, logprobs, [(), *request.prompt_top] if logprobs != none else None, final=True
    )


def ending(asked: Asked, request: Request, stream: TextStream) -> Delta:
    """An entry without text for the token that ended an echoed text.

    Evaluation harnesses count on one entry for each token that they asked for, behind those of the prompt.
    """
    if not (asked.echo and request.end is not None and not stream.stopped):
        return Delta()
    logprob, top = request.end
    shown = tuple((stream.would_add(token), value) for token, value in top)
    return Delta("", ("",), (logprob,), (stream.length,), (shown,))


def best(asked: Asked, requests: Sequence[Request]) -> list[int]:
    """The texts to give: of those drawn for a prompt the n most probable per token, the best first."""
    if asked.drawn == asked.body.n:
        return list(range(len(requests)))

    def mean(index: int) -> float:
        found = requests[index].logprobs
        return sum(found) / len(found) if found else -math.inf

    groups = [range(first, first + asked.drawn) for first in range(0, len(requests), asked.drawn)]
    return [index for group in groups for index in sorted(group, key=mean, reverse=True)[: asked.body.n]]


def choice(
    asked: Asked,
    index: int,
    delta: Delta,
    finish: str | None,
    *,
    streamed: bool,
    calls: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """One entry of "choices": a text, or a part of it that is new, and the tool calls that were in it."""
    if calls and finish == "stop":
        finish = "tool_calls"
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
    said: dict[str, Any] = {"role": "assistant", "content": delta.text}
    if calls:
        said["content"] = delta.text or None
        said["tool_calls"] = [{"index": i} | call if streamed else call for i, call in enumerate(calls)]
    return entry | {"delta" if streamed else "message": said}


def _token(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _alternatives(delta: Delta) -> list[dict[str, float] | None]:
    """Log-probabilities by text, the token drawn among them; of two tokens with the same text the more probable's."""
    found: list[dict[str, float] | None] = []
    for token, logprob, others in zip(delta.tokens, delta.logprobs, delta.top, strict=True):
        if logprob is None:
            found.append(None)
            continue
        by_text: dict[str, float] = {}
        for text, value in (*others, (token, logprob)):
            by_text.setdefault(text, value)
        found.append(by_text)
    return found


def usage(asked: Asked, requests: Sequence[Request], drawn: int) -> dict[str, int]:
    """Tokens read, every prompt once, and drawn, up to where the texts end."""
    read = sum(len(one.prompt) for one in requests) // asked.drawn
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


def openapi(version: str, models: Sequence[str], statuses: dict[int, str]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the server.

    Args:
      version: of this program.
      models: names of the model that is served and of its adapters.
      statuses: of errors, with their meanings.
    """
    from pydantic.json_schema import models_json_schema

    _, found = models_json_schema(
        [(kind, "validation") for kind in (CompletionBody, ChatBody, Error)],
        ref_template="#/components/schemas/{model}",
    )
    for kind in (CompletionBody, ChatBody):
        found["$defs"][kind.__name__]["properties"]["model"]["enum"] = list(models)

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

    named = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": list(models)}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tessera", "version": version},
        "paths": {
            "/v1/completions": path("post", "Continue prompts.", "CompletionBody"),
            "/v1/chat/completions": path("post", "Answer messages.", "ChatBody"),
            "/v1/models": path("get", "The model that is served, and its adapters."),
            "/v1/models/{name}": path("get", "A model by name.") | {"parameters": [named]},
            "/health": path("get", "Whether requests are answered.", public=True),
            "/metrics": path("get", "Prometheus metrics.", kind="text/plain", public=True),
        },
        "components": {
            "schemas": found["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
