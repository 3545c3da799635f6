"""The settings of a sweep over model sizes, every one with its default and its meaning."""

from scaling.sweeps.adaptive import PlannerConfig
from scaling.sweeps.executors import ExecutorConfig
from scaling.sweeps.plan import Family, PlanConfig
from tessera.data.text import TextConfig
from tessera.infra.schema import Group, Schema
from tessera.sweeps.programs import TrialConfig
from tessera.sweeps.report import ReportConfig

SCHEMA = Schema(
    None,
    family=Group(Family, without=("vocab",)),
    plan=PlanConfig,
    train=TrialConfig,
    data=TextConfig,
    engine=ExecutorConfig,
    planner=PlannerConfig,
    report=ReportConfig,
)
