"""LoRA adapters in and out of peft's directory format."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tessera.cli import export_hf
from tessera.lm import lora
from tessera.models.transformer import Decoder
from tessera.serving.adapters import CONFIG, WEIGHTS, load_adapters, save_adapters
from tessera.serving.families import NotConvertible
from tessera.serving.huggingface import load_directory
from tessera.serving.load import SourceConfig, export_directory, load

pytest.importorskip("safetensors")
GOLDEN = Path(__file__).parents[2] / "golden"
MODELS = ("llama", "qwen2")


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_of_peft_gives_its_logits_merges_the_same_and_comes_back(name, tmp_path, golden):
    params, config = load_directory(GOLDEN / "huggingface" / name)
    adapters, settings = load_adapters(GOLDEN / "lora" / name, config)
    merged = lora.apply(params, adapters, settings)
    case = golden("lora")[name]
    found = jax.jit(Decoder(config).apply)({"params": merged}, golden("lora")["tokens"])
    np.testing.assert_allclose(found, case["logits"], atol=2e-5)
    kernel = merged["blocks"]["mlp"]["down" if name == "llama" else "up"]["kernel"][1]
    np.testing.assert_allclose(kernel, case["merged"], rtol=1e-5, atol=1e-6)
    if name == "qwen2":  # of the last layer alone
        np.testing.assert_array_equal(
            merged["blocks"]["mlp"]["up"]["kernel"][0], params["blocks"]["mlp"]["up"]["kernel"][0]
        )

    from safetensors.numpy import load_file

    save_adapters(tmp_path / "ours", adapters, settings, config, base=name)
    theirs, ours = (load_file(folder / WEIGHTS) for folder in (GOLDEN / "lora" / name, tmp_path / "ours"))
    assert set(theirs) <= set(ours) and all(np.array_equal(ours[one], theirs[one]) for one in theirs)
    assert not any(ours[one].any() for one in set(ours) - set(theirs))
    # With this file and the same tensors peft computes the same logits: `make golden` asserts it.
    exported = (GOLDEN / "lora" / f"{name}.exported_config.json").read_text()
    assert (tmp_path / "ours" / CONFIG).read_text() == exported
    again, same = load_adapters(tmp_path / "ours", config)
    assert (same.scale, same.rank) == (settings.scale, settings.rank)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, adapters))


def test_a_model_is_loaded_and_exported_with_an_adapter_merged_in(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.save(str(tmp_path / "words.json"))
    base = load(SourceConfig(str(GOLDEN / "huggingface" / "llama"), tokenizer=str(tmp_path / "words.json")))
    plain = export_directory(base, tmp_path / "base")
    assert export_hf.main([str(plain), str(tmp_path / "merged"), f"--adapter={GOLDEN / 'lora' / 'llama'}"]) == 0
    adapters, settings = load_adapters(GOLDEN / "lora" / "llama", base.config)
    wanted, found = lora.apply(base.params, adapters, settings), load(SourceConfig(str(tmp_path / "merged"))).params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, wanted)
    assert np.abs(found["blocks"]["mlp"]["down"]["kernel"] - base.params["blocks"]["mlp"]["down"]["kernel"]).max() > 0.1


@pytest.fixture
def theirs(tmp_path):
    return shutil.copytree(GOLDEN / "lora" / "llama", tmp_path / "theirs")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"use_dora": True}, "use_dora=True is not read"),
        ({"bias": "all"}, "bias='all' is not read"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": "4"}, "r='4' must be a positive number"),
        ({"r": 5}, r"lora_A.weight has shape \(4, 64\); \(5, 64\) is needed"),
        ({"lora_alpha": None}, "lora_alpha=None"),
    ],
)
def test_settings_that_mean_something_else_are_refused(theirs, change, message):
    _, config = load_directory(GOLDEN / "huggingface" / "llama")
    file = theirs / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(NotConvertible, match=message):
        load_adapters(theirs, config)


def test_another_models_adapter_foreign_files_and_experts_are_refused(theirs, tmp_path):
    _, llama = load_directory(GOLDEN / "huggingface" / "llama")
    _, gemma = load_directory(GOLDEN / "huggingface" / "gemma2")
    params, mixtral = load_directory(GOLDEN / "huggingface" / "mixtral")
    with pytest.raises(NotConvertible, match=r"shape \(4, \d+\); \(4, \d+\) is needed|no projection of this model"):
        load_adapters(theirs, gemma)
    with pytest.raises(FileNotFoundError, match="has no adapter_config.json"):
        load_adapters(tmp_path, llama)
    adapters, settings = load_adapters(theirs, llama)
    with pytest.raises(FileExistsError, match="notes.txt"):
        (theirs / "notes.txt").write_text("mine")
        save_adapters(theirs, adapters, settings, llama)
    assert (theirs / "notes.txt").read_text() == "mine"
    (theirs / WEIGHTS).write_bytes(b"\xff" * 40)
    with pytest.raises(NotConvertible, match="no safetensors file"):
        load_adapters(theirs, llama)
    config = lora.LoRAConfig(rank=2, targets="experts/up/kernel$")
    experts = lora.initialize(jax.tree.map(jnp.asarray, params), config, key=jax.random.key(0))
    with pytest.raises(NotConvertible, match="experts"):
        save_adapters(tmp_path / "new", experts, config, mixtral)
    assert not (tmp_path / "new").exists()
