"""Chat templates against transformers (`make_chats` of tests/golden/make.py), and tool calls in models' own forms."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("pydantic")

from tessera.data.text import BPETokenizer, ByteTokenizer
from tessera.models.transformer import TransformerConfig
from tessera.serving.chat import BadChat, CallStream, ChatFormat
from tessera.serving.engine import Engine
from tessera.serving.huggingface import TextFormat, read_format
from tessera.serving.load import Loaded
from tessera.serving.protocol import BadRequest, Reader, read_body
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


BEGUN = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}+{% endif %}"
)


def begun(template=BEGUN):
    """Letters from "!" on. "<s>" begins every text, as in Llama's tokenizer, and every chat by its template."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = {"<s>": 1, "</s>": 2} | {chr(33 + i): i for i in range(64) if i not in (1, 2)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(letters, [], unk_token="!"))
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    options = {"single": "<s> $A", "pair": "<s> $A $B", "special_tokens": [("<s>", 1)]}
    inner.post_processor = tokenizers.processors.TemplateProcessing(**options)
    return BPETokenizer(inner), TextFormat(1, (2,), template)


def test_a_chat_begins_once():
    """Values of lm-eval 0.4.13's HFLM on transformers 5.24.0."""
    messages = [{"role": "user", "content": "#$%"}, {"role": "assistant", "content": "&"}]
    assert ChatFormat(*begun()).prompt(messages) == (1, 0, 3, 4, 2, 5, 2, 10)


def test_the_harness_reads_texts_and_chats_as_its_own_model_does(monkeypatch):
    """Values of lm-eval 0.4.13's HFLM on transformers 5.24.0; it is not needed here."""
    from tessera.serving.harness import harness_model

    monkeypatch.setitem(sys.modules, "lm_eval.api.model", SimpleNamespace(TemplateLM=object))
    known, text = begun()
    engine = Engine.__new__(Engine)  # which draws nothing here
    engine.programs = SimpleNamespace(config=SimpleNamespace(length=25))
    found = harness_model(
        engine, Loaded({}, TransformerConfig(vocab_size=66, layers=1, width=8, heads=2, kv_heads=1, ff=8), known, text)
    )
    for string, special, ids in (
        ("#$%", None, [1, 0, 3, 4]),
        ("#$%", True, [1, 0, 3, 4]),
        ("#$%", False, [0, 3, 4]),
        ("<s>#$%", None, [1, 0, 3, 4]),
        ("<s>#$%", True, [1, 1, 0, 3, 4]),
        ("<s>#$%", False, [1, 0, 3, 4]),
        ("", None, [1]),
        ("", False, []),
    ):
        assert found.tok_encode(string, add_special_tokens=special) == ids
    messages = [{"role": "user", "content": "#$%"}, {"role": "assistant", "content": "&"}]
    for generation, chat, ids in (
        (True, "<s>#$%</s>&</s>+", [1, 0, 3, 4, 2, 5, 2, 10]),
        (False, "<s>#$%</s>&", [1, 0, 3, 4, 2, 5]),
    ):
        assert found.apply_chat_template(messages, add_generation_prompt=generation) == chat
        assert found.tok_encode(chat) == ids


@pytest.mark.parametrize(
    "template, content, text",
    [
        (BEGUN, "a ", "<s>a "),
        (BEGUN.replace("m.content", "m.content | trim"), "a ", "<s>a"),
        (BEGUN.replace("m.content", "'(' + m.content + ')'"), "a", "<s>(a"),
        ("", "a", "user: a"),
    ],
)
def test_a_last_message_goes_on_where_it_ends(template, content, text):
    """Values of transformers 5.24.0, continue_final_message=True, but for the last, which has no template."""
    chat = ChatFormat(*begun(template))
    assert chat.render([{"role": "user", "content": content}], goes_on=True) == text


def test_a_template_that_leaves_out_what_is_to_go_on_is_named():
    with pytest.raises(BadChat, match="leaves out the last message"):
        ChatFormat(*begun("{{ messages[0].role }}")).render([{"role": "user", "content": "a"}], goes_on=True)


def test_a_token_that_the_model_has_not_is_one_error_by_name():
    known = tokenizer()
    known.limit = 259  # <|im_end|> is 259
    reader, body = Reader(known, 259, TextFormat()), {"model": "tiny", "max_tokens": 1}
    for chat, asked in (
        (False, {"prompt": "a<|im_end|>"}),
        (True, {"messages": [{"role": "user", "content": "<|im_end|>"}]}),
    ):
        with pytest.raises(BadRequest, match=r"'<\|im_end\|>', which is token 259 .* 0\.\.258") as error:
            read_body(json.dumps(body | asked).encode(), reader, chat=chat, limit=9, max_choices=2)
        assert error.value.parameter == ("messages" if chat else "prompt")


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


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": [1]},
        {"properties": "x"},
        {"properties": {"a": {"type": "string", "enum": 5}}, "required": 7},
        {"properties": {"a": 1}, "required": None},
    ],
)
def test_a_schema_that_is_none_fails_nobodys_call(parameters):
    """A client may send anything as a tool's parameters."""
    chat, tools = (
        ChatFormat(ByteTokenizer(), TextFormat(template=CODER)),
        [{"type": "function", "function": {"name": "f", "parameters": parameters}}],
    )
    text = "<tool_call><function=f><parameter=a>1</parameter></function></tool_call>"
    assert "function=f" in chat.calls_grammar(tools)
    assert [name for name, _ in calls(chat.read_calls(text, tools)[1])] == ["f"]
