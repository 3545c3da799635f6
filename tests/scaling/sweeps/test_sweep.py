"""Tables of runs carried out: order, artefacts, retries, kills, engines."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_sweep
from toy_sweep import FAST, Inside

from scaling.sweeps import executors
from scaling.sweeps.executors import ExecutorConfig, Local, make_executor
from scaling.sweeps.store import Store
from scaling.sweeps.sweep import RunFailed, Status, run_sweep, table
from scaling.tables import read_csv

ROOT = Path(__file__).parents[3]


def quick(run, directory, report):
    return toy_sweep.train(run, directory, report, seconds=0.0)


def carry_out(path, train=quick, engine=None, config=FAST, runs=None, **options):
    runs = toy_sweep.runs() if runs is None else runs
    return run_sweep(runs, train, Store(path / "runs"), engine or Inside(), path / "runs.csv", config, **options)


def test_rows_come_in_the_order_of_the_plan_and_can_be_read(tmp_path):
    rows = carry_out(tmp_path, engine=Inside(backwards=True))
    planned = [(run.name, readout.budget) for run in toy_sweep.runs() for readout in run.readouts]
    assert [(row["run"], row["budget"]) for row in rows] == planned
    found = read_csv(tmp_path / "runs.csv")
    assert found["loss"].tolist() == [row["loss"] for row in rows]
    assert found["flops"].tolist() == [row["flops"] for row in rows]


def test_what_is_done_is_not_done_again(tmp_path):
    carry_out(tmp_path)
    before = (tmp_path / "runs.csv").read_bytes()
    engine = Inside()
    carry_out(tmp_path, engine=engine)
    assert engine.calls == 0 and (tmp_path / "runs.csv").read_bytes() == before


def test_the_table_has_nothing_of_a_run_that_failed(tmp_path):
    """Not the readouts that it had made either: started again it may go on, and its rows come together."""

    def failing(run, directory, report):
        for made, found in enumerate(quick(run, directory, report)):
            if run.name == "w16" and made:
                raise OSError("the disk is full")
            yield found

    with pytest.raises(RunFailed, match="w16: the disk is full"):
        carry_out(tmp_path, failing)
    names = read_csv(tmp_path / "runs.csv")["run"].tolist()
    planned = [run.name for run in toy_sweep.runs() for _ in run.readouts]
    assert names == [name for name in planned if name != "w16"] and len(names) < len(planned)


def test_a_budget_that_is_added_takes_only_its_own_training(tmp_path):
    carry_out(tmp_path, runs=toy_sweep.runs(budgets=(1e9, 9e9)))
    started = []

    def counting(run, directory, report):
        started.append([readout.budget for readout in run.readouts])
        return quick(run, directory, report)

    carry_out(tmp_path, counting)
    assert started == [[3e9]] * 4
    carry_out(tmp_path / "full")
    assert (tmp_path / "runs.csv").read_bytes() == (tmp_path / "full" / "runs.csv").read_bytes()


@pytest.mark.parametrize("torn", ["", "run,width", "nonsense\n1,2\n"])
def test_a_torn_csv_is_mended(tmp_path, torn):
    carry_out(tmp_path)
    full = (tmp_path / "runs.csv").read_text()
    (tmp_path / "runs.csv").write_text(torn or full[:-7])
    carry_out(tmp_path)
    assert (tmp_path / "runs.csv").read_text() == full


def test_a_sweep_that_stops_early_keeps_the_same_rows_in_whatever_order_runs_end(tmp_path):
    def enough(rows):
        return len(rows) >= 4

    texts = []
    for name, engine in (("a", Inside()), ("b", Inside(backwards=True))):
        states = []
        carry_out(
            tmp_path / name, engine=engine, enough=enough, watch=lambda s, states=states: states.append(list(s.states))
        )
        texts.append((tmp_path / name / "runs.csv").read_text())
        assert states[-1] == ["done", "done", "not needed", "not needed"]
    carry_out(tmp_path / "a", enough=enough)
    assert texts[0] == texts[1] == (tmp_path / "a" / "runs.csv").read_text()
    assert len(texts[0].splitlines()) == 1 + 6


def test_failed_runs_are_tried_again_in_processes_of_their_own(tmp_path):
    last = []
    engine = Local(2, tmp_path / "logs", TOY)
    rows = carry_out(tmp_path, toy_sweep.fail_once, engine, watch=lambda s: last.append(list(s.tries)))
    assert len(rows) == 12 and last[-1] == [2 if run.columns["width"] in (16, 24) else 1 for run in toy_sweep.runs()]


def test_runs_that_keep_failing_are_named_and_the_others_kept(tmp_path):
    with pytest.raises(RunFailed, match=r"1 of 4 runs failed(.|\n)*w16: the disk is full"):
        carry_out(tmp_path, toy_sweep.fail_always)
    assert {row for row in read_csv(tmp_path / "runs.csv")["run"]} == {"w8", "w24", "w32"}
    rows = carry_out(tmp_path)
    assert [row["run"] for row in rows[::3]] == [run.name for run in toy_sweep.runs()]


def test_a_run_that_diverges_is_a_result_and_not_trained_again(tmp_path):
    states, engine = [], Inside()
    rows = carry_out(tmp_path, toy_sweep.diverge, engine, watch=lambda status: states.append(list(status.states)))
    assert states[-1] == ["done", "done", "diverged", "diverged"] and engine.calls == 4
    assert [(row["width"], row["budget"]) for row in rows if row["width"] in (16, 24)] == [(16, 1e9)]
    assert read_csv(tmp_path / "runs.csv")["loss"].tolist() == [row["loss"] for row in rows]
    diverged = (tmp_path / "diverged.csv").read_text()
    assert "the loss is nan near step 10" in diverged and "the loss at step" in diverged
    # Noted at the first readout that was not reached: of width 16 the second.
    lost = {row["run"]: int(row["steps"]) for row in csv.DictReader(diverged.splitlines())}
    planned = {run.name: [readout.steps for readout in run.readouts] for run in toy_sweep.runs()}
    assert lost == {"w16": planned["w16"][1], "w24": planned["w24"][0]}
    engine = Inside()
    assert carry_out(tmp_path, toy_sweep.diverge, engine) == rows and engine.calls == 0
    assert (tmp_path / "diverged.csv").read_text() == diverged
    (tmp_path / "sound").mkdir()
    (tmp_path / "sound" / "diverged.csv").write_text(diverged)  # of a start before the fault was mended
    carry_out(tmp_path / "sound", toy_sweep.diverge, Inside(), runs=toy_sweep.runs(widths=(8,)))
    assert not (tmp_path / "sound" / "diverged.csv").exists()
    with pytest.raises(RunFailed, match="all runs diverged"):
        carry_out(tmp_path / "all", toy_sweep.diverge, runs=toy_sweep.runs(widths=(24,)))


def test_a_killed_process_is_reported_by_its_signal(tmp_path):
    engine = Local(1, tmp_path, TOY)
    (job,) = engine.submit([(signal.raise_signal, (signal.SIGKILL,))])
    job.process.wait()
    (other,) = engine.submit([(int, ("x",))])
    other.process.wait()
    assert "SIGKILL" in job.error() and "invalid literal" in other.error()


def test_settings_planned_twice_are_refused(tmp_path):
    with pytest.raises(ValueError, match="planned twice: w8"):
        carry_out(tmp_path, runs=[*toy_sweep.runs(), toy_sweep.runs(widths=(8,))[0]])


def test_rows_with_other_columns_are_refused():
    with pytest.raises(ValueError, match="'b' has columns"):
        table([{"run": "a", "loss": 1.0}, {"run": "b", "los": 1.0}])


# --- processes and kills

TOY = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "scaling")])}


def start(directory, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "toy_sweep", str(directory), *more],
        cwd=directory.parent,
        env=os.environ | TOY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(directory):
    process = start(directory)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return (directory / "runs.csv").read_bytes()


def kill_and_restart(directory, kills, seed, longest):
    """SIGKILL a sweep `kills` times at random moments of its life, then let it end."""
    rng, alive = random.Random(seed), 0
    while alive < kills and not (directory / "finished").exists():
        process = start(directory)
        time.sleep(rng.uniform(0.05, longest))
        alive += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return alive


@pytest.mark.parametrize(("kills", "seed"), [(2, 0), pytest.param(20, 1, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_csv_is_the_same(tmp_path, kills, seed):
    full, killed = tmp_path / "full", tmp_path / "killed"
    full.mkdir()
    killed.mkdir()
    begun = time.monotonic()
    reference = finish(full)
    died = kill_and_restart(killed, kills, seed, longest=0.8 * (time.monotonic() - begun))
    assert died >= 1, "the sweep ended before it could be killed"
    assert finish(killed) == reference
    assert len(reference.splitlines()) == 1 + 12


def test_workers_end_with_the_sweep(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=tmp_path, env=os.environ | TOY, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        # Without an init that reaps it, an orphan that has ended stays as a zombie.
        status = Path(f"/proc/{child}/stat")
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its sweep")


def test_a_function_of_the_script_itself_is_refused(tmp_path):
    process = start(tmp_path / "x", "--main")
    output, _ = process.communicate(timeout=60)
    assert process.returncode and "move it to a module" in output


PARENT = """
import time
from scaling.sweeps.executors import Local
(job,) = Local(1, ".").submit([(time.sleep, (60,))])
print(job.process.pid, flush=True)
time.sleep(60)
"""


# --- engines


@pytest.mark.parametrize(("name", "module", "extra"), [("slurm", "submitit", "slurm"), ("ray", "ray", "ray")])
def test_a_missing_engine_names_the_extra(tmp_path, monkeypatch, name, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"tessera-jax\[{extra}\]"):
        make_executor(ExecutorConfig(name=name, slots=2), tmp_path)


def test_environment_variables_of_the_options_win(tmp_path):
    config = ExecutorConfig("local", slots=1, options=(("CACHE", "mine"), ("MORE", "1")))
    made = make_executor(config, tmp_path, {"CACHE": "the program's", "OTHER": "2"})
    assert made.environment == {"CACHE": "mine", "MORE": "1", "OTHER": "2"}


def test_a_cluster_needs_a_number_of_slots(tmp_path):
    with pytest.raises(ValueError, match="slots = 0"):
        make_executor(ExecutorConfig(name="slurm"), tmp_path)
    assert make_executor(ExecutorConfig(), tmp_path).slots >= 1


@pytest.mark.parametrize("name", ["submitit-debug", pytest.param("submitit-local", marks=pytest.mark.slow)])
def test_submitit_carries_a_sweep_out(tmp_path, monkeypatch, name):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", TOY["PYTHONPATH"])
    engine = make_executor(ExecutorConfig(name=name, slots=2, options=(("timeout_min", 5),)), tmp_path / "submitit")
    rows = carry_out(tmp_path, toy_sweep.fail_once if name == "submitit-local" else quick, engine)
    carry_out(tmp_path / "full")
    assert len(rows) == 12 and (tmp_path / "runs.csv").read_bytes() == (tmp_path / "full" / "runs.csv").read_bytes()


class Lost:
    """A job of submitit that was cancelled where SLURM keeps no accounts: it never has a result."""

    job_id, state = "7_1", "UNKNOWN"

    def done(self):
        return False


def test_a_job_that_left_the_queue_without_a_result_has_failed(tmp_path, monkeypatch):
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\ncat $(dirname $0)/jobs\n")
    squeue.chmod(0o755)
    (tmp_path / "jobs").write_text("7_0\n7_1\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(executors, "GONE_SECONDS", 0.0)
    job = executors.Submitted(Lost(), executors.SlurmQueue())
    assert not job.done() and not job.done()
    (tmp_path / "jobs").write_text("7_0\n")
    assert not job.done()  # its result may still be on the way
    assert job.done() and job.error() == "job 7_1 left the queue without a result: cancelled or killed"
    squeue.write_text("#!/bin/sh\nexit 1\n")
    assert not executors.Submitted(Lost(), executors.SlurmQueue()).done()


@pytest.mark.slow
def test_ray_carries_a_sweep_out(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", TOY["PYTHONPATH"])
    engine = make_executor(ExecutorConfig(name="ray", slots=2), tmp_path)
    carry_out(tmp_path, toy_sweep.fail_once, engine)
    carry_out(tmp_path / "full")
    assert (tmp_path / "runs.csv").read_bytes() == (tmp_path / "full" / "runs.csv").read_bytes()


def test_one_thread_each():
    assert "intra_op_parallelism_threads=1" in executors.ONE_THREAD["XLA_FLAGS"]
    assert Status(toy_sweep.runs()).states == ["waiting"] * 4


def test_a_runs_process_has_the_users_flags_and_one_thread(tmp_path, monkeypatch):
    given = []

    class NoProcess(subprocess.Popen):
        def __init__(self, command, env, **_):
            given.append(env)
            self.stdin, self.returncode = (tmp_path / "payload").open("wb"), 0

    monkeypatch.setattr(executors.subprocess, "Popen", NoProcess)
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=here")
    Local(1, tmp_path, {"MORE": "1"}).submit([(int, ("1",))])
    (env,) = given
    assert env["XLA_FLAGS"].split() == ["--xla_dump_to=here", *executors.ONE_THREAD["XLA_FLAGS"].split()]
    assert env["OMP_NUM_THREADS"] == "1" and env["MORE"] == "1"
