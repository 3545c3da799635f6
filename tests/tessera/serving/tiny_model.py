"""The small decoder that the tests of serving share, adapters of it, and programs for both."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from sharding.plan import Plan
from tessera.lm import lora
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.serving.engine import Engine
from tessera.serving.multi_lora import ADAPTED
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


LORA = {  # of other ranks, kernels and scales
    "A": lora.LoRAConfig(rank=2, alpha=3.0, targets="/(query|value|output)/kernel$"),
    "B": lora.LoRAConfig(rank=5, alpha=2.0, targets=ADAPTED, rank_stabilized=True),
}


@cache
def adapters(name, config=CONFIG):
    """Random ones, so large that every text differs from the base's."""
    made = lora.initialize(weights(config), LORA[name], key=jax.random.key(ord(name)))
    rng = np.random.default_rng(ord(name))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.4).astype(np.float32), made)


@cache
def merged(name, config=CONFIG):
    """Weights with an adapter merged in; "" is the base's."""
    return lora.apply(weights(config), adapters(name, config), LORA[name]) if name else weights(config)


@cache
def adapted_programs(sizes=SIZES, config=CONFIG, axes="", change=lambda params: params):
    stacked = lora.stack([(adapters(name, config), LORA[name]) for name in LORA])
    params, served = serve({**change(weights(config)), "adapters": stacked}, config, Plan(axes))
    made = make_programs(served, sizes)
    return made, made.place(params)


def adapted_engine(sizes=SIZES, queue=64, config=CONFIG, axes="", **options):
    """An engine with the adapters A and B."""
    made, params = adapted_programs(sizes, config, axes)
    return Engine(made, params, queue, adapters=tuple(LORA), **options)


def logits(tokens, params=None, config=CONFIG):
    """Logits [N, V] of what follows each token, of the decoder without a cache."""
    padded = np.zeros((1, SIZES.length), np.int32)
    padded[0, : len(tokens)] = tokens
    params = weights() if params is None else params
    return np.asarray(_decode(config)({"params": params}, padded), np.float64)[0, : len(tokens)]


def logprobs(tokens, params=None, config=CONFIG):
    """Log-probabilities [N, V] of what follows each token, in float64."""
    found = logits(tokens, params, config)
    found -= found.max(-1, keepdims=True)
    return found - np.log(np.exp(found).sum(-1, keepdims=True))


@cache
def _decode(config):
    return jax.jit(Decoder(replace(config, dtype="float32")).apply)
