"""Tokenizing a corpus: the tokens that reading the text gives, duplicates counted, and kills without a trace."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tessera.data.corpus import TokenizeConfig, tokenize_corpus
from tessera.data.text import TextConfig, load_text
from tessera.infra.errors import ConfigError

GOLDEN = Path(__file__).parents[2] / "golden" / "tokenizers"
TEXTS = [f"{i}: " + "the cat sat on the mat — 東京 " * (i % 5) for i in range(80)]
SHARES = {"validation": 0.2, "test": 0.2}


def corpus(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.mark.parametrize("tokenizer", ["bytes", "bytelevel", "unigram"])
def test_token_files_are_read_as_the_text_is(tokenizer, tmp_path):
    name = corpus(tmp_path / "a.jsonl")
    choice = tokenizer if tokenizer == "bytes" else str(GOLDEN / f"{tokenizer}.json")
    text = TextConfig(name=name, tokenizer=choice, **SHARES)
    plain, said = load_text(text), tokenize_corpus(text, TokenizeConfig(part_bytes=500), tmp_path / "out")
    found = load_text(TextConfig(name=str(tmp_path / "out"), **SHARES))
    for split in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(found, split)[:], getattr(plain, split))
        assert found.bytes_per_token[split] == pytest.approx(plain.bytes_per_token[split], rel=0.01)
    assert found.vocab_size == plain.vocab_size and type(found.tokenizer) is type(plain.tokenizer)
    assert said["tokens"] == sum(len(split) + 1 for split in found[:3]) == said["unique_tokens"] == said["total_tokens"]
    assert said["bytes_per_token"] == pytest.approx(sum(len(t.encode()) for t in TEXTS) / said["tokens"])


def test_planted_duplicates_are_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("tessera.data.corpus.Seen.add", _merging)
    text = TextConfig(
        sources=(
            (corpus(tmp_path / "a.jsonl", TEXTS + TEXTS[:7]), 1.0),
            (corpus(tmp_path / "b.jsonl", TEXTS[10:30]), 1.0),
        )
    )
    said = tokenize_corpus(text, TokenizeConfig(part_bytes=700), tmp_path / "out")
    assert said["documents"] == 80 and said["duplicates"] == 27
    assert said["duplicate_bytes"] == sum(len(t.encode()) for t in TEXTS[:7] + TEXTS[10:30])
    assert said["total_tokens"] - said["unique_tokens"] == said["duplicate_bytes"] + 27  # bytes and separators
    once = tokenize_corpus(TextConfig(name=corpus(tmp_path / "c.jsonl")), TokenizeConfig(), tmp_path / "once")
    assert once["sha256"] == said["sha256"] and once["duplicates"] == 0


def _merging(self, key, length):
    """Small arrays that are merged at every document."""
    self.__init__(np.append(self._hashes, np.uint64(key)), np.append(self._lengths, length))


def test_bpe_learns_outside_the_held_out_documents(tmp_path):
    texts = [f"abab{i} " * 9 for i in range(40)]
    text = TextConfig(name=corpus(tmp_path / "a.jsonl", texts), tokenizer="bpe", vocab_size=270, **SHARES)
    tokenize_corpus(text, TokenizeConfig(), tmp_path / "out")
    plain, found = load_text(text), load_text(TextConfig(name=str(tmp_path / "out"), **SHARES))
    np.testing.assert_array_equal(found.train[:], plain.train)


KILLED = """
import sys
from pathlib import Path
from tessera.data import corpus
from tessera.data.text import TextConfig
text = TextConfig(name=sys.argv[1], tokenizer=sys.argv[2])
config = corpus.TokenizeConfig(part_bytes=3000)
corpus.tokenize_corpus(text, config, Path(sys.argv[3]), lambda *_: print("part", flush=True))
"""


@pytest.mark.parametrize("moments", [(1, 4, 9)])
def test_a_killed_run_goes_on(moments, tmp_path):
    """SIGKILL while parts are written; then bytes of a torn write behind what was saved."""
    name = corpus(tmp_path / "a.jsonl", TEXTS * 2 + [f"{i} more" * 30 for i in range(400)])
    whole = tokenize_corpus(TextConfig(name=name), TokenizeConfig(), tmp_path / "whole")
    for parts in moments:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, name, "bytes", str(tmp_path / "out")], stdout=subprocess.PIPE
        )
        for _ in range(parts):
            assert process.stdout.readline() == b"part\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for file in ("tokens.bin", "tokens.documents.bin"):
            with (tmp_path / "out" / file).open("ab") as torn:
                torn.write(b"torn!")
    with pytest.raises(ConfigError, match="run the same `tessera tokenize` again"):
        load_text(TextConfig(name=str(tmp_path / "out")))
    before = json.loads((tmp_path / "out" / "progress.json").read_text())["read"]
    assert before > 0
    said = tokenize_corpus(TextConfig(name=name), TokenizeConfig(), tmp_path / "out")
    rest = ("finished",)
    assert {k: v for k, v in said.items() if k not in rest} == {k: v for k, v in whole.items() if k not in rest}
    files = [(tmp_path / out / "tokens.documents.bin").read_bytes() for out in ("out", "whole")]
    assert files[0] == files[1]


def test_errors(tmp_path):
    with pytest.raises(ConfigError, match="no text in"):
        tokenize_corpus(TextConfig(name=corpus(tmp_path / "a.jsonl", [])), TokenizeConfig(), tmp_path / "a")
    np.save(tmp_path / "b.npy", np.arange(9))
    with pytest.raises(ConfigError, match="b.npy: a token file; text is needed"):
        tokenize_corpus(TextConfig(name=str(tmp_path / "b.npy")), TokenizeConfig(), tmp_path / "b")
    with pytest.raises(ValueError, match="part_bytes=0"):
        TokenizeConfig(part_bytes=0)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "progress.json").write_text(json.dumps(dict.fromkeys(("read", "tokens", "documents"), 9)))
    with pytest.raises(ConfigError, match="shorter than progress.json says; remove the directory"):
        tokenize_corpus(TextConfig(name=corpus(tmp_path / "d.jsonl")), TokenizeConfig(), tmp_path / "c")
