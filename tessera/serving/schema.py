"""The settings of serving and of generating text, every one with its default and its meaning."""

from dataclasses import dataclass

from tessera.infra.schema import Group, Schema
from tessera.serving.app import AppConfig
from tessera.serving.load import DraftConfig, SourceConfig
from tessera.serving.programs import ServeConfig
from tessera.serving.requests import Sampling


@dataclass(frozen=True)
class ServeSettings:
    """What stands at the top of a server's config.

    Attributes:
      plan: how the work is split over devices, like "tp=4, dp=2"; "" is one device. The other devices stay idle.
      queue: requests that may wait for a slot.
      prompt: text to continue, for `tessera generate`.
      host: address to listen on; the default is reachable from this machine only.
      port: to listen on.
      api_key_variable: environment variable with the API key; where it is not set, no key is asked for.
    """

    plan: str = ""
    queue: int = 64
    prompt: str = "def "
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_variable: str = "TESSERA_API_KEY"


SCHEMA = Schema(
    ServeSettings,
    model=SourceConfig,
    draft=DraftConfig,
    sizes=ServeConfig,
    sampling=Sampling,
    app=Group(AppConfig, without=("api_key",)),
)
