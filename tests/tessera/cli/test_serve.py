"""What a server's settings come to before a model is loaded."""

import pytest

pytest.importorskip("prometheus_client")

from tessera.cli import main as cli
from tessera.cli import serve
from tessera.infra.config import ConfigError
from tessera.infra.config_files import load_config


class Asked(Exception):
    """Stands in for the loading of a model."""


@pytest.mark.parametrize(("invariant", "expected"), [("False", 16), ("True", 0)])
def test_batch_invariance_is_without_the_prefix_cache(monkeypatch, invariant, expected):
    def make_engine(source, plan, sizes, queue, draft, prefix_cache, adapters):
        raise Asked(prefix_cache)

    monkeypatch.setattr(serve, "make_engine", make_engine)
    with pytest.raises(Asked) as asked:
        serve.main(invocation(("port", "0"), ("batch_invariant", invariant)))
    assert asked.value.args == (expected,)


def test_batch_invariance_refuses_pages():
    with pytest.raises(ConfigError, match="batch_invariant with config.sizes.pages=8: a text that lost its pages"):
        serve.main(invocation(("batch_invariant", "True"), ("sizes.pages", "8")))


def invocation(*overrides):
    config = load_config(cli.COMMANDS["serve"].config)[0]
    return cli.invoke(serve.SCHEMA, config, [*overrides, ("model.dir", "nowhere")], "x", {})
