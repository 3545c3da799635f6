import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tessera.models.transformer import Decoder, TransformerConfig
from tessera.serving.huggingface import NotConvertible, is_directory, load_directory, read_config, save_directory

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def make(kind, **more):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, **more)
        return transformers.MixtralForCausalLM(config).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **more)).eval()


def tensors(directory):
    import safetensors.numpy

    return {
        name: tensor
        for file in directory.glob("*.safetensors")
        for name, tensor in safetensors.numpy.load_file(file).items()
    }


@pytest.mark.parametrize(
    "kind, more",
    [
        ("llama", {"rope_theta": 5e4, "head_dim": 16}),
        ("llama", {"tie_word_embeddings": True}),
        ("mixtral", {}),
    ],
    ids=["llama", "llama-tied", "mixtral"],
)
def test_a_model_of_transformers_gives_equal_logits_and_comes_back_the_same(kind, more, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = make(kind, **more)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(0, 64, (3, 12))
    with torch.no_grad():
        expected = theirs(torch.as_tensor(tokens)).logits.numpy()
    assert is_directory(tmp_path / "theirs")
    params, config = load_directory(tmp_path / "theirs")
    found = jax.jit(Decoder(config).apply)({"params": params}, jnp.asarray(tokens))
    np.testing.assert_allclose(found, expected, atol=1e-4)

    save_directory(tmp_path / "ours", params, config, shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert np.array_equal(tensor, after[name]), name
    again, same = load_directory(tmp_path / "ours")
    assert same == config and jax.tree.all(jax.tree.map(np.array_equal, again, params))
    back = type(theirs).from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert np.array_equal(back(torch.as_tensor(tokens)).logits.numpy(), expected)


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


def test_a_directory_that_holds_something_else_is_not_replaced(tmp_path):
    pytest.importorskip("safetensors")
    config = TransformerConfig(vocab_size=8, layers=2, width=8, heads=2, ff=8)
    params = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    (tmp_path / "config.json").write_text(json.dumps({"model": {}}))  # a run
    with pytest.raises(FileExistsError, match="give another directory"):
        save_directory(tmp_path, params, config)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
