"""The settings of the studies on tickets, every one with its default and its meaning."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tessera.infra.errors import ConfigError, unknown
from tessera.infra.schema import Changes, Group, Schema
from tessera.tickets.setup import GROUPS, SCHEMA, SearchSettings
from tessera.tickets.studies.ablations import AblationConfig
from tessera.tickets.studies.distribution import DistributionConfig
from tessera.tickets.studies.instability import InstabilityConfig
from tessera.tickets.studies.movement import MovementConfig
from tessera.tickets.studies.population import PopulationConfig
from tessera.tickets.studies.reasons import ReasonsConfig
from tessera.tickets.studies.reliability import ReliabilityConfig
from tessera.tickets.studies.rewinding import RewindingConfig
from tessera.tickets.studies.sources import SourcesConfig
from tessera.tickets.studies.sparse_training import SparseConfig
from tessera.tickets.studies.strong import StrongConfig
from tessera.tickets.studies.transfer import TransferConfig

STUDIES: dict[str, type] = {
    "ablations": AblationConfig,
    "distribution": DistributionConfig,
    "instability": InstabilityConfig,
    "movement": MovementConfig,
    "population": PopulationConfig,
    "reasons": ReasonsConfig,
    "reliability": ReliabilityConfig,
    "rewinding": RewindingConfig,
    "sources": SourcesConfig,
    "sparse_training": SparseConfig,
    "strong": StrongConfig,
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
