"""A field added with a default breaks nothing: what an earlier version began goes on, what it finished is used."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent.parent.parent
PACKAGES = ("lottery", "moe", "sharding", "scaling", "tessera", "configs", "scripts")
LM = ["--config=lm:tiny", "--config.length=16", "--config.batch_size=2", "--config.model.width=16"]
LM += ["--config.model.heads=2", "--config.model.kv_heads=1", "--config.eval.batches=1"]
LM += ["--config.data.max_bytes=40000"]
# Script and flags.
RUNS = {
    "train": ("train", [*LM, "--config.steps=4", "--config.checkpoint.every=2"]),
    "search": (
        "find_ticket",
        ["--config=lottery_digits", "--config.train.steps=10it", "--config.search.levels=1", "--config.seeds=0,"],
    ),
    "sweep": (
        "sweep",
        [
            *("--config=isoflop:tiny", "--config.plan.widths=16,", "--config.plan.budgets=1e9,"),
            *("--config.plan.least_steps=2", "--config.plan.warmup=1", "--config.plan.tokens_per_parameter=0.0,1e9"),
            *("--config.train.eval_tokens=4096", "--config.train.noise_batches=0", "--config.engine.slots=1"),
        ],
    ),
    "study": (
        "study",
        [
            *("--config=study_instability:tiny", "--config.data.name=digits", "--config.train.steps=20it"),
            *("--config.study.steps=0,", "--config.study.densities=1.0,", "--config.seeds=0,"),
        ],
    ),
}


def add_fields(package: Path) -> int:
    """Add `added_later: int = 0` as the last field of every dataclass whose name ends in Config."""
    added = 0
    for path in package.rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in reversed(list(ast.walk(ast.parse("\n".join(lines))))):
            if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config") and node.decorator_list):
                continue
            fields = [statement for statement in node.body if isinstance(statement, ast.AnnAssign)]
            lines[fields[-1].end_lineno - 1] += "\n    added_later: int = 0"
            added += 1
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return added


def start(sources: Path, directory: Path, script: str, flags: list[str]) -> str:
    environment = os.environ | {
        "PYTHONPATH": str(sources),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / f"jax-{jax.__version__}"),
    }
    words = [sys.executable, str(sources / "scripts" / f"{script}.py"), *flags, "--workdir=run"]
    done = subprocess.run(words, cwd=directory, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def results(directory: Path) -> dict[str, int]:
    """Files that training writes, with the times of their last change."""
    names = {"checkpoints", "levels", "readouts", "memo"}
    found = [path for path in (directory / "run").rglob("*") if path.is_file() and set(path.parts) & names]
    return {str(path.relative_to(directory)): path.stat().st_mtime_ns for path in found}


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    made = tmp_path_factory.mktemp("versions")
    for version in ("old", "new"):
        for package in PACKAGES:
            shutil.copytree(ROOT / package, made / version / package, ignore=shutil.ignore_patterns("__pycache__"))
    assert sum(add_fields(made / "new" / package) for package in PACKAGES[:5]) > 40
    return made / "old", made / "new"


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_what_an_earlier_version_finished_is_not_made_again(name, versions, tmp_path):
    old, new = versions
    start(old, tmp_path, *RUNS[name])
    before = results(tmp_path)
    assert before
    start(new, tmp_path, *RUNS[name])
    assert results(tmp_path) == before


@pytest.mark.slow
def test_what_an_earlier_version_began_goes_on(versions, tmp_path):
    old, new = versions
    start(old, tmp_path, *RUNS["train"])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    before = results(tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    start(new, tmp_path, *RUNS["train"])
    after = results(tmp_path)
    earlier = {path: time for path, time in before.items() if "/checkpoints/4/" not in path}
    assert earlier and {path: time for path, time in after.items() if "/checkpoints/4/" not in path} == earlier
    assert len(after) > len(earlier)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == lines.count("\n")
