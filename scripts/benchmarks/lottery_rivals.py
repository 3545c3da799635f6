"""The lottery's side of the benchmark: a stack of masked LeNets training on random pixels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lottery import masks as masks_lib
from tessera.data.images import Images, ImageSplits
from tessera.models.registry import lenet
from tessera.models.vision import MLPConfig
from tessera.optim.optimizer import OptimizerConfig, make_optimizer
from tessera.tickets.train import TicketConfig, make_programs


def synthetic(count: int, inputs: int) -> ImageSplits:
    """Random pixels and labels: speed does not depend on what a picture shows. Evaluation sets hold one image."""
    rng = np.random.default_rng(0)

    def images(n):
        return Images(rng.random((n, inputs, 1, 1), np.float32), rng.integers(0, 10, n).astype(np.int32))

    return ImageSplits(images(count), images(1), images(1), 10)


def stack_rival(splits: ImageSplits, index: np.ndarray, *, tickets: int, stack: str, config) -> Callable[[], object]:
    """A function that trains `tickets` masked networks for one block of steps and waits for the result."""
    network = lenet(MLPConfig(hidden=tuple(config.hidden)), jnp.zeros((1, config.inputs)))
    optimizer = make_optimizer(OptimizerConfig(name="adam", lr=config.lr))
    ticket = TicketConfig(steps=len(index), batch_size=index.shape[1], stack=stack)

    programs = make_programs(splits, network, optimizer, ticket)
    keys = jax.random.split(jax.random.key(0), tickets)
    params = jax.vmap(network.init)(keys)
    which = masks_lib.prunable(jax.tree.map(lambda x: x[0], params))
    density = jax.tree.map(lambda live: config.density if live else 1.0, which)
    masks = jax.tree.map(lambda p, d: jax.random.uniform(keys[0], p.shape) < d, params, density)
    state = programs.init(masks_lib.apply(params, masks), masks)
    blocks = np.broadcast_to(index, (tickets, *index.shape))

    def run():
        nonlocal state
        state, _ = programs.advance(state, masks, blocks)
        jax.block_until_ready(state)

    return run
