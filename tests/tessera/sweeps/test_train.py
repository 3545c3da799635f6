"""One run of a sweep trained for real: readouts, going on, and what a kill leaves behind."""

import json
import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from scaling.sweeps.plan import Family, PlanConfig, PlannedRun, Readout, Rule, plan_runs
from scaling.sweeps.store import Store, carry_out
from tessera.data.text import ByteTokenizer, TextConfig, TextSplits, load_text
from tessera.infra.artifacts import ArtifactStore
from tessera.infra.config import ConfigError
from tessera.sweeps import train
from tessera.sweeps.programs import TrialConfig, compile_programs
from tessera.sweeps.train import TextStore, load_texts, train_run

CONFIG = TrialConfig(eval_tokens=2048, noise_batches=2, chunk=16, save_seconds=0.0)
PLAN = PlanConfig(
    widths=(8,), tokens=(4096.0, 8192.0), batch=Rule(4.0, multiple=1), warmup=4, least_steps=4, lr=Rule(2e-2)
)


@pytest.fixture(autouse=True, scope="module")
def one_program_a_shape():
    """Runs of one model, seed and config share their programs, which are functions of their arguments alone."""
    made = {}

    def compile_once(trial):
        return made.setdefault((trial.model, trial.seed, trial.config), compile_programs(trial))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_programs", compile_once)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    rng = np.random.default_rng(0)
    path.write_text(" ".join(rng.choice(["a", "small", "model", "reads", "this", "text"], 20_000)))
    return TextConfig(name=str(path))


def plan(**changes):
    (run,) = plan_runs(Family(length=16), PlanConfig(**{**PLAN.__dict__, **changes}), {"data": "toy"})
    return run


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The rows of a run that was let alone, and its store."""
    return trained(text, tmp_path_factory.mktemp("whole"))


def trained(text, directory, run=None):
    run = run or plan()
    carry_out(partial(train_run, text=text, config=CONFIG), run, directory)
    return Store(directory).rows(run), directory


@pytest.mark.long
def test_rows_hold_what_was_measured(whole):
    rows, _ = whole
    assert [row["tokens"] for row in rows] == [4096, 8192]
    assert rows[1]["loss"] < rows[0]["loss"] < np.log(256)
    for row in rows:
        assert row["epochs"] == pytest.approx(row["tokens"] / 90_000, rel=0.2)
        assert row["gradient_noise"] > 0 and np.isfinite(row["gradient_signal"])


def test_of_a_trunk_that_ended_its_branch_points_stay_alone(whole):
    """What was saved in between is removed, that at the branch points too."""
    assert {path.name for path in whole[1].rglob("trunk/*")} == {f"branch-{one.branch}" for one in plan().readouts}


def test_a_readout_is_what_a_run_of_that_length_gives(text, whole, tmp_path):
    rows, _ = trained(text, tmp_path, plan(tokens=(4096.0,)))
    assert rows == whole[0][:1]


@pytest.mark.long
def test_a_readout_added_later_branches_off_the_trunk_that_is_there(text, whole, tmp_path):
    trained(text, tmp_path, plan(tokens=(4096.0,)))
    steps = []
    run = plan()
    store = Store(tmp_path)
    missing = store.missing(run)
    assert [readout.tokens for readout in missing] == [8192]
    (measured,) = train_run(plan(tokens=(8192.0,)), store.path(run), steps.append, text=text, config=CONFIG)
    assert measured[1]["loss"] == whole[0][1]["loss"]
    first, last = run.readouts
    assert steps[0] == first.branch and sum(steps) == last.steps  # the trunk's first part is not trained again


@pytest.mark.long
def test_a_readout_added_before_the_end_of_the_trunk_is_what_it_would_have_been(text, whole, tmp_path):
    trained(text, tmp_path, plan(tokens=(8192.0,)))
    path = Store(tmp_path).path(plan())
    (measured,) = train_run(plan(tokens=(4096.0,)), path, lambda steps: None, text=text, config=CONFIG)
    assert measured[1]["loss"] == whole[0][0]["loss"]


@pytest.mark.parametrize(
    "until", [pytest.param(10, marks=pytest.mark.slow), 70, pytest.param(110, marks=pytest.mark.slow)]
)
def test_a_killed_run_goes_on_bit_for_bit(text, whole, tmp_path, until):
    class Killed(BaseException):
        pass

    done = 0

    def report(steps):
        nonlocal done
        done += steps
        if done > until:
            raise Killed

    run, store = plan(), Store(tmp_path)
    with pytest.raises(Killed):
        for readout, measured in train_run(run, store.path(run), report, text=text, config=CONFIG):
            store.save(run, readout, measured)
    rows, _ = trained(text, tmp_path)
    assert rows == whole[0]


@pytest.mark.slow
def test_a_damaged_save_is_passed_over(text, whole, tmp_path):
    run = plan()
    shutil.copytree(whole[1], tmp_path / "copy")
    store = Store(tmp_path / "copy")
    saves = ArtifactStore(store.path(run) / "trunk", "branch-")
    assert saves.steps() == [readout.branch for readout in run.readouts]
    for path in saves.path(saves.steps()[-1]).rglob("*"):
        if path.is_file() and path.stat().st_size > 500:
            path.write_bytes(path.read_bytes()[:-100])
    (store.path(run) / "readouts" / f"{run.readouts[1].steps}.json").unlink()
    rows, _ = trained(text, tmp_path / "copy")
    assert rows == whole[0]


def test_a_diverging_run_says_so(text, tmp_path):
    run = plan(lr=Rule(1e30))
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at step \d+ \(w8\): a lower learning rate"):
        list(train_run(run, tmp_path, lambda steps: None, text=text, config=CONFIG))


def test_validation_windows_are_spread_over_the_text(text):
    few, all_ = load_texts(text, 16, 1024), load_texts(text, 16, 10**9)
    stream = load_text(text).validation
    there = (len(stream) - 1) // 16
    assert few.validation.shape == (1, 64, 17) and there > 130
    for found in (few, all_):  # window i of n is the one that begins at i / n of the text
        windows = np.asarray(found.validation).reshape(-1, 17)
        for i, window in enumerate(windows):
            begin = 16 * (i * there // len(windows))
            np.testing.assert_array_equal(window, stream[begin : begin + 17])
    with pytest.raises(ConfigError, match="config.train.eval_tokens=100: at least 1024 are needed"):
        load_texts(text, 16, 100)
    assert train.EVAL_BATCH == 64


def test_texts_that_are_too_small_are_refused_before_the_sweep():
    splits = TextSplits(
        np.zeros(2000, np.uint8), np.zeros(1024, np.uint8), np.zeros(0, np.uint8), 256, "", ByteTokenizer()
    )
    with pytest.raises(ConfigError, match="validation text has 1024 tokens; at least 1025 .*length of at most 15"):
        train.check_texts(splits, 16, 4096)
    assert train.check_texts(splits, 15, 4096) == 64
    with pytest.raises(ConfigError, match="train text has 16 tokens; at least 17"):
        train.check_texts(splits._replace(train=splits.train[:16]), 16, 4096)


def test_rows_have_the_unique_tokens_of_their_text(tmp_path):
    """Those of an earlier version too, whose files do not have them."""
    store, run = TextStore(tmp_path), PlannedRun("w", {"width": 8}, (Readout(100, 80, 102_400, 6e9, 6e9),))
    store.save(run, run.readouts[0], {"loss": 2.5, "epochs": 0.8})
    assert store.rows(run)[0]["unique_tokens"] == 128_000


@pytest.mark.long
def test_a_sweep_trains_on_any_tokens_and_on_sources_by_weight(tmp_path):
    """Numbers of windows against the streams, one by one; bits per byte against the bytes of the held-out text."""
    golden = Path(__file__).parents[2] / "golden" / "tokenizers" / "bytelevel.json"
    words = "the tile token ticket routes".split()
    for name, count in (("a", 300), ("b", 100)):
        rows = [" ".join(random.Random(f"{name}{i}").choices(words, k=30)) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    sources = tuple((str(tmp_path / f"{name}.jsonl"), weight) for name, weight in (("a", 1.0), ("b", 3.0)))
    text = TextConfig(sources=sources, tokenizer=str(golden), validation=0.2, test=0.1)
    texts, splits = load_texts(text, 16, 2048), load_text(text)
    assert texts.train.dtype == np.uint16 and splits.vocab_size == 400
    (first, _), (second, _) = texts.mixture
    assert (first, second) == tuple((len(stream) - 1) // 16 for stream, _ in splits.parts)
    index = texts.order(0, 0, 200, 4)
    np.testing.assert_array_equal(texts.order(0, 50, 100, 4), index[50:150])
    assert (index > first).mean() == pytest.approx(0.75, abs=0.01)
    stored = np.asarray(texts.train)
    for number in np.unique(index).tolist():
        stream, own = (splits.parts[0][0], number) if number < first else (splits.parts[1][0], number - first - 1)
        np.testing.assert_array_equal(stored[number * 16 :][:17], stream[own * 16 :][:17])
    (run,) = plan_runs(Family(vocab=400, length=16), PlanConfig(**{**PLAN.__dict__, "tokens": (2048.0,)}), {})
    config = replace(CONFIG, noise_batches=0)
    ((_, measured),) = train_run(run, tmp_path / "run", lambda steps: None, text=text, config=config)
    size = bytes_of(splits.validation, golden)
    bits = measured["loss"] / np.log(2) * len(splits.validation) / size
    assert measured["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert 2048 / measured["epochs"] == pytest.approx((first + second) * 16)
    with pytest.raises(ConfigError, match="config.data.packing: a sweep trains on windows"):
        load_texts(replace(text, packing="best_fit"), 16, 2048)
    short = splits._replace(parts=(splits.parts[0], (splits.parts[1][0][:16], 3.0)))
    with pytest.raises(ConfigError, match=r"config.data.sources: '.*b.jsonl' has 16 training tokens; at least 17"):
        train.check_texts(short, 16, 2048, sources)


def bytes_of(stream, golden):
    """Bytes of the documents of a stream, whose separators are no text."""
    inner = tokenizers.Tokenizer.from_file(str(golden))
    return len(inner.decode(stream[stream != inner.token_to_id("<|endoftext|>")].tolist()).encode())
