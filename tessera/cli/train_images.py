"""Train on pictures larger than memory: `tessera train-images --config=images --config.data.name=DIR --workdir=RUN`."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from tessera.cli.main import Invocation
from tessera.data.image_stream import AugmentConfig, held_out_images, stream_images
from tessera.data.images import class_folders, mode_of
from tessera.infra.checkpoint import CheckpointConfig, CheckpointDamaged, CheckpointMismatch, Checkpoints
from tessera.infra.config import ConfigError, build, check_seeds, checked
from tessera.infra.logger import Logger
from tessera.infra.schema import Choice, Group, Schema
from tessera.infra.workdir import WorkdirMismatch, hold, resolve
from tessera.lm.run import data_parallel, dividing
from tessera.lm.schema import LogConfig
from tessera.loop import Interrupted, LoopConfig, NonFiniteLoss, evaluate, train
from tessera.losses import cross_entropy
from tessera.models.registry import CONV, NETWORKS, STATISTICS, make_network
from tessera.optim.optimizer import OptimizerConfig, eval_params, learning_rate, make_optimizer
from tessera.step import StepConfig, init_state, make_train_step
from tessera.tickets.train import make_loss, with_statistics


@dataclass(frozen=True)
class ImageSettings:
    """What stands at the top of the config.

    Attributes:
      seed: of the initial weights, the order of the pictures and their augmentation.
      steps: training steps, one batch each.
      batch_size: pictures per step over all devices.
      lr: peak learning rate.
    """

    seed: int = 0
    steps: int = 1000
    batch_size: int = 128
    lr: float = 1e-3


@dataclass(frozen=True)
class FolderConfig:
    """Which pictures.

    Attributes:
      name: directory of class folders: CLASS/*.png, or train/CLASS/*.png and test/CLASS/*.png.
      test: share of the pictures that is the test set where there is no folder of it.
      workers: threads that decode and augment.
    """

    name: str = ""
    test: float = 0.2
    workers: int = 8


@dataclass(frozen=True)
class EveryConfig:
    """When the network is evaluated on the test set.

    Attributes:
      every: steps between two evaluations; 0 evaluates after the last step only.
    """

    every: int = 0


IMAGES = {name: one for name, one in NETWORKS.items() if name != "decoder"}
SCHEMA = Schema(
    ImageSettings,
    data=FolderConfig,
    augment=AugmentConfig,
    model=Choice(
        "name",
        {name: Group(cls, without=(size,), defaults=CONV.get(name, {})) for name, (cls, size, _) in IMAGES.items()},
        "resnet20",
        "network, a name in `tessera.models.registry.NETWORKS`.",
    ),
    optimizer=Group(OptimizerConfig, without=("lr", "steps")),
    step=Group(StepConfig, without=("ema", "noise_scale")),
    checkpoint=CheckpointConfig,
    log=LogConfig,
    eval=EveryConfig,
)
ERRORS = (WorkdirMismatch, CheckpointDamaged, CheckpointMismatch, NonFiniteLoss, ImportError)


def main(invocation: Invocation) -> int:
    """Config -> pictures, network, step -> training loop -> loss and accuracy on the test set. Returns the status."""
    c, first_process = invocation.config, jax.process_index() == 0
    check_seeds(c.to_dict())
    saving = build(CheckpointConfig, c.checkpoint, "config.checkpoint")
    augment = build(AugmentConfig, c.augment, "config.augment")
    if c.steps < 1 or c.batch_size < 1:
        raise ConfigError(f"config.steps={c.steps} and config.batch_size={c.batch_size} must be at least 1")
    optimizer = build(OptimizerConfig, c.optimizer, "config.optimizer", lr=c.lr, steps=c.steps)
    step_config = build(StepConfig, c.step, "config.step", ema=optimizer.ema)
    loop = checked("config", LoopConfig, c.steps, c.log.every, c.eval.every)
    if not c.data.name:
        raise ConfigError("config.data.name: a directory of class folders is needed (CLASS/*.png)")
    files = checked("config.data", class_folders, c.data.name, c.data.test)
    if not files.test:
        raise ConfigError(f"config.data.test={c.data.test}: no picture of {c.data.name} would be left to test on")
    channels = 1 if mode_of(files.train[0][0]) == "L" else 3
    example = jnp.zeros((1, augment.size, augment.size, channels))
    network = make_network(c.model, example, len(files.classes))
    placement = checked("config", lambda: data_parallel(dividing(jax.devices(), c.batch_size)))
    index, count = placement.share()
    if c.batch_size % count:
        raise ConfigError(f"config.batch_size={c.batch_size}: {count} processes share a batch; a multiple is needed")
    init_key, step_key = jax.random.split(jax.random.key(c.seed))
    tx = checked("config.optimizer", make_optimizer, optimizer)
    inner = make_train_step(make_loss(network), tx, step_config, adjust=with_statistics)

    def step_fn(state: Any, batch: Any, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        state, metrics = inner(state, (batch["images"], batch["labels"]), key)
        return state, {name: value for name, value in metrics.items() if name != STATISTICS}

    @jax.jit
    def eval_step(params: Any, batch: Any) -> dict[str, jax.Array]:
        _, metrics = cross_entropy(network.apply(params, batch["images"]), batch["labels"], batch["weights"])
        return {"loss": metrics["cross_entropy"]} | {name: metrics[name] for name in ("accuracy", "weight")}

    share: dict[str, Any] = {"batch_size": c.batch_size, "process_index": index, "process_count": count}
    share |= {"workers": c.data.workers}

    def eval_fn(state: Any) -> dict[str, float]:
        params = eval_params(optimizer, state.opt_state, state.params) if state.ema is None else state.ema

        def batches() -> Iterator[tuple[Any, float]]:
            for batch in held_out_images(files.test, augment, **share):
                yield placement.place({name: value for name, value in batch.items() if name != "ids"}), 1.0

        return evaluate(eval_step, params, batches())

    workdir = invocation.prepare({**resolve(c), "pictures": len(files.train), "classes": files.classes}, whole=True)
    if first_process:
        sizes = f"{len(files.train):,} pictures to train on, {len(files.test):,} to test on"
        print(f"{sizes}, {len(files.classes)} classes", file=sys.stderr, flush=True)
    logger = Logger(workdir, tensorboard=c.log.tensorboard, wandb=c.log.wandb, active=first_process)
    with hold(workdir), logger, Checkpoints(workdir / "checkpoints", saving) as checkpoints:
        try:
            result = train(
                step_fn,
                jax.jit(lambda: init_state(network.init(init_key), tx, step_config), out_shardings=placement.state),
                stream_images(files.train, augment, seed=c.seed, **share),
                loop,
                key=step_key,
                logger=logger,
                checkpoints=checkpoints,
                evaluate=eval_fn,
                schedule=learning_rate(optimizer),
                place=placement.place,
            )
        except Interrupted as stop:
            Console(stderr=True).print(f"{stop} ({workdir})", soft_wrap=True)
            return 128 + stop.signum
    if first_process:
        found = result.evaluation
        Console().print(f"{workdir}: test loss {found['loss']:.4f}, test accuracy {found['accuracy']:.4f}")
    return 0
