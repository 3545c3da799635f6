"""What a user installs: the wheel in an empty environment, and what the code asks of the extras."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tessera

ROOT = Path(__file__).parent.parent
LIBRARIES = ("lottery", "moe", "sharding", "scaling")
PACKAGES = (*LIBRARIES, "tessera")
SETUP = (ROOT / "setup.py").read_text()
# What a module may import before any of its functions is called: the core, and what comes with it.
CORE = {
    *("jax", "flax", "optax", "orbax", "ml_collections", "numpy", "scipy", "absl", "jaxtyping", "grain", "rich"),
    *("etils", "ml_dtypes"),
}
# The server's own modules: the command imports them where it starts one.
EXTRAS = dict.fromkeys(("starlette", "uvicorn", "pydantic", "prometheus_client"), "tessera/serving/")


def at_import(tree: ast.AST):
    """Import statements that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from (child for child in node.orelse if isinstance(child, ast.Import | ast.ImportFrom))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_import(node)


def test_importing_a_module_needs_the_core_alone():
    offenders = []
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        for node in at_import(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in {name.split(".")[0] for name in names}:
                known = name in CORE or name in PACKAGES or name in sys.stdlib_module_names
                if not known and not where.startswith(EXTRAS.get(name, "nowhere")):
                    offenders.append(f"{where}:{node.lineno} imports {name}")
    assert not offenders, "import these where they are used, and name the extra if they are missing:\n" + "\n".join(
        offenders
    )


def test_messages_name_extras_that_exist():
    extras = set(re.findall(r'^    "(\w+)": \[', SETUP, re.MULTILINE))
    assert {"reports", "data", "hf", "serve", "dev"} <= extras
    for path in (path for package in (*PACKAGES, "scripts") for path in (ROOT / package).rglob("*.py")):
        named = re.findall(r"tessera-jax\[([\w,]+)\]|extra `(\w+)`", path.read_text())
        unknown = {name for pair in named for text in pair for name in text.split(",") if name} - extras
        assert not unknown, f"{path.relative_to(ROOT)} names extras that setup.py lacks: {sorted(unknown)}"


def test_there_is_one_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", tessera.__version__)
    assert f"## {tessera.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {tessera.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_package_is_marked_as_typed():
    assert all((ROOT / package / "py.typed").exists() for package in PACKAGES)


def run(*command, cwd, check=True):
    """Run outside the checkout, without its variables."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "JAX_COMPILATION_CACHE_DIR")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert not check or done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel's Python in an empty environment."""
    folder = tmp_path_factory.mktemp("wheel")
    leave_out = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__", "docs", "tests", "scripts")
    # A copy, as setuptools would put what an earlier build left in build/ into the wheel.
    shutil.copytree(ROOT, folder / "source", ignore=leave_out)
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    run(sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", folder / "dist", folder / "source", cwd=folder)
    shutil.rmtree(folder / "source")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    lock = ROOT / "requirements" / "ci-{}.{}.txt".format(*sys.version_info)
    constraints = ("--constraint", lock) if lock.exists() and sys.platform == "linux" else ()
    run(python, *pip, "install", *constraints, *(folder / "dist").glob("*.whl"), cwd=folder)
    return python


@pytest.mark.wheel
def test_installing_brings_the_core_and_nothing_else(installed, tmp_path):
    found = run(installed, "-m", "pip", "list", "--format=freeze", cwd=tmp_path).stdout.lower().replace("_", "-")
    names = {line.partition("==")[0] for line in found.split()}
    assert {"tessera-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "rich"} <= names
    extras = "matplotlib scikit-learn pooch tokenizers safetensors tensorboardx starlette chex torch pytest"
    assert not names & set(extras.split())


@pytest.mark.wheel
def test_only_our_names_are_installed(installed, tmp_path):
    for name in ("training", "scripts", "configs", "tests", "docs"):
        failed = run(installed, "-c", f"import {name}", cwd=tmp_path, check=False)
        assert failed.returncode and "ModuleNotFoundError" in failed.stderr, f"import {name} works"
    code = "from lottery import masks; import moe, importlib.metadata as m; print(m.version('tessera-jax'))"
    assert run(installed, "-c", code, cwd=tmp_path).stdout.strip() == tessera.__version__


IMPORT_ALL = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    for module in pkgutil.walk_packages(importlib.import_module(name).__path__, name + "."):
        importlib.import_module(module.name)
"""


@pytest.mark.wheel
def test_the_four_libraries_import_with_the_core_alone(installed, tmp_path):
    run(installed, "-c", IMPORT_ALL, *LIBRARIES, cwd=tmp_path)


@pytest.mark.wheel
def test_files_beside_the_code_are_in_the_wheel(installed, tmp_path):
    code = (
        "import importlib.resources as r; "
        f"print(*(r.files(p).joinpath('py.typed').is_file() for p in {PACKAGES})); "
        "print(any(f.name.endswith('.json') for f in r.files('moe.kernels').joinpath('tilings').iterdir())); "
        "print(r.files('tessera.configs').joinpath('lm.py').is_file())"
    )
    assert set(run(installed, "-c", code, cwd=tmp_path).stdout.split()) == {"True"}


@pytest.mark.wheel
@pytest.mark.skipif(not (ROOT / "tessera/cli/main.py").exists(), reason="the console command is not there yet")
def test_the_console_command_trains(installed, tmp_path):
    run(installed, "-c", IMPORT_ALL, "tessera.configs", cwd=tmp_path)
    command = installed.with_name("tessera")
    said = run(command, "train", "--config=lm:tiny", "--config.steps=3", "--workdir=run", cwd=tmp_path)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    assert "`reports`" in said.stdout + said.stderr, "the extra that draws the report is named"
    assert "python" in run(command, "doctor", cwd=tmp_path).stdout.lower()
