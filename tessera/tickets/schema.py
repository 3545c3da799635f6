"""The settings of ticket searches, every one with its default and its meaning."""

from dataclasses import dataclass
from typing import Any

from lottery.search_config import SearchConfig
from tessera.data.images import ImageConfig
from tessera.data.windows import WindowConfig
from tessera.infra.schema import Choice, Group, Schema
from tessera.models.registry import CONV, NETWORKS
from tessera.optim.optimizer import OptimizerConfig
from tessera.tickets.train import TicketConfig


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


DATA = Choice(
    "kind",
    {"images": Group(ImageConfig), "text": Group(WindowConfig)},
    "images",
    "what the data are: images with labels, or windows of text.",
)
MODEL = Choice(
    "name",
    {name: Group(cls, without=(size,), defaults=CONV.get(name, {})) for name, (cls, size, _) in NETWORKS.items()},
    "lenet",
    "network, a name in `tessera.models.registry.NETWORKS`.",
)
GROUPS: dict[str, Any] = {
    "data": DATA,
    "model": MODEL,
    "optimizer": Group(OptimizerConfig, without=("lr", "steps"), defaults={"name": "adam"}),
    "train": Group(TicketConfig, without=("rewind",), defaults={"steps": "1000it"}, hints={"steps": str}),
    "search": Group(
        SearchConfig,
        without=("seeds", "layouts"),
        defaults={"rewind": "0it", "output": "^output/"},
        hints={"rewind": str},
    ),
    "score_inputs": Group(ScoreInputsConfig),
    "transfer": Group(TransferSource),
}
SCHEMA = Schema(SearchSettings, **GROUPS)
