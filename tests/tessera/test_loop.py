"""The loop: an interrupted run equals an uninterrupted one, and every way of stopping says what it should."""

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tessera.infra.checkpoint import CheckpointConfig, CheckpointReader, Checkpoints
from tessera.infra.logger import METRICS, TIMING, Logger, read_rows
from tessera.loop import Interrupted, LoopConfig, NonFiniteLoss, Profile, Signals, evaluate, train
from tessera.step import StepConfig, init_state, make_train_step

ROWS = 6


@dataclass
class Stream:
    """An endless data iterator with a position; `poison` is the id of a row that is not finite."""

    poison: int = -1
    position: int = 0
    seen: list = field(default_factory=list)
    at: dict = field(default_factory=dict)

    def __next__(self):
        self.position += 1
        if self.position in self.at:
            self.at[self.position]()
        ids = np.arange(self.position * ROWS, (self.position + 1) * ROWS)
        x = np.random.default_rng(self.position).normal(size=(ROWS, 4)).astype(np.float32)
        x[ids == self.poison] = np.nan
        self.seen.append(self.position)
        return {"x": x, "ids": ids}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def loss_fn(params, batch, key):
    target = jax.random.normal(key, (ROWS,))
    return jnp.mean((batch["x"] @ params["w"] - target) ** 2), {}


TX = optax.adamw(0.1)
STEP_CONFIG = StepConfig(ema=0.5)
STEP = make_train_step(loss_fn, TX, STEP_CONFIG)


def run(
    workdir,
    stream=None,
    *,
    steps=20,
    every=5,
    keep=3,
    best=1,
    step_fn=STEP,
    step_config=STEP_CONFIG,
    profile=None,
    **options,
):
    stream = stream or Stream()
    eval_fn = jax.jit(lambda params, batch: {"loss": jnp.mean((batch @ params["w"]) ** 2)})
    held_out = np.random.default_rng(99).normal(size=(2, 8, 4)).astype(np.float32)
    with Logger(workdir) as logger, Checkpoints(workdir / "checkpoints", CheckpointConfig(every, keep, best)) as saved:
        result = train(
            step_fn,
            lambda: init_state({"w": jnp.ones(4)}, TX, step_config),
            stream,
            LoopConfig(steps, log_every=2, eval_every=4, **options),
            key=jax.random.key(3),
            logger=logger,
            checkpoints=saved,
            evaluate=lambda state: evaluate(eval_fn, state.ema, [(batch, 1.0) for batch in held_out]),
            schedule=lambda step: 0.1 / (1 + step),
            profile=profile,
        )
        return result, saved.steps()


def same(a, b):
    chex.assert_trees_all_equal(a.state, b.state)
    assert a.evaluation == b.evaluation


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return *run(workdir, tokens=2, devices=4, flops=3.0, peak=36.0), workdir


def test_rows_and_checkpoints_of_a_whole_run(whole):
    result, steps, workdir = whole
    rows = read_rows(workdir / METRICS)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(2, 21, 2))
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [4, 8, 12, 16, 20]
    assert {"step", "kind", "loss", "grad_norm", "update_norm", "lr"} == set(rows[0])
    assert rows[0]["lr"] == 0.1 / 2 and int(result.state.step) == 20 and result.start == 0
    assert result.evaluation == {"loss": rows[-1]["loss"]}
    assert steps == [10, 15, 20]  # the newest three; the best is the last
    timing = read_rows(workdir / TIMING)
    assert len(timing) == 10 and timing[0]["tokens_per_second"] == pytest.approx(12 * timing[0]["steps_per_second"])
    assert timing[0]["tokens_per_second_per_device"] == pytest.approx(timing[0]["tokens_per_second"] / 4)
    assert timing[0]["mfu"] == pytest.approx(6 * 3.0 * timing[0]["steps_per_second"] / 36.0)  # six rows a step


def test_speed_is_of_steps_alone(tmp_path, monkeypatch):
    """Every step takes two seconds, whatever was saved or evaluated in between."""
    now = [0.0]
    monkeypatch.setattr("tessera.loop.time.perf_counter", lambda: now[0])
    tick = lambda: now.__setitem__(0, now[0] + 2.0)  # noqa: E731
    run(tmp_path, Stream(at=dict.fromkeys(range(1, 13), tick)), steps=12, every=5)
    assert [row["steps_per_second"] for row in read_rows(tmp_path / TIMING)] == [0.5] * 6


@dataclass
class Spikes(Stream):
    """A stream with a batch of large numbers at some positions."""

    spikes: tuple = (11, 15)

    def __next__(self):
        found = super().__next__()
        return found | {"x": found["x"] * (1000.0 if self.position in self.spikes else 1.0)}


def test_skipped_spikes_are_logged_and_a_resumed_run_skips_the_same(tmp_path, caplog):
    config = StepConfig(ema=0.5, skip_step_on_spikes=True, skip_step_interval=8, skip_step_scaling_factor=5.0)
    how = {"step_fn": make_train_step(loss_fn, TX, config), "step_config": config}
    whole, _ = run(tmp_path / "whole", Spikes(), **how)
    rows = read_rows(tmp_path / "whole" / METRICS)
    assert [(row["step"], row["skipped_steps"]) for row in rows if row["kind"] == "skipped"] == [(11, 1)]
    spike = next(row for row in rows if row["kind"] == "skipped")
    assert spike["loss"] > 1e4 and spike["grad_norm"] > 1e4
    lr = {row["step"]: row["lr"] for row in rows if row["kind"] == "train"}
    assert lr[10] == 0.1 / 10 and lr[12] == 0.1 / 11  # the optimizer did not count the step
    for moment in (10, 13, 17):
        with pytest.raises(Killed):
            run(tmp_path / "killed", Spikes(at={moment: kill}), **how)
    again, _ = run(tmp_path / "killed", Spikes(), **how)
    same(again, whole)
    assert (tmp_path / "killed" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()


# Of JAX 0.12's reader, in which an exception ends the process.
@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__:DeprecationWarning")
def test_a_trace_of_some_steps_opens_and_has_them(tmp_path):
    profile = Profile.parse("3:4", tmp_path / "profile")
    run(tmp_path, steps=6, profile=profile)
    (path,) = (tmp_path / "profile").rglob("*.xplane.pb")
    data, found = jax.profiler.ProfileData.from_file(str(path)), []
    for plane in data.planes:
        for line in plane.lines:
            found += [(dict(one.stats)["step_num"], one.duration_ns) for one in line.events if one.name == "train"]
    assert sorted(step for step, _ in found) == [3, 4] and all(duration > 0 for _, duration in found)


@pytest.mark.parametrize("text", ["4:3", "0:2", "3-4", "a"])
def test_steps_to_trace_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="steps|write the first and the last step"):
        Profile.parse(text, Path())


class Killed(BaseException):
    """Ends a run without any of its clean-up: nothing in the loop may rely on more than a kill leaves."""


def kill():
    raise Killed


@pytest.mark.parametrize("moments", [(3,), (6, 7, 13), (5, 10, 20), (19,), (11, 11, 12)])
def test_killed_and_restarted_is_one_run(tmp_path, whole, moments):
    for moment in moments:
        stream = Stream(at={moment: kill})
        with pytest.raises(Killed):
            run(tmp_path, stream)
    stream = Stream()
    result, steps = run(tmp_path, stream)
    same(result, whole[0])
    assert steps == whole[1]
    assert (tmp_path / METRICS).read_bytes() == (whole[2] / METRICS).read_bytes()
    assert stream.seen == list(range(result.start + 1, 21))


def test_a_finished_run_does_nothing_more(tmp_path):
    first, _ = run(tmp_path)
    before = (tmp_path / METRICS).read_bytes()
    stream = Stream()
    again, _ = run(tmp_path, stream)
    same(first, again)
    assert stream.seen == [] and again.start == 20 and (tmp_path / METRICS).read_bytes() == before


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_at_the_step(tmp_path, whole, signum):
    stream = Stream(at={8: lambda: os.kill(os.getpid(), signum)})
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted, match="interrupted at step 8") as caught:
        run(tmp_path, stream)
    assert caught.value.signum == signum and signal.getsignal(signum) is before
    assert stream.seen[-1] == 8
    result, _ = run(tmp_path)
    same(result, whole[0])
    assert result.start == 8
    assert (tmp_path / METRICS).read_bytes() == (whole[2] / METRICS).read_bytes()


def test_a_second_signal_acts_as_if_nobody_listened():
    """The first is noted; the second meets the handler that was there before, in the middle of a step."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.reached(1) and heard == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("step", [1, 7, 10, 20])
def test_a_loss_that_is_not_finite_stops_with_step_rows_and_checkpoint(tmp_path, step):
    stream = Stream(poison=step * ROWS + 2)
    with pytest.raises(NonFiniteLoss) as caught:
        run(tmp_path, stream, steps=30, best=0)
    error = caught.value
    assert error.step == step
    np.testing.assert_array_equal(error.ids, np.arange(step * ROWS, (step + 1) * ROWS))
    last = (step - 1) // 5 * 5 or None
    assert error.checkpoint == last
    assert f"step {step} " in str(error) and str(step * ROWS) in str(error)
    failed = [row for row in read_rows(tmp_path / METRICS) if row["kind"] == "failed"]
    assert [row["step"] for row in failed] == [step] and np.isnan(failed[0]["loss"])
    with Checkpoints(tmp_path / "checkpoints") as saved:
        assert max(saved.steps(), default=None) == last
        for kept in saved.steps():
            state = saved.restore(kept, init_state({"w": jnp.ones(4)}, TX, StepConfig(ema=0.5))).state
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("step", [5, 20])
def test_an_update_that_overflows_is_never_saved(tmp_path, step):
    """Its loss and gradient are finite: only the weights after it are not, and after the last step nobody looks."""

    def overflows(state, batch, key):
        state, metrics = STEP(state, batch, key)
        params = jax.tree.map(lambda w: w * jnp.where(state.step == step, jnp.inf, 1), state.params)
        return state.replace(params=params), metrics

    with pytest.raises(NonFiniteLoss, match=f"state are not finite after step {step}, batch ids") as caught:
        run(tmp_path, step_fn=overflows)
    assert caught.value.checkpoint == (step - 5 or None)
    with Checkpoints(tmp_path / "checkpoints") as saved:
        assert max(saved.steps(), default=0) == step - 5


def test_a_damaged_newest_checkpoint_costs_only_its_steps(tmp_path, whole):
    with pytest.raises(Killed):
        run(tmp_path, Stream(at={18: kill}))
    for path in (tmp_path / "checkpoints" / "15" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-9])
    result, steps = run(tmp_path)
    same(result, whole[0])
    assert result.start == 10 and steps == whole[1]
    assert (tmp_path / METRICS).read_bytes() == (whole[2] / METRICS).read_bytes()


def test_no_evaluation_no_schedule_no_ids(tmp_path):
    class Bare(Stream):
        def __next__(self):
            return {"x": super().__next__()["x"]}

    with Logger(tmp_path) as logger, Checkpoints(tmp_path / "c") as saved:
        result = train(
            STEP,
            lambda: init_state({"w": jnp.ones(4)}, TX, STEP_CONFIG),
            Bare(),
            LoopConfig(3),
            key=jax.random.key(0),
            logger=logger,
            checkpoints=saved,
        )
        assert saved.steps() == [3] and result.evaluation == {}
        assert [row["step"] for row in logger.rows()] == [3]


def test_evaluation_is_a_weighted_mean_over_batches():
    batches = [(np.float32(1), 1.0), (np.float32(2), 1.0), (np.float32(7), 0.5), (np.float32(3), -0.5)]
    assert evaluate(lambda p, b: {"a": p * b, "b": b}, jnp.float32(2), batches) == {"a": 5.0, "b": 2.5}
    with pytest.raises(ValueError, match="no batch to evaluate"):
        evaluate(lambda p, b: {}, 0.0, [])


def test_bad_config():
    with pytest.raises(ValueError, match="log_every >= 1"):
        LoopConfig(3, log_every=0)


def failing(workdir, error, **options):
    """A run whose evaluation after the last step fails."""

    def evaluation(state):
        if int(state.step) == 20:
            raise error
        return {"loss": 1.0 / int(state.step)}

    return with_evaluation(workdir, evaluation, **options)


def with_evaluation(workdir, evaluation, stream=None, *, keep=2, best=1):
    config = CheckpointConfig(6, keep, best)
    with Logger(workdir) as logger, Checkpoints(workdir / "checkpoints", config) as saved:
        return train(
            STEP,
            lambda: init_state({"w": jnp.ones(4)}, TX, STEP_CONFIG),
            stream or Stream(),
            LoopConfig(20, log_every=2, eval_every=6),
            key=jax.random.key(3),
            logger=logger,
            checkpoints=saved,
            evaluate=evaluation,
        )


@pytest.mark.parametrize("error", [ValueError("no batch"), Killed()])
def test_a_failure_in_the_last_evaluation_costs_no_training(tmp_path, error):
    with pytest.raises(type(error)):
        failing(tmp_path / "failed", error)
    assert CheckpointReader(tmp_path / "failed" / "checkpoints").steps()[-1] == 20

    def measure(state):
        calls.append(int(state.step))
        return {"loss": 1.0 / int(state.step), "other": 2.0}

    calls, stream = [], Stream()
    result = with_evaluation(tmp_path / "failed", measure, stream)
    assert (result.start, stream.seen, calls, result.evaluation) == (20, [], [20], {"loss": 0.05, "other": 2.0})
    rows = read_rows(tmp_path / "failed" / METRICS)
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [6, 12, 18, 20]
    # It ended as a run without a failure does, and there is nothing more to do.
    again = with_evaluation(tmp_path / "failed", measure)
    assert calls == [20] and again.evaluation == result.evaluation
    assert read_rows(tmp_path / "failed" / METRICS) == rows


@pytest.mark.parametrize("losses, kept", [((3.0, 1.0, 2.0, 4.0), [12, 18, 20]), ((4.0, 3.0, 2.0, 1.0), [18, 20])])
def test_the_last_checkpoint_is_ranked_though_it_is_saved_before_its_evaluation(tmp_path, losses, kept):
    found = dict(zip((6, 12, 18, 20), losses, strict=True))
    with_evaluation(tmp_path, lambda state: {"loss": found[int(state.step)]})
    with Checkpoints(tmp_path / "checkpoints") as saved:
        assert saved.steps() == kept and saved.best_step() == min(found, key=found.__getitem__)
