"""A ticket search from its config: settings, data, network, optimizer, compiled programs, and its levels on disk."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from lottery import criteria, imp, transfer
from lottery.imp import Row, level_like
from tessera.data.images import ImageConfig, load_images
from tessera.data.windows import WindowConfig, load_windows
from tessera.infra.artifacts import ArtifactStore, load_extra, load_tree, save_tree
from tessera.infra.config import ConfigError, build, checked, unknown
from tessera.infra.remote import local
from tessera.infra.schema import Choice, Group, Schema
from tessera.infra.workdir import read_settings
from tessera.models.registry import CONV, NETWORKS, Network, make_network
from tessera.optim.optimizer import OptimizerConfig, make_optimizer, parse_steps
from tessera.tickets.train import Programs, Splits, TicketConfig, make_loss, make_programs, train_stack

# config.data.kind -> (dataclass of the other settings, loader).
DATA: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "images": (ImageConfig, load_images),
    "text": (WindowConfig, load_windows),
}


@dataclass(frozen=True)
class SearchSettings:
    """What stands at the top of a search's config.

    Attributes:
      seeds: one independent repetition each: initialization, data order, random masks.
      lr: peak learning rate.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    lr: float = 1e-3


@dataclass(frozen=True)
class ScoreInputsConfig:
    """Training examples that scores like SNIP look at, the first of a fixed random order.

    Attributes:
      batches: batches of them.
      batch_size: examples of one.
      normalize: SynFlow's matrices are rescaled first; switch it off for networks with skips (resnet20, vit, decoder).
    """

    batches: int = 5
    batch_size: int = 100
    normalize: bool = True

    def __post_init__(self):
        if self.batches < 1 or self.batch_size < 1:
            raise ValueError(f"batches={self.batches} and batch_size={self.batch_size} must be at least 1")


@dataclass(frozen=True)
class TransferSource:
    """Where the masks of the arm "transfer" come from.

    Attributes:
      workdir: of the finished search whose masks are taken; "" where no arm needs one.
      arm: its arm.
      shift: seeds on: seed i gets the mask of the other search's seed number i + shift.
    """

    workdir: str = ""
    arm: str = "ticket"
    shift: int = 0


GROUPS: dict[str, Any] = {
    "data": Choice(
        "kind",
        {kind: Group(cls) for kind, (cls, _) in DATA.items()},
        "images",
        "what the data are: images with labels, or windows of text.",
    ),
    "model": Choice(
        "name",
        {name: Group(cls, without=(size,), defaults=CONV.get(name, {})) for name, (cls, size, _) in NETWORKS.items()},
        "lenet",
        "network, a name in `tessera.models.registry.NETWORKS`.",
    ),
    "optimizer": Group(OptimizerConfig, without=("lr", "steps"), defaults={"name": "adam"}),
    "train": Group(TicketConfig, without=("rewind",), defaults={"steps": "1000it"}, hints={"steps": str}),
    "search": Group(
        imp.SearchConfig,
        without=("seeds", "layouts"),
        defaults={"rewind": "0it", "output": "^output/"},
        hints={"rewind": str},
    ),
    "score_inputs": Group(ScoreInputsConfig),
    "transfer": Group(TransferSource),
}
SCHEMA = Schema(SearchSettings, **GROUPS)


class FinishedLevels:
    """The finished levels `00/`, `01/`, ... of a search, which may be running: its directory is left as it is."""

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)

    def path(self, level: int) -> Path:
        """The directory of a finished level."""
        return self.directory / f"{level:02d}"

    def has(self, level: int) -> bool:
        """Whether the level is finished."""
        return self.path(level).is_dir()

    def load(self, level: int, like: PyTree) -> tuple[PyTree, list[Row]]:
        """The tree and rows of a finished level. Raises CheckpointDamaged if its files were altered."""
        return load_tree(self.path(level), like), load_extra(self.path(level))["rows"]


class LevelStore(FinishedLevels):
    """The levels of the search that this process runs; to look at another one use `FinishedLevels`.

    Under `directory`, `00/`, `01/`, ... are finished and `03.step1200/` is level 3 as it was after step 1200. Satisfies
    `lottery.imp.Store`. Every save is atomic, and a damaged artifact is reported with its path.
    """

    def load(self, level: int, like: PyTree) -> tuple[PyTree, list[Row]]:
        """As `FinishedLevels.load`; the states of a search killed while it finished the level are removed."""
        self.unfinished(level).clear()
        return super().load(level, like)

    def save(self, level: int, tree: PyTree, rows: list[Row]) -> None:
        """Write a finished level and remove the states saved while it was under way."""
        save_tree(self.path(level), tree, {"rows": rows})
        self.unfinished(level).clear()

    def unfinished(self, level: int) -> ArtifactStore:
        """The states of a level under way."""
        return ArtifactStore(self.directory, f"{level:02d}.step")


@dataclass(frozen=True)
class Setup:
    """The parts of a search; `size` is the number of training examples, `classes` of logits."""

    splits: Splits
    network: Network
    ticket: TicketConfig
    search: imp.SearchConfig
    optimizer: optax.GradientTransformationExtraArgs
    programs: Programs
    score_inputs: criteria.ScoreInputs
    size: int
    classes: int

    def train(
        self,
        starts: imp.Starts,
        unfinished: ArtifactStore | None = None,
        report: Callable[[int, dict], None] = lambda steps, row: None,
    ) -> imp.Trained:
        """Train a stack with the setup's schedule."""
        return train_stack(
            starts, self.programs, config=self.ticket, size=self.size, unfinished=unfinished, report=report
        )

    def loss(self, params: PyTree, batch: tuple[Array, Array]) -> Array:
        """Mean training cross-entropy of (inputs, labels), float32 []."""
        return make_loss(self.network)(params, batch)[0]

    def programs_for(
        self, optimizer: optax.GradientTransformation | None = None, network: Network | None = None, **options: Any
    ) -> Programs:
        """Compiled programs with another optimizer or network; `options` as of `make_programs`."""
        return make_programs(self.splits, network or self.network, optimizer or self.optimizer, self.ticket, **options)


def load_data(settings: Mapping[str, Any] | ConfigDict, path: str = "config.data") -> Any:
    """Splits from a config group: "kind" ("images" or "text") and the settings of that kind's dataclass."""
    options = dict(settings)
    kind = options.pop("kind", "images")
    if kind not in DATA:
        raise ConfigError(unknown(f"{path}.kind", str(kind), DATA))
    cls, load = DATA[kind]
    return checked(path, load, build(cls, options, path))


def make_setup(config: Any, splits: Any = None) -> Setup:
    """Build all parts from a `ConfigDict` as in `configs/lottery_digits.py`.

    Args:
      config: groups data, model, optimizer, train, search; seeds, lr; steps as `tessera.optim.optimizer.parse_steps`
        reads them; score_inputs, the examples that criteria like SNIP look at.
      splits: the data, if it has been loaded already.

    Raises:
      ConfigError: wrong settings, naming their path.
    """
    splits = load_data(config.data) if splits is None else splits
    for name in ("train", "validation", "test"):
        if not len(getattr(splits, name).labels):
            setting = "config.data.validation" if name == "validation" else "config.data"
            raise ConfigError(f"{setting}: no examples for {name}; at least 1 is needed")
    size = len(splits.train.labels)

    def steps(name: str, text: Any) -> int:
        return checked(name, parse_steps, text, steps_per_epoch=size // config.train.batch_size)

    rewind = steps("config.search.rewind", config.search.rewind)
    train = {**config.train, "steps": steps("config.train.steps", config.train.steps)}
    ticket = build(TicketConfig, train, "config.train", rewind=rewind)
    search = build(imp.SearchConfig, {**config.search, "rewind": rewind}, "config.search", seeds=tuple(config.seeds))
    settings = build(OptimizerConfig, config.optimizer, "config.optimizer", lr=config.lr, steps=ticket.steps)
    network = make_network(config.model, splits.train.images[:1], splits.num_classes)
    optimizer = checked("config.optimizer", make_optimizer, settings)
    if search.score == "movement":
        optimizer = optax.with_extra_args_support(optax.chain(criteria.track_movement(), optimizer))
    programs = make_programs(splits, network, optimizer, ticket)
    score_inputs = _score_inputs(network, splits, build(ScoreInputsConfig, config.score_inputs, "config.score_inputs"))
    return Setup(splits, network, ticket, search, optimizer, programs, score_inputs, size, splits.num_classes)


def _score_inputs(network: Network, splits: Any, config: ScoreInputsConfig) -> criteria.ScoreInputs:
    data = splits.train
    batch = min(config.batch_size, len(data.labels))
    count = min(config.batches, len(data.labels) // batch)
    index = np.random.default_rng(0).permutation(len(data.labels))[: count * batch].reshape(count, batch)
    return criteria.ScoreInputs(
        loss_fn=lambda params, pair: make_loss(network)(params, pair)[0],
        batches=(jnp.asarray(data.images[index]), jnp.asarray(data.labels[index])),
        apply_fn=network.apply,
        inputs=jnp.asarray(data.images[:1]),
        normalize=config.normalize,
    )


def starts_of(
    params: PyTree, masks: PyTree, seeds: Sequence[int], names: Sequence[str], start_step: int = 0
) -> imp.Starts:
    """A stack [S, ...] to train outside a search: `seeds` order the data, `names` appear in rows and messages."""
    return imp.Starts(
        params, masks, None, start_step, np.asarray(seeds, np.int32), tuple(zip(names, seeds, strict=True))
    )


def with_steps(setup: Setup, config: Any, **changes: Any) -> Setup:
    """The same setup with another schedule: `changes` are fields of `TicketConfig`; programs are made anew."""
    ticket = replace(setup.ticket, **changes)
    settings = build(OptimizerConfig, config.optimizer, "config.optimizer", lr=config.lr, steps=ticket.steps)
    optimizer = make_optimizer(settings)
    setup = replace(setup, ticket=ticket, optimizer=optimizer)
    return replace(setup, programs=setup.programs_for())


def init_stack(setup: Setup, seeds: Sequence[int], salt: int = 0) -> PyTree:
    """Initializations [S, ...], each a function of its seed and the salt."""
    keys = [jax.random.fold_in(jax.random.key(seed), salt) for seed in seeds]
    return jax.jit(jax.vmap(setup.network.init))(jnp.stack(keys))


def search_tickets(setup: Setup, store: Any, train_fn: Callable[..., imp.Trained], config: Any) -> imp.Result:
    """Run the setup's search, with masks from another search where the arm "transfer" asks for them.

    Args:
      setup: from `make_setup`. store, train_fn: see `lottery.imp.search`.
      config: its group `transfer` says where masks come from: {"workdir", "arm" (default "ticket"), "shift" (seeds
        on)}; masks of other widths are fitted by `lottery.transfer.resize`.
    """
    given = _given(setup, config.get("transfer", {})) if "transfer" in setup.search.arms else None
    return imp.search(
        setup.network.init,
        train_fn,
        store,
        setup.search,
        opt_init=jax.jit(setup.optimizer.init),
        score_inputs=setup.score_inputs,
        given=given,
    )


def _given(setup: Setup, config: Mapping[str, Any] | ConfigDict) -> Callable[[int], PyTree]:
    if not config.get("workdir"):
        raise ConfigError("config.transfer.workdir: the arm 'transfer' needs the workdir of a finished search")
    other = finished(config["workdir"], "config.transfer.workdir")
    like = jax.eval_shape(setup.network.init, jax.random.key(0))

    def masks(level: int) -> PyTree:
        tree, rows = other.level(level)
        mine = transfer.of_arm(tree["masks"], rows, config.get("arm", "ticket"))
        stack = transfer.by_seed(mine, setup.search.seeds, config.get("shift", 0))
        return jax.vmap(lambda mask: transfer.resize(mask, like))(stack)

    return masks


class Finished(NamedTuple):
    """A search that ran before: its setup, its settings and its levels."""

    setup: Setup
    config: ConfigDict
    store: FinishedLevels

    def level(self, level: int) -> tuple[PyTree, list[Row]]:
        """The tree and rows of a level.

        Raises:
          ValueError: the search has no such level, or has not finished it.
        """
        if not self.store.has(level):
            raise ValueError(f"{self.store.directory} has no finished level {level}")
        params = jax.eval_shape(self.setup.network.init, jax.random.key(0))
        keeps = self.setup.search.rewind_optimizer and level == 0
        opt_state = jax.eval_shape(self.setup.optimizer.init, params) if keeps else None
        return self.store.load(level, level_like(params, self.setup.search, level, opt_state))


def finished(workdir: str | Path, path: str = "workdir", splits: Any = None) -> Finished:
    """A search found by its directory.

    Raises:
      ConfigError: there is no search in it.
    """
    directory = local(workdir)
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{path}: {workdir} has no config.json; the workdir of a search is needed")
    config = ConfigDict(read_settings(directory))
    return Finished(make_setup(config, splits), config, FinishedLevels(directory / "levels"))
