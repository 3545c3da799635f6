"""The settings of serving and of generating text, every one with its default and its meaning."""

from dataclasses import dataclass

from tessera.infra.schema import Group, Schema
from tessera.serving.load import DraftConfig, SourceConfig
from tessera.serving.programs import ServeConfig
from tessera.serving.requests import LARGEST, OutOfRange, Sampling, check_whole, is_number


@dataclass(frozen=True)
class AppConfig:
    """What the server promises and refuses.

    Attributes:
      model: name of the model in the API.
      api_key: that requests must bring; "" asks for none.
      timeout: seconds a request may take, waiting included.
      max_tokens: tokens drawn where a request does not say.
      max_choices: choices (prompts times n) of one HTTP request at most.
      max_body: bytes of a request at most.
      patience: seconds that running requests get from SIGTERM or SIGINT on.
      slow: seconds that a client may take to send a request's head, or its body, or to accept a part of the answer.
      hosts: names that requests may use for this server where no key is asked for, beside localhost and addresses.
      warm_up: compile the programs of all prompt lengths before the first request.
    """

    model: str = "tessera"
    api_key: str = ""
    timeout: float = 300.0
    max_tokens: int = 64
    max_choices: int = 16
    max_body: int = 2**20
    patience: float = 10.0
    slow: float = 30.0
    hosts: tuple[str, ...] = ()
    warm_up: bool = True

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_choices", "max_body"):
            check_whole(name, getattr(self, name), 1, LARGEST)
        for name in ("timeout", "patience", "slow"):
            if not (is_number(getattr(self, name)) and getattr(self, name) >= 0):
                raise OutOfRange(name, getattr(self, name), "a number of seconds, 0 or more")


@dataclass(frozen=True)
class ServeSettings:
    """What stands at the top of a server's config.

    Attributes:
      plan: how the work is split over devices, like "tp=4, dp=2"; "" is one device. The other devices stay idle.
      queue: requests that may wait for a slot.
      prefix_cache: a prompt that begins like a text that runs, or has ended and is still in the KV cache, takes the
        tokens they share from there, if they are so many; 0 reads every prompt whole.
      batch_invariant: a request's tokens and log-probabilities are the same bits whatever its neighbors: without the
        prefix cache, and with slots of their own (`sizes.pages` 0).
      adapters: LoRA adapters of `peft` beside the model (multi-LoRA), NAME=DIRECTORY each; a request to the server asks
        for one as its model, `tessera generate` by `sampling.adapter`. (`model.adapter` merges one into the model.)
      prompt: text to continue, for `tessera generate`.
      host: address to listen on; the default is reachable from this machine only.
      port: to listen on; 0 takes a free one.
      api_key_variable: environment variable with the API key; where it is not set, no key is asked for.
    """

    plan: str = ""
    queue: int = 64
    prefix_cache: int = 16
    batch_invariant: bool = False
    adapters: tuple[str, ...] = ()
    prompt: str = "def "
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_variable: str = "TESSERA_API_KEY"


SCHEMA = Schema(
    ServeSettings,
    model=SourceConfig,
    draft=DraftConfig,
    sizes=ServeConfig,
    sampling=Group(Sampling, without=("top_logprobs", "prompt_logprobs")),
    app=Group(AppConfig, without=("api_key",)),
)
