"""SmolLM2-135M-Instruct, which somebody else trained, against transformers; `make smollm2` brings it."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from sharding.plan import Plan
from tessera.models.lm_loss import lm_loss
from tessera.models.transformer import Decoder
from tessera.serving.chat import ChatFormat
from tessera.serving.load import SourceConfig, load, make_engine
from tessera.serving.programs import ServeConfig
from tessera.serving.requests import Sampling

MODEL = Path(__file__).parents[3] / ".cache" / "smollm2"
pytestmark = pytest.mark.skipif(not (MODEL / "config.json").exists(), reason=f"no {MODEL}: make smollm2")


@pytest.fixture(scope="module")
def model():
    return load(SourceConfig(str(MODEL)))


def losses(model, rows):
    loss = jax.jit(lm_loss(Decoder(model.config)))
    return [float(loss(model.params, {"tokens": row[None]}, None)[0]) for row in rows]


def text(case):
    return case.tobytes().decode()


def test_tokens_and_the_loss_of_a_text_are_those_of_transformers(model, golden):
    case = golden("smollm2")
    found = model.tokenizer.encode(text(case["text"]))[: len(case["tokens"])]
    np.testing.assert_array_equal(found, case["tokens"])
    rows = case["tokens"].astype(np.int32).reshape(40, 513)
    np.testing.assert_allclose(losses(model, rows[:1]), case["losses"][:1], rtol=1e-4)


@pytest.mark.slow
def test_perplexity_of_twenty_thousand_tokens_is_that_of_transformers(model, golden):
    case = golden("smollm2")
    found = losses(model, case["tokens"].astype(np.int32).reshape(40, 513))
    np.testing.assert_allclose(found, case["losses"], rtol=1e-3)
    assert np.exp(np.mean(found)) == pytest.approx(np.exp(np.mean(case["losses"])), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chat", "story"])
def test_greedy_texts_are_those_of_transformers_up_to_their_end(name, golden):
    case = golden("smollm2")[name]
    engine, loaded = make_engine(SourceConfig(str(MODEL)), Plan(), ServeConfig(slots=1, length=512))
    prompt = loaded.tokenizer.encode(text(case["prompt"])).tolist()
    request = engine.submit(prompt, Sampling(temperature=0.0, max_tokens=200))
    engine.run()
    wanted = [token for token in case["tokens"].tolist() if token not in loaded.format.ends]
    assert request.tokens == wanted and request.finish == ("stop" if len(wanted) < 200 else "length")
    if name == "chat":
        assert loaded.tokenizer.decode(np.asarray(request.tokens)) == "The capital of France is Paris."
        asked = [{"role": "user", "content": "What is the capital of France?"}]
        assert ChatFormat(loaded.tokenizer, loaded.format).prompt(asked) == tuple(prompt)


@pytest.mark.slow
def test_the_official_client_is_told_the_capital_of_france(tmp_path):
    """The whole command: a process that serves the directory, and OpenAI's client."""
    openai = pytest.importorskip("openai")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    root = MODEL.parents[1]
    flags = [f"--config.model.dir={MODEL}", f"--config.port={port}", "--config.sizes.slots=1"]
    flags += ["--config.sizes.length=128", "--config.sizes.chunk=64", "--config.app.warm_up=false"]
    command = [sys.executable, str(root / "scripts" / "serve.py"), "--config=configs/serve.py", *flags]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=root, stdout=log, stderr=log)
    try:
        with openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1", timeout=300) as client:
            until = time.monotonic() + 300
            while True:
                try:
                    (model,) = client.models.list()
                    break
                except (openai.APIConnectionError, openai.InternalServerError):
                    assert time.monotonic() < until and server.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.5)
            asked = [{"role": "user", "content": "What is the capital of France?"}]
            answer = client.chat.completions.create(model=model.id, messages=asked, temperature=0.0, max_tokens=20)
    finally:
        server.terminate()
        server.wait(60)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["tp=3", "pp=5", "cp=2", "dp=2", "dp=2, tp=3", "pp=2, tp=3"])
def test_texts_under_a_plan_are_those_of_one_device(axes, golden):
    case = golden("smollm2")["chat"]
    engine, loaded = make_engine(SourceConfig(str(MODEL)), Plan(axes), ServeConfig(slots=10, length=64, chunk=64))
    prompt = loaded.tokenizer.encode(text(case["prompt"])).tolist()
    asked = [Sampling(temperature=0.0, max_tokens=12), Sampling(temperature=0.0, max_tokens=5)]
    found = [engine.submit(prompt, one) for one in asked]
    engine.run()
    wanted = [token for token in case["tokens"].tolist() if token not in loaded.format.ends]
    assert found[0].tokens == wanted[:12] and found[1].tokens == wanted[:5]
