import jax
import jax.numpy as jnp
import pytest

from scripts.benchmarks import decode
from tessera.data.text import ByteTokenizer
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.serving.load import Loaded, export_directory


@pytest.mark.slow
def test_engines_take_turns_at_the_same_model(tmp_path):
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    config = TransformerConfig(vocab_size=8192, layers=1, width=16, heads=2, ff=16)
    params = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    export_directory(Loaded(params, config, ByteTokenizer()), tmp_path / "model")
    sizes = {"model": str(tmp_path / "model"), "bits": (0, 8), "prompt": 16, "slots": (2,), "tokens": 2, "rounds": 2}
    rows = list(decode.rows(decode.DecodeBenchmark(**sizes)))
    cases, names = ("prompt of 16 tokens", "decode, 2 slots"), ("tessera, 32 bits", "tessera, 8 bits")
    assert [(row.case, row.name) for row in rows] == [(case, name) for case in cases for name in names]
    assert all(row.seconds > 0 and (row.ratio is None) == (row.name == names[0]) for row in rows)
    assert rows[2].rate == pytest.approx(4 / rows[2].seconds) and rows[0].more["same tokens"] == 1.0
