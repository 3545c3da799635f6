"""The small decoder that the tests of serving share, and programs for it."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from sharding.plan import Plan
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.serving.engine import Engine
from tessera.serving.programs import ServeConfig, make_programs
from tessera.serving.served import serve

CONFIG = TransformerConfig(vocab_size=256, layers=2, width=16, heads=4, kv_heads=2, ff=16)
SIZES = ServeConfig(slots=4, length=64, chunk=16)


@cache
def weights(config=CONFIG):
    # Larger than at the start of training, so that the next token is not nearly uniform.
    config = replace(config, init_scale=2.0)
    return jax.jit(Decoder(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


@cache
def programs(sizes=SIZES, config=CONFIG, axes=""):
    params, served = serve(weights(config), config, Plan(axes))
    made = make_programs(served, sizes)
    return made, made.place(params)


def engine(sizes=SIZES, queue=64, axes="", **options):
    made, params = programs(sizes, CONFIG, axes)
    return Engine(made, params, queue, **options)


def logits(tokens):
    """Logits [N, V] of what follows each token, of the decoder without a cache."""
    padded = np.zeros((1, SIZES.length), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_decode({"params": weights()}, padded), np.float64)[0, : len(tokens)]


def logprobs(tokens):
    """Log-probabilities [N, V] of what follows each token, in float64."""
    found = logits(tokens)
    found -= found.max(-1, keepdims=True)
    return found - np.log(np.exp(found).sum(-1, keepdims=True))


_decode = jax.jit(Decoder(replace(CONFIG, dtype="float32")).apply)
