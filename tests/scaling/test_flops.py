from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from moe.experts import MixtureConfig
from moe.gate import RouterConfig
from moe.layer import MoEConfig
from scaling import flops
from sharding.analysis import count_products
from tessera.models.transformer import Decoder, TransformerConfig, param_shapes

SMALL = flops.Shape(layers=2, width=8, ff=32, heads=2, head_dim=4, vocab=11, length=5)


def ratio_to_6nd(shape, *, embedding, logits):
    return flops.appendix_f(shape, embedding=embedding, logits=logits) / (
        6 * flops.parameters(shape).total * shape.length
    )


@pytest.mark.parametrize("name", flops.CHINCHILLA_MODELS)
def test_appendix_f_ratios_of_the_six_published_models(name):
    shape, published = flops.CHINCHILLA_MODELS[name]
    assert ratio_to_6nd(shape, embedding=False, logits=False) == pytest.approx(published, abs=0.01)
    assert round(ratio_to_6nd(shape, embedding=False, logits=False), 2) == published
    # Their names are their sizes, to the digits they have.
    size = float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]]
    assert flops.parameters(shape).total == pytest.approx(size, rel=0.05)


def test_other_conventions_miss_the_published_table():
    off = [
        max(
            abs(ratio_to_6nd(shape, embedding=embedding, logits=logits) - published)
            for shape, published in flops.CHINCHILLA_MODELS.values()
        )
        for embedding, logits in ((True, True), (False, True), (True, False))
    ]
    assert min(off) > 0.1


def test_counts_by_hand():
    assert flops.parameters(SMALL) == flops.Parameters(88, 2 * 4 * 64, 2 * 2 * 256, 0, 0, 0)
    untied = flops.parameters(flops.Shape(2, 8, 32, 2, 4, 11, 5, kv_heads=1, gated=True, tied=False))
    assert untied == flops.Parameters(88, 2 * 3 * 64, 2 * 3 * 256, 0, 0, 88)
    assert untied.non_embedding == untied.total - 176
    projections, scores, dense, output = 2 * 5 * 4 * 64, 4 * 15 * 8, 2 * 5 * 2 * 256, 2 * 5 * 88
    assert flops.exact_matmuls(SMALL) == 3 * (2 * (projections + scores + dense) + output)


def test_experts_are_counted_active_and_total():
    shape = flops.Shape(2, 8, 32, 2, 4, 11, 5, experts=4, active_experts=2)
    total, active = flops.parameters(shape), flops.parameters(shape, active=True)
    assert total.feed_forward == 2 * active.feed_forward
    assert total.router == active.router == 2 * 8 * 4
    assert flops.count(shape, "6ND").params == total.total
    assert flops.count(shape, "6ND, active experts").flops_per_token == 6 * active.total
    # A token's products do not know of experts it does not visit, the router aside.
    more = flops.Shape(2, 8, 32, 2, 4, 11, 5, experts=8, active_experts=2)
    assert flops.exact_matmuls(more) - flops.exact_matmuls(shape) == 3 * 2 * 2 * 5 * 8 * 4


MIXED = {"shared_experts": 2, "latent": 6, "dense_layers": 1, "dense_ff": 20}


@pytest.mark.parametrize("more", [{}, *({name: MIXED[name]} for name in ("shared_experts", "latent")), MIXED])
def test_experts_are_counted_as_they_are_computed(more):
    """Weights and products of the project's own decoder, whose "dense" dispatch runs every expert on every token."""
    shape = flops.Shape(3, 16, 12, 4, 4, 11, 8, gated=True, tied=False, experts=4, active_experts=4, **more)
    options = {"shared": shape.shared_experts, "latent": shape.latent, "first_k_dense_replace": shape.dense_layers}
    mixture, router = MixtureConfig(dispatch="dense"), RouterConfig("top_k", 4, 4)
    moe = MoEConfig(ff=12, router=router, mixture=mixture, **options)
    sizes = {"vocab_size": 11, "layers": 3, "width": 16, "heads": 4, "tied": False}
    model = Decoder(TransformerConfig(**sizes, ff=shape.dense_ff, mlp="routed", moe=moe))
    params = param_shapes(model.config)
    matrices = [
        leaf.size for leaf in jax.tree.leaves(params["blocks"]) + jax.tree.leaves(params.get("dense_blocks", {}))
    ]
    norms = 2 * 3 * 16
    assert flops.parameters(shape).non_embedding == sum(matrices) - norms
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    found = sum(one.flops * one.runs for one in count_products(model.apply, {"params": params}, tokens))
    assert flops.exact_matmuls(shape, causal=False) == 3 * found
    few = replace(shape, active_experts=1)
    skipped = 2 * 8 * (3 - shape.dense_layers) * 3 * 3 * (shape.latent or 16) * 12  # three experts' three matrices
    assert flops.exact_matmuls(shape) - flops.exact_matmuls(few) == 3 * skipped
    assert flops.appendix_f(shape) - flops.appendix_f(few) == 3 * skipped


@pytest.mark.parametrize("window", [1, 3, 5, 9])
def test_local_layers_count_the_pairs_of_their_windows(window):
    shape = flops.Shape(3, 8, 32, 2, 4, 11, 5)
    local = replace(shape, window=window, local_layers=2)
    hidden = sum(t - s >= window for t in range(5) for s in range(t + 1))
    assert flops.exact_matmuls(shape) - flops.exact_matmuls(local) == 3 * 2 * 2 * 2 * hidden * 2 * 4
    assert flops.exact_matmuls(shape, causal=False) == flops.exact_matmuls(local, causal=False)


def test_kaplans_count_by_hand():
    # Table 1 of Kaplan et al. (2020): 2 N + 2 n_layer n_ctx d_attn a token forward, three times that in training.
    weights = 2 * (4 * 64 + 2 * 256)
    assert flops.count(SMALL, "kaplan") == (weights, 3 * (2 * weights + 2 * 2 * 5 * 8))


@pytest.mark.parametrize("convention", flops.CONVENTIONS)
def test_every_convention_counts_near_six_n(convention):
    shape, _ = flops.CHINCHILLA_MODELS["1.1B"]
    count = flops.count(shape, convention)
    assert 0.9 < count.flops_per_token / (6 * count.params) < 1.3


def test_wrong_shapes_and_names():
    with pytest.raises(ValueError, match="no convention '7ND'; there are '6ND'"):
        flops.count(SMALL, "7ND")
    with pytest.raises(ValueError, match="layers = 0"):
        flops.Shape(0, 8, 32, 2, 4, 11, 5)
    with pytest.raises(ValueError, match="active_experts 3 of experts 2"):
        flops.Shape(2, 8, 32, 2, 4, 11, 5, experts=2, active_experts=3)
    with pytest.raises(ValueError, match="latent and dense_layers are of models with experts above 1"):
        flops.Shape(2, 8, 32, 2, 4, 11, 5, latent=4)
    with pytest.raises(ValueError, match="dense_layers 1 of dense_ff 0"):
        flops.Shape(2, 8, 32, 2, 4, 11, 5, experts=2, dense_layers=1)
    with pytest.raises(ValueError, match="heads 2 is not a multiple of kv_heads 3"):
        flops.Shape(2, 8, 32, 2, 4, 11, 5, kv_heads=3)
