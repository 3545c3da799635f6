"""What a program imports, seen from a fresh process: serving and the libraries draw nothing."""

import subprocess
import sys

import pytest

SERVING = "import tessera.serving.load, tessera.serving.app, tessera.lm.warm_start"
LIBRARIES = """
import importlib, pkgutil
import lottery, moe, sharding, scaling
for package in (lottery, moe, sharding, scaling):
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(found.name)
"""


@pytest.mark.parametrize(
    "code, unwanted",
    [
        (SERVING, ("matplotlib", "tessera.reports", "scipy.optimize")),
        (LIBRARIES, ("matplotlib", "tessera")),
        ("from tessera.reports import style; style.canvas()", ("matplotlib.pyplot",)),
    ],
    ids=["serving", "libraries", "pyplot"],
)
def test_nothing_more_is_imported(code, unwanted):
    code += f"\nimport sys; print(*[name for name in {unwanted!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not found.stdout.split()
