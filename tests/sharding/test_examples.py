"""Every public name has an example that runs, and packages import nothing that they do not need."""

import doctest
import importlib
import subprocess
import sys

import pytest

PACKAGES = ("sharding", "sharding.analysis", "sharding.inference", "sharding.multihost", "sharding.pipeline")
NAMES = [(package, name) for package in PACKAGES for name in importlib.import_module(package).__all__]


def run_examples(name, found):
    tests = [test for test in doctest.DocTestFinder(recurse=False).find(found, name, module=False) if test.examples]
    assert tests, f"{name} has no example in its docstring"
    for test in tests:
        doctest.DebugRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL).run(test)


@pytest.mark.parametrize("package, name", NAMES, ids=[".".join(pair) for pair in NAMES])
def test_every_public_name_has_an_example_that_runs(package, name):
    run_examples(name, getattr(importlib.import_module(package), name))


def test_the_example_of_the_package_runs():
    run_examples("sharding", importlib.import_module("sharding"))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_public_name_hides_a_module(package):
    found = importlib.import_module(package)
    assert len(set(found.__all__)) == len(found.__all__)
    for name in found.__all__:
        assert importlib.util.find_spec(f"{package}.{name}") is None, name
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'missing'"):
        _ = found.missing


def test_importing_the_package_is_cheap():
    program = f"import {', '.join(PACKAGES)}, sys; print([name for name in ('jax', 'tessera') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == "[]\n"
