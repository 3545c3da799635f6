"""OpenAI's request and response bodies: what is asked becomes prompts and `Sampling`, what was drawn becomes JSON."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tessera.data.text import Tokenizer
from tessera.serving.requests import (
    LARGEST,
    MAX_STOP_TOKENS,
    OutOfRange,
    Request,
    Sampling,
    check_number,
    check_whole,
    show,
)

IGNORED = {"user", "best_of", "metadata", "store", "service_tier"}
FIELDS = {
    *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stream"),
    *("stream_options", "stop", "seed", "logprobs", "top_k", "min_p", "repetition_penalty", "stop_token_ids"),
    *("presence_penalty", "frequency_penalty"),
}
MAX_LOGPROBS = 5  # as at OpenAI; the drawn token's own is what is given
# Settings that must keep the value that switches them off.
OFF: dict[str, tuple[Any, ...]] = {
    "echo": (None, False),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "response_format": (None, {"type": "text"}),
}


class BadRequest(ValueError):
    """A body that is not understood; `parameter` says which of its fields."""

    def __init__(self, message: str, parameter: str = "", code: str = ""):
        super().__init__(message)
        self.parameter, self.code = parameter, code


@dataclass(frozen=True)
class Asked:
    """A request: prompts in tokens, how each is sampled, strings that end a text, and how to answer."""

    prompts: tuple[tuple[int, ...], ...]
    samplings: tuple[Sampling, ...]
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    logprobs: bool
    chat: bool
    model: str


def read_body(body: Any, tokenizer: Tokenizer, *, chat: bool, limit: int, max_choices: int) -> Asked:
    """Check a body and read it.

    Args:
      body: of POST /v1/completions, or with `chat` /v1/chat/completions.
      tokenizer: of the model.
      chat: messages instead of a prompt.
      limit: tokens to draw where the body does not say.
      max_choices: most choices (prompts times n) of one request.

    Raises:
      BadRequest: anything unknown, of the wrong type or out of range.
    """
    if not isinstance(body, Mapping):
        raise BadRequest("the body must be a JSON object")
    for name, value in body.items():
        if name in OFF and value not in OFF[name]:
            raise BadRequest(f"{name}={show(value)} is not supported; leave it out", name)
        if name not in FIELDS and name not in OFF and name not in IGNORED:
            raise BadRequest(f"unknown field {show(name)}", show(name)[1:-1])
    prompts = [_chat_prompt(body, tokenizer)] if chat else _prompts(body, tokenizer)
    number = _whole(body, "n", 1, max_choices, 1)
    if number * len(prompts) > max_choices:
        raise BadRequest(f"{len(prompts)} prompts with n={number}: 1 to {max_choices} texts a request", "n")
    seed = _whole(body, "seed", -(2**63), 2**63 - 1, None)
    first = int.from_bytes(os.urandom(4), "little") if seed is None else seed % 2**32
    most = [_whole(body, name, 1, LARGEST, None) for name in ("max_completion_tokens", "max_tokens")]
    stop_tokens = body.get("stop_token_ids")
    try:
        sampling = Sampling(
            temperature=_number(body, "temperature", 1.0),
            top_k=max(_whole(body, "top_k", -1, LARGEST, 0), 0),  # -1 is off, too
            top_p=_number(body, "top_p", 1.0),
            min_p=_number(body, "min_p", 0.0),
            repetition_penalty=_number(body, "repetition_penalty", 1.0),
            presence_penalty=_number(body, "presence_penalty", 0.0),
            frequency_penalty=_number(body, "frequency_penalty", 0.0),
            seed=first,
            max_tokens=next((value for value in most if value is not None), limit),
            stop_tokens=() if stop_tokens is None else _tokens(stop_tokens, "stop_token_ids", MAX_STOP_TOKENS),
        )
        every = [Sampling(**{**vars(sampling), "seed": (first + i) % 2**32}) for i in range(number)]
    except OutOfRange as error:
        raise BadRequest(str(error), error.parameter) from error
    return Asked(
        prompts=tuple(prompt for prompt in prompts for _ in range(number)),
        samplings=tuple(every * len(prompts)),
        stop=_stop(body),
        stream=_flag(body, "stream"),
        usage=_usage(body),
        logprobs=_logprobs(body, chat=chat),
        chat=chat,
        model=str(body.get("model", "")),
    )


def _whole(body: Mapping, name: str, low: int, high: int, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    try:
        check_whole(name, value, low, high)
    except OutOfRange as error:
        raise BadRequest(str(error), name) from error
    return value


def _number(body: Mapping, name: str, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    check_number(name, value)
    return float(value)


def _flag(body: Mapping, name: str, place: str = "") -> bool:
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise BadRequest(f"{place}{name}={show(value)} must be true or false", f"{place}{name}")
    return bool(value)


def _usage(body: Mapping) -> bool:
    options = body.get("stream_options")
    if not isinstance(options, Mapping | None):
        raise BadRequest(f"stream_options={show(options)} must be an object", "stream_options")
    return _flag(options or {}, "include_usage", "stream_options.")


def _logprobs(body: Mapping, *, chat: bool) -> bool:
    value = body.get("logprobs")
    if chat or isinstance(value, bool):
        return _flag(body, "logprobs")
    return bool(_whole(body, "logprobs", 0, MAX_LOGPROBS, 0))


def _stop(body: Mapping) -> tuple[str, ...]:
    stop = body.get("stop")
    strings = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or len(strings) > 4 or not all(isinstance(word, str) for word in strings):
        raise BadRequest(f"stop={show(stop)} must be a string or a list of up to four strings", "stop")
    return tuple(strings)


def _tokens(value: Any, name: str, most: int = LARGEST) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > most:
        raise BadRequest(f"{name}={show(value)} must be a list of at most {most} token ids", name)
    for token in value:
        try:
            check_whole(name, token, 0, LARGEST)
        except OutOfRange as error:
            raise BadRequest(f"{error}, and in the vocabulary", name) from error
    return tuple(value)


def _encode(text: str, tokenizer: Tokenizer, name: str) -> tuple[int, ...]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
        raise BadRequest(f"{name} is not valid Unicode: {error}", name) from error
    return tuple(tokenizer.encode(text).tolist())


def _prompts(body: Mapping, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise BadRequest(
            "prompt must be a string, a list of strings, a list of token ids or a list of such lists", "prompt"
        )
    if isinstance(prompt[0], int | float):
        prompt = [prompt]
    found = []
    for one in prompt:
        tokens = _encode(one, tokenizer, "prompt") if isinstance(one, str) else _tokens(one, "prompt")
        if not tokens:
            raise BadRequest("an empty prompt", "prompt")
        found.append(tokens)
    return found


def _chat_prompt(body: Mapping, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Messages as plain text, "role: content" line by line: models trained here have learned no chat format."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list of {role, content}", "messages")
    lines = []
    for message in messages:
        known = isinstance(message, Mapping) and all(isinstance(message.get(x), str) for x in ("role", "content"))
        if not known:
            raise BadRequest("every message needs a role and a content, both strings", "messages")
        lines.append(f"{message['role']}: {message['content']}\n")
    return _encode("".join(lines) + "assistant:", tokenizer, "messages")


def choice(asked: Asked, index: int, text: str, finish: str | None, logprobs: Mapping | None, *, delta: bool) -> dict:
    """One entry of "choices": the text, or with `delta` the part that is new."""
    if asked.chat:
        content = {"role": "assistant", "content": text}
        return {"index": index, "delta" if delta else "message": content, "finish_reason": finish, "logprobs": None}
    return {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs}


def token_logprobs(request: Request, start: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """The log-probabilities of tokens from `start` on, as the completions endpoint writes them."""
    strings = [tokenizer.decode(np.asarray([token], np.int32)) for token in request.tokens[start:]]
    values = request.logprobs[start:]
    alternatives = [{string: value} for string, value in zip(strings, values, strict=True)]
    return {"tokens": strings, "token_logprobs": values, "top_logprobs": alternatives, "text_offset": []}


def usage(requests: Sequence[Request]) -> dict[str, int]:
    """Tokens read and drawn."""
    read, drawn = sum(len(one.prompt) for one in requests), sum(len(one.tokens) for one in requests)
    return {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}


def response(asked: Asked, identity: str, choices: list[dict], model: str, *, delta: bool) -> dict[str, Any]:
    """The body around choices."""
    kind = "text_completion"
    if asked.chat:
        kind = "chat.completion.chunk" if delta else "chat.completion"
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model, "choices": choices}


def error_body(message: str, kind: str, parameter: str = "", code: str = "") -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    return {"error": {"message": message, "type": kind, "param": parameter or None, "code": code or None}}
