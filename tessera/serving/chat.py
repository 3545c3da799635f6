"""Chat: messages become a prompt by the model's own template (Jinja, as in `transformers`), and its text tool calls.

A template is a program that a model's author wrote: it runs in Jinja's sandbox (extra `hf`).
"""

import functools
import json
import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from tessera.data.text import BPETokenizer, Tokenizer
from tessera.serving.huggingface import TextFormat

PLAIN = TextFormat()  # of a model without special tokens, limit or template


class BadChat(ValueError):
    """Messages or tools that the model's template does not take."""


class ToolFormat(NamedTuple):
    """How a model writes tool calls: JSON objects with a name and arguments, each between `begin` and `end`.

    Attributes:
      begin, end: around the calls; both "" for a text that is a call and nothing else.
      arguments: name of the arguments' field.
    """

    begin: str
    end: str
    arguments: str = "arguments"


# What a template has in it, where it asks for calls in this form: Hermes (Qwen, SmolLM), Mistral, Llama 3.1.
TOOL_FORMATS = {
    "<tool_call>": ToolFormat("<tool_call>", "</tool_call>"),
    "[TOOL_CALLS]": ToolFormat("", ""),  # a special token: it is not part of the text
    '"parameters"': ToolFormat("", "", "parameters"),
}


class ChatFormat:
    """How one model reads chats and calls tools.

    Args:
      tokenizer: of the model.
      text: the model's template and special tokens; without a template messages are "role: content" lines.
    """

    def __init__(self, tokenizer: Tokenizer, text: TextFormat = PLAIN):
        self.tokenizer, self.text = tokenizer, text
        knows = text.template if "tools" in text.template else ""
        self.tools = next((form for mark, form in TOOL_FORMATS.items() if mark in knows), None)

    def prompt(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> tuple[int, ...]:
        """The tokens of a chat up to where the assistant answers.

        Args:
          messages: of OpenAI's API: role, content, tool_calls, tool_call_id.
          tools: of OpenAI's API.

        Raises:
          BadChat: the template refuses them, or there is none that knows tools.
        """
        if tools and self.tools is None:
            raise BadChat("the model's chat template knows no tools")
        text = self.render(messages, tools)
        special = {"special": False} if self.text.template and isinstance(self.tokenizer, BPETokenizer) else {}
        return tuple(self.tokenizer.encode(text, **special).tolist())

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> str:
        """The text of a chat up to where the assistant answers."""
        if not self.text.template:
            lines = [f"{message['role']}: {message.get('content') or ''}\n" for message in messages]
            return "".join(lines) + "assistant:"
        from jinja2.exceptions import TemplateError

        names, ends = dict(self.text.special or {}), self.text.ends
        if self.text.special is None and isinstance(self.tokenizer, BPETokenizer):
            names["bos_token"] = "" if self.text.begin is None else self.tokenizer.name_of(self.text.begin)
            names["eos_token"] = self.tokenizer.name_of(ends[0]) if ends else ""
        messages = [_with_arguments(message) for message in messages]
        try:
            return _template(self.text.template).render(
                messages=messages, tools=list(tools) or None, documents=None, add_generation_prompt=True, **names
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise BadChat(f"the model's chat template refuses these messages: {error}") from error

    def calls_grammar(self, tools: Sequence[dict[str, Any]]) -> str:
        """A grammar (Lark's syntax) of one call of one of some tools.

        Raises:
          BadChat: the model's template knows no tools.
        """
        if self.tools is None:
            raise BadChat("the model's chat template knows no tools")
        calls = []
        for tool in tools:
            given = tool["function"].get("parameters") or {"type": "object"}
            fields = {"name": {"const": tool["function"]["name"]}, self.tools.arguments: given}
            call = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
            calls.append(f"%json {json.dumps(call)}")
        around = [f" {json.dumps(mark)} " if mark else "" for mark in (self.tools.begin, self.tools.end)]
        return f"start: {around[0]}call{around[1]}\ncall: " + " | ".join(calls)

    def read_calls(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """An answer without its tool calls, and the calls as OpenAI's API gives them; what is no call stays text."""
        if self.tools is None:
            return text, []
        if not self.tools.begin:
            found = self._calls(text)
            return ("", found) if found else (text, [])
        rest, calls = "", []
        before, *parts = text.split(self.tools.begin)
        rest += before
        for part in parts:
            inside, end, after = part.partition(self.tools.end)
            found = self._calls(inside)
            rest += after.lstrip("\n") if found else self.tools.begin + inside + end + after
            calls += found
        return (rest.rstrip() if calls else rest), calls

    def may_call(self, text: str) -> int:
        """Letters at the beginning of an unfinished answer that cannot belong to a tool call."""
        if self.tools is None:
            return len(text)
        if not self.tools.begin:
            return 0 if text.lstrip()[:1] in ("", "{", "[") else len(text)
        mark = self.tools.begin
        if (place := text.find(mark)) >= 0:
            return place
        return len(text) - next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)

    def _calls(self, text: str) -> list[dict[str, Any]]:
        assert self.tools is not None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        calls = []
        for one in value if isinstance(value, list) else [value]:
            arguments = one.get(self.tools.arguments) if isinstance(one, dict) else None
            if arguments is None or not isinstance(one.get("name"), str):
                return []
            written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            function = {"name": one["name"], "arguments": written}
            calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
        return calls


class CallStream:
    """Gives out an answer part by part, but for what may be a tool call, and the calls at its end."""

    def __init__(self, chat: ChatFormat):
        self._chat, self._text, self._given = chat, "", 0

    def feed(self, text: str, *, final: bool) -> tuple[str, list[dict[str, Any]]]:
        """The text to show, and at the end the calls, after `text` was added to the answer."""
        self._text += text
        whole, calls = (
            self._chat.read_calls(self._text) if final else (self._text[: self._chat.may_call(self._text)], [])
        )
        shown, self._given = whole[self._given :], max(self._given, len(whole))
        return shown, calls


def _with_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: the arguments of its calls as objects, which OpenAI's API sends as text."""
    calls = []
    for call in message.get("tool_calls") or []:
        function = dict(call["function"])
        try:
            function["arguments"] = json.loads(function["arguments"])
        except (ValueError, RecursionError):
            pass
        calls.append({**call, "function": function})
    return {**message, **({"tool_calls": calls} if calls else {})}


@functools.cache
def _template(source: str) -> Any:
    """A compiled template, with what `transformers` gives to templates."""
    try:
        from jinja2 import nodes
        from jinja2.exceptions import TemplateError
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise BadChat("chat templates need the extra `hf`: pip install 'tessera-jax[hf]'") from error

    class Generation(Extension):
        """{% generation %} marks what the assistant wrote, for training; it changes no text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, **more)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise BadChat(f"the model's chat template is not valid: {error}") from error
