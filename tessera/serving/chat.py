"""Chat: messages become a prompt by the model's own template (Jinja, as in `transformers`), and its text tool calls.

A template is a program that a model's author wrote: it runs in Jinja's sandbox (extra `hf`).
"""

import functools
import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tessera.data.text import BPETokenizer, Tokenizer
from tessera.serving.huggingface import TextFormat

END_OF_LAST = "END_OF_LAST_MESSAGE "  # with a space, which shows whether a template strips texts
PLAIN = TextFormat()  # of a model without special tokens, limit or template


class BadChat(ValueError):
    """Messages or tools that the model's template does not take."""


Call = tuple[str, Any]
"""Name and arguments of a tool call; arguments that a model wrote as text stay text."""


class ToolFormat(NamedTuple):
    """How a model writes tool calls.

    Attributes:
      begin, end: around a call; "" for a text that is a call and nothing else. Without an end it lasts to the next.
      read: (text between the two, schemas of the tools' parameters by name) -> calls; none if it is no call.
      write: (name, schema of its parameters) -> a call as a sequence of a grammar in Lark's syntax.
      head, tail: around all calls of a turn.
      marks: further names of special tokens that belong to a call's text.
    """

    begin: str
    end: str
    read: Callable[[str, Mapping[str, Any]], list[Call]]
    write: Callable[[str, Any], str]
    head: str = ""
    tail: str = ""
    marks: tuple[str, ...] = ()


def _quoted(text: str) -> str:
    """A literal of a grammar in Lark's syntax."""
    return json.dumps(text, ensure_ascii=False)


_NEWLINE = _quoted("\n")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _objects(field: str, text: str, schemas: Mapping[str, Any]) -> list[Call]:
    """JSON objects with "name" and the arguments in `field`: one, or a list."""
    value = _json(text)
    found = value if isinstance(value, list) else [value]
    if not all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and one.get(field) is not None for one in found
    ):
        return []
    return [(one["name"], one[field]) for one in found]


def _object(field: str, name: str, schema: Any) -> str:
    fields = {"name": {"const": name}, field: schema}
    call = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return f"%json {json.dumps(call)}"


def _named(text: str, schemas: Mapping[str, Any]) -> list[Call]:
    """Mistral's: a list of objects, or a name, [ARGS] (in some versions) and a JSON object."""
    if calls := _objects("arguments", text, schemas):
        return calls
    found = re.fullmatch(r"\s*([\w.-]+)\s*(?:\[ARGS\])?\s*(\{.*\})\s*", text, re.DOTALL)
    arguments = _json(found[2]) if found else None
    return [(found[1], arguments)] if found and isinstance(arguments, dict) else []


SEPARATOR = "<｜tool▁sep｜>"


def _separated(text: str, schemas: Mapping[str, Any]) -> list[Call]:
    """DeepSeek's: type, separator, name and fenced JSON (V3, R1), or name, separator and JSON (V3.1)."""
    first, found, rest = text.partition(SEPARATOR)
    fenced = re.fullmatch(r"\s*(\S+)\s*```json\s*(\{.*\})\s*```\s*", rest, re.DOTALL)
    name, arguments = (fenced[1], _json(fenced[2])) if fenced else (first.strip(), _json(rest))
    return [(name, arguments)] if found and isinstance(arguments, dict) else []


def _parameters(text: str, schemas: Mapping[str, Any]) -> list[Call]:
    """Qwen3-Coder's: <function=NAME>, and a value between <parameter=NAME> and </parameter> each.

    Values are JSON, but for parameters whose schema says that they are strings.
    """
    found = re.fullmatch(r"\s*<function=([^>]+)>(.*?)(?:</function>)?\s*", text, re.DOTALL)
    if not found:
        return []
    name, body = found[1].strip(), found[2]
    given = re.findall(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", body, re.DOTALL)
    properties, arguments = _properties(schemas.get(name)), {}
    for key, written in given:
        value = None if _is_text(properties.get(key.strip(), {})) else _json(written)
        arguments[key.strip()] = written if value is None and written.strip() != "null" else value
    return [(name, arguments)]


def _properties(schema: Any) -> dict[str, Any]:
    """Those of a client's schema, which may be anything."""
    found = schema.get("properties") if isinstance(schema, dict) else None
    return found if isinstance(found, dict) else {}


def _is_text(schema: Any) -> bool:
    return isinstance(schema, dict) and schema.get("type") == "string"


_CLOSED = "\n</parameter>\n"
_TEXT = f"text[suffix={json.dumps(_CLOSED)}]: /(?s:.*)/"  # a string up to the end of its parameter


def _parameter_rules(name: str, schema: Any) -> str:
    """Grammar of `_parameters`: in the schema's order, those that are not required may be left out."""
    needed, parts = schema.get("required"), []
    for key, of in _properties(schema).items():
        value = f"%json {json.dumps(of)} {_quoted(_CLOSED)}"
        if _is_text(of):
            words = of["enum"] if isinstance(of.get("enum"), list) else []
            value = f"({' | '.join(_quoted(str(one) + _CLOSED) for one in words)})" if words else "text"
        rule = f"{_quoted(f'<parameter={key}>')} {_NEWLINE} {value}"
        parts.append(rule if isinstance(needed, list) and key in needed else f"( {rule} )?")
    begin, end = _quoted(f"<function={name}>"), _quoted("</function>")
    return " ".join([_NEWLINE, begin, _NEWLINE, *parts, end, _NEWLINE])


def _fenced(name: str, schema: Any) -> str:
    around = _quoted(f"{name}\n```json\n"), _quoted("\n```")
    return f'"function" {_quoted(SEPARATOR)} {around[0]} %json {json.dumps(schema)} {around[1]}'


def _plain(between: str, name: str, schema: Any) -> str:
    return f"{_quoted(name)} {_quoted(between)} %json {json.dumps(schema)}"


def _listed(name: str, schema: Any) -> str:
    return f'"[" {_object("arguments", name, schema)} "]"'


_HERMES = ToolFormat("<tool_call>", "</tool_call>", partial(_objects, "arguments"), partial(_object, "arguments"))
_MISTRAL = ToolFormat("[TOOL_CALLS]", "", _named, _listed, marks=("[ARGS]",))
_DEEPSEEK = ToolFormat(
    *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", _separated, _fenced),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", (SEPARATOR,)),
)
# What a template has in it, all of it, where it asks for calls in this form; the first that fits.
TOOL_FORMATS: tuple[tuple[tuple[str, ...], ToolFormat], ...] = (
    (("<tool_call>", "<function="), _HERMES._replace(read=_parameters, write=_parameter_rules)),  # Qwen3-Coder
    (("<tool_call>",), _HERMES),  # Qwen, SmolLM
    (("<｜tool▁call▁begin｜>", "```json"), _DEEPSEEK),  # V3, R1
    (("<｜tool▁call▁begin｜>",), _DEEPSEEK._replace(write=partial(_plain, SEPARATOR))),  # V3.1
    (("[TOOL_CALLS]", "[ARGS]"), _MISTRAL._replace(write=partial(_plain, "[ARGS]"))),
    (("[TOOL_CALLS]",), _MISTRAL),
    (
        ('"parameters"',),
        ToolFormat("", "", partial(_objects, "parameters"), partial(_object, "parameters")),
    ),  # Llama 3.1
)


class ChatFormat:
    """How one model reads chats and calls tools.

    Args:
      tokenizer: of the model.
      text: the model's template and special tokens; without a template messages are "role: content" lines.

    Attributes:
      tools: how it writes tool calls; None if its template knows no tools.
      shown: name of every special token that is part of a call, to be given out as text.
    """

    def __init__(self, tokenizer: Tokenizer, text: TextFormat = PLAIN):
        self.tokenizer, self.text = tokenizer, text
        knows = text.template if "tools" in text.template else ""
        self.tools = next((form for marks, form in TOOL_FORMATS if all(mark in knows for mark in marks)), None)
        form = self.tools
        self.marks = [mark for mark in (form.head, form.begin) if mark] if form else []
        names = {form.begin, form.end, form.head, form.tail, *form.marks} - {""} if form else set()
        self.shown = {token: name for name in names if (token := self._special(name)) is not None}

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

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = (), *, goes_on: bool = False
    ) -> str:
        """The text of a chat up to where the assistant answers, or with `goes_on` to the end of what was said last."""
        if not self.text.template:
            lines = [f"{message['role']}: {message.get('content') or ''}\n" for message in messages]
            return "".join(lines)[:-1] if goes_on else "".join(lines) + "assistant:"
        from jinja2.exceptions import TemplateError

        names, ends = dict(self.text.special or {}), self.text.ends
        if self.text.special is None and isinstance(self.tokenizer, BPETokenizer):
            names["bos_token"] = "" if self.text.begin is None else self.tokenizer.name_of(self.text.begin)
            names["eos_token"] = self.tokenizer.name_of(ends[0]) if ends else ""
        messages = [_with_arguments(message) for message in messages]
        if goes_on:
            messages[-1]["content"] = f"{messages[-1].get('content') or ''}{END_OF_LAST}"
        try:
            text = _template(self.text.template).render(
                messages=messages, tools=list(tools) or None, documents=None, add_generation_prompt=not goes_on, **names
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise BadChat(f"the model's chat template refuses these messages: {error}") from error
        if not goes_on:
            return text
        before, found, after = text.rpartition(END_OF_LAST.strip())
        if not found:
            raise BadChat("the model's chat template leaves out the last message, which is to go on")
        return before if after.startswith(" ") else before.rstrip()  # a template that strips texts

    def calls_grammar(self, tools: Sequence[dict[str, Any]]) -> str:
        """A grammar (Lark's syntax) of one call of one of some tools.

        Raises:
          BadChat: the model's template knows no tools.
        """
        if self.tools is None:
            raise BadChat("the model's chat template knows no tools")
        form, special = self.tools, {name: f"<[{token}]>" for token, name in self.shown.items()}
        calls = [form.write(name, schema) for name, schema in _schemas(tools).items()]
        around = [special.get(mark, _quoted(mark)) if mark else "" for mark in form[:2] + (form.head, form.tail)]
        begin, end, head, tail = around
        for name, token in special.items():  # those inside a call
            calls = [call.replace(_quoted(name), token) for call in calls]
        rules = [
            f"start: {head} {begin} call {end} {tail}",
            "call: " + " | ".join(f"call{n}" for n in range(len(calls))),
        ]
        return "\n".join([*rules, *(f"call{number}: {call}" for number, call in enumerate(calls)), _TEXT])

    def read_calls(self, text: str, tools: Sequence[dict[str, Any]] = ()) -> tuple[str, list[dict[str, Any]]]:
        """An answer without its tool calls, and the calls as OpenAI's API gives them; what is no call stays text."""
        form, schemas = self.tools, _schemas(tools)
        if form is None:
            return text, []
        if not form.begin:
            found = form.read(text, schemas)
            return ("", _as_calls(found)) if found else (text, [])
        rest, *parts = text.split(form.begin)
        calls = []
        for part in parts:
            inside, end, after = part.partition(form.end) if form.end else (part, "", "")
            found = form.read(inside, schemas)
            rest += after.lstrip("\n") if found else form.begin + inside + end + after
            calls += found
        for mark in filter(None, (form.head, form.tail) if calls else ()):
            rest = rest.replace(mark, "")
        return (rest.rstrip() if calls else rest), _as_calls(calls)

    def may_call(self, text: str) -> int:
        """Letters at the beginning of an unfinished answer that cannot belong to a tool call."""
        if self.tools is None:
            return len(text)
        if not self.marks:
            return 0 if text.lstrip()[:1] in ("", "{", "[") else len(text)
        places = [place for mark in self.marks if (place := text.find(mark)) >= 0]
        if places:
            return min(places)
        most = max(map(len, self.marks)) - 1
        held = (n for n in range(min(most, len(text)), 0, -1) if any(mark.startswith(text[-n:]) for mark in self.marks))
        return len(text) - next(held, 0)

    def _special(self, name: str) -> int | None:
        """The number of a special token, which decoding leaves out; None for other text."""
        token = self.tokenizer.token_of(name) if isinstance(self.tokenizer, BPETokenizer) else None
        return token if token is not None and not self.tokenizer.decode(np.asarray([token])) else None


def _schemas(tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The parameters' schema of every tool by name."""
    return {tool["function"]["name"]: tool["function"].get("parameters") or {"type": "object"} for tool in tools}


def _as_calls(found: Sequence[Call]) -> list[dict[str, Any]]:
    calls = []
    for name, arguments in found:
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        function = {"name": name, "arguments": written}
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
    return calls


class CallStream:
    """Gives out an answer part by part, but for what may be a tool call, and the calls at its end."""

    def __init__(self, chat: ChatFormat, tools: Sequence[dict[str, Any]] = ()):
        self._chat, self._tools, self._text, self._given = chat, tools, "", 0

    def feed(self, text: str, *, final: bool) -> tuple[str, list[dict[str, Any]]]:
        """The text to show, and at the end the calls, after `text` was added to the answer."""
        self._text += text
        whole, calls = (
            self._chat.read_calls(self._text, self._tools)
            if final
            else (self._text[: self._chat.may_call(self._text)], [])
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
