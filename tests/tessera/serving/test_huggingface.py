import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tessera.models.transformer import Decoder, TransformerConfig
from tessera.serving import huggingface
from tessera.serving.huggingface import (
    ForeignFiles,
    NotConvertible,
    is_directory,
    load_directory,
    read_config,
    save_directory,
)

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


SMALL = TransformerConfig(vocab_size=8, layers=2, width=8, heads=2, ff=8)


def small(seed):
    return jax.jit(Decoder(SMALL).init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def same(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_a_directory_with_other_files_is_refused_and_left_as_it_is(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.numpy import save_file

    notes, theirs, link = tmp_path / "notes", tmp_path / "theirs", tmp_path / "link"
    for folder in (notes, theirs, link):
        folder.mkdir()
    (notes / "thesis.tex").write_text("years of work")
    (notes / "photos").mkdir()
    (theirs / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"x": np.zeros(3, np.float32)}, theirs / "model.safetensors", {"format": "pt"})
    (link / "config.json").symlink_to(theirs / "config.json")
    for folder, named in ((notes, "photos, thesis.tex"), (theirs, "config.json, model.safetensors"), (link, "config")):
        before = contents(folder)
        with pytest.raises(ForeignFiles, match=f"{folder.name} holds .*{named}.*new or empty directory"):
            save_directory(folder, small(0), SMALL)
        assert contents(folder) == before
    assert (notes / "photos").is_dir() and sorted(x.name for x in tmp_path.iterdir()) == ["link", "notes", "theirs"]
    beside = tmp_path / ".model.new"  # the name of no file beside the directory is taken either
    beside.mkdir()
    (beside / "thesis.tex").write_text("years of work")
    made = save_directory(tmp_path / "model", small(0), SMALL)
    assert contents(beside)
    (made / "tokenizer.json").write_text("{}")
    before = contents(made)
    with pytest.raises(ForeignFiles, match=r"holds .*: tokenizer\.json;"):
        save_directory(made, small(1), SMALL)
    assert contents(made) == before
    with pytest.raises(ForeignFiles, match="is a file"):
        save_directory(made / "tokenizer.json", small(1), SMALL)


@pytest.mark.parametrize("sizes", [(2**20, 500), (500, 2**20)], ids=["one-then-many", "many-then-one"])
def test_an_export_replaces_an_earlier_one_and_a_kill_never_leaves_a_mix(sizes, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    old, new = small(0), small(1)
    made = save_directory(tmp_path / "model", old, SMALL, shard_bytes=sizes[0])
    replace, unlink, seen = os.replace, type(made).unlink, []

    def killed_at(number):
        calls = iter(range(1000))

        def dies(call):
            def wrapped(*args, **options):
                if next(calls) == number:
                    raise KeyboardInterrupt
                return call(*args, **options)

            return wrapped

        return dies

    for number in range(100):
        with monkeypatch.context() as patch:
            dies = killed_at(number)
            patch.setattr(os, "replace", dies(replace))
            patch.setattr(type(made), "unlink", dies(unlink))
            # A killed process does not tidy up: only the first call, before anything is written, does something.
            tidy = iter([huggingface._clear_staging])
            patch.setattr(huggingface, "_clear_staging", lambda x, tidy=tidy: next(tidy, lambda x: None)(x))
            try:
                save_directory(made, new, SMALL, shard_bytes=sizes[1])
                break
            except KeyboardInterrupt:
                pass
        try:
            found = load_directory(made)[0]
            seen.append("old" if same(found, old) else "new" if same(found, new) else "mix")
        except FileNotFoundError:
            seen.append("none")
        save_directory(made, old, SMALL, shard_bytes=sizes[0])  # the next export mends it
        assert same(load_directory(made)[0], old) and not (made / huggingface.STAGING).exists()
    assert set(seen) == {"old", "none"} and len(seen) > 10
    save_directory(made, new, SMALL, shard_bytes=sizes[1])
    assert same(load_directory(made)[0], new)
    assert (len(list(made.glob("*.safetensors"))) > 1) == (sizes[1] == 500)


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path):
    pytest.importorskip("safetensors")
    made = save_directory(tmp_path / "model", small(0), SMALL)
    before = contents(made)
    with pytest.raises(NotConvertible):
        save_directory(made, {**small(1), "final_norm": {}}, SMALL, shard_bytes=100)
    assert contents(made) == before and sorted(x.name for x in made.iterdir()) == sorted(before)
