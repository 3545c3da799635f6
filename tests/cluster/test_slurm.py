"""Sweeps and trainings on a real SLURM: cancelled, killed or queued again, they end as an undisturbed one does."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from small_runs import SWEEP, TRAIN

from scaling.sweeps.executors import ExecutorConfig, make_executor
from tessera.infra.logger import METRICS, read_rows

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
CACHE = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / f"jax-{jax.__version__}-scripts"), "JAX_PLATFORMS": "cpu"}
ON_SLURM = [*SWEEP, "--config.engine.name=slurm", "--config.engine.slots=2"]
LONGER = [*TRAIN, "--config.steps=600", "--config.eval.every=300"]


@pytest.fixture
def slurm(slurm_cluster, monkeypatch):
    """Runs SLURM's commands; whatever a test leaves in the queue is cancelled."""
    for name, value in (slurm_cluster | CACHE).items():
        monkeypatch.setenv(name, value)

    def command(*words):
        run = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, (words, run.stdout, run.stderr)
        return run.stdout

    yield command
    command("scancel", "--user=root")


def until(condition, what, seconds=600):
    limit = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < limit, what
        time.sleep(0.2)
    return found


def sweep(workdir):
    log = (workdir.parent / f"{workdir.name}.log").open("ab")
    flags = [*ON_SLURM, f"--workdir={workdir}"]
    return subprocess.Popen([sys.executable, "-m", "scripts.sweep", *flags], cwd=ROOT, stdout=log, stderr=log)


def test_a_job_is_submitted_and_a_cancelled_one_says_so(slurm, tmp_path):
    """The one that runs everywhere: a call that ends, one that fails, one that is cancelled."""
    executor = make_executor(ExecutorConfig("slurm", slots=2), tmp_path / "jobs")
    jobs = executor.submit([(time.sleep, (0,)), (int, ("no number",)), (time.sleep, (600,))])
    until(lambda: all(job.done() for job in jobs[:2]), "short jobs have not ended")
    assert not jobs[0].error() and "no number" in jobs[1].error()
    assert not jobs[2].done()
    executor.stop(jobs[2:])
    until(jobs[2].done, "the cancelled job has not ended")
    assert jobs[2].error()


def test_a_sweep_with_a_cancelled_run_killed_and_started_again_ends_the_same(slurm, tmp_path):
    assert sweep(tmp_path / "whole").wait(900) == 0, (tmp_path / "whole.log").read_text()
    process = sweep(workdir := tmp_path / "run")
    try:
        job = until(lambda: slurm("squeue", "--noheader", "--states=R", "--format=%i").split(), "no run has begun")[0]
        slurm("scancel", job)  # its run is submitted again
        until(lambda: list(workdir.rglob("*.json")), "nothing has come out", 300)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    slurm("scancel", "--user=root")
    assert sweep(workdir).wait(900) == 0, (tmp_path / "run.log").read_text()
    assert (workdir / "runs.csv").read_bytes() == (tmp_path / "whole" / "runs.csv").read_bytes()
    assert (workdir / "report.html").exists()


def test_a_training_sent_sigterm_is_queued_again_and_ends_the_same(slurm, tmp_path, monkeypatch):
    """`scripts/launch/slurm.sbatch` as it is, two processes on a node; SLURM requeues a job in two minutes."""
    monkeypatch.setenv("TESSERA", str(ROOT))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    size = ["--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-task=0", "--job-name=tessera"]

    def submit(workdir):
        script = str(ROOT / "scripts" / "launch" / "slurm.sbatch")
        output = slurm(
            "sbatch", "--parsable", *size, f"--output={workdir}.log", script, *LONGER, f"--workdir={workdir}"
        )
        return output.strip()

    def ended(workdir, job):
        text = Path(f"{workdir}.log").read_text() if Path(f"{workdir}.log").exists() else ""
        state = slurm("scontrol", "show", "job", job).partition("JobState=")[2].split()[0]
        assert state not in ("FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"), text
        return state == "COMPLETED"

    def losses(workdir):
        return {(row["kind"], row["step"]): row["loss"] for row in read_rows(workdir / METRICS) if "loss" in row}

    whole, workdir = tmp_path / "whole", tmp_path / "run"
    job = submit(whole)
    until(lambda: ended(whole, job), "the whole training has not ended")
    job = submit(workdir)
    until(lambda: (workdir / METRICS).exists() and len(losses(workdir)) > 5, "it has not begun")
    slurm("scancel", "--signal=TERM", job)
    until(lambda: "JobState=PENDING" in slurm("scontrol", "show", "job", job), "it is not queued again", 120)
    saved = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert 0 < max(saved) < 600
    until(lambda: ended(workdir, job), "it has not gone on")
    assert losses(workdir) == losses(whole)
    assert max(step for _, step in losses(workdir)) == 600
