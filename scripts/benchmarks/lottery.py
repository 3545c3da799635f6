"""Training iterations of tickets: stacks by `lax.map` and `vmap`, beside the same masked step in PyTorch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lottery import masks as masks_lib
from scripts.benchmarks.timing import Contest, Row
from tessera.data.images import Images, ImageSplits
from tessera.infra.schema import Schema
from tessera.models.registry import lenet
from tessera.models.vision import MLPConfig
from tessera.optim.optimizer import OptimizerConfig, make_optimizer
from tessera.tickets.train import TicketConfig, make_programs

BASELINE = "torch, fused Adam, same masked step"


@dataclass(frozen=True)
class LotteryBenchmark:
    """Masked training of LeNet.

    Attributes:
      suite: the benchmark's name.
      cores: that the process may use; 0 is all.
      lr: learning rate of Adam.
      batch_size: images per step.
      steps: of a call.
      rounds: that are counted.
      tickets: networks trained at once, one contestant each.
      density: of the masks.
      inputs: pixels of an image.
      images: in memory.
      hidden: hidden units.
    """

    suite: str = "lottery"
    cores: int = 1
    lr: float = 1.2e-3
    batch_size: int = 60
    steps: int = 300
    rounds: int = 7
    tickets: tuple[int, ...] = (1, 5, 20)
    density: float = 0.2
    inputs: int = 784
    images: int = 20_000
    hidden: tuple[int, ...] = (300, 100)


SCHEMA = Schema(LotteryBenchmark)


def rows(config) -> Iterator[Row]:
    """Iterations per second and ticket."""
    splits = synthetic(config.images, config.inputs)
    index = np.random.default_rng(1).integers(0, config.images, (config.steps, config.batch_size)).astype(np.int32)
    contestants: dict[str, Callable[[], object]] = {}
    work = {}
    for tickets in config.tickets:
        for stack in ("map", "vmap"):
            name = f"tessera, {stack}, {tickets} ticket(s)"
            contestants[name] = train_stack(splits, index, tickets=tickets, stack=stack, config=config)
            work[name] = float(config.steps * tickets)
    contestants |= torch_contestants(splits, index, config)
    work |= {name: float(config.steps) for name in contestants if name not in work}
    yield from Contest("masked LeNet, iterations", contestants, BASELINE, work, config.rounds).rows()


def torch_contestants(splits: ImageSplits, index: np.ndarray, config) -> dict[str, Callable[[], object]]:
    """The same in PyTorch, masked and not; none where it is not installed (extra `baselines`)."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return {}
    from scripts.benchmarks.torch_lenet import lenet_loop

    x, y = splits.train.images.reshape(config.images, -1), splits.train.labels
    return {
        name: lenet_loop(x, y, index, hidden=config.hidden, lr=config.lr, density=density)
        for name, density in ((BASELINE, config.density), ("torch, fused Adam, no masks", None))
    }


def synthetic(count: int, inputs: int) -> ImageSplits:
    """Random pixels and labels: speed does not depend on what a picture shows. Evaluation sets hold one image."""
    rng = np.random.default_rng(0)

    def images(n):
        return Images(rng.random((n, inputs, 1, 1), np.float32), rng.integers(0, 10, n).astype(np.int32))

    return ImageSplits(images(count), images(1), images(1), 10)


def train_stack(splits: ImageSplits, index: np.ndarray, *, tickets: int, stack: str, config) -> Callable[[], object]:
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
