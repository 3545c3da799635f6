"""The public API: what `import lottery` gives and loads, and every example in a docstring."""

import doctest
import importlib
import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lottery

NAMESPACE = {"jax": jax, "jnp": jnp, "np": np, "optax": optax, "lottery": lottery}
PUBLIC = [
    f"{module}.{name}"
    for module in lottery.__all__
    for name in importlib.import_module(f"lottery.{module}").__all__
    if callable(getattr(getattr(lottery, module), name))
]


@pytest.mark.parametrize("module", lottery.__all__)
def test_every_public_name_has_an_example_and_it_runs(module):
    loaded = getattr(lottery, module)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
    for name in loaded.__all__:
        value = getattr(loaded, name)
        if not callable(value):
            assert f"`{name}`" in (loaded.__doc__ or ""), f"{module}: the docstring does not explain {name}"
            continue
        text = inspect.unwrap(value).__doc__ or ""
        assert ">>>" in text, f"lottery.{module}.{name} has no example"
        test = doctest.DocTestParser().get_doctest(text, dict(NAMESPACE), f"lottery.{module}.{name}", None, 0)
        found: list[str] = []
        result = runner.run(test, out=found.append)
        assert not result.failed, "".join(found)


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import lottery; lottery.masks.prunable", ("matplotlib", "scipy", "tessera", "moe")),
        (
            "import lottery; [getattr(lottery, name) for name in lottery.__all__ if name != 'block_sparse']",
            ("matplotlib", "scipy.optimize", "tessera", "moe"),
        ),
    ],
)
def test_the_import_is_light(code, absent):
    code += f"; import sys; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(AttributeError, match="has no attribute 'mask'; it has align, "):
        lottery.mask  # noqa: B018
