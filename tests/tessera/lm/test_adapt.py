"""Going on from a model that somebody else trained: adapters, kept zeros, a teacher, and what is saved of them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from lottery import masks
from tessera.infra.checkpoint import CheckpointConfig, Checkpoints
from tessera.infra.config import ConfigError
from tessera.infra.logger import Logger
from tessera.infra.schema import completed
from tessera.infra.workdir import FORMAT
from tessera.lm import lora
from tessera.lm.distill import DistillConfig, distill_loss
from tessera.lm.run import build_run, run_flops, whole_model
from tessera.lm.schema import SCHEMA
from tessera.lm.warm_start import Pretrained, StartConfig, masked_params, read_model, with_pretrained
from tessera.loop import train
from tessera.models.lm_loss import lm_loss, training_flops
from tessera.models.transformer import Decoder
from tessera.serving.huggingface import load_directory
from tessera.serving.load import SourceConfig, load, read_architecture

tokenizers = pytest.importorskip("tokenizers")
GOLDEN = Path(__file__).parents[2] / "golden" / "huggingface" / "llama"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a tiny Llama, its tokenizer of 60 words, and a text of these."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(GOLDEN, home / "llama")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w0"))
    words.add_special_tokens(["w1"])
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(home / "llama" / "tokenizer.json"))
    text = np.random.default_rng(0).zipf(1.5, 900) % 60
    (home / "text.txt").write_text(" ".join(f"w{i}" for i in text))
    return home


@pytest.fixture(scope="module")
def pretrained(home):
    params, model = load_directory(home / "llama")
    return Pretrained(params, model, str(home / "llama" / "tokenizer.json"))


def settings(home, pretrained, **changes):
    """Settings of a short run from the directory; dotted names change them."""
    c = completed(SCHEMA, {})
    with c.unlocked():
        c.start.dir, c.data.name = str(home / "llama"), str(home / "text.txt")
        c.update({"steps": 4, "batch_size": 4, "length": 8, "lr": 0.1, "z_loss": 0.0})
        c.update_from_flattened_dict({"optimizer.name": "sgd", "optimizer.schedule": "constant", "optimizer.warmup": 0})
        c.update_from_flattened_dict(
            {"eval.batches": 2, "data.validation": 0.2, "data.test": 0.2, "data.overlap": 0, "data.separator": "w1"}
        )
        c.update_from_flattened_dict(changes)
    return with_pretrained(c, pretrained)


def advance(run, steps, state=None):
    """The states after each step, from the first."""
    step, loader = jax.jit(run.step_fn), run.loader("train")
    states, losses = [run.init_fn(False) if state is None else state], []
    for _ in range(steps):
        batch = run.placement.place({"tokens": next(loader)["tokens"]})
        state, metrics = step(states[-1], batch, run.key)
        states.append(state)
        losses.append(metrics)
    return states, losses


LORA = {"lora.rank": 2, "lora.alpha": 6.0}


@pytest.fixture(scope="module")
def adapted(home, pretrained):
    """A run of adapters on one device, and its states and losses of two steps."""
    run = build_run(settings(home, pretrained, **LORA), pretrained)
    return run, *advance(run, 2)


@pytest.mark.long
def test_adapters_are_trained_and_the_model_stays(pretrained, adapted):
    run, states, losses = adapted
    assert run.config.model.vocab_size == 64 and run.tokenizer.vocab_size == 60
    assert run.loop.flops == training_flops(run.config.model, 8, states[0].params)
    jax.tree.map(np.testing.assert_array_equal, states[0].frozen["base"], pretrained.params)
    jax.tree.map(np.testing.assert_array_equal, states[2].frozen["base"], pretrained.params)
    jax.tree.map(np.testing.assert_array_equal, whole_model(run.config, states[0]), pretrained.params)
    # The first gradient of b, by the chain rule from that of the kernel: scale * a^T dW.
    tokens = jnp.asarray(next(run.loader("train"))["tokens"])
    loss_fn = lm_loss(Decoder(run.config.model))
    loss, kernels = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, {"tokens": tokens})[0]))(pretrained.params)
    assert float(losses[0]["loss"]) == pytest.approx(float(loss), rel=1e-6)
    up = lambda tree: tree["blocks"]["mlp"]["up"]["kernel"]  # noqa: E731
    wanted = -0.1 * 3.0 * np.einsum("lir,lio->lro", up(states[0].params)["a"], up(kernels))
    np.testing.assert_allclose(up(states[1].params)["b"], wanted, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(up(states[1].params)["a"], up(states[0].params)["a"])
    merged = jax.jit(lambda adapters: lora.apply(pretrained.params, adapters, run.config.lora))(states[2].params)
    assert np.abs(np.asarray(up(merged)) - up(pretrained.params)).max() > 1e-4
    found = run.eval_fn(states[2], "validation")
    assert found["loss"] == pytest.approx(float(lm_loss_of(run, merged)), rel=1e-5)


def lm_loss_of(run, params):
    """The mean loss of the validation batches."""
    loss_fn = jax.jit(lambda batch: lm_loss(Decoder(run.config.model))(params, batch)[0])
    params = jax.tree.map(jnp.asarray, params)
    return np.mean([loss_fn({"tokens": batch["tokens"]}) for batch in run.held_out("validation")])


@pytest.mark.long
@pytest.mark.parametrize("plan", ["fsdp=2, tp=2, dp=2", pytest.param("pp=2, tp=2, dp=2", marks=pytest.mark.slow)])
def test_a_plan_trains_adapters_as_one_device_does(home, pretrained, adapted, plan):
    alone = adapted[1:]
    split = advance(build_run(settings(home, pretrained, plan=plan, **LORA), pretrained), 2)
    for ours, theirs in zip(split[1], alone[1], strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), abs=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), split[0][-1].params, alone[0][-1].params
    )


@pytest.mark.long
def test_a_mask_goes_on_other_weights(home, pretrained):
    """Its zeros, or as many of every layer at other places, in the directory's weights or in random ones."""
    keep = lambda leaf: np.where(leaf > np.quantile(leaf, 0.25, axis=(-2, -1), keepdims=True), leaf, 0)  # noqa: E731
    pruned = jax.tree.map(lambda leaf: keep(leaf) if leaf.ndim > 1 else leaf, pretrained.params)
    which, key = masks.prunable(pruned), jax.random.key(3)
    made = lambda **how: masked_params(pretrained.params, pretrained.model, StartConfig(**how), pruned, key=key)  # noqa: E731
    kernels = lambda tree: [x for x, chosen in zip(*map(jax.tree.leaves, (tree, which)), strict=True) if chosen]  # noqa: E731
    ticket, shuffled, fresh = made(), made(shuffle_mask=True), made(random_weights=True)
    assert len(kernels(ticket)) == 7
    for first, zeros, other, random in zip(*map(kernels, (pretrained.params, pruned, shuffled, fresh)), strict=True):
        assert first.shape[0] == 2 and 0.7 < np.mean(zeros != 0) < 0.8
        layers = tuple(range(1, first.ndim))
        np.testing.assert_array_equal((other != 0).sum(layers), (zeros != 0).sum(layers))
        assert ((other != 0) != (zeros != 0)).any() and (other[other != 0] == first[other != 0]).all()
        np.testing.assert_array_equal(random != 0, zeros != 0)
        assert not (random[zeros != 0] == first[zeros != 0]).any()
    table = lambda tree: tree["embed"]["table"]  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, ticket, masks.apply(pretrained.params, masks.support(pruned)))
    np.testing.assert_array_equal(table(ticket), table(pretrained.params))
    assert (table(fresh) != table(pretrained.params)).all()
    # The mask stays in training, and another seed draws other places.
    given = pretrained._replace(params=ticket)
    run = build_run(settings(home, given, **{"start.mask": "pruned", "optimizer.name": "adamw"}), given)
    states, _ = advance(run, 2)
    for before, after in zip(kernels(ticket), kernels(states[-1].params), strict=True):
        np.testing.assert_array_equal(before != 0, np.asarray(after) != 0)
    other = masked_params(
        pretrained.params, pretrained.model, StartConfig(shuffle_mask=True), pruned, key=jax.random.key(4)
    )
    assert any((a != b).any() for a, b in zip(kernels(other), kernels(shuffled), strict=True))
    narrow = jax.tree.map(lambda leaf: leaf[..., :-1], pruned)
    with pytest.raises(ValueError, match="weights do not fit"):
        masked_params(pretrained.params, pretrained.model, StartConfig(), narrow, key=key)


@pytest.mark.parametrize("adapters", [False, True])
def test_zeros_of_a_pruned_model_stay(home, pretrained, adapters):
    pruned = masks.apply(
        pretrained.params, masks.support(jax.tree.map(lambda x: np.where(x > 0, x, 0), pretrained.params))
    )
    given = pretrained._replace(params=jax.tree.map(np.asarray, pruned))
    changes = {"start.keep_zeros": True, "optimizer.name": "adamw", "optimizer.weight_decay": 0.1}
    changes |= LORA if adapters else {}
    run = build_run(settings(home, given, **changes), given)
    after = whole_model(run.config, advance(run, 2)[0][-1])
    for path, leaf in masks.flatten(after).items():
        before = masks.flatten(pruned)[path]
        if path.endswith("kernel") and path != "head/kernel":
            assert not np.asarray(leaf)[np.asarray(before) == 0].any() and 0.3 < (before == 0).mean() < 0.7
            assert (np.asarray(leaf) != before).mean() > 0.3
    if not adapters:
        gain = after["blocks"]["mlp_norm"]["gain"]
        assert (np.asarray(gain) != pruned["blocks"]["mlp_norm"]["gain"]).all()


@pytest.mark.parametrize(("weight", "temperature", "hidden"), [(0.3, 2.0, 0.0), (1.0, 1.0, 0.5)])
def test_the_loss_with_a_teacher_is_that_of_numpy(pretrained, weight, temperature, hidden):
    model = Decoder(pretrained.model)
    student, teacher = pretrained.params, jax.tree.map(lambda x: 1.1 * x, pretrained.params)
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 60)
    config = DistillConfig(weight, temperature, hidden)
    loss, metrics = jax.jit(distill_loss(model, config, loss_chunk_size=3))((student, teacher), {"tokens": tokens})
    run = jax.jit(
        lambda p: model.apply({"params": p}, tokens[:, :-1], capture_intermediates=True, mutable=["intermediates"])
    )
    (ours, mine), (theirs, his) = (run(params) for params in (student, teacher))
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    nll = -np.take_along_axis(log_softmax(ours, -1), np.asarray(tokens)[:, 1:, None], -1).mean()
    soft = softmax(theirs / temperature, -1) * log_softmax(ours / temperature, -1)
    soft = -soft.sum(-1).mean() * temperature**2
    # Three hidden states: what attention reads in two layers, and what the head reads.
    states = [
        [x["intermediates"]["blocks"]["attention_norm"]["__call__"][0], x["intermediates"]["final_norm"]["__call__"][0]]
        for x in (mine, his)
    ]
    distances = [np.square(np.asarray(a) - np.asarray(b)).mean() for a, b in zip(*states, strict=True)]
    wanted = (1 - weight) * nll + weight * soft + hidden * np.mean(distances)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    assert float(metrics["cross_entropy"]) == pytest.approx(nll, rel=1e-5)


@pytest.mark.long
def test_distillation_from_the_start_moves_nothing_and_from_a_teacher_towards_it(home, pretrained):
    """With itself as the teacher, and the logits alone, the gradient is zero; text enters by 1 - weight."""
    run = build_run(settings(home, pretrained, **{"distill.weight": 1.0}), pretrained)
    states, metrics = advance(run, 1)
    assert float(metrics[0]["grad_norm"]) < 1e-5 and set(states[0].frozen) == {"teacher"}
    alone = training_flops(run.config.model, 8)
    assert run.loop.flops == pytest.approx(alone * 4 / 3)  # the teacher is as large, and runs forward alone
    other = jax.tree.map(lambda x: x * 1.3, pretrained.params)
    given = pretrained._replace(teacher=other, teacher_model=pretrained.model)
    wide = run_flops(
        run.config, given._replace(teacher_model=replace(pretrained.model, ff=2 * pretrained.model.ff_size))
    )
    ffs = 2 * 3 * pretrained.model.layers * pretrained.model.width * pretrained.model.ff_size
    assert wide == pytest.approx(alone * 4 / 3 + 8 * ffs)
    changes = {"distill.weight": 1.0, "distill.dir": "elsewhere", "distill.temperature": 2.0}
    run = build_run(settings(home, given, **changes), given)
    _, metrics = advance(run, 4)
    found = [float(one["distillation"]) for one in metrics]
    assert float(metrics[0]["grad_norm"]) > 1e-3 and found[-1] < found[0]
    both = build_run(settings(home, pretrained, **{"distill.weight": 0.5} | LORA), pretrained)
    assert set(both.init_fn(False).frozen) == {"base"}


def carried_out(workdir, home, pretrained, **changes):
    """A run in a workdir, as `tessera train` carries it out: its parts and its last state."""
    c = settings(home, pretrained, **changes)
    run = build_run(c, pretrained if c.start.dir else None)
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(run.settings))
    (workdir / "run.json").write_text(json.dumps({"format": FORMAT}))
    shutil.copy(home / "llama" / "tokenizer.json", workdir)
    logger, saving = Logger(workdir), CheckpointConfig(every=2)
    with logger, Checkpoints(workdir / "checkpoints", saving) as checkpoints:
        options = {"key": run.key, "logger": logger, "checkpoints": checkpoints, "place": run.placement.place}
        init = lambda: run.init_fn(bool(checkpoints.steps()))  # noqa: E731
        return run, train(run.step_fn, init, run.loader("train"), replace(run.loop, peak=1e9), **options).state


@pytest.mark.long
def test_a_run_of_adapters_is_saved_without_its_base_resumed_and_read_back(home, pretrained, tmp_path):
    whole = lambda workdir, steps: carried_out(workdir, home, pretrained, steps=steps, **LORA)  # noqa: E731
    _, at_once = whole(tmp_path / "once", 4)
    _, early = whole(tmp_path / "twice", 2)
    run, resumed = whole(tmp_path / "twice", 4)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, at_once.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.frozen["base"], pretrained.params)
    timing = [json.loads(line) for line in (tmp_path / "once" / "timing.jsonl").read_text().splitlines()]
    timing = [row for row in timing if "mfu" in row]
    assert timing and all(
        row["mfu"] == pytest.approx(row["tokens_per_second"] / 8 * run.loop.flops / 1e9) for row in timing
    )
    size = sum(file.stat().st_size for file in (tmp_path / "once" / "checkpoints").rglob("*") if file.is_file())
    assert size < 4 * sum(leaf.size for leaf in jax.tree.leaves(pretrained.params))
    found = load(SourceConfig(str(tmp_path / "once")))  # the model to serve: the adapters in the directory's weights
    wanted = whole_model(run.config, at_once)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found.params, wanted)
    assert found.config == run.config.model and found.tokenizer.vocab_size == 60
    assert read_architecture(SourceConfig(str(tmp_path / "once"))) == run.config.model
    rewound = load(SourceConfig(str(tmp_path / "once"), step=2)).params  # an earlier checkpoint of the same run
    wanted = whole_model(run.config, early)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), rewound, wanted)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3 in .*; there: 2, 4"):
        load(SourceConfig(str(tmp_path / "once"), step=3))
    with pytest.raises(ValueError, match="step=2: .*llama is one model"):
        load(SourceConfig(str(home / "llama"), step=2))
    with pytest.raises(ValueError, match="is a run of adapters, not of a whole model: write"):
        read_model(tmp_path / "once")
    doubled = pretrained._replace(params=jax.tree.map(lambda x: 2 * x, pretrained.params))
    assert run.settings["start_sha256"] != build_run(settings(home, pretrained), doubled).settings["start_sha256"]


@pytest.mark.slow
def test_adapters_of_a_run_are_merged_into_its_weights(home, pretrained, tmp_path):
    first = tmp_path / "first"
    _, tuned = carried_out(first, home, pretrained, steps=2)
    changes = {"start.dir": "", "start.workdir": str(first), "data.tokenizer": pretrained.tokenizer, "lora.rank": 2}
    run, state = carried_out(tmp_path / "second", home, pretrained, steps=2, **changes)
    jax.tree.map(np.testing.assert_array_equal, state.frozen["base"], tuned.params)
    found = load(SourceConfig(str(tmp_path / "second")))
    wanted = whole_model(run.config, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found.params, wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start.dir": "", "lora.rank": 2}, "config.lora.rank is set: name the model"),
        ({"start.dir": "", "start.keep_zeros": True}, "config.start.keep_zeros is set"),
        ({"start.dir": "", "distill.weight": 0.5}, "config.distill is set: name the teacher"),
        ({"distill.weight": 0.5, "plan": "dp=8"}, "config.distill with config.plan='dp=8'"),
        ({"distill.weight": 1.5}, "weight=1.5 must be a share"),
        ({"lora.rank": 200}, "rank=200 of blocks/attention/key/kernel"),
        ({"start.workdir": "runs/x"}, "a run starts from one of the two"),
        ({"start.step": 2}, "config.start.step=2: a checkpoint of a run, which start.workdir names"),
        ({"start.dir": "", "start.mask": "x"}, "config.start.mask='x' needs a Hugging Face directory, start.dir"),
        ({"start.shuffle_mask": True}, "config.start.shuffle_mask=True needs .* start.mask"),
    ],
)
def test_what_has_nothing_to_start_from_is_refused(home, pretrained, changes, message):
    c = settings(home, pretrained, **changes)
    with pytest.raises(ConfigError, match=message):
        build_run(c, pretrained if c.start.dir else None).init_fn(False)
