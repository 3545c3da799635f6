"""The settings of ticket searches and of the studies on them, every one with its default and its meaning."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lottery.levels import SearchConfig
from tessera.data.images import ImageConfig
from tessera.data.windows import WindowConfig
from tessera.infra.errors import ConfigError, unknown
from tessera.infra.schema import Changes, Choice, Group, Schema
from tessera.models.registry import CONV, NETWORKS
from tessera.optim.optimizer import OptimizerConfig
from tessera.tickets.programs import TicketConfig
from tessera.tickets.setup import EvidenceConfig
from tessera.tickets.studies.ablations import AblationConfig
from tessera.tickets.studies.distribution import DistributionConfig
from tessera.tickets.studies.instability import InstabilityConfig
from tessera.tickets.studies.population import PopulationConfig
from tessera.tickets.studies.rewinding import RewindingConfig
from tessera.tickets.studies.sources import SourcesConfig
from tessera.tickets.studies.sparse_training import SparseConfig
from tessera.tickets.studies.transfer import TransferConfig


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
    "search": Group(SearchConfig, without=("seeds",), defaults={"rewind": "0it"}, hints={"rewind": str}),
    "evidence": Group(EvidenceConfig),
    "transfer": Group(TransferSource),
}
SCHEMA = Schema(SearchSettings, **GROUPS)

STUDIES: dict[str, type] = {
    "ablations": AblationConfig,
    "distribution": DistributionConfig,
    "instability": InstabilityConfig,
    "population": PopulationConfig,
    "rewinding": RewindingConfig,
    "sources": SourcesConfig,
    "sparse_training": SparseConfig,
    "transfer": TransferConfig,
}


@dataclass(frozen=True)
class StudySettings(SearchSettings):
    """What stands at the top of a study's config.

    Attributes:
      name: the study, which picks the settings of the group `study`.
    """

    name: str = "instability"


def _study(given: Mapping[str, Any]) -> Group:
    name = given.get("name", StudySettings.name)
    if name not in STUDIES:
        raise ConfigError(unknown(f"config.name={name!r}", str(name), STUDIES))
    return Group(STUDIES[name])


STUDY_SCHEMA = Schema(
    StudySettings,
    **GROUPS,
    study=_study,
    sources=Changes(SCHEMA, "what one of the other searches changes (study `sources`)."),
)
