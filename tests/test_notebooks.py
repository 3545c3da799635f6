"""Notebooks: one a package, without outputs, with the badge of setup.py's address; a slow test runs them."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def badges():
    spec = importlib.util.spec_from_file_location("badge", ROOT / "notebooks" / "badge.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def test_there_is_one_for_every_package():
    assert [path.stem for path in NOTEBOOKS] == ["lottery", "moe", "scaling", "sharding", "tessera"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_badge_py_leaves_it(path, badges):
    assert read(path) == badges.clean(read(path), path.name), "run python notebooks/badge.py"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_a_title_figures_and_an_assertion(path):
    cells = read(path)["cells"]
    code = [source(cell) for cell in cells if cell["cell_type"] == "code"]
    assert source(cells[1]).startswith(f"# {path.stem}: ")
    assert "plt.show()" in "".join(code) and "assert " in code[-1]
    for text in code:
        compile(text, path.name, "exec")


def test_the_badge_is_a_link_to_the_notebook_at_the_repository(badges):
    text = badges.badge("moe.ipynb", "https://github.com/owner/name")
    assert "(https://colab.research.google.com/github/owner/name/blob/main/notebooks/moe.ipynb)" in text
    assert "colab" not in badges.badge("moe.ipynb", "")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs the extra docs")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output.text for output in outputs if output.get("name") == "stderr" and "Error" in output.text]
