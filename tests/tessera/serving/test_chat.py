"""Chat templates against transformers (`make_chats` of tests/golden/make.py), and tool calls in models' own forms."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("pydantic")

from tessera.data.text import BPETokenizer, ByteTokenizer
from tessera.serving.chat import BadChat, CallStream, ChatFormat
from tessera.serving.huggingface import TextFormat, read_format
from tessera.serving.protocol import Reader, read_body
from tessera.serving.text import TextStream

GOLDEN = Path(__file__).parents[2] / "golden"
CHATS = json.loads((GOLDEN / "chats.json").read_text())
SPECIAL = json.loads((GOLDEN / "special_tokens.json").read_text())
HERMES = next(one["template"] for one in CHATS if one["tools"])
MISTRAL = "{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}{{ messages | tojson }}[TOOL_CALLS]"
MISTRAL_11 = MISTRAL + "[ARGS]"
CODER = "{% if tools %}<tool_call>\n<function=name>\n<parameter=p>{% endif %}{{ messages }}"
PARTS = "calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end"
OPEN, CALL, SEP, DONE, SHUT = (f"<｜tool▁{name}｜>" for name in PARTS)
DEEPSEEK = "{% if tools %}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{% endif %}```json{{ messages }}"
DEEPSEEK_31 = DEEPSEEK.replace("```json", "")
LLAMA = '{% if tools %}Answer with {"name": name, "parameters": object}.{% endif %}{{ messages | tojson }}'
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TYPED = {
    "type": "function",
    "function": {
        "name": "typed",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string"}, "n": {"type": "integer"}, "list": {"type": "array"}},
            "required": ["n"],
        },
    },
}


def tokenizer():
    """Bytes, with the special tokens of the templates."""
    known = BPETokenizer.of_bytes()
    known._inner.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    return BPETokenizer(known._inner)


@pytest.mark.parametrize("case", CHATS, ids=[f"{one['name']}-{bool(one['tools'])}" for one in CHATS])
def test_a_chat_is_the_prompt_that_transformers_makes(case):
    known = tokenizer()
    chat = ChatFormat(known, TextFormat(256, (257,), case["template"]))
    messages = json.loads(json.dumps(case["messages"]))
    for message in messages:  # OpenAI's API sends the arguments of a call as text
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    assert chat.render(messages, case["tools"] or ()) == case["text"]
    tokens = chat.prompt(messages, case["tools"] or ())
    assert known._inner.decode(tokens, skip_special_tokens=False) == case["text"]
    for mark, written in ((258, "<|im_start|>"), (256, "<s>")):
        assert tokens.count(mark) == case["text"].count(written)


def test_a_template_runs_in_a_sandbox_and_says_what_is_wrong():
    for template in (
        "{{ raise_exception('no system message') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{% set _ = messages.append(1) %}",
        "{{ nothing.at.all }}",
        "{% if %}",
        "{{ 1 + 'a' }}",
    ):
        with pytest.raises(BadChat, match="chat template"):
            ChatFormat(ByteTokenizer(), TextFormat(template=template)).render([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    "template", ["{{ 1 }}", [{"name": "rag", "template": "{{ 2 }}"}, {"name": "default", "template": "{{ 1 }}"}]]
)
def test_a_directorys_template_is_the_only_one_or_the_default_of_several(template, tmp_path):
    shutil.copy(GOLDEN / "huggingface" / "llama" / "config.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert read_format(tmp_path).template == "{{ 1 }}"
    (tmp_path / "chat_template.jinja").write_text("{{ 3 }}")
    assert read_format(tmp_path).template == "{{ 3 }}"


@pytest.mark.parametrize("case", SPECIAL, ids=[one["name"] for one in SPECIAL])
def test_a_template_has_the_special_tokens_of_the_tokenizers_files(case, tmp_path):
    """Not those that config.json numbers: instructed models end their turns with another token than their texts."""
    settings = json.loads((GOLDEN / "huggingface" / "llama" / "config.json").read_text())
    assert settings["bos_token_id"] is not None
    for name, content in (case["files"] | {"config.json": settings}).items():
        (tmp_path / name).write_text(json.dumps(content))
    assert ChatFormat(tokenizer(), read_format(tmp_path)).render([{"role": "user", "content": "?"}]) == case["text"]


def calls(found):
    return [(one["function"]["name"], json.loads(one["function"]["arguments"])) for one in found]


@pytest.mark.parametrize(
    "template, text, rest, found",
    [
        (
            HERMES,
            'Yes.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
            "Yes.",
            [("f", {"a": 1})],
        ),
        (
            HERMES,
            '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": "{}"}]</tool_call>\n',
            "",
            [("f", {}), ("g", {})],
        ),
        (HERMES, '<tool_call>{"name": "f", "arguments": {}}', "", [("f", {})]),
        (HERMES, "a <tool_call>none</tool_call> b", "a <tool_call>none</tool_call> b", []),
        (HERMES, '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
        (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"x": "<"}}]', "", [("f", {"x": "<"})]),
        (
            MISTRAL,
            '[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]',
            "",
            [("f", {}), ("g", {})],
        ),
        (MISTRAL, 'I will look.[TOOL_CALLS][{"name": "f", "arguments": {}}]', "I will look.", [("f", {})]),
        (MISTRAL, "[1, 2]", "[1, 2]", []),
        (
            MISTRAL_11,
            'Yes.[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g{"y": {}}',
            "Yes.",
            [("f", {"x": 1}), ("g", {"y": {}})],
        ),
        (MISTRAL_11, "[TOOL_CALLS]f[ARGS]{", "[TOOL_CALLS]f[ARGS]{", []),
        (
            CODER,
            "Now.\n<tool_call>\n<function=typed>\n<parameter=text>\n1\n\n2\n</parameter>\n"
            "<parameter=n>\n1\n</parameter>\n<parameter=list>\n[1, null]\n</parameter>\n"
            "<parameter=other>\nwords\n</parameter>\n</function>\n</tool_call>",
            "Now.",
            [("typed", {"text": "1\n\n2", "n": 1, "list": [1, None], "other": "words"})],
        ),
        (CODER, "<tool_call>\n<function=f>\n</function>\n</tool_call>", "", [("f", {})]),
        (CODER, "<tool_call>f</tool_call>", "<tool_call>f</tool_call>", []),
        (
            DEEPSEEK,
            f'Yes.{OPEN}{CALL}function{SEP}f\n```json\n{{"x": 1}}\n```{DONE}\n'
            f"{CALL}function{SEP}g\n```json\n{{}}\n```{DONE}{SHUT}",
            "Yes.",
            [("f", {"x": 1}), ("g", {})],
        ),
        (
            DEEPSEEK_31,
            f'{OPEN}{CALL}f{SEP}{{"x": "a"}}{DONE}{SHUT}',
            "",
            [("f", {"x": "a"})],
        ),
        (LLAMA, ' {"name": "f", "parameters": {"x": 1}}', "", [("f", {"x": 1})]),
        (LLAMA, '{"name": "f"}', '{"name": "f"}', []),
        ("{{ messages }}", '<tool_call>{"name": "f", "arguments": {}}</tool_call>', None, []),
    ],
)
def test_tool_calls_are_read_whole_and_streamed(template, text, rest, found):
    chat = ChatFormat(ByteTokenizer(), TextFormat(template=template))
    rest = text if rest is None else rest
    said, made = chat.read_calls(text, [TYPED])
    assert (said, calls(made)) == (rest, found) and len({one["id"] for one in made}) == len(made)
    for size in (1, 3, 100):
        stream, shown, given = CallStream(chat, [TYPED]), "", []
        for i in range(0, len(text), size):
            part, made = stream.feed(text[i : i + size], final=i + size >= len(text))
            shown, given = shown + part, given + made
        assert (shown.rstrip(), calls(given)) == (rest, found)
        assert "tool_call" not in shown or not found


def test_a_call_that_is_demanded_has_a_grammar_of_the_models_own_form():
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "tools": [ADD], "tool_choice": "required"}
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    named = {"type": "function", "function": {"name": "mul", "parameters": schema}}
    only = {"tools": [ADD, named], "tool_choice": {"type": "function", "function": {"name": "mul"}}}
    for template, text in (
        (HERMES, '<tool_call>{"name": "mul", "arguments": {"a": 1}}</tool_call>'),
        (LLAMA, '{"name": "mul", "parameters": {"a": 1}}'),
        (MISTRAL, '[TOOL_CALLS][{"name": "mul", "arguments": {"a": 1}}]'),
        (MISTRAL_11, '[TOOL_CALLS]mul[ARGS]{"a": 1}'),
        (CODER, "<tool_call>\n<function=mul>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"),
        (
            DEEPSEEK,
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>mul\n```json\n"
            '{"a": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        ),
        (
            DEEPSEEK_31,
            f'{OPEN}{CALL}mul{SEP}{{"a": 1}}{DONE}{SHUT}',
        ),
    ):
        reader = Reader(ByteTokenizer(), 256, TextFormat(template=template))
        read = read_body(json.dumps(asked | only).encode(), reader, chat=True, limit=9, max_choices=2)
        (constraint,) = read.constraints
        for token in text.encode():
            assert constraint.allowed()[token] and not constraint.ended
            constraint.accept(token)
        assert constraint.ended
        assert calls(reader.chat.read_calls(text)[1]) == [("mul", {"a": 1})]


@pytest.mark.parametrize(
    ("template", "marks", "text"),
    [
        (MISTRAL, ["[TOOL_CALLS]"], '[TOOL_CALLS][{"name": "typed", "arguments": {"n": 7}}]'),
        (MISTRAL_11, ["[TOOL_CALLS]", "[ARGS]"], '[TOOL_CALLS]typed[ARGS]{"text": "é", "n": 7}'),
        (
            DEEPSEEK,
            [
                "<｜tool▁calls▁begin｜>",
                "<｜tool▁call▁begin｜>",
                "<｜tool▁sep｜>",
                "<｜tool▁call▁end｜>",
                "<｜tool▁calls▁end｜>",
            ],
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>typed\n```json\n"
            '{"n": 7}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        ),
        (
            CODER,
            ["<tool_call>", "</tool_call>"],
            "<tool_call>\n<function=typed>\n<parameter=text>\na <b>\n\n</parameter>\n<parameter=n>\n7\n</parameter>\n"
            "</function>\n</tool_call>",
        ),
    ],
)
def test_special_tokens_of_a_call_are_read_and_demanded(template, marks, text):
    """Decoding leaves special tokens out; a call's own are given out, in a text that has others, and are drawn."""
    known = BPETokenizer.of_bytes()
    known._inner.add_special_tokens(["<s>", *marks])
    known = BPETokenizer(known._inner)
    reader = Reader(known, known.vocab_size, TextFormat(256, (256,), template))
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "?"}],
        "tools": [TYPED],
        "tool_choice": "required",
    }
    read = read_body(json.dumps(asked).encode(), reader, chat=True, limit=9, max_choices=2)
    (constraint,), tokens = read.constraints, known.encode(text, special=False).tolist()
    assert sum(token > 256 for token in tokens) == sum(map(text.count, marks))
    for token in tokens:
        assert constraint.allowed()[token]
        constraint.accept(token)
    drawn = [*"Ü.".encode(), *tokens, 256]
    assert "".join(TextStream(known).feed(drawn, final=True).tokens) == known.decode(np.array(drawn))
    for size in (1, 100):
        stream, whole = TextStream(known, shown=reader.chat.shown), ""
        for i in range(0, len(drawn), size):
            whole += stream.feed(drawn[i : i + size], final=i + size >= len(drawn)).text
        assert whole == "Ü." + text
    rest, found = reader.chat.read_calls(whole, [TYPED])
    assert rest == "Ü." and calls(found)[0][0] == "typed" and calls(found)[0][1]["n"] == 7
