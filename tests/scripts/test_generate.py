"""The scripts of serving, on a run of the training script and on a ticket of it."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from commands import run_here

from lottery import export, masks
from tessera.infra.checkpoint import Checkpoints
from tessera.infra.workdir import prepare
from tessera.models.transformer import Decoder, TransformerConfig

ROOT = Path(__file__).parent.parent.parent
MODEL = {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "ff": 16}


@pytest.fixture(scope="module")
def made_run(tmp_path_factory):
    """A workdir as `scripts/train.py` leaves it, and a ticket of its weights."""
    path = prepare(tmp_path_factory.mktemp("run") / "lm", {"model": MODEL, "data": {"tokenizer": "bytes"}, "seed": 0})
    config = TransformerConfig(vocab_size=256, **MODEL)
    params = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    with Checkpoints(path / "checkpoints") as checkpoints:
        checkpoints.save(3, {"params": params, "step": jnp.int32(3)})
        checkpoints.wait()
    export.save(path / "ticket.safetensors", params, masks.ones(params))
    return path


def command(name, run, *settings):
    return [sys.executable, str(ROOT / "scripts" / name), f"--config.model.dir={run}", *settings]


ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / f"jax-{jax.__version__}"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


ASKED = ("--config.prompt=def ", "--config.sampling.max_tokens=12")
ASKED += ("--config.sizes.slots=2", "--config.sizes.length=64", "--config.sizes.chunk=16")


def generate(run, *settings):
    asked = command("generate.py", run, *ASKED, *settings)
    return subprocess.run(asked, env=ENVIRONMENT, capture_output=True, timeout=300)


def draft_of(run):
    return [f"--config.draft.dir={run}", "--config.draft.bits=8", "--config.draft.tokens=2"]


def test_a_wrong_setting_and_a_missing_run_are_said_in_one_line(made_run, tmp_path):
    for settings, words in (
        (["--config.sampling.top_p=2.0"], "top_p=2.0 must be in (0, 1]"),
        ([f"--config.model.dir={tmp_path}"], "no run in"),
    ):
        status, output = run_here("generate", f"--config.model.dir={made_run}", *ASKED, *settings)
        assert status in (1, 2) and words in output and "Traceback" not in output


@pytest.mark.slow
def test_text_of_a_run_and_of_its_ticket_are_equal_and_start_with_the_prompt(made_run):
    done = generate(made_run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"def ") and len(done.stdout.decode()) > 6
    ticket = generate(made_run, f"--config.model.ticket={made_run}/ticket.safetensors")
    assert ticket.stdout == done.stdout
    greedy = [generate(made_run, "--config.sampling.temperature=0.0", *more) for more in ([], draft_of(made_run))]
    assert greedy[0].stdout == greedy[1].stdout != done.stdout


@pytest.mark.slow
def test_the_server_starts_answers_and_ends_at_a_signal(made_run):
    asked = command("serve.py", made_run, "--config.port=18473", "--config.sizes.length=64", "--config.sizes.chunk=16")
    server = subprocess.Popen(asked, env=ENVIRONMENT | {"TESSERA_API_KEY": "key"}, stderr=subprocess.PIPE)
    address = "http://127.0.0.1:18473"
    try:
        until = time.monotonic() + 200
        while True:
            assert server.poll() is None and time.monotonic() < until, server.stderr.read().decode()
            try:
                assert b"ok" in urllib.request.urlopen(f"{address}/health").read()
                break
            except OSError:
                time.sleep(0.2)
        body = json.dumps({"model": "tessera", "prompt": "def ", "max_tokens": 5}).encode()
        headers = {"Authorization": "Bearer key", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/v1/completions", body, headers)
        answer = json.load(urllib.request.urlopen(request, timeout=200))
        assert answer["usage"]["completion_tokens"] == 5
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        assert b"Traceback" not in server.stderr.read()
    finally:
        server.kill()
