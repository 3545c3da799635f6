"""Scripts where matplotlib is not installed: results are saved, one line names the extra, the exit code is 0."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tessera.reports.html import Section, Table, paragraphs, print_report, write_report
from tessera.reports.style import MissingMatplotlib

ROOT = Path(__file__).parents[3]
BLOCKED = """
import runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""
LINE = "no report: its figures need the extra `reports` (pip install -e '.[reports]'); all results are saved"
DIGITS = ("--config.seeds=(0, 1)", "--config.model.hidden=(12, 8)")
SEARCH = ("--config=configs/lottery_digits.py", *DIGITS, "--config.train.steps=20it", "--config.search.levels=1")
LM = (
    *("--config=configs/lm.py:tiny", "--config.steps=4", "--config.batch_size=2", "--config.length=16"),
    *("--config.model.layers=1", "--config.model.width=16", "--config.model.heads=2", "--config.model.kv_heads=1"),
    *("--config.optimizer.warmup=1", "--config.eval.batches=1"),
)
SWEEP = (
    *("--config=configs/isoflop.py:tiny", "--config.plan.widths=(8, 12, 16, 20)", "--config.plan.budgets=(5e8, 1e9)"),
    *("--config.plan.least_steps=10", "--config.plan.tokens_per_parameter=(0.1, 1e4)", "--config.plan.warmup=4"),
    *("--config.train.eval_tokens=4096", "--config.report.resamples=20"),
)
FIT = ("--config=configs/fit.py", "--config.resamples=10")
# Script, flags, and files that must be there at the end.
CASES = {
    "find_ticket": (SEARCH, ("tickets.csv",)),
    "train": (LM, ("metrics.jsonl", "checkpoints")),
    "fit_scaling": (FIT, ("fit.json",)),
    "explain": (("--config=configs/lm.py:tiny", "--config.plan=fsdp=2", "--no-search"), ()),
    "study": (("--config=configs/study_ablations.py:tiny", *DIGITS), ("rows.csv", "table.md")),
    "sweep": (SWEEP, ("runs.csv", "fit.json")),
}


def start(script, *arguments):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / f"jax-{jax.__version__}-scripts")}
    cpu = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, f"scripts.{script}", *arguments],
        cwd=ROOT,
        env=os.environ | cache | cpu,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture
def data(tmp_path):
    """A text to train on and a table of runs to fit."""
    (tmp_path / "text.txt").write_text("the tile token ticket routes experts in parallel\n" * 200)
    params, tokens = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(1e9, 1e11, 6)))
    loss = 1.7 + 400 / params**0.34 + 410 / tokens**0.28
    np.savetxt(tmp_path / "runs.csv", np.stack([params, tokens, loss], 1), delimiter=",", header="params,tokens,loss")
    text = (tmp_path / "runs.csv").read_text().removeprefix("# ")
    (tmp_path / "runs.csv").write_text(text)
    return {"train": f"--config.data.name={tmp_path}/text.txt", "fit_scaling": f"--config.runs={tmp_path}/runs.csv"}


@pytest.mark.long
@pytest.mark.parametrize("script", [pytest.param(name, marks=[pytest.mark.slow] * (name != "train")) for name in CASES])
def test_a_run_ends_with_one_line_and_its_results(script, data, tmp_path):
    flags, files = CASES[script]
    found = start(script, *flags, *([data[script]] if script in data else []), f"--workdir={tmp_path / 'run'}")
    assert found.returncode == 0, found.stderr
    assert found.stdout.rstrip("\n").splitlines()[-1] == LINE, found.stdout
    assert found.stdout.count("matplotlib") == 0 and "Traceback" not in found.stderr
    assert not [name for name in files if not (tmp_path / "run" / name).exists()]
    assert not (tmp_path / "run" / "report.html").exists()


def test_pages_without_figures_need_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    print_report(write_report, tmp_path, "t", [Section("", paragraphs("a")), Section("b", Table(("x",), [(1,)]))])
    assert (tmp_path / "report.html").exists() and "report.html" in capsys.readouterr().out

    def draw():
        from tessera.reports.style import canvas

        return canvas()[0]

    with pytest.raises(MissingMatplotlib, match="extra `reports`"):
        write_report(tmp_path / "drawn", "t", [Section("c", draw)])
    print_report(write_report, tmp_path / "drawn", "t", [Section("c", draw)])
    assert capsys.readouterr().out == LINE + "\n" and not (tmp_path / "drawn").exists()
