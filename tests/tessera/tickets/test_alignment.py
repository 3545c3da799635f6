"""A shuffled decoder is put back by what its units say."""

import jax
import numpy as np
import pytest

from lottery import align
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.tickets.alignment import decoder_activations

CONFIG = TransformerConfig(vocab_size=29, layers=2, width=16, heads=4, kv_heads=2, ff=10)


@pytest.mark.long
def test_activations_put_a_shuffled_decoder_back():
    tokens = jax.random.randint(jax.random.key(0), (4, 12), 0, 29)
    params = Decoder(CONFIG).init(jax.random.key(1), tokens)["params"]
    spec, opened = align.decoder_spec(2), align.open_decoder(params)
    generator = np.random.default_rng(0)
    order = {name: generator.permutation(size) for name, size in align.sizes(opened, spec).items()}
    shuffled = align.permute(opened, order, spec)
    here = decoder_activations(params, tokens, CONFIG)
    there = decoder_activations(jax.tree.map(np.asarray, align.close_decoder(shuffled)), tokens, CONFIG)
    assert set(here) == set(order)
    for i, x in enumerate(here["residual"].reshape(2, -1, 16)):
        gate, up = (x @ np.asarray(params["blocks"]["mlp"][name]["kernel"][i]) for name in ("gate", "up"))
        np.testing.assert_allclose(here[f"ff_{i}"], gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-6)
    found = align.match_activations(here, there)
    back = align.permute(shuffled, found, spec)
    jax.tree.map(np.testing.assert_array_equal, back, opened)


def test_other_decoders_are_refused():
    with pytest.raises(ValueError, match="scan=False"):
        decoder_activations({}, jax.numpy.zeros((1, 2), int), TransformerConfig(5, 1, 4, 1, head_dim=4, scan=False))
