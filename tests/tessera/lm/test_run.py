"""A training run's parts: settings and texts that cannot work are refused before anything is trained."""

import io
import json
import random
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from rich.console import Console
from scipy.special import log_softmax

from configs import lm
from moe.gate import RouterConfig
from moe.layer import MoEConfig
from sharding.errors import PlanError
from sharding.mesh import make_mesh
from sharding.plan import Plan
from tessera.data.text import TextConfig, load_text
from tessera.infra.config import ConfigError
from tessera.infra.schema import completed
from tessera.lm.run import (
    Placement,
    RunConfig,
    accumulated_batch,
    batch_share,
    build_run,
    data_parallel,
    dividing,
    first_state,
    results_table,
    run_config,
    under_plan,
)
from tessera.lm.schema import SCHEMA
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.optim.optimizer import OptimizerConfig
from tessera.parallel.decoder import ShardedDecoder, batch_sharding
from tessera.step import StepConfig

MODEL = TransformerConfig(vocab_size=32, layers=2, width=16, heads=8, ff=16)


def settings(tmp_path, words=600, **changes):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(random.Random(0).choices("the tile token ticket routes experts".split(), k=words)))
    config = completed(SCHEMA, lm.get_config("tiny"))
    config.update({"steps": 40, "batch_size": 4, "length": 16, "data": {"name": str(path)}})
    config.model.update({"layers": 1, "width": 16, "heads": 2, "kv_heads": 1})
    config.update(changes)
    return config


def test_texts_that_are_large_enough_are_taken(tmp_path):
    run = build_run(settings(tmp_path))
    assert sum(1 for _ in run.held_out("test")) > 0
    assert run.loop.tokens == 16  # of a row, for the throughput


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"words": 60},
            r"(?s)the validation text has \d+ tokens; at least 65 are needed .*batch_size=4.*the test text",
        ),
        ({"data": {"validation": 0.0}}, "config.data: the validation text has 0 tokens.*config.data.validation=0.0"),
        ({"data": {"test": 0.01}}, r"the test text has 3\d tokens; .*batch_size of at most 2 or .*length of at most"),
        ({"length": 5000}, r"the train text has \d+ tokens; at least 5001 are needed"),
        ({"batch_size": 0}, "config.batch_size=0: at least 1 is needed"),
        ({"seed": -1}, "config.seed=-1: a seed is a whole number in 0"),
        ({"seed": 2**40}, "config.seed=1099511627776: a seed is a whole number in 0"),
        ({"steps": 0}, "config.steps=0: at least 1 is needed"),
        ({"eval": {"batches": 0}}, "config.eval.batches=0: at least 1 is needed"),
        ({"eval": {"sample": -1}}, "config.eval.sample=-1: at least 0 is needed"),
        ({"loss_chunk_size": -1}, "config.loss_chunk_size=-1: tokens at a time, or 0"),
        ({"rampup_batch_size": (1, 1)}, "three numbers .start, increment, samples. are needed"),
        ({"rampup_batch_size": (3, 2, 9)}, "increments of 2 do not lead from start=3 to batch_size=4"),
        (
            {"rampup_batch_size": (1, 1, 9), "step": {"grad_accum_steps": 2}},
            "start and increment must be multiples of the 2 sequences of a part of gradient accumulation",
        ),
        ({"model": {"attention_implementation": "cudnn"}}, "config.model: .*'cudnn' runs on gpu, and this is cpu"),
    ],
)
def test_what_would_fail_at_the_end_is_refused_at_the_start(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_run(settings(tmp_path, **changes))


@pytest.mark.long
@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_ramp_compiles_each_size_once_and_trains_on_the_rows_in_order(tmp_path, parts):
    """With gradient accumulation too, whose parts keep their rows: 4, so 1, 2 and then 3 of them."""
    changes = {"batch_size": 12, "rampup_batch_size": (4, 4, 24), "step": {"grad_accum_steps": parts}}
    run = build_run(settings(tmp_path, words=4000, **changes))
    assert "batch sizes: 4 in steps 1 to 3, 8 in steps 4 to 5, 12 in steps 6 to 40" in run.notes
    traced = []

    def step_fn(state, batch, key):
        traced.append(batch["tokens"].shape[0])
        return run.step_fn(state, batch, key)

    step, state, batches, ids, losses = jax.jit(step_fn), run.init_fn(False), run.loader("train"), [], []
    for _ in range(8):
        batch = dict(next(batches))
        ids.append(batch.pop("ids"))
        state, metrics = step(state, run.placement.place(batch), run.key)
        losses.append(float(metrics["loss"]))
    assert traced == [4, 8, 12] and [len(each) for each in ids] == [4, 4, 4, 8, 8, 12, 12, 12]
    plain = build_run(settings(tmp_path, words=4000, batch_size=4)).loader("train")
    np.testing.assert_array_equal(np.concatenate(ids), np.concatenate([next(plain)["ids"] for _ in range(16)]))
    assert losses[-1] < losses[0]


def test_the_sizes_that_the_message_gives_do(tmp_path):
    with pytest.raises(ConfigError) as caught:
        build_run(settings(tmp_path, words=60))
    length = min(int(part.split()[0].rstrip("\n")) for part in str(caught.value).split("config.length of at most ")[1:])
    build_run(settings(tmp_path, words=60, length=length))
    batch = min(int(part.split()[0]) for part in str(caught.value).split("config.batch_size of at most ")[1:])
    build_run(settings(tmp_path, words=60, batch_size=batch))


@pytest.mark.parametrize(
    ("moe", "step", "message"),
    [
        (
            {"router": {"k": 1}},
            {},
            "config.model.moe.router: router name='top_k', k=1: the softmax over one choice",
        ),
        ({"importance": 0.1}, {"grad_accum_steps": 2}, None),
        ({"balance_scope": "microbatch"}, {"grad_accum_steps": 2}, None),
    ],
)
def test_routers_and_losses_that_training_would_not_have_are_refused(tmp_path, moe, step, message):
    config = settings(tmp_path)
    config.model.mlp = "routed"
    config.model.moe.update(moe)
    config.step.update(step)
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        run_config(config, 256)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_a_plan_has_to_divide_a_part_of_the_batch(parts):
    """12 sequences over four devices: parts of 12 and 4 divide, those of 6 and 3 do not."""
    config = RunConfig(MODEL, Plan("dp=4"), OptimizerConfig(), StepConfig(grad_accum_steps=parts), 12, 128)
    assert accumulated_batch(config) == 12 // parts
    with nullcontext() if 12 // parts % 4 == 0 else pytest.raises(PlanError, match=f"{12 // parts}"):
        under_plan(config, devices=jax.devices()[:4])


def test_experts_without_a_plan_run_on_the_devices_of_their_tokens():
    """The compiled program has no collective inside its loops: no device waits for another between tiles."""
    moe = MoEConfig(router=RouterConfig("top_k", 4, 2))
    model = replace(MODEL, mlp="routed", moe=moe, layers=1, width=128, heads=2, ff=128, scan=False)
    config = RunConfig(model, Plan(""), OptimizerConfig(), StepConfig(), 12, 128)
    loss_fn, placement = under_plan(config)
    assert placement.batch.mesh.devices.size == 6
    params = jax.eval_shape(lambda: first_state(config).params)
    arguments = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        (params, {"tokens": jax.ShapeDtypeStruct((12, 129), "int32")}),
        (placement.state.params, {"tokens": placement.batch}),
    )
    step = jax.jit(jax.grad(lambda params, batch: loss_fn(params, batch, None)[0]))
    text = step.lower(*arguments).compile().as_text()
    heads = r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}"
    computations = dict(re.findall(heads, text, re.MULTILINE | re.DOTALL))
    inside = set(re.findall(r"body=%?([\w.\-]+)", text))
    assert inside and re.search(r" all-reduce(-start)?\(", text) and "all-gather" not in text
    while more := {
        called
        for name in inside
        for called in re.findall(r"%([\w.\-]+)", computations[name])
        if called in computations and called not in inside
    }:
        inside |= more
    for name in inside:
        assert not re.search(r" (all|reduce-scatter|collective)[\w\-]*\(", computations[name]), name


def test_results_table():
    stream = io.StringIO()
    Console(file=stream, width=80).print(results_table("run", {"test": {"loss": np.log(2), "accuracy": 0.5}}))
    for text in ("run", "test", "0.6931", "1.0000", "0.5000"):
        assert text in stream.getvalue()


@pytest.mark.parametrize(("batch", "devices"), [(16, 8), (12, 6), (7, 7), (1, 1), (11, 1)])
def test_as_many_devices_as_divide_the_batch(batch, devices, caplog):
    placement = data_parallel(dividing(jax.devices(), batch))
    said = f"batch_size={batch} uses {devices} of 8 devices; a multiple of 8 uses all"
    assert [record.getMessage() for record in caplog.records] == ([said] if devices < 8 else [])
    rows = np.arange(batch * 3, dtype=np.float32).reshape(batch, 3)
    placed = placement.place({"x": rows})["x"]
    np.testing.assert_array_equal(placed, rows)
    assert len(placed.sharding.device_set) == devices
    assert placed.addressable_shards[0].data.shape == (batch // devices, 3)
    state = jax.device_put(rows, placement.state)
    assert state.addressable_shards[0].data.shape == rows.shape


@pytest.mark.parametrize(
    "owned, shares",
    [
        ({0: {0, 1}, 1: {2, 3}}, [(0, 2), (1, 2)]),
        ({0: {0}, 1: {0}, 2: {1}, 3: {1}}, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # tensor-parallel over two processes
        ({0: {0, 1}, 1: {0, 1}}, [(0, 1), (0, 1)]),
        ({0: {0, 2}, 1: {1, 3}}, [(0, 2), (1, 2)]),
    ],
)
def test_processes_feed_the_rows_their_devices_hold(owned, shares):
    assert [batch_share(owned, process) for process in owned] == shares


def test_rows_that_processes_share_in_part_are_refused():
    with pytest.raises(ValueError, match="the same rows or none in common"):
        batch_share({0: {0, 1}, 1: {1, 2}}, 0)


@pytest.mark.parametrize("axes", ["dp=8", "tp=8", "dp=2, fsdp=2, tp=2"])
def test_one_process_feeds_the_whole_batch(axes):
    parts = ShardedDecoder(MODEL, Plan(axes))
    assert Placement(None, batch_sharding(parts, make_mesh(Plan(axes)))).share() == (0, 1)
    assert data_parallel(jax.devices()).share() == (0, 1)


def test_rows_with_a_tokenizer_of_a_file_are_trained_on_and_their_leak_is_said(tmp_path):
    """Bits per byte by hand; a leak planted into training is found; what is logged and stored says the vocabulary."""
    golden = Path(__file__).parents[2] / "golden" / "tokenizers" / "bytelevel.json"
    texts = [
        f"{i} " + " ".join(random.Random(i).choices("the tile token ticket 東京".split(), k=40)) for i in range(80)
    ]
    texts += [f"[{i}] " + " ".join(texts[:80]) for i in range(3)]  # every document again, in others
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {"name": str(tmp_path / "a.jsonl"), "tokenizer": str(golden), "validation": 0.2, "test": 0.2}
    run = build_run(settings(tmp_path, data=data))
    assert run.config.model.vocab_size == run.settings["vocab_size"] == 400
    line, attention = run.notes
    found = [float(share) for share in re.findall(r"([\d.]+)% of (?:validation|test)", line)]
    assert line.startswith("overlap: ") and "by 13-grams of tokens" in line
    assert len(found) == 2 and min(found) > 80
    result = run.eval_fn(run.init_fn(False), "validation")
    splits = load_text(TextConfig(**data))
    size = sum(len(part.encode()) for part in bytes_of(splits.validation, golden))
    assert result["bits_per_byte"] == pytest.approx(
        result["loss"] / np.log(2) * len(splits.validation) / size, rel=1e-6
    )
    clean = build_run(settings(tmp_path, data=data | {"overlap": 0}))
    assert clean.notes == (attention,) and attention.startswith("attention: xla")


def bytes_of(tokens, file):
    """The documents of a stream, decoded by the library."""
    inner = tokenizers.Tokenizer.from_file(str(file))
    ends = np.flatnonzero(tokens == inner.token_to_id("<|endoftext|>"))
    return [inner.decode(part[part != 0].tolist()) for part in np.split(tokens, ends)]


def test_further_texts_are_scored_with_validation_by_name(tmp_path):
    """Against the loss of a decoder on their whole windows; documents are joined by byte 0."""
    for name, text in (("a", "tile " * 60), ("b", "the route")):
        (tmp_path / f"{name}.md").write_text(text)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "ticket é " * 20}) + "\n")
    names = (f"{tmp_path}/*.md", f"{tmp_path}/rows.jsonl")
    run = build_run(settings(tmp_path, eval={"texts": names}))
    state = run.init_fn(False)
    result = run.eval_fn(state, "validation")
    assert set(run.eval_fn(state, "test")) == {key for key in result if ": " not in key}
    apply = jax.jit(Decoder(run.config.model).apply)
    texts = (("tile " * 60 + "\0the route").encode(), ("ticket é " * 20).encode())
    for name, text in zip(names, texts, strict=True):
        cut = [np.frombuffer(text, np.uint8)[i : i + 17].astype(np.int32) for i in range(0, len(text) - 16, 16)]
        windows = np.stack(cut)
        tokens = jnp.asarray(windows)
        logits = apply({"params": state.params}, tokens[:, :-1])
        chosen = np.take_along_axis(log_softmax(np.asarray(logits, np.float64), -1), windows[:, 1:, None], axis=-1)
        assert result[f"{name}: loss"] == pytest.approx(-float(chosen.mean()), rel=1e-5)
        size = len(text) - text.count(b"\0")  # separators are tokens and no text
        wanted = result[f"{name}: loss"] / np.log(2) * len(text) / size
        assert result[f"{name}: bits_per_byte"] == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ConfigError, match=r"config.eval.texts: '.*b.md' has 9 tokens; at least 65 fill a batch"):
        build_run(settings(tmp_path, eval={"texts": (f"{tmp_path}/b.md",)}))
    with pytest.raises(ConfigError, match="config.eval.texts: .*nothing"):
        build_run(settings(tmp_path, eval={"texts": ("nothing.txt",)}))


@pytest.mark.long
def test_packed_answers_are_scored_as_each_by_itself(tmp_path):
    """Held-out loss by hand, a document a row, of what follows the prompts; a step, and the line at the start."""
    rows = [{"ask": f"{i}? ", "answer": "tile " * (i % 5 + 1)} for i in range(90)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"name": str(tmp_path / "chat.jsonl"), "column": "answer", "prompt": "ask", "packing": "best_fit"}
    run = build_run(settings(tmp_path, length=40, data=data | {"validation": 0.3, "test": 0.3}))
    said = r"packing: \d+ training documents in \d+ rows \(best_fit\); .*% padding, 0 documents cut"
    assert re.fullmatch(said, run.notes[1])
    state = run.init_fn(False)
    batch = next(run.loader("train"))
    state, metrics = jax.jit(run.step_fn)(state, {name: x for name, x in batch.items() if name != "ids"}, run.key)
    assert metrics["padding"] == pytest.approx((batch["positions"] < 0).mean()) and bool(metrics["finite"])
    result = run.eval_fn(state, "validation")
    stream = load_text(TextConfig(**data, validation=0.3, test=0.3)).validation
    texts = np.split(stream, np.flatnonzero(stream == 0) + 1)
    rows = np.stack([np.pad(text, (0, 41 - len(text))) for text in texts]).astype(np.int32)
    logits = jax.jit(Decoder(run.config.model).apply)({"params": state.params}, jnp.asarray(rows[:, :-1]))
    nll, logits = [], log_softmax(np.asarray(logits, np.float64), -1)
    for k, text in enumerate(texts):
        begin = bytes(text.astype(np.uint8)).index(b"? ") + 2
        nll += [-logits[k, i - 1, rows[k, i]] for i in range(begin, len(text))]
    assert result["loss"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert "bits_per_byte" not in result
