"""What is kept for the backward pass, by name and by group of layers: read, computed alike, and counted."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn

from moe.layer import MoEConfig
from sharding.mesh import make_mesh
from sharding.plan import Plan
from tessera.models.lm_loss import lm_loss
from tessera.models.remat import NAMES, Remat, parse_remat
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.parallel.decoder import ShardedDecoder
from tessera.parallel.decoder import make_loss as make_split_loss
from tessera.planning.memory import saved_per_row

SIZES = {"vocab_size": 32, "layers": 4, "width": 16, "heads": 2, "ff": 32}
TOKENS = {"tokens": jax.random.randint(jax.random.key(1), (4, 9), 0, 32, jnp.int32)}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("none", [(4, "none", (), ())]),
        ("1 full; 3 dots", [(1, "full", (), ()), (3, "dots", (), ())]),
        ("save(attended+gate_up)", [(4, "names", ("attended", "gate_up"), ())]),
        ("3 offload(residual) save(mlp); 1 none", [(3, "names", ("mlp",), ("residual",)), (1, "none", (), ())]),
    ],
)
def test_a_setting_is_read(text, groups):
    assert parse_remat(text, 4) == tuple(Remat(*group) for group in groups)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("some", "choose none, full, dots"),
        ("full; none", "'full' is not a number of layers and a policy"),
        ("3 full; 3 none", "groups of 3 \\+ 3 layers are 6, the model has 4"),
        ("0 full; 4 none", "groups of 0"),
        ("save(atended)", "no activation is called 'atended'; choose among residual"),
        ("save(mlp) offload(mlp)", "'mlp' is to be saved and offloaded"),
        ("", "not a number of layers and a policy"),
    ],
)
def test_what_cannot_be_read_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        TransformerConfig(**SIZES, remat=text)


def test_groups_are_whole_units_of_the_scan():
    with pytest.raises(ValueError, match="a group of 1 layers is not a multiple of moe.every=2"):
        TransformerConfig(**SIZES, mlp="routed", moe=MoEConfig(every=2), remat="1 full; 3 none")


def gradients(loss, params):
    (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, TOKENS, jax.random.key(0))
    return value, grads


WAYS = ["save(attended+gate_up)", "offload(residual)", "1 full; 2 offload(qkv) save(mlp); 1 none"]


@pytest.fixture(scope="module")
def reference():
    model = Decoder(TransformerConfig(**SIZES))
    params = drawn(model, TOKENS["tokens"][:, :-1])
    return params, gradients(lm_loss(model), params)


@pytest.mark.long
@pytest.mark.parametrize(
    ("plan", "remat"),
    [
        ("fsdp=2, tp=2", WAYS[2]),
        pytest.param("", WAYS[2], marks=pytest.mark.slow),
        *(pytest.param(plan, way, marks=pytest.mark.slow) for plan in ("", "fsdp=2, tp=2") for way in WAYS[:2]),
    ],
)
def test_gradients_are_those_of_keeping_everything(reference, remat, plan):
    params, expected = reference
    config = TransformerConfig(**SIZES, remat=remat)
    if plan:
        loss = make_split_loss(ShardedDecoder(config, Plan(plan)), make_mesh(Plan(plan), jax.devices()[:4]))
    else:
        loss = lm_loss(Decoder(config))
    found = gradients(loss, params)
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=1e-6)


def test_unrolled_layers_take_their_groups_too(reference):
    _, (value, expected) = reference
    config = TransformerConfig(**SIZES, remat=WAYS[2], scan=False)
    params = reference[0]
    blocks = {f"blocks_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(4)}
    rest = {name: leaf for name, leaf in params.items() if name != "blocks"}
    found, grads = gradients(lm_loss(Decoder(config)), rest | blocks)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    layers = [grads.pop(f"blocks_{i}") for i in range(4)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    chex.assert_trees_all_close(grads | {"blocks": stacked}, expected, rtol=2e-5, atol=1e-6)


def test_bytes_by_name():
    config = TransformerConfig(vocab_size=32, layers=1, width=64, heads=4, kv_heads=2, ff=128, dtype="bfloat16")
    stream = 128 * 64 * 2
    sizes = {"residual": 1, "qkv": 2, "attended": 1, "attention": 1, "gate_up": 4, "mlp": 1}
    assert tuple(sizes) == NAMES
    positions = 128 * 4  # int32, one a token
    for name, size in sizes.items():
        size *= name != "mlp"  # nothing in the backward pass of a sum needs its terms
        kept = saved_per_row(config, Plan(""), 128, Remat(1, "names", offloaded=(name,)))
        assert kept.host == size * stream, name
        assert kept.fixed == positions and kept.device == (0 if name == "residual" else stream), name  # the input
        if name not in ("residual", "gate_up", "mlp"):
            continue
        saved = saved_per_row(config, Plan(""), 128, Remat(1, "names", saved=(name,)))
        assert (saved.host, saved.fixed, saved.device) == (0, positions, kept.device + kept.host)
