"""The commands `tessera prune` and `tessera compare-pruning` on a small model: what comes out, what is refused."""

import csv
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.plan import Plan
from tessera.cli import compare_pruning, prune
from tessera.cli import main as cli
from tessera.compress.pruning import prune_decoder
from tessera.compress.text import perplexity
from tessera.data.text import BPETokenizer
from tessera.infra.config import ConfigError
from tessera.infra.config_files import load_config
from tessera.infra.workdir import WorkdirMismatch
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.serving import scoring
from tessera.serving.engine import Engine
from tessera.serving.huggingface import load_directory, save_directory
from tessera.serving.load import SourceConfig, load
from tessera.serving.programs import ServeConfig, make_programs
from tessera.serving.served import serve

CONFIG = TransformerConfig(vocab_size=256, layers=2, width=16, heads=4, kv_heads=2, ff=32)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A model as a Hugging Face directory."""
    made = tmp_path_factory.mktemp("models") / "dense"
    init = jax.jit(Decoder(replace(CONFIG, init_scale=2.0)).init)
    save_directory(made, init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"], CONFIG)
    BPETokenizer.of_bytes().save(made / "tokenizer.json")
    return made


@pytest.fixture
def folder(tmp_path, dense):
    """The model, and two texts."""
    (tmp_path / "dense").symlink_to(dense)
    (tmp_path / "learn.txt").write_text("".join(f"line {i} of text\n" for i in range(200)))
    (tmp_path / "judge.txt").write_text("".join(f"other line, {i * i}\n" for i in range(30)))
    return tmp_path


def run(folder, *flags, workdir="out", command=prune, arms=None):
    name = command.__name__.rpartition(".")[2]
    config, name = load_config(name, scripts=(name,))
    if arms is not None:
        config = {**config, "arms": arms}
    given = {
        "model.dir": str(folder / "dense"),
        "texts": str(folder / "judge.txt"),
        "calibration.texts": str(folder / "learn.txt"),
        "calibration.sequences": "8",
        "calibration.length": "16",
        "length": "33",
        "prune.block": "8",
    } | dict(flag.split("=", 1) for flag in flags)
    invocation = cli.invoke(command.SCHEMA, config, list(given.items()), name, {"workdir": str(folder / workdir)})
    return command.main(replace(invocation, flags=invocation.flags | {"upload_seconds": 15.0}))


@pytest.mark.long
def test_a_directory_comes_out_that_loads_as_the_pruned_model(folder, capsys):
    assert run(folder) == 0
    out = folder / "out"
    loaded = load(SourceConfig(str(out / "model")))
    up = loaded.params["blocks"]["mlp"]["up"]["kernel"]
    assert np.mean(up != 0) == 0.5
    dense, _ = load_directory(folder / "dense")
    np.testing.assert_array_equal(loaded.params["embed"]["table"], dense["embed"]["table"])
    result = json.loads((out / "result.json").read_text())
    assert result["density"] == 0.5 and result["parameters"] == result["pruned_parameters"]
    (row,) = result["texts"]
    assert row["tokens"] == len((folder / "judge.txt").read_bytes())
    # The same figures as `tessera evaluate`, whose engine has a cache of keys and values.
    text = (folder / "judge.txt").read_text()
    programs = None  # of the one architecture
    for params, key in ((dense, "nats per token"), (loaded.params, "pruned, nats")):
        placed, served = serve(params, loaded.config, Plan(""))
        programs = programs or make_programs(served, ServeConfig(slots=4, length=34, chunk=16))
        engine = Engine(programs, programs.place(placed))
        tokens = loaded.tokenizer.encode(text).tolist()
        wanted = scoring.perplexity(engine, [tokens], len(text), loaded.begin, length=33)
        assert wanted.tokens == row["tokens"] and row[key] == pytest.approx(wanted.loss, rel=1e-5)
    lines = (out / "layers.csv").read_text().splitlines()
    assert lines[0] == "layer,block,weights,density,error" and len(lines) == 1 + 2 * 7
    page = (out / "report.html").read_text()
    assert "blocks_1/mlp/down/kernel" in page and "judge.txt" in page
    assert not list((out / "blocks").iterdir()) and "result" not in capsys.readouterr().err
    # A run that was killed after the export goes on with what it wrote.
    before = (out / "model" / "model.safetensors").stat().st_mtime_ns
    (out / "finished.json").unlink(missing_ok=True)
    assert run(folder) == 0 and (out / "model" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["calibration.sequences=5000"], "config.calibration: calibration text too short"),
        (["calibration.texts=FOLDER/judge.txt"], "config.texts: .*judge.txt has a document of the calibration text"),
        (["prune.structure=2:4", "prune.density=0.3"], "config.prune: .*density=0.5 is the only one"),
        (["prune.structure=expert", "prune.method=reap"], "config.prune: .*no routed experts"),
        (["prune.structure=5x5"], "config.prune: blocks_0/.*do not divide"),
        (["prune.method=wand"], "config.prune.method"),
        (["texts=nothing.txt"], "config.texts: no text file matches"),
        (["model.dir=FOLDER/nothing"], "config.model"),
        (["dtype=int8"], "config.dtype='int8'"),
    ],
)
def test_what_cannot_be_is_one_message_and_no_model(folder, flags, message):
    with pytest.raises(ConfigError, match=message):
        run(folder, *(flag.replace("FOLDER", str(folder)) for flag in flags))
    assert not (folder / "out" / "model").exists()


def test_files_of_others_are_left_alone(folder):
    (folder / "out").mkdir()
    (folder / "out" / "thesis.doc").write_text("mine")
    with pytest.raises(WorkdirMismatch, match="no run made it"):
        run(folder)
    assert [path.name for path in (folder / "out").iterdir()] == ["thesis.doc"]


def test_a_text_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="every document is empty"):
        perplexity({}, CONFIG, [[]], 0, 8)


ARMS = {
    "magnitude": {"method": "magnitude"},
    "sparse": {"density": 0.75},
    "layers": {"structure": "layer", "method": "influence"},
}


@pytest.mark.long
def test_arms_are_compared_draw_by_draw_and_go_on_after_a_kill(folder, monkeypatch):
    flags = ("draws=3,5", "tokens=150")
    pruned, killed = [], prune_decoder

    def stops(*args, **options):
        pruned.append(args)
        if len(pruned) == 5:
            raise KeyboardInterrupt
        return killed(*args, **options)

    monkeypatch.setattr(compare_pruning, "prune_decoder", stops)
    with pytest.raises(KeyboardInterrupt):
        run(folder, *flags, command=compare_pruning, arms=ARMS)
    assert run(folder, *flags, command=compare_pruning, arms=ARMS) == 0
    assert len(pruned) == 5 + 2  # the four that were done are not pruned again
    # Both draws have calibration text of their own, and the arms of one draw the same.
    windows = [args[3] for args in pruned]
    assert all((one == windows[0]).all() for one in windows[:3]) and (windows[3] != windows[0]).any()
    rows = list(csv.DictReader((folder / "out" / "rows.csv").open()))
    assert [(row["arm"], row["draw"]) for row in rows] == [
        (arm, draw) for draw in "35" for arm in ("dense", *sorted(ARMS))
    ]
    # By the command for one model, on the whole text: its first 150 bytes are the first draw's, the next the second's.
    judged = (folder / "judge.txt").read_bytes()
    for number, draw in enumerate("35"):
        (folder / "judge.txt").write_bytes(judged[150 * number : 150 * (number + 1)])
        one = f"one-{draw}"
        assert run(folder, "prune.density=0.75", f"calibration.seed={draw}", workdir=one) == 0
        (wanted,) = json.loads((folder / one / "result.json").read_text())["texts"]
        for arm, key in (("dense", "nats per token"), ("sparse", "pruned, nats")):
            (row,) = (row for row in rows if (row["arm"], row["draw"]) == (arm, draw))
            assert float(row["nats"]) == pytest.approx(wanted[key], rel=1e-6) and int(row["tokens"]) == 150
    kernels = int(rows[0]["live"])
    assert [int(row["live"]) / kernels for row in rows[:4]] == [1, 0.5, 0.5, 0.75]
    page = (folder / "out" / "report.html").read_text()
    assert "sparse is" in page and "sparsegpt, unstructured" in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["tokens=5000"], "config.texts: .*judge.txt has 4[0-9]+ tokens; 5 draws that score 5,000 each need 25,000"),
        (["draws=1,1"], "draws that differ are needed"),
        (["against=wanda"], "config.against='wanda': one of the arms is needed: layers, magnitude, sparse"),
        (["arms.sparse.density=2.0"], "config.arms.sparse: density=2.0"),
        (["arms.sparse.structure=5x5"], "config.arms.sparse: blocks_0/.*do not divide"),
    ],
)
def test_arms_that_cannot_be_are_one_message(folder, flags, message):
    with pytest.raises(ConfigError, match=message):
        run(folder, *flags, command=compare_pruning, arms=ARMS)
    assert not (folder / "out").exists()
