"""The small decoder that the tests of serving share, and programs for it."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp

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


def engine(sizes=SIZES, queue=64, axes=""):
    made, params = programs(sizes, CONFIG, axes)
    return Engine(made, params, queue)
