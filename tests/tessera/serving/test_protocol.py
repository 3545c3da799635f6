"""What a body may say: every field is done, refused by its name, or described as changing nothing."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pydantic")

from bodies import BODIES, CHAT, COMPLETION

from tessera.data.text import ByteTokenizer
from tessera.serving.protocol import BadRequest, ChatBody, CompletionBody, Reader, best, openapi, read_body, usage
from tessera.serving.requests import Request, Sampling

READER = Reader(ByteTokenizer(), 256)


def read(body, chat=False, reader=READER):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_body(data, reader, chat=chat, limit=7, max_choices=4)


@pytest.mark.parametrize(
    "data",
    [b"[" * 100_000, b"{", b"", b"\xff", b"[]", b"5", b"null", b'{"\\ud800": 1}', b'{"prompt": "\\ud800"}', b"1" * 400]
    + [b'{"model": "tiny", "prompt": [%s]}' % (b"1" * 5000), b'{"a":' * 5000],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_no_json_object_is_refused(data):
    for chat in (False, True):
        with pytest.raises(BadRequest, match="the body"):
            read(data, chat)


def test_the_best_of_several_texts_are_those_of_the_highest_mean_per_token():
    asked = read({"model": "m", "prompt": ["a", "b"], "best_of": 2, "n": 1})
    requests = []
    # Means -1, -2; -0.5, none: the short text has the higher sum and the lower mean.
    for logprobs in ([-1.0] * 5, [-2.0], [-0.5, -0.5], []):
        request = Request((1,), Sampling(max_tokens=8))
        request.logprobs.extend(logprobs)
        requests.append(request)
    assert best(asked, requests) == [0, 2]
    assert best(read({"model": "m", "prompt": ["a", "b"], "n": 2}), requests) == [0, 1, 2, 3]


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
REFUSED = [  # chat, what is added to a body, the parameter that is named, a part of the message
    (False, {"stream": "no"}, "stream", "true or false"),
    (False, {"best_of": 2, "n": 3}, "best_of", "best_of=2 is less than n=3"),
    (False, {"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
    (False, {"best_of": 5}, "best_of", "1 prompts with best_of=5: 1 to 4"),
    (False, {"logprobs": 6}, "logprobs", "logprobs=6 must be a whole number in 0..5"),
    (False, {"stop": {"a": 1}}, "stop", "a string or a list"),
    (False, {"stop": ["a", ""]}, "stop", "1 to 256 letters"),
    (False, {"stop": "a" * 257}, "stop", "1 to 256 letters"),
    (False, {"echo": "x"}, "echo", "true or false"),
    (True, {"max_tokens": 0}, "max_tokens", "a whole number in 1"),
    (False, {"suffix": "a"}, "suffix", "not supported"),
    (False, {"store": True}, "store", "not supported"),
    (False, {"metadata": {"a": "b"}}, "metadata", "not supported"),
    (False, {"logit_bias": {"5": 101}}, "logit_bias", "token ids and numbers in -100..100"),
    (False, {"logit_bias": {"a": 1}}, "logit_bias", "logit_bias='a' must be an object whose keys are token ids"),
    (False, {"logit_bias": {"-1": 1}}, "logit_bias", "keys are token ids"),
    (False, {"service_tier": "flex"}, "service_tier", "not supported"),
    (False, {"stream_options": {"include_usage": "x"}}, "stream_options", "stream_options.include_usage='x'"),
    (False, {"stream_options": {"other": 1}}, "stream_options", "stream_options.other"),
    (True, {"stream_options": {"include_obfuscation": True}}, "stream_options", "include_obfuscation=True"),
    (False, {"response_format": {"type": "xml"}}, "response_format", "{type: json_object}"),
    (False, {"response_format": {"type": "regex"}}, "response_format", "{type: regex, regex}"),
    (False, {"response_format": {"type": "text", "regex": "a"}}, "response_format", "{type: text}"),
    (False, {"response_format": {"type": "regex", "regex": "(["}}, "response_format", "unclosed character class"),
    (False, {"response_format": {"type": "grammar", "grammar": "start: b"}}, "response_format", "unknown name"),
    (
        False,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
        "response_format",
        "Invalid type: x",
    ),
    (False, {"messages": []}, "messages", "unknown field"),
    (False, {"prompt": []}, "prompt", "empty prompt"),
    (False, {"prompt": [[]]}, "prompt", "empty prompt"),
    (False, {"prompt": ["a", ""]}, "prompt", "empty prompt"),
    (False, {"prompt": None}, "prompt", "prompt is missing"),
    (False, {"model": 5}, "model", "model=5 must be the name of the model or of an adapter"),
    (False, {"prompt": ["a"] * 3, "n": 2}, "n", "3 prompts with n=2"),
    (False, {"max_tokens": True}, "max_tokens", "max_tokens=True must be a whole number"),
    (False, {"temperature": 1e-12}, "temperature", "or 0"),
    (True, {"prompt": "a"}, "prompt", "unknown field"),
    (True, {"logprobs": 1}, "logprobs", "true or false"),
    (True, {"top_logprobs": 2}, "top_logprobs", "needs logprobs=true"),
    (True, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs=21 must be a whole number in 0..20"),
    (True, {"tools": [{}]}, "tools", r"tools\[0\].type is missing"),
    (True, {"tools": [TOOL]}, "tools", "chat template knows no tools"),
    (True, {"tool_choice": "required"}, "tool_choice", "needs tools"),
    (True, {"tool_choice": "x"}, "tool_choice", '"required"'),
    (True, {"messages": []}, "messages", "a list of {role, content}"),
    (True, {"messages": [{"content": "a"}]}, "messages", r"messages\[0\].role is missing"),
    (True, {"messages": [{"role": "user", "content": 5}]}, "messages", r"messages\[0\].content=5"),
    (True, {"messages": [{"role": "u", "content": "", "other": "b"}]}, "messages", r"messages\[0\].other='b'"),
]


@pytest.mark.parametrize("chat, more, parameter, message", REFUSED, ids=lambda value: str(value)[:30])
def test_what_is_not_done_is_refused_by_name(chat, more, parameter, message):
    with pytest.raises(BadRequest, match=message) as error:
        read((CHAT if chat else COMPLETION) | more, chat)
    assert error.value.parameter == parameter and len(str(error.value)) < 250


def test_null_and_what_asks_for_nothing_are_the_same_as_nothing():
    for chat, kind, base in ((False, CompletionBody, COMPLETION), (True, ChatBody, CHAT)):
        plain = read(base | {"seed": 5}, chat)
        nulls = read(base | {name: None for name in kind.model_fields if name not in base} | {"seed": 5}, chat)
        off = {"user": "me", "store": False, "metadata": {}, "logit_bias": {}, "stop": [], "top_k": -1, "n": 1}
        assert plain == nulls and read(base | off | {"seed": 5}, chat).samplings == plain.samplings
        assert plain.samplings == (Sampling(seed=5, max_tokens=7),)


def test_what_is_asked_arrives():
    asked = {
        "temperature": 0,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "repetition_penalty": 2.0,
        "presence_penalty": -1.0,
    }
    asked |= {"frequency_penalty": 1.5, "max_tokens": 9, "max_completion_tokens": 4, "stop_token_ids": [3, 4]}
    found = read(COMPLETION | asked | {"prompt": [[1, 2], [3]], "n": 2, "seed": -1, "stop": "x", "logprobs": 0})
    wanted = {name: value for name, value in asked.items() if name not in ("max_completion_tokens", "stop_token_ids")}
    assert found.prompts == ((1, 2), (1, 2), (3,), (3,)) and found.stop == ("x",) and found.logprobs
    wanted |= {"temperature": 0.0, "max_tokens": 4, "stop_tokens": (3, 4)}
    seeds = [one.seed for one in found.samplings]
    assert found.samplings[0] == Sampling(**wanted, seed=2**32 - 1) and seeds == [2**32 - 1, 0] * 2
    # Both texts of a prompt read it once.
    requests = [Request(*pair) for pair in zip(found.prompts, found.samplings, strict=True)]
    assert usage(found, requests, drawn=5) == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


@given(BODIES, st.booleans(), st.booleans())
def test_any_body_is_read_or_refused(body, chat, known):
    try:
        asked = read(body | (CHAT if chat else COMPLETION) if known else body, chat)
    except BadRequest as error:
        assert str(error)
    else:
        assert 1 <= len(asked.prompts) == len(asked.samplings) <= 4


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_bytes_are_refused(data):
    with pytest.raises(BadRequest):
        read(data)


def test_the_document_describes_every_field():
    document = openapi("1.0", ["tiny", "adapter"], {400: "no"})
    schemas = document["components"]["schemas"]
    for kind in (CompletionBody, ChatBody):
        fields = schemas[kind.__name__]["properties"]
        assert set(fields) == set(kind.model_fields) and all(field["description"] for field in fields.values())
        assert schemas[kind.__name__]["additionalProperties"] is False
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schemas
    assert schemas["CompletionBody"]["properties"]["top_p"]["maximum"] == 1
    assert schemas["ChatBody"]["properties"]["model"]["enum"] == ["tiny", "adapter"]
