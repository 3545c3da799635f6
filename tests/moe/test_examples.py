"""Every public name of the packages has a docstring with an example, and the examples hold."""

import doctest
import importlib

import pytest

PACKAGES = ("moe", "moe.route", "moe.kernels")
NAMES = [(package, name) for package in PACKAGES for name in importlib.import_module(package).__all__]


@pytest.mark.parametrize(("package", "name"), [*((package, "") for package in PACKAGES), *NAMES])
def test_the_example_in_a_docstring_holds(package, name):
    module = importlib.import_module(package)
    subject = getattr(module, name) if name else module
    first, *_ = (subject.__doc__ or "").strip().split("\n")
    assert first.endswith((".", ":")), f"{package}.{name}: the docstring begins with a sentence, not {first!r}"
    example = doctest.DocTestParser().get_doctest(subject.__doc__, {}, f"{package}.{name}", None, None)
    assert example.examples, f"{package}.{name} has no example (>>>) in its docstring"
    report: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=report.append)
    assert not report, "".join(report)
