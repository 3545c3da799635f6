"""One run of a sweep trained for real: readouts, going on, and what a kill leaves behind."""

import shutil
from functools import partial

import numpy as np
import pytest

from scaling.sweeps.plan import Family, PlanConfig, PlannedRun, Readout, Rule, plan_runs
from scaling.sweeps.store import Store, carry_out
from tessera.data.text import ByteTokenizer, TextConfig, TextSplits
from tessera.infra.artifacts import ArtifactStore
from tessera.infra.config import ConfigError
from tessera.sweeps import train
from tessera.sweeps.programs import TrialConfig
from tessera.sweeps.train import TextStore, load_texts, train_run

CONFIG = TrialConfig(eval_tokens=2048, noise_batches=2, chunk=16, save_seconds=0.0)
PLAN = PlanConfig(
    widths=(8,), tokens=(4096.0, 8192.0), batch=Rule(4.0, multiple=1), warmup=4, least_steps=4, lr=Rule(2e-2)
)


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
    firsts = {tuple(row) for row in np.asarray(all_.validation).reshape(-1, 17)[-200:]}
    assert few.validation.shape == (1, 64, 17)
    assert any(tuple(row) in firsts for row in np.asarray(few.validation).reshape(-1, 17)[-4:])
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
