"""The settings of a language model's training, every one with its default and its meaning."""

from dataclasses import dataclass

from sharding.plan import Plan
from tessera.data.text import TextConfig
from tessera.infra.checkpoint import CheckpointConfig
from tessera.infra.schema import Group, Schema
from tessera.lm.distill import DistillConfig
from tessera.lm.lora import LoRAConfig
from tessera.lm.warm_start import StartConfig
from tessera.models.transformer import TransformerConfig
from tessera.optim.optimizer import OptimizerConfig
from tessera.step import StepConfig


@dataclass(frozen=True)
class LMSettings:
    """What stands at the top of a language model's config.

    Attributes:
      seed: of the initial weights, the order of the data and dropout.
      steps: training steps, one batch each.
      batch_size: sequences per step over all devices.
      length: tokens per sequence.
      rampup_batch_size: batch-size ramp, (start, increment, samples) as Megatron-LM has it: batches begin with `start`
        sequences and grow by `increment`, to batch_size after so many sequences; () has none.
      lr: peak learning rate.
      z_loss: weight of the squared log-partition function (z-loss, PaLM, Chowdhery et al. 2022); 0 is off.
      loss_chunk_size: tokens of a device whose logits exist at once (chunked linear cross-entropy, as in Liger Kernel),
        so that memory does not grow with tokens x vocabulary; 0 computes all of them at once.
      plan: how the work is split over devices, like "fsdp=4, tp=2"; "" is data parallelism over the devices there are.
    """

    seed: int = 0
    steps: int = 400
    batch_size: int = 16
    length: int = 128
    rampup_batch_size: tuple[int, ...] = ()
    lr: float = 1e-3
    z_loss: float = 1e-4
    loss_chunk_size: int = 1024
    plan: str = ""


@dataclass(frozen=True)
class LogConfig:
    """What is logged, beside `metrics.jsonl`.

    Attributes:
      every: steps between two rows.
      tensorboard: also write TensorBoard events (extra `tensorboard`).
      wandb: also log to Weights & Biases (extra `wandb`).
      hardware: accelerator whose peak MFU is a share of, such as "v5p" or "H100"; "auto" goes by the devices there are,
        which on CPUs are timed once, "none" logs no MFU.
    """

    every: int = 10
    tensorboard: bool = False
    wandb: bool = False
    hardware: str = "auto"


@dataclass(frozen=True)
class EvalConfig:
    """When and on how much held-out text the model is evaluated.

    Attributes:
      every: steps between two evaluations; 0 evaluates after the last step only.
      batches: batches of one evaluation, of every text.
      texts: further texts that are scored in every evaluation, each a name, file or glob as `data.name` has them; a row
        gets their nats per token and bits per byte by name.
      sample: tokens that the trained model writes after the beginning of the validation text, for the report; 0: none.
        At most what is left of `length` after the prompt, which is half of it or 64 tokens.
    """

    every: int = 0
    batches: int = 16
    texts: tuple[str, ...] = ()
    sample: int = 64


SCHEMA = Schema(
    LMSettings,
    sharding=Group(Plan, without=("axes",)),
    start=StartConfig,
    lora=LoRAConfig,
    distill=DistillConfig,
    data=TextConfig,
    model=Group(TransformerConfig, without=("vocab_size",)),
    optimizer=Group(OptimizerConfig, without=("lr", "steps")),
    step=Group(StepConfig, without=("ema",)),
    checkpoint=CheckpointConfig,
    log=LogConfig,
    eval=EvalConfig,
)
