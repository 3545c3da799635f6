"""`tessera merge`: whole decoders merged, aligned ones first."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lottery import align
from moe.layer import MoEConfig
from tessera.cli import merge
from tessera.data.text import ByteTokenizer
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.serving.load import Loaded, SourceConfig, export_directory, load

CONFIG = TransformerConfig(vocab_size=256, layers=2, width=16, heads=4, kv_heads=2, ff=24, tied=True)
TOKENS = jnp.arange(12)[None]


def made(seed: int, config: TransformerConfig = CONFIG) -> Loaded:
    params = jax.jit(Decoder(config).init)(jax.random.key(seed), TOKENS)["params"]
    return Loaded(jax.tree.map(np.asarray, params), config, ByteTokenizer())


def test_a_soup_of_directories_and_a_task_taken_away(tmp_path, capsys):
    models = [made(0), made(1)]
    names = [str(export_directory(model, tmp_path / name)) for model, name in zip(models, "ab", strict=True)]
    assert merge.main([*names, "--weights", "3", "1", f"--output={tmp_path / 'soup'}"]) == 0
    assert (
        merge.main([names[1], f"--base={names[0]}", "--method=task", "--weights", "-1", f"--output={tmp_path / 'c'}"])
        == 0
    )
    soup, without = (load(SourceConfig(str(tmp_path / name))).params for name in ("soup", "c"))
    for path in (("embed", "table"), ("blocks", "mlp", "up", "kernel")):
        one, two, mixed, less = models[0].params, models[1].params, soup, without
        for name in path:
            one, two, mixed, less = one[name], two[name], mixed[name], less[name]
        np.testing.assert_allclose(mixed, 0.75 * one + 0.25 * two, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(less, 2 * one - two, rtol=1e-5, atol=1e-6)
    merge.check_same(
        CONFIG, load(SourceConfig(names[0])).config, "a run", "its export"
    )  # where defaults are written out
    assert merge.main([*names, "--method=ties", f"--output={tmp_path / 'd'}"]) == 1
    assert "pass base=" in capsys.readouterr().err and not (tmp_path / "d").exists()
    assert merge.main([*names, f"--output={tmp_path / 'soup'}"]) == 1
    assert "exists" in capsys.readouterr().err


def test_a_permuted_copy_is_found_again_and_the_soup_computes_what_it_did():
    one = made(0)
    spec = align.decoder_spec(CONFIG.layers, CONFIG.tied)
    opened = align.open_decoder(one.params)
    rng = np.random.default_rng(0)
    order = {name: rng.permutation(size) for name, size in align.sizes(opened, spec).items()}
    other = one._replace(params=align.close_decoder(align.permute(opened, order, spec)))
    apply = jax.jit(Decoder(CONFIG).apply)
    wanted = apply({"params": one.params}, TOKENS)
    np.testing.assert_allclose(apply({"params": other.params}, TOKENS), wanted, rtol=1e-4, atol=1e-5)
    soup = merge.merge_models([one, other], names=["one", "other"], aligned=True)
    np.testing.assert_allclose(apply({"params": soup.params}, TOKENS), wanted, rtol=1e-4, atol=1e-5)
    plain = merge.merge_models([one, other], names=["one", "other"])
    assert np.abs(apply({"params": plain.params}, TOKENS) - wanted).max() > 0.1


@pytest.mark.long
def test_slerp_goes_layer_by_layer_and_expert_by_expert():
    config = TransformerConfig(vocab_size=256, layers=2, width=8, heads=2, ff=8, mlp="routed", moe=MoEConfig(ff=8))
    models = [made(0, config), made(1, config)]
    merged = merge.merge_models(models, names=["a", "b"], method="slerp", weights=[0.5, 0.5]).params
    one, two, both = (
        tree["blocks"]["mlp"]["experts"]["up"]["kernel"][1, 3].ravel() for tree in (*(m.params for m in models), merged)
    )
    angle = np.arccos(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
    np.testing.assert_allclose(both, np.sin(angle / 2) / np.sin(angle) * (one + two), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "how", "message"),
    [
        ({"rope_theta": 5e5}, {}, "rope_theta is 10000.0 in a and 500000.0 in b"),
        ({}, {"aligned": True, "base": made(2)}, "leave out either of the two"),
        ({"norm_position": "both"}, {"aligned": True}, "blocks_0/attention_post_norm/gain has no permutation"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, how, message):
    other = made(1, dataclasses.replace(CONFIG, **change))
    one = other if "norm_position" in change else made(0)
    with pytest.raises(ValueError, match=message):
        merge.merge_models([one, other], names=["a", "b", *["base"] * ("base" in how)], **how)
