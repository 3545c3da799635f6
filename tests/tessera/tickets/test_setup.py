"""Searches from a config: networks with batch statistics, decoders on text, distillation, transfer, wrong settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import lottery_cifar, lottery_digits, lottery_lm
from lottery import imp, transfer
from lottery import masks as masks_lib
from lottery.imp import level_counts
from tessera.data import windows
from tessera.data.images import Images, ImageSplits
from tessera.infra.checkpoint import CheckpointDamaged, NotOurs
from tessera.infra.config import ConfigError
from tessera.infra.schema import completed
from tessera.infra.workdir import prepare
from tessera.losses import distillation
from tessera.models.registry import STATISTICS
from tessera.step import index_block
from tessera.tickets.setup import (
    SCHEMA,
    Finished,
    FinishedLevels,
    LevelStore,
    finished,
    make_setup,
    search_tickets,
    starts_of,
)


def images(count, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, count).astype(np.int32)
    x = generator.normal(size=(count, 4, 4, 1)).astype(np.float32) + labels[:, None, None, None]
    return Images(x, labels)


SPLITS = ImageSplits(images(40), images(10, 1), images(12, 2), 3)


def small(**changes):
    config = completed(SCHEMA, lottery_digits.get_config())
    config.seeds = (0, 4)
    config.model = ConfigDict({"hidden": (6,)})
    config.train.update({"steps": "6it", "batch_size": 5, "eval_every": 6, "save_seconds": 0.0})
    config.search.update({"levels": 1, "rate": 0.5, "output_rate": 0.5})
    config.score_inputs = ConfigDict({"batches": 2, "batch_size": 10})
    for path, value in changes.items():
        group, name = path.split("__")
        config[group][name] = value
    return config


def run(config, store=None, splits=SPLITS):
    setup, store = make_setup(config, splits), store or imp.Memory()
    rows = search_tickets(setup, store, lambda starts, level: setup.train(starts), config)
    return setup, store, rows


def test_distillation_agrees_with_torch(golden):
    cases = golden("losses")["distillation"]
    for temperature in (1.0, 4.0):
        case = cases[f"{temperature:g}"]
        got = distillation(jnp.asarray(case["student"]), jnp.asarray(case["teacher"]), temperature)
        assert float(got) == pytest.approx(float(case["loss"]), rel=1e-5)


@pytest.mark.long
def test_batch_statistics_are_trained_kept_rewound_and_never_pruned():
    config = small(search__rewind="2it", search__output="^output/", search__arms=("ticket",))
    config.model = ConfigDict({"name": "resnet20", "blocks": 1, "widths": (2,)})
    setup, store, _ = run(config)
    level0, _ = store.load(0, None)
    level1, rows = store.load(1, None)
    params = jax.jit(setup.network.init)(imp.search_keys(setup.search, 0, "init")[1])
    state, kept = jax.jit(setup.optimizer.init)(params), None

    @jax.jit
    def train_step(params, state, x, y):
        updates, state = setup.optimizer.update(jax.grad(setup.loss)(params, (x, y)), state, params)
        return {**optax.apply_updates(params, updates), **setup.network.train(params, x)[1]}, state

    for step, index in enumerate(index_block(seed=4, start=0, steps=6, batch_size=5, size=40), start=1):
        x, y = jnp.asarray(SPLITS.train.images[index]), jnp.asarray(SPLITS.train.labels[index])
        params, state = train_step(params, state, x, y)
        kept = params if step == 2 else kept
    for want, name in ((params, "params"), (kept, "reset")):
        got = jax.tree.map(lambda leaf: leaf[1], level0[name])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)
    assert all(np.all(leaf) for leaf in jax.tree.leaves(level1["masks"][STATISTICS]))
    assert rows[0]["density"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.long
def test_the_decoder_is_searched_on_text_and_its_embedding_stays():
    config = completed(SCHEMA, lottery_lm.get_config("tiny"))
    config.seeds = (0,)
    config.train.update({"steps": "4it", "eval_every": 4})
    config.optimizer.warmup = 1
    config.search.update({"levels": 1, "rewind": "0it", "arms": ("ticket",)})
    tokens = np.frombuffer(b"abcdefgh" * 80, np.uint8).astype(np.int32)
    cut = windows.windows(tokens, 16)
    splits = windows.WindowSplits(
        cut, windows.Windows(*(x[:4] for x in cut)), windows.Windows(*(x[:6] for x in cut)), 256
    )
    np.testing.assert_array_equal(cut.images[1], tokens[16:32])
    np.testing.assert_array_equal(cut.labels[1], tokens[17:33])
    setup, store, rows = run(config, splits=splits)
    tree, _ = store.load(1, None)
    assert np.all(tree["masks"]["embed"]["table"]) and not np.all(tree["masks"]["blocks"]["mlp"]["up"]["kernel"])
    assert rows[-1]["density"] == pytest.approx(0.7, abs=0.01) and 0 <= rows[-1]["final_test_accuracy"] <= 1
    with pytest.raises(ValueError, match="test: 5 tokens do not fill one window of length=16"):
        windows.windows(tokens[:5], 16, "test")


@pytest.mark.slow
def test_a_teacher_pulls_the_tickets_towards_itself():
    found = {}
    for weight in (0.0, 1.0):
        config = small(search__teacher="dense", search__arms=("ticket",), train__distill=weight, train__steps="60it")
        config.train.update({"eval_every": 60, "temperature": 2.0})
        config.lr = 0.01
        setup, store, _ = run(config)
        teacher, ticket = (store.load(level, None)[0]["params"] for level in (0, 1))
        x = jnp.asarray(SPLITS.train.images)
        logits = [jax.vmap(setup.network.apply, (0, None))(params, x) for params in (teacher, ticket)]
        found[weight] = float(distillation(logits[1], logits[0], 2.0))
    assert found[1.0] < found[0.0]


@pytest.mark.slow
def test_masks_of_a_finished_search_are_carried_to_other_widths(tmp_path):
    source = small()
    workdir = prepare(tmp_path / "source", source)
    run(source, LevelStore(workdir / "levels"), splits=None)
    config = small(search__arms=("ticket", "transfer"))
    config.model = ConfigDict({"hidden": (12,)})
    config.transfer = ConfigDict({"workdir": str(workdir), "shift": 1})
    _, target, _ = run(config, splits=None)
    tree, level_rows = target.load(1, None)
    got, _ = transfer.of_arm(tree["masks"], level_rows, "transfer")
    other = finished(workdir)
    assert isinstance(other, Finished)
    theirs, seeds = transfer.of_arm(*(lambda t, r: (t["masks"], r))(*other.level(1)), "ticket")
    assert seeds == (0, 4)
    np.testing.assert_array_equal(got["dense0"]["kernel"][0][:, :6], theirs["dense0"]["kernel"][1])
    np.testing.assert_array_equal(got["dense0"]["kernel"][0][:, 6:], theirs["dense0"]["kernel"][1])
    with pytest.raises(ConfigError, match="config.transfer.workdir: the arm 'transfer' needs"):
        run(small(search__arms=("transfer",)))
    with pytest.raises(ConfigError, match="has no config.json"):
        finished(tmp_path / "nothing", "config.search")


WRONG = [
    ({"search__structure": "3:2"}, "config.search: SearchConfig.structure: 3:2 sparsity is impossible"),
    ({"search__score": "snop"}, "config.search: SearchConfig.score: 'snop' is not one of"),
    ({"search__scope": "erq"}, "config.search: SearchConfig.scope: 'erq'"),
    ({"train__distill": 2.0}, "config.train: distill=2.0"),
    ({"model__name": "lenit"}, "config.model.name: no such setting; did you mean 'lenet'"),
    ({"model__norm": "batch"}, "config.model.norm: no such setting"),
    ({"data__kind": "sound"}, "config.data.kind"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:28] for _, message in WRONG])
def test_wrong_settings_name_their_path(changes, message):
    with pytest.raises(ConfigError, match=message):
        config = small(**changes)
        make_setup(config, None if "data__kind" in changes else SPLITS)


def test_a_split_without_examples_is_refused_before_the_search():
    with pytest.raises(ConfigError, match="config.data.validation: no examples for validation; at least 1"):
        make_setup(small(), SPLITS._replace(validation=images(0)))


@pytest.mark.parametrize("name", [*lottery_cifar.SMALL, "conv2-small", "resnet20-small", "vit-small"])
def test_every_cifar_config_builds_its_network_and_its_search(name):
    config = completed(SCHEMA, lottery_cifar.get_config(name))
    side = 16 if name.endswith("small") else 32
    one = Images(np.zeros((1, side, side, 3), np.float32), np.zeros(1, np.int32))
    many = Images(np.zeros((200, side, side, 3), np.float32), np.zeros(200, np.int32))
    config.score_inputs = ConfigDict({"batches": 1, "batch_size": 1})
    setup = make_setup(config, ImageSplits(many, one, one, 10))
    shapes = jax.eval_shape(setup.network.init, jax.random.key(0))
    which = masks_lib.prunable(shapes, setup.search.rules)
    sizes = {p: int(np.prod(x.shape)) for p, x in masks_lib.flatten(shapes).items() if masks_lib.flatten(which)[p]}
    counts = level_counts(setup.search, sizes, {})
    assert len(counts) == setup.search.levels and sum(counts[-1].values()) < sum(sizes.values())


def test_fine_tuning_begins_where_the_schedule_ends():
    config = small(search__arms=("ticket", "finetune"))
    config.optimizer = ConfigDict({"name": "sgd", "schedule": "linear", "final": 0.0})
    setup = make_setup(config, SPLITS)
    params = jax.vmap(setup.network.init)(jax.random.split(jax.random.key(0), 2))
    starts = starts_of(params, masks_lib.ones(params), (0, 0), ("ticket", "finetune"))
    trained = setup.train(dataclasses.replace(starts, late=(False, True)))
    before, after = (tree["dense0"]["kernel"] for tree in (params, trained.params))
    moved = [bool(np.any(np.asarray(before[i] != after[i]))) for i in (0, 1)]
    assert moved == [True, False]  # a rate that has fallen to zero moves nothing


# Levels on disk: atomic, complete, and honest about damage.

TREE = {"params": {"w": jnp.arange(6.0).reshape(2, 3)}, "masks": {"w": jnp.ones((2, 3), bool)}}
ROWS = [{"arm": "dense", "seed": 0, "loss": 0.1}]


def damage(directory):
    """Cut every file of an artifact short."""
    for path in directory.rglob("*"):
        if path.is_file() and path.stat().st_size > 4:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_finished_level_comes_back_and_its_leftovers_go(tmp_path):
    store = LevelStore(tmp_path)
    store.unfinished(3).save(10, TREE)
    assert not store.has(3)
    store.save(3, TREE, ROWS)
    assert store.has(3) and not store.has(4)
    tree, rows = store.load(3, TREE)
    np.testing.assert_array_equal(tree["params"]["w"], TREE["params"]["w"])
    assert rows == ROWS and store.unfinished(3).latest(TREE) is None
    (tmp_path / "03.step10" / "state").mkdir(parents=True)  # killed while it was removed
    store.load(3, TREE)
    assert [path.name for path in tmp_path.iterdir()] == ["03"]


def test_a_damaged_level_is_named(tmp_path):
    store = LevelStore(tmp_path)
    store.save(0, TREE, ROWS)
    damage(store.path(0))
    with pytest.raises(CheckpointDamaged, match=str(store.path(0))):
        store.load(0, TREE)


def test_the_levels_of_another_search_are_left_as_they_are(tmp_path):
    store = LevelStore(tmp_path)
    store.save(3, TREE, ROWS)
    for name in ("03.step10", ".04.new"):  # the search that owns them is running
        (tmp_path / name / "state").mkdir(parents=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    levels = FinishedLevels(tmp_path)
    assert levels.has(3) and not levels.has(4) and levels.load(3, TREE)[1] == ROWS
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_directory_of_someone_else_under_such_a_name_stays(tmp_path):
    (tmp_path / "01.step5").mkdir()
    (tmp_path / "01.step5" / "thesis.tex").write_text("years of work")
    with pytest.raises(NotOurs, match=r"01\.step5 .*thesis\.tex"):
        LevelStore(tmp_path).save(1, TREE, ROWS)
    with pytest.raises(NotOurs, match=r"01\.step5 .*thesis\.tex"):
        LevelStore(tmp_path).unfinished(1).clear(before=9)
    assert (tmp_path / "01.step5" / "thesis.tex").exists()
