"""`tessera generate`: a text up to its end, beside the decoder without a cache."""

import json
from dataclasses import replace

import pytest
import tiny_model as tiny
from ml_collections import ConfigDict

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

from tessera.cli import generate
from tessera.cli.main import Invocation
from tessera.data.text import BPETokenizer
from tessera.infra.errors import ConfigError
from tessera.serving.huggingface import save_directory

CONFIG = replace(tiny.CONFIG, layers=1)
PROMPT = "ab"


def run(path, prompt):
    given = {
        "model": {"dir": str(path)},
        "prompt": prompt,
        "sampling": {"temperature": 0.0, "max_tokens": 12},
        "sizes": {"slots": 1, "length": 16, "chunk": 8},
    }
    return generate.main(Invocation(ConfigDict(generate.SCHEMA.complete(given)), "serve"))


def test_a_text_ends_at_its_end_token_which_is_not_printed(tmp_path, capsys):
    """The token is a plain one of tokenizer.json, which only tokenizer_config.json calls the end of a text."""
    tokens = list(PROMPT.encode())
    for _ in range(12):
        tokens.append(int(tiny.logits(tokens, tiny.weights(CONFIG), CONFIG)[-1].argmax()))
    drawn = tokens[len(PROMPT) :]
    first = next(i for i in range(3, 12) if drawn[i] not in tokens[: len(PROMPT) + i])  # that was not drawn before
    save_directory(tmp_path / "model", tiny.weights(CONFIG), CONFIG, eos_token_id=drawn[first])
    known = BPETokenizer.of_bytes()
    known.save(tmp_path / "model" / "tokenizer.json")
    named = {"eos_token": known.name_of(drawn[first]), "pad_token": "<pad>"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(named))
    assert run(tmp_path / "model", PROMPT) == 0
    assert capsys.readouterr().out == PROMPT + bytes(drawn[:first]).decode(errors="replace") + "\n"
    with pytest.raises(ConfigError, match=r"config\.prompt.*'<pad>', which is token 256"):
        run(tmp_path / "model", "ab<pad>")
