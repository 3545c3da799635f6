import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tessera.models.transformer import Decoder, TransformerConfig
from tessera.serving.huggingface import NotConvertible, is_directory, load_directory, read_config, save_directory

GOLDEN = Path(__file__).parents[2] / "golden" / "huggingface"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tensors(directory):
    import safetensors.numpy

    return {
        name: tensor
        for file in directory.glob("*.safetensors")
        for name, tensor in safetensors.numpy.load_file(file).items()
    }


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral"])
def test_a_model_of_transformers_gives_equal_logits_and_comes_back_the_same(name, tmp_path, golden):
    theirs, case = GOLDEN / name, golden("huggingface")
    assert is_directory(theirs)
    params, config = load_directory(theirs)
    found = jax.jit(Decoder(config).apply)({"params": params}, jnp.asarray(case["tokens"]))
    np.testing.assert_allclose(found, case[name], atol=1e-4)

    save_directory(tmp_path / "ours", params, config, shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    before, after = tensors(theirs), tensors(tmp_path / "ours")
    assert before.keys() == after.keys()
    for path, tensor in before.items():
        assert np.array_equal(tensor, after[path]), path
    again, same = load_directory(tmp_path / "ours")
    assert same == config and jax.tree.all(jax.tree.map(np.array_equal, again, params))
    # With this file and the same tensors transformers computes the same logits: `make golden` asserts it.
    exported = (GOLDEN / f"{name}.exported_config.json").read_text()
    assert (tmp_path / "ours" / "config.json").read_text() == exported


def test_what_has_no_counterpart_is_refused(tmp_path):
    pytest.importorskip("safetensors")
    base = {"model_type": "llama", **SIZES, "rms_norm_eps": 1e-6}
    for wrong in ({"attention_bias": True}, {"model_type": "gpt2"}, {"rope_scaling": {"rope_type": "llama3"}}):
        (tmp_path / "config.json").write_text(json.dumps(base | wrong))
        with pytest.raises(NotConvertible, match=next(iter(wrong)).split("_scaling")[0]):
            read_config(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path / "nothing")
    config = TransformerConfig(vocab_size=8, layers=2, width=8, heads=2, ff=8)
    params = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    made = save_directory(tmp_path / "small", params, config, "bfloat16")
    loaded, same = load_directory(made)
    assert same.tied and same.layers == 2
    half = jax.tree.map(lambda leaf: np.asarray(leaf.astype(jnp.bfloat16), np.float32), params)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, half))
    (made / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_directory(made)
