"""Parallelism plans: sizes of the mesh axes of data, ZeRO / FSDP, expert, context, tensor and pipeline parallelism."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from sharding.errors import PlanError, choice
from sharding.rules import Rules

MESH_AXES = ("pp", "dp", "fsdp", "ep", "cp", "tp")
"""Outermost first: neighbors along the last axes are the nearest devices."""

DATA_AXES = ("dp", "fsdp", "ep")
"""Axes that split the batch. Experts live on part of the data copies (Lepikhin et al. 2021, section 3.3)."""

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb_h1", "dualpipev")
CONTEXT = ("ring", "all_to_all")


@dataclass(frozen=True)
class Plan:
    """A parallelism plan, written in one line and checked when it is made.

    Attributes:
      axes: sizes of the mesh axes, like "dcn.dp=2, pp=4, fsdp=8, tp=4": pp pipeline, dp data, fsdp ZeRO / FSDP, ep
        expert, cp context, tp tensor parallelism. Absent axes have size 1; "" is one device. `dcn.` marks the part of
        an axis that crosses slices (or hosts) over the data-center network (DCN); the size of the axis is the product
        of both parts. One axis may be -1: the remaining devices (see `fill`).
      schedule: pipeline schedule, one of `SCHEDULES` (GPipe, 1F1B, interleaved 1F1B, ZB-H1, DualPipeV);
        only with pp > 1.
      microbatches: of the pipeline; 0 is the number of stages.
      virtual: chunks of layers per stage of the interleaved schedule (virtual pipeline stages); DualPipeV has 2.
      sequence: sequence parallelism, the residual stream split over tp along time (Korthikanti et al. 2022, 4.2.2).
      zero: ZeRO stage, what fsdp splits: 1 the optimizer state alone, 3 also parameters and gradients (Rajbhandari et
        al. 2020).
      context: attention under context parallelism: "ring" attention (Liu et al. 2023), or "all_to_all", which exchanges
        heads for time (DeepSpeed Ulysses, Jacobs et al. 2023).
      rules: logical axis -> mesh axes.

    Raises:
      PlanError: unknown axis or choice, impossible sizes, fewer microbatches than stages.

    Example:
      >>> import sharding
      >>> plan = sharding.Plan("dcn.dp=2, fsdp=-1, tp=4").fill(64)
      >>> plan.axes, plan.data
      ('dcn.dp=2, fsdp=8, tp=4', 16)
    """

    axes: str = ""
    schedule: str = "1f1b"
    microbatches: int = 0
    virtual: int = 1
    sequence: bool = False
    zero: int = 3
    context: str = "ring"
    rules: Rules = Rules()

    def __post_init__(self) -> None:
        _ = self.parts
        for name, known in (("schedule", SCHEDULES), ("context", CONTEXT), ("zero", (1, 3))):
            if getattr(self, name) not in known:
                raise PlanError(f"{name}={getattr(self, name)!r}: {choice(getattr(self, name), known)}")
        stages = self.size("pp")
        if self.microbatches < 0 or (self.microbatches and stages > 1 and self.microbatches < stages):
            raise PlanError(
                f"microbatches={self.microbatches} are fewer than the {stages} stages of pp={stages}, which would "
                f"idle; nearest valid: microbatches={stages}"
            )
        if self.virtual < 1 or (self.virtual > 1 and self.schedule != "interleaved" and not self.folded):
            raise PlanError(
                f"virtual={self.virtual} with schedule={self.schedule!r}: the interleaved schedule takes virtual >= 1, "
                "the others virtual=1"
            )
        if self.folded:
            if self.virtual > 2:
                raise PlanError(f"virtual={self.virtual} with schedule='dualpipev', which has 2 chunks; leave it at 1")
            object.__setattr__(self, "virtual", 2)

    @cached_property
    def parts(self) -> Mapping[tuple[str, str], int]:
        """Sizes by (network, axis) as written, network "ici" or "dcn"."""
        return _parse(self.axes)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Size of every mesh axis over ICI and DCN."""
        return {axis: self.ici[axis] * self.dcn[axis] for axis in MESH_AXES}

    @cached_property
    def ici(self) -> dict[str, int]:
        """Sizes within a slice, over ICI."""
        return {axis: self.parts.get(("ici", axis), 1) for axis in MESH_AXES}

    @cached_property
    def dcn(self) -> dict[str, int]:
        """Sizes across slices, over DCN."""
        return {axis: self.parts.get(("dcn", axis), 1) for axis in MESH_AXES}

    def size(self, axis: str) -> int:
        """Size of one mesh axis, 1 if absent."""
        return self.sizes[axis]

    @property
    def devices(self) -> int:
        """Number of devices of the plan; negative while an axis is -1."""
        return math.prod(self.sizes.values())

    @property
    def data(self) -> int:
        """Number of shards of the batch."""
        return math.prod(self.sizes[axis] for axis in DATA_AXES)

    @property
    def folded(self) -> bool:
        """Whether a stage's second chunk of layers goes from the last stage back to the first (DualPipeV)."""
        return self.schedule == "dualpipev"

    @property
    def microbatch_count(self) -> int:
        """Microbatches with the default filled in."""
        return self.microbatches or self.size("pp")

    def present(self, *axes: str) -> tuple[str, ...]:
        """Select the mesh axes that are larger than 1, in the given order."""
        return tuple(axis for axis in axes if self.sizes[axis] > 1)

    def fill(self, devices: int) -> "Plan":
        """Fit the plan to a number of devices: an axis of -1 gets the remaining ones.

        Raises:
          PlanError: the sizes do not multiply to `devices`.
        """
        parts = dict(self.parts)
        free = [key for key, size in parts.items() if size == -1]
        if free:
            used = math.prod(size for size in parts.values() if size != -1)
            if devices % used:
                raise PlanError(
                    f"{_write(parts)}: the other axes take {used}, which does not divide the {devices} devices; "
                    f"nearest valid: {_write(_nearest({**parts, free[0]: 1}, devices))}"
                )
            parts[free[0]] = devices // used
        product = math.prod(parts.values())
        if product != devices:
            written = " x ".join(f"{_name(key)}={size}" for key, size in parts.items()) or "no axis"
            raise PlanError(
                f"plan {self.axes!r}: {written} makes {product} devices and there are {devices}; "
                f"nearest valid: {_write(_nearest(parts or {('ici', 'dp'): 1}, devices))}"
            )
        return replace(self, axes=_write(parts))


def _parse(axes: str) -> dict[tuple[str, str], int]:
    parts: dict[tuple[str, str], int] = {}
    for item in filter(None, (item.strip() for item in axes.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        network, axis = name.split(".", 1) if "." in name else ("ici", name)
        if network not in ("ici", "dcn"):
            raise PlanError(f"plan {axes!r}: {name!r} should start with 'dcn.' (across slices) or with no prefix")
        if axis not in MESH_AXES:
            raise PlanError(f"plan {axes!r}: there is no axis {axis!r}; {choice(axis, MESH_AXES)}")
        try:
            size = int(value)
        except ValueError:
            size = 0
        if not equals or (size < 1 and size != -1):
            raise PlanError(f"plan {axes!r}: {item!r} should read {name}=N with N >= 1, or -1 for what is left")
        if (network, axis) in parts:
            raise PlanError(f"plan {axes!r}: {name} is given twice, {parts[network, axis]} and {size}")
        parts[network, axis] = size
    if sum(size == -1 for size in parts.values()) > 1:
        raise PlanError(f"plan {axes!r}: only one axis can be -1")
    return parts


def _name(key: tuple[str, str]) -> str:
    return key[1] if key[0] == "ici" else ".".join(key)


def _write(parts: Mapping[tuple[str, str], int]) -> str:
    return ", ".join(f"{_name(key)}={size}" for key, size in parts.items())


def factorings(number: int, slots: int) -> Iterator[tuple[int, ...]]:
    """Enumerate all ways to write `number` as an ordered product of `slots` factors."""
    if slots == 1:
        yield (number,)
        return
    for factor in range(1, number + 1):
        if number % factor == 0:
            for rest in factorings(number // factor, slots - 1):
                yield (factor, *rest)


def _nearest(parts: Mapping[tuple[str, str], int], devices: int) -> dict[tuple[str, str], int]:
    """Find sizes of the same axes that multiply to `devices`, changed by the smallest factors.

    On a tie the fewest axes change, and the fewest become 1.
    """

    def distance(sizes: tuple[int, ...]) -> tuple[float, int, int]:
        changes = [abs(math.log(new / old)) for new, old in zip(sizes, parts.values(), strict=True)]
        return round(sum(changes), 9), sum(change > 0 for change in changes), sizes.count(1)

    nearest: tuple[int, ...] = min(factorings(devices, len(parts)), key=distance)
    return dict(zip(parts, nearest, strict=True))
