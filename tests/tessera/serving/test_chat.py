"""Chat templates against transformers (`make_chats` of tests/golden/make.py), and tool calls in models' own forms."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("pydantic")

from tessera.data.text import BPETokenizer, ByteTokenizer
from tessera.serving.chat import BadChat, CallStream, ChatFormat
from tessera.serving.huggingface import TextFormat, read_format
from tessera.serving.protocol import Reader, read_body

GOLDEN = Path(__file__).parents[2] / "golden"
CHATS = json.loads((GOLDEN / "chats.json").read_text())
SPECIAL = json.loads((GOLDEN / "special_tokens.json").read_text())
HERMES = next(one["template"] for one in CHATS if one["tools"])
MISTRAL = "{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}{{ messages | tojson }}[TOOL_CALLS]"
LLAMA = '{% if tools %}Answer with {"name": name, "parameters": object}.{% endif %}{{ messages | tojson }}'
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


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
        (MISTRAL, '[{"name": "f", "arguments": {"x": "<"}}]', "", [("f", {"x": "<"})]),
        (MISTRAL, "[1, 2]", "[1, 2]", []),
        (LLAMA, ' {"name": "f", "parameters": {"x": 1}}', "", [("f", {"x": 1})]),
        (LLAMA, '{"name": "f"}', '{"name": "f"}', []),
        ("{{ messages }}", '<tool_call>{"name": "f", "arguments": {}}</tool_call>', None, []),
    ],
)
def test_tool_calls_are_read_whole_and_streamed(template, text, rest, found):
    chat = ChatFormat(ByteTokenizer(), TextFormat(template=template))
    rest = text if rest is None else rest
    said, made = chat.read_calls(text)
    assert (said, calls(made)) == (rest, found) and len({one["id"] for one in made}) == len(made)
    for size in (1, 3, 100):
        stream, shown, given = CallStream(chat), "", []
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
    ):
        reader = Reader(ByteTokenizer(), 256, TextFormat(template=template))
        read = read_body(json.dumps(asked | only).encode(), reader, chat=True, limit=9, max_choices=2)
        (constraint,) = read.constraints
        for token in text.encode():
            assert constraint.allowed()[token] and not constraint.ended
            constraint.accept(token)
        assert constraint.ended
        assert calls(reader.chat.read_calls(text)[1]) == [("mul", {"a": 1})]
