"""The official client talks to the server over a real socket."""

import asyncio
import contextlib
import json
import math
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
import tiny_model as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.data.text import ByteTokenizer
from tessera.infra.errors import ConfigError
from tessera.serving.engine import Engine, generate_all
from tessera.serving.huggingface import TextFormat
from tessera.serving.metrics import HISTOGRAMS
from tessera.serving.requests import Request, Sampling
from tessera.serving.schema import AppConfig
from tessera.serving.service import Service

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("pydantic")

import openai
import prometheus_client.parser as parser
from bodies import BODIES, CHAT, COMPLETION

from tessera.serving.app import make_app
from tessera.serving.chat import PLAIN
from tessera.serving.process import bind, make_server

KEY = "a key"
CONFIG = AppConfig(model="tiny", api_key=KEY, patience=0.2)
ADAPTED = {  # by the name of a model
    name: Sampling(temperature=0.0, max_tokens=5, adapter=adapter)
    for name, adapter in (("tiny", ""), ("A", "A"), ("B", "B"))
}
SLOW = 0.1  # seconds between two steps where a text shall take a while


class Running:
    """A server on a free port of the loopback interface, with a gate in front of every step of its engine."""

    def __init__(self, sizes=tiny.SIZES, queue=64, config=CONFIG, pause=0.0, warm_up=None, text=PLAIN, engine=None):
        self.engine = engine or tiny.engine(sizes, queue)
        if warm_up is not None:
            self.engine.warm_up = warm_up
        self.service, self.said = Service(self.engine, warm_up=warm_up is not None, model="tiny"), []
        self.gate = threading.Event()
        self.gate.set()
        step = self.engine.step

        def gated():
            self.gate.wait()
            time.sleep(pause)
            step()

        self.engine.step = gated
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        app = make_app(self.service, ByteTokenizer(), config, text)
        self.server = make_server(app, self.service, config, lambda: self.said.append("ready"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        self.wait(lambda: self.server.started)

    def wait(self, condition, seconds=60):
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, "it did not happen"
            time.sleep(0.01)

    def client(self, key=KEY, kind=openai.OpenAI):
        return kind(api_key=key, base_url=f"{self.address}/v1", max_retries=0, timeout=120)

    def get(self, path):
        with urllib.request.urlopen(self.address + path) as answer:
            return answer.read().decode()

    def post(self, body, path="completions"):
        """Status and answer of a body, which is sent as it is if it is a string."""
        data = body if isinstance(body, str) else json.dumps(body)
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}/v1/{path}", data.encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def stop(self):
        self.gate.set()
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive() and not self.service.alive


@contextlib.contextmanager
def running(*args, **options):
    server = Running(*args, **options)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server():
    with running() as one:
        yield one


def test_a_completion_whole_and_streamed_is_the_same_text(server):
    client = server.client()
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 12, "seed": 3, "temperature": 0.8}
    whole = client.completions.create(**asked, logprobs=0)
    assert whole.choices[0].finish_reason == "length" and whole.object == "text_completion"
    assert whole.usage.prompt_tokens == 5 and whole.usage.completion_tokens == 12
    assert len(whole.choices[0].logprobs.token_logprobs) == 12 and max(whole.choices[0].logprobs.token_logprobs) <= 0
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert len(chunks) > 2 and chunks[-1].usage.total_tokens == 17
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"


def test_several_prompts_choices_chat_and_what_samplers_take(server):
    client = server.client()
    many = client.completions.create(model="tiny", prompt=["a", "bc"], n=2, max_tokens=4, seed=5)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    tokens = client.completions.create(model="tiny", prompt=[98, 99], max_tokens=4, seed=5)
    assert tokens.choices[0].text == many.choices[2].text
    more = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.2, "frequency_penalty": 0.5}
    one = client.completions.create(model="tiny", prompt="a", max_tokens=6, seed=1, extra_body=more)
    other = client.completions.create(model="tiny", prompt="a", max_tokens=6, seed=2, extra_body=more)
    assert one.choices[0].text == other.choices[0].text, "top_k = 1 leaves nothing to the seed"
    messages = [{"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, seed=1)
    parts = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, seed=1, stream=True)
    assert "".join(part.choices[0].delta.content for part in parts) == chat.choices[0].message.content


def test_an_echo_gives_the_prompt_with_the_log_probabilities_of_its_tokens(server):
    """As evaluation harnesses ask: the sum over a continuation in the prompt, and whether it is the greedy one."""
    client = server.client()
    asked = {"model": "tiny", "max_tokens": 3, "temperature": 0, "logprobs": 2}
    ids = list("hellö".encode())
    drawn = generate_all(tiny.engine(), [ids], [Sampling(temperature=0.0, max_tokens=3)])[0].tokens
    tokens, reference = [*ids, *drawn], tiny.logprobs([*ids, *drawn])
    wanted = [reference[i, token] for i, token in enumerate(tokens[1:])]
    for prompt in ("hellö", ids):
        echo = client.completions.create(**asked, prompt=prompt, echo=True).choices[0]
        found = echo.logprobs
        assert echo.text == bytes(tokens).decode(errors="replace") == "".join(found.tokens)
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        assert found.token_logprobs[1:] == pytest.approx(wanted, abs=2e-5)
        assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(len(found.tokens))]
    read = client.completions.create(**asked | {"max_tokens": 0}, prompt=tokens, echo=True)
    assert read.choices[0].text == echo.text and read.usage.completion_tokens == 0
    assert read.choices[0].logprobs.token_logprobs[1:] == pytest.approx(wanted, abs=2e-5)
    for found in (echo.logprobs, read.choices[0].logprobs):
        for i in range(len(ids), len(tokens)):  # drawn greedily: harnesses compare with the largest, exactly
            assert found.token_logprobs[i] == max(found.top_logprobs[i].values())
    parts = list(client.completions.create(**asked, prompt="hello", echo=True, stream=True))
    whole = client.completions.create(**asked, prompt="hello", echo=True).choices[0]
    assert "".join(part.choices[0].text for part in parts) == whole.text
    assert [one for part in parts for one in part.choices[0].logprobs.tokens] == whole.logprobs.tokens
    plain = client.completions.create(model="tiny", prompt="hello", max_tokens=2, echo=True, stop="e").choices[0]
    assert plain.text.startswith("hello") and plain.logprobs is None


def test_the_best_of_several_texts_are_the_most_probable_ones_per_token(server):
    client = server.client()
    asked = {"model": "tiny", "prompt": ["ab", "c"], "max_tokens": 4, "seed": 7, "logprobs": 0}

    def means(answer):
        return [sum(one.logprobs.token_logprobs) / 4 for one in answer.choices]

    every = client.completions.create(**asked, n=5)
    best = client.completions.create(**asked, n=2, best_of=5)
    wanted = [sorted(means(every)[i : i + 5], reverse=True)[:2] for i in (0, 5)]
    assert means(best) == pytest.approx(wanted[0] + wanted[1], abs=1e-6)
    assert [one.index for one in best.choices] == [0, 1, 2, 3]
    assert best.usage.completion_tokens == 2 * 5 * 4 and best.usage.prompt_tokens == 3


def test_a_bias_of_logits_draws_and_forbids_tokens(server):
    client = server.client()
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 6, "temperature": 0}
    assert client.completions.create(**asked, logit_bias={"120": 100}).choices[0].text == "xxxxxx"
    letters = {str(token): 60 for token in b"abc"}
    first = client.completions.create(**asked, logit_bias=letters).choices[0].text[0]
    other = client.completions.create(**asked, logit_bias=letters | {str(ord(first)): -100}).choices[0].text
    ranks = tiny.logprobs([97])[0]
    assert [first, other[0]] == sorted("abc", key=lambda letter: -ranks[ord(letter)])[:2] and first not in other


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["a", "bc"]}, "count": {"type": "integer", "minimum": 3, "maximum": 9}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


def test_a_response_format_is_kept_to(server):
    """A model that was never trained writes what the form allows, beside texts that are free."""
    client = server.client()
    free = {"model": "tiny", "prompt": "a", "max_tokens": 12, "seed": 4}
    alone = client.completions.create(**free).choices[0].text
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.completions.create(**free).choices[0].text))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "max_tokens": 50, "top_p": 0.9}
    for seed in range(3):
        bias = {str(token): -100 for token in b" \n\r\t"}  # spaces between the parts would fill the context
        choice = client.chat.completions.create(**chat, response_format=form, seed=seed, logit_bias=bias).choices[0]
        found = json.loads(choice.message.content)
        assert choice.finish_reason == "stop" and set(found) == {"name", "count"}
        assert found["name"] in ("a", "bc") and 3 <= found["count"] <= 9
    for thread in threads:
        thread.join(60)
    assert answers == [alone] * 2
    for form, pattern in (
        ({"type": "regex", "regex": "(ab|c){3}[0-9]"}, r"(ab|c){3}[0-9]"),
        ({"type": "grammar", "grammar": 'start: "<" word ">"\nword: "x" | "y" word'}, r"<y*x>"),
    ):
        bias = {"120": 5}
        extra = {"extra_body": {"response_format": form}}
        text = client.completions.create(model="tiny", prompt="a", max_tokens=40, logit_bias=bias, **extra).choices[0]
        assert re.fullmatch(pattern, text.text) and text.finish_reason == "stop"
    stream = client.chat.completions.create(**chat, seed=1, stream=True, response_format={"type": "json_object"})
    assert "".join(part.choices[0].delta.content for part in stream).lstrip().startswith("{")


@pytest.mark.long
def test_tools_are_called_in_the_form_of_the_models_template():
    """An untrained model, made to call one; then the call and its result go into the next prompt."""
    template = (
        "{% if tools %}{{ tools | length }} as <tool_call>{% endif %}{% for message in messages %}"
        "{{ message.role[0] }}{{ message.content }}{% for call in message.tool_calls or [] %}"
        "{{ call.function.arguments.a }}{% endfor %};{% endfor %}"
    )
    arguments = {"type": "object", "properties": {"a": {"enum": [3]}}, "required": ["a"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": arguments}}]
    sizes = replace(tiny.SIZES, length=128)
    with running(sizes, text=TextFormat(template=template)) as server:
        chat = server.client().chat.completions
        said = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
        bias = {str(token): -100 for token in b" \n\r\t"}
        asked = {"model": "tiny", "messages": said, "tools": tools, "max_tokens": 90, "seed": 1, "logit_bias": bias}
        answer = chat.create(**asked, tool_choice="required")
        (call,) = answer.choices[0].message.tool_calls
        assert answer.usage.prompt_tokens == len("1 as <tool_call>uab;")
        assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
        assert (call.type, call.function.name) == ("function", "f") and json.loads(call.function.arguments) == {"a": 3}
        named = {"type": "function", "function": {"name": "f"}}
        parts = list(chat.create(**asked, tool_choice=named, stream=True))
        made = [one for part in parts for one in part.choices[0].delta.tool_calls or []]
        assert [(one.index, one.function.name, one.function.arguments) for one in made] == [(0, "f", '{"a": 3}')]
        assert parts[-1].choices[0].finish_reason == "tool_calls"
        assert not any(part.choices[0].delta.content for part in parts)
        said += [answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "9"}]
        free = chat.create(
            **asked | {"messages": said, "max_tokens": 2, "logit_bias": {"120": 100}}, tool_choice="none"
        )
        assert free.usage.prompt_tokens == len("uab;a3;t9;") and free.choices[0].message.content == "xx"
        assert free.choices[0].finish_reason == "length" and not free.choices[0].message.tool_calls


def test_a_stop_string_ends_the_text_before_it(server):
    client = server.client()
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 40, "seed": 1}
    text = client.completions.create(**asked).choices[0].text
    word = next(letter for letter in text[4:] if letter.isascii())
    cut = client.completions.create(**asked, stop=[word]).choices[0]
    assert cut.text == text[: text.index(word)] and cut.finish_reason == "stop"


def test_models_health_and_metrics(server):
    assert [model.id for model in server.client().models.list()] == ["tiny"]
    assert server.client().models.retrieve("tiny").id == "tiny"
    assert "ok" in server.get("/health")
    server.client().completions.create(model="tiny", prompt="a", max_tokens=2)
    page = server.get("/metrics")
    families = {family.name: family for family in parser.text_string_to_metric_families(page)}
    samples = {sample.name: sample for family in families.values() for sample in family.samples}
    assert samples["vllm:generation_tokens_total"].value >= 2 and samples["tessera_slots"].value == 4
    assert samples["vllm:num_requests_running"].labels == {"model_name": "tiny"}
    assert {"tessera_requests", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"} <= set(families)
    for name in HISTOGRAMS:
        assert samples[f"vllm:{name}_count"].value == samples[f"vllm:{name}_bucket"].value > 0
    ends = {one.labels["finished_reason"]: one.value for one in families["vllm:request_success"].samples}
    assert ends["length"] >= 1 and ends["error"] == 0 and set(ends) == {"stop", "length", "abort", "error"}


def test_what_is_wrong_is_said_in_the_clients_own_errors(server):
    client = server.client()
    ask = {"model": "tiny", "prompt": "a", "max_tokens": 2}
    with pytest.raises(openai.AuthenticationError):
        server.client("another key").completions.create(**ask)
    with pytest.raises(openai.AuthenticationError):
        server.client("another key").models.list()
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**ask | {"prompt": "a" * 64})
    assert error.value.code == "context_length_exceeded" and "64 tokens" in error.value.message
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**ask | {"model": "large"})
    for wrong in (
        {"temperature": -1},
        {"top_p": 2},
        {"n": 99},
        {"prompt": ""},
        {"presence_penalty": 3},
        {"suffix": "x"},
    ):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**ask | wrong)
    with pytest.raises(openai.BadRequestError, match="wrong_name"):
        client.completions.create(**ask, extra_body={"wrong_name": 1})
    with pytest.raises(openai.APIStatusError) as error:
        client.completions.create(**ask | {"prompt": "a" * 2**20})
    assert error.value.status_code == 413


def test_a_request_names_the_adapter_that_it_is_served_with():
    with running(engine=tiny.adapted_engine()) as one:
        client = one.client()
        models = {model.id: model for model in client.models.list()}
        assert list(models) == ["tiny", "A", "B"] and models["B"].parent == "tiny"
        assert client.models.retrieve("A").id == "A"
        prompt = [7, 8, 9, 10]
        asked = {"prompt": prompt, "max_tokens": 5, "temperature": 0, "logprobs": 0, "echo": True}
        for name in ("tiny", "A", "B"):
            whole = client.completions.create(model=name, **asked)
            assert whole.model == name
            found = whole.choices[0].logprobs.token_logprobs
            tokens = generate_all(tiny.adapted_engine(), [prompt], [ADAPTED[name]])[0].tokens
            expected = tiny.logprobs([*prompt, *tokens], tiny.merged(name.replace("tiny", "")))
            wanted = expected[np.arange(8), [*prompt, *tokens][1:]]
            assert found[1:] == pytest.approx(wanted, abs=1e-4)
        chunks = list(client.completions.create(model="B", **asked, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        assert {chunk.model for chunk in chunks} == {"B"}
        unnamed = one.post({**asked, "echo": False})[1]
        assert unnamed["model"] == "tiny"
        assert unnamed["choices"] == one.post({**asked, "echo": False, "model": "tiny"})[1]["choices"]
        with pytest.raises(openai.NotFoundError, match="'C' does not exist; this server has 'tiny', 'A', 'B'"):
            client.completions.create(model="C", **asked)
        best = client.completions.create(model="A", prompt=prompt, max_tokens=4, seed=1, best_of=3, logprobs=0)
        asked = [Sampling(seed=seed, max_tokens=4, adapter="A") for seed in (1, 2, 3)]
        texts = generate_all(tiny.adapted_engine(), [prompt] * 3, asked)
        assert sum(best.choices[0].logprobs.token_logprobs) == pytest.approx(
            max(sum(text.logprobs) for text in texts), abs=1e-4
        )


def test_a_full_queue_is_refused_and_nothing_in_it_is_lost():
    with running(queue=2) as server:
        server.gate.clear()
        answers = []

        def ask(seed):
            answers.append(server.client().completions.create(model="tiny", prompt="a", max_tokens=3, seed=seed))

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        server.wait(lambda: len(server.engine.waiting) == 6)
        with pytest.raises(openai.RateLimitError) as error:
            server.client().completions.create(model="tiny", prompt="a", max_tokens=3)
        assert error.value.response.headers["retry-after"] == "1"
        server.gate.set()
        for thread in threads:
            thread.join(60)
        assert len(answers) == 6 and {answer.usage.completion_tokens for answer in answers} == {3}
        assert 'tessera_requests_refused_total{model_name="tiny"} 1.0' in server.get("/metrics")


def test_a_client_that_leaves_frees_its_slot():
    with running(pause=SLOW) as server:
        ask = {"model": "tiny", "prompt": "a", "max_tokens": 60}
        stream = server.client().completions.create(**ask, stream=True)
        next(iter(stream))
        assert server.engine.running == 1
        stream.close()
        server.wait(lambda: server.engine.running == 0)
        with pytest.raises(openai.APITimeoutError):
            server.client().with_options(timeout=0.3).completions.create(**ask)
        server.wait(lambda: server.engine.counts["finished_cancelled"] == 2 and server.engine.running == 0)
        assert server.engine.counts["finished_length"] == 0


def test_a_request_that_takes_too_long_is_ended():
    with running(config=replace(CONFIG, timeout=0.3), pause=SLOW) as server:
        ask = {"model": "tiny", "prompt": "a", "max_tokens": 60}
        with pytest.raises(openai.APIStatusError) as error:
            server.client().completions.create(**ask)
        assert error.value.status_code == 504
        with pytest.raises(openai.APIError, match=r"0\.3 s"):
            list(server.client().completions.create(**ask, stream=True))
        server.wait(lambda: server.engine.running == 0)


def raw(server, data, seconds=10.0):
    """What a socket that sends some bytes and then nothing more gets before the server closes it."""
    with socket.create_connection(server.socket.getsockname(), timeout=seconds) as found:
        found.sendall(data)
        parts = []
        while part := found.recv(2**16):
            parts.append(part)
        return b"".join(parts)


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer a key\r\n"
HEAD += b"Content-Type: application/json\r\nContent-Length: 1000\r\n"


def test_slow_clients_are_let_go_of():
    with running(config=replace(CONFIG, slow=0.3, timeout=60.0)) as server:
        begun = time.monotonic()
        answers = []
        for data in (b"", b"GET /hea", HEAD, HEAD + b'\r\n{"model"'):
            thread = threading.Thread(target=lambda data=data: answers.append(raw(server, data)))
            thread.start()
        server.wait(lambda: len(answers) == 4)
        assert time.monotonic() - begun < 5 and not server.server.server_state.connections
        assert sorted(answer[:12] for answer in answers) == [b"", b"", b"", b"HTTP/1.1 408"]

        # One that asks for much and reads nothing: more than the kernel's buffers hold.
        app, size = server.server.config.loaded_app, 2**24

        async def large(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"a" * size, "more_body": True})
            await send({"type": "http.response.body", "body": b"a" * size})

        server.server.config.loaded_app = large
        with socket.create_connection(server.socket.getsockname()) as found:
            found.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            server.wait(lambda: server.server.server_state.connections)
            server.wait(lambda: not server.server.server_state.connections, 5)
        server.server.config.loaded_app = app


def test_who_may_ask(server):
    """A page of another site can send a request to a server on loopback, under a name of its own; it gets no answer."""

    def status(server, path="models", data=None, **headers):
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(f"{server.address}/v1/{path}", data, sent)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            assert "error" in json.loads(error.read())
            return error.code

    own = server.address.removeprefix("http://")
    key = {"Authorization": f"Bearer {KEY}"}
    assert status(server, **key) == status(server, Authorization=f"bearer  {KEY}") == 200
    assert status(server, Authorization=KEY) == status(server) == 401
    assert status(server, **key, Origin="https://evil.example") == status(server, **key, Origin="null") == 403
    assert status(server, **key, Origin=f"http://{own}") == status(server, **key, Host="my-service") == 200
    for kind, wanted in (("text/plain", 415), ("application/x-www-form-urlencoded", 415), ("application/json", 400)):
        assert status(server, "completions", b"{}", **key, Content_Type=kind) == wanted
    assert status(server, "completions", b"{}", **key, Content_Type="Application/JSON; charset=utf-8") == 400
    assert status(server, "nothing") == 404 and status(server, "completions") == 405
    with running(config=replace(CONFIG, api_key="", hosts=("My-Service",))) as other:
        for host, wanted in (("evil.example", 400), ("evil.example:80", 400), ("[::1", 400), ("", 400)):
            assert status(other, Host=host) == wanted
        for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "my-service:80", "10.0.0.1"):
            assert status(other, Host=host) == 200
    letters = "clé-ключ"
    with running(config=replace(CONFIG, api_key=letters)) as other:
        sent = f"Bearer {letters}".encode().decode("latin-1")  # the bytes of UTF-8, as curl sends them
        assert status(other, Authorization=sent) == 200 and status(other, Authorization="Bearer cl") == 401
    with running(config=replace(CONFIG, api_key="clé")) as other:
        assert status(other, Authorization="Bearer clé") == 200  # latin-1, as urllib sends it


@settings(max_examples=60)
@given(BODIES, st.booleans(), st.booleans())
def test_no_body_is_an_error_of_the_server(server, body, chat, known):
    if known:  # a body that may be answered
        body = body | (CHAT if chat else COMPLETION) | {"max_tokens": 2, "max_completion_tokens": None, "stream": False}
    status, answer = server.post(body, "chat/completions" if chat else "completions")
    assert status == 200 and answer["choices"] or 400 <= status < 500 and answer["error"]["message"]


def test_the_document_is_served(server):
    assert "/v1/completions" in json.loads(server.get("/openapi.json"))["paths"]


def test_a_busy_port_is_one_line(server):
    address = server.socket.getsockname()
    with pytest.raises(ConfigError, match=rf"config.port={address[1]}: .*in use"):
        bind(*address).listen()
    with pytest.raises(ConfigError, match="no.such.host"):
        bind("no.such.host.invalid", 80)
    with pytest.raises(ConfigError, match="config.port=70000"):
        bind("127.0.0.1", 70000)


def test_health_is_503_until_all_programs_are_compiled():
    compiled = threading.Event()
    with running(warm_up=compiled.wait) as server:
        with pytest.raises(urllib.error.HTTPError, match="503") as error:
            server.get("/health")
        assert json.loads(error.value.read())["reason"] == "compiling" and not server.said
        compiled.set()
        server.wait(lambda: server.said == ["ready"])
        assert "ok" in server.get("/health")
    with running(warm_up=lambda: 1 / 0) as server:  # no memory for a program, say
        server.wait(lambda: not server.thread.is_alive())
        assert server.server.failed and not server.said


def test_a_shutdown_lets_what_runs_finish():
    server = Running(pause=0.005, config=replace(CONFIG, patience=20.0))
    answers = []
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 30}
    thread = threading.Thread(target=lambda: answers.append(server.client().completions.create(**asked)))
    thread.start()
    server.wait(lambda: server.engine.running == 1)
    server.stop()
    thread.join(60)
    assert answers[0].usage.completion_tokens == 30


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_what_a_shutdown_cuts_off_is_told(signum, caplog):
    server = Running(pause=SLOW, config=replace(CONFIG, patience=0.5, timeout=60.0))
    asked, answers, streamed = {"model": "tiny", "prompt": "a", "max_tokens": 60}, [], []

    def stream():
        try:
            streamed.extend(server.client().completions.create(**asked, stream=True))
        except openai.APIError as error:
            streamed.append(error)

    threads = [threading.Thread(target=lambda: answers.append(server.post(asked))), threading.Thread(target=stream)]
    for thread in threads:
        thread.start()
    server.wait(lambda: server.engine.running == 2 and streamed)
    begun = time.monotonic()
    server.server.handle_exit(signum, None)
    assert server.service.draining and "shutting down" in server.service.unready
    for thread in (*threads, server.thread):
        thread.join(20)
    assert 0.5 <= time.monotonic() - begun < 3 and server.server.signum == signum
    status, answer = answers[0]
    assert status == 503 and answer["error"]["code"] == "shutting_down"
    assert "shut down before" in str(streamed[-1]) and len(streamed) > 1
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


def test_usage_and_log_probabilities_end_where_the_text_ends(server, monkeypatch):
    """Where nobody tells the engine that the text has ended, too: all tokens after a stop string are drawn."""
    monkeypatch.setattr(server.engine, "cancel", lambda request: None)
    client = server.client()
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 40, "seed": 1, "logprobs": 0}
    whole = client.completions.create(**asked).choices[0]
    # The first place of a letter that a token begins with.
    text = whole.text
    place = next(i for i in whole.logprobs.text_offset if i > 3 and text[i].isascii() and text.index(text[i]) == i)
    asked |= {"stop": text[place]}
    one = client.completions.create(**asked)
    assert one.choices[0].text == whole.text[:place]
    count = whole.logprobs.text_offset.index(place)
    assert one.choices[0].logprobs.tokens == whole.logprobs.tokens[:count]
    assert one.choices[0].logprobs.token_logprobs == whole.logprobs.token_logprobs[:count]
    assert one.usage.completion_tokens == count
    two = client.completions.create(**asked | {"n": 2, "prompt": ["hello", "you"]})
    assert two.usage.prompt_tokens == 8, "a prompt is read once, however many texts go on from it"
    chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    for name in ("tokens", "token_logprobs", "text_offset"):
        parts = [getattr(chunk.logprobs, name) for chunk in chunks]
        assert sum(parts, []) == getattr(one.choices[0].logprobs, name)
    assert "".join(chunk.text for chunk in chunks) == one.choices[0].text


def test_streamed_log_probabilities_come_once_while_the_engine_goes_on(server):
    """The engine's thread adds tokens while a chunk is written."""
    client = server.client()
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 60, "seed": 2, "logprobs": 0}
    whole = client.completions.create(**asked).choices[0].logprobs.token_logprobs
    for _ in range(5):
        chunks = client.completions.create(**asked, stream=True)
        assert [value for chunk in chunks for value in chunk.choices[0].logprobs.token_logprobs] == whole
    messages = [{"role": "user", "content": "a"}]
    chat = {"model": "tiny", "messages": messages, "max_tokens": 20, "seed": 2, "logprobs": True}
    one = client.chat.completions.create(**chat)
    assert bytes(sum((token.bytes for token in one.choices[0].logprobs.content), [])).decode() == (
        one.choices[0].message.content
    )
    parts = client.chat.completions.create(**chat, stream=True)
    assert [token for part in parts for token in part.choices[0].logprobs.content] == one.choices[0].logprobs.content


def test_alternatives_in_openais_form(server):
    client = server.client()
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 12, "seed": 5}
    one = client.completions.create(**asked, logprobs=3).choices[0]
    chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, logprobs=3, stream=True)]
    assert sum((chunk.logprobs.top_logprobs for chunk in chunks), []) == one.logprobs.top_logprobs
    for token, value, top in zip(
        one.logprobs.tokens, one.logprobs.token_logprobs, one.logprobs.top_logprobs, strict=True
    ):
        # Bytes that are no character alone have the same text, so there may be fewer.
        assert 1 <= len(top) <= 4 and top[token] >= value and list(top.values())[0] == max(top.values())
    assert client.completions.create(**asked, logprobs=0).choices[0].logprobs.top_logprobs is None
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 8, "seed": 2}
    for token in client.chat.completions.create(**chat, logprobs=True, top_logprobs=20).choices[0].logprobs.content:
        values = [other.logprob for other in token.top_logprobs]
        assert len(values) == 20 and values == sorted(values, reverse=True) and token.logprob <= values[0]
        assert sum(map(math.exp, values)) <= 1 + 1e-5
    plain = client.chat.completions.create(**chat, logprobs=True).choices[0].logprobs.content
    assert all(token.top_logprobs == [] for token in plain)


@pytest.mark.slow
def test_two_hundred_requests_at_once_lose_none():
    with running(queue=200) as server:

        async def ask(client, seed):
            answer = await client.completions.create(model="tiny", prompt=f"{seed} ", max_tokens=8, seed=seed)
            return answer.choices[0].text, answer.usage.completion_tokens

        async def everybody():
            async with server.client(kind=openai.AsyncOpenAI) as client:
                return await asyncio.gather(*(ask(client, seed) for seed in range(200)))

        answers = asyncio.run(everybody())
        assert [count for _, count in answers] == [8] * 200
        alone = server.client().completions.create(model="tiny", prompt="77 ", max_tokens=8, seed=77)
        assert answers[77][0] == alone.choices[0].text
        assert server.engine.counts["finished_length"] == 201


HUGE = "1" + "0" * 400
WRONG = {
    "top_k": (2**31, -2, 10**30, 5.0, 1e30, "NaN", "Infinity", HUGE, "5.5", True, '"5"', []),
    "top_p": (0, 1.01, -1, "NaN", "Infinity", "1e400", HUGE, True),
    "temperature": (-1, 101, 1e-300, "NaN", "-Infinity", "1e400", HUGE, '"1"', True),
    "min_p": (-0.1, 1.1, "NaN", "Infinity", HUGE),
    "repetition_penalty": (0, -1, 101, 1e-300, "NaN", "Infinity", HUGE),
    "presence_penalty": (-2.1, 2.1, "NaN", "Infinity", HUGE),
    "frequency_penalty": (-2.1, 2.1, "NaN", "-Infinity", HUGE),
    "max_tokens": (-1, 2**31, 3.0, 1e30, "NaN", "Infinity", HUGE, True),
    "max_completion_tokens": (0, -1, 2**31, 1e30, HUGE),
    "n": (0, -1, 17, 2**63, 1.0, "NaN", "Infinity", HUGE, True),
    "seed": (2**63, -(2**63) - 1, 1.0, "NaN", "Infinity", HUGE),
    "logprobs": (-1, 6, 2**40, 0.0, "NaN", HUGE, '"all"', True),
    "logit_bias": ('{"5": 101}', '{"5": NaN}', '{"99999999999": 100}', '{"256": 1}', '{"-1": 1}', 3),
    "stop": (5, "[1]", '{"a": 1}', '["a","b","c","d","e"]', "NaN", True),
    "stop_token_ids": (5, "[-1]", "[256]", "[2147483648]", f"[{HUGE}]", "[1.0]", "[NaN]", '"ab"', "[true]", "{}"),
    "prompt": (
        "[256]",
        "[-1]",
        f"[{HUGE}]",
        "[1.0]",
        "[NaN]",
        "[[1], [2147483648]]",
        5,
        "NaN",
        '["a", 5]',
    ),
    "stream": (1, '"yes"', "NaN"),
    "stream_options": (5, '"usage"', "[1]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_number_is_refused_with_its_name_and_range(server, name):
    for value in WRONG[name]:
        base = "".join(
            f'"{x}": {y}, ' for x, y in {"model": '"tiny"', "prompt": '"a"', "max_tokens": 2}.items() if x != name
        )
        status, answer = server.post(f'{{{base}"{name}": {str(value).lower() if value is True else value}}}')
        error = answer["error"]
        assert status == 400 and error["param"] == name and error["type"] == "invalid_request_error", (value, answer)
        assert name in error["message"] and len(error["message"]) < 250, error
    assert server.post({"model": "tiny", "prompt": "a", "max_tokens": 2})[0] == 200


def test_a_refused_number_ends_nobody_elses_request(server):
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 40, "seed": 3}
    alone = server.post(asked)[1]["choices"]
    server.gate.clear()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(server.post(asked)))
    thread.start()
    server.wait(lambda: server.engine.busy)
    for more in ({"top_k": 2**31}, {"temperature": 10**400}, {"stream_options": 5}):
        assert server.post(asked | more)[0] == 400
    server.gate.set()
    thread.join(60)
    assert answers[0][0] == 200 and answers[0][1]["choices"] == alone
    assert server.post("[" * 100_000)[0] == 400 and server.post("{")[0] == 400
    assert (
        server.post({"model": "tiny", "messages": [{"role": "u", "content": "\ud800"}]}, "chat/completions")[0] == 400
    )


def test_one_text_that_fails_is_an_error_of_its_own_request(monkeypatch):
    with running() as server:
        asked = {"model": "tiny", "prompt": "hello", "max_tokens": 30, "seed": 3}
        alone = server.post(asked)[1]["choices"]
        add = server.engine._add

        def fails(text, *rest, **more):
            if text.sampling.seed == 9 and len(text.tokens) == 2:
                raise OverflowError("of this text")
            add(text, *rest, **more)

        monkeypatch.setattr(server.engine, "_add", fails)
        server.gate.clear()
        answers = {}

        def ask(seed):
            answers[seed] = server.post(asked | {"seed": seed})

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in (3, 9)]
        for thread in threads:
            thread.start()
        server.wait(lambda: len(server.engine.waiting) == 2)
        server.gate.set()
        for thread in threads:
            thread.join(60)
        assert answers[9][0] == 500 and answers[3][0] == 200 and answers[3][1]["choices"] == alone
        with pytest.raises(openai.APIError, match="the model failed"):
            list(server.client().completions.create(**asked | {"seed": 9}, stream=True))
        assert "ok" in server.get("/health")


@pytest.mark.parametrize("cause", ["restart", "exit", "steps"])
def test_a_dead_engine_is_told_at_once(cause, monkeypatch):
    """Its restart fails, its thread ends, or step after step fails: 503 for who waits, who comes, and who looks."""
    with running(config=replace(CONFIG, timeout=60.0)) as server:
        asked = {"model": "tiny", "prompt": "a", "max_tokens": 30}
        assert server.post(asked)[0] == 200

        def broken(*_, **__):
            raise SystemExit if cause == "exit" else RuntimeError("the device is gone")

        monkeypatch.setattr(type(server.engine.programs), "generate", broken)
        if cause == "restart":
            monkeypatch.setattr(type(server.engine.programs), "start", broken)
        if cause == "steps":
            for _ in range(2):  # it may still be one bad step
                assert server.post(asked)[0] == 500 and "ok" in server.get("/health")
        server.gate.clear()
        answers, streamed = [], []
        threads = [threading.Thread(target=lambda: answers.append(server.post(asked))) for _ in range(6)]

        def stream():
            try:
                streamed.extend(server.client().completions.create(**asked, stream=True))
            except openai.APIError as error:
                streamed.append(error)

        threads.append(threading.Thread(target=stream))
        for thread in threads:
            thread.start()
        server.wait(lambda: len(server.engine.waiting) == 7)
        begun = time.monotonic()
        server.gate.set()
        for thread in threads:
            thread.join(10)
        assert time.monotonic() - begun < 2
        assert [(status, answer["error"]["code"]) for status, answer in answers] == [(503, "engine_dead")] * 6
        assert "started anew" in str(streamed[-1])
        begun = time.monotonic()
        status, answer = server.post(asked)
        assert status == 503 and answer["error"]["code"] == "engine_dead" and time.monotonic() - begun < 1
        with pytest.raises(urllib.error.HTTPError) as error:
            server.get("/health")
        assert error.value.code == 503 and "failed for good" in error.value.read().decode()
        assert 'tessera_alive{model_name="tiny"} 0.0' in server.get("/metrics") and not server.engine.busy


def test_the_time_to_the_first_token_is_of_texts_that_have_one():
    """A text that ends with an error before its first token has a duration and no first token."""
    told = []

    class Silent(Engine):
        def __init__(self):
            pass

        def submit(self, prompt, sampling, notify, constraint):
            told.append(notify)
            return Request(prompt, sampling)

    async def ask(**changes):
        requests, _ = service.submit([(1, 2)], [Sampling()])
        told[-1](replace(requests[0], **changes))

    service = Service(Silent(), model="tiny")

    def seen(name, what="count"):
        value = service.latencies.registry.get_sample_value(f"vllm:{name}_seconds_{what}", {"model_name": "tiny"})
        return value or 0

    names = ("time_to_first_token", "e2e_request_latency", "request_time_per_output_token")
    asyncio.run(ask(finish="error"))
    assert [seen(name) for name in names] == [0, 1, 0]
    asyncio.run(ask(tokens=[5], finish="length"))
    assert [seen(name) for name in names] == [1, 2, 0], "one token has none after it"
