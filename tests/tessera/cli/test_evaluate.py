"""`tessera evaluate`: which text is scored, and by how many bytes."""

import json
from types import SimpleNamespace

from tessera.cli import evaluate
from tessera.cli.main import invoke
from tessera.data.text import ByteTokenizer
from tessera.serving.scoring import Perplexity


def test_bytes_are_those_of_the_text_not_its_letters(tmp_path, monkeypatch, capsys):
    (tmp_path / "greek.txt").write_text("αβγ δ", encoding="utf-8")

    def perplexity(engine, tokens, size, begin, **options):
        return Perplexity(tokens=sum(map(len, tokens)), bytes=size, nats=float(options["length"]))

    loaded = SimpleNamespace(tokenizer=ByteTokenizer(), begin=0)
    monkeypatch.setattr(evaluate, "make_engine", lambda *args: (None, loaded))
    monkeypatch.setattr(evaluate, "perplexity", perplexity)
    out = tmp_path / "rows.json"
    options = {"texts": (str(tmp_path / "greek.txt"),), "length": 10, "out": str(out)}
    assert evaluate.main(invoke(evaluate.SCHEMA, options, [], "evaluate", {})) == 0
    (row,) = json.loads(out.read_text())
    assert (row["bytes"], row["tokens"], row["documents"]) == (9, 9, 1) and row["nats per token"] == 10 / 9
    assert "| 9 |" in capsys.readouterr().out
