"""Auto-parallel search: all factorings of the devices over the mesh axes, ranked by a cost function."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from sharding.errors import PlanError
from sharding.plan import MESH_AXES, Plan, factorings


class Judged(NamedTuple):
    """A plan with its cost: bytes of memory per device, and lower bounds on the seconds of a step.

    `seconds` is with overlap of compute and communication, `serial` without. The batch is cut into `grad_accum_steps`
    parts of gradient accumulation.

    Example:
      >>> import sharding
      >>> sharding.analysis.Judged(sharding.Plan("fsdp=8"), memory=1e9, seconds=0.5, serial=0.7).seconds
      0.5
    """

    plan: Plan
    memory: float
    seconds: float
    serial: float
    grad_accum_steps: int = 1


@dataclass(frozen=True)
class Ranking:
    """Result of a search.

    Attributes:
      fits: plans within the memory, fastest first.
      smallest: the plan of least memory, None if no plan is valid.
      tried: number of plans.
      refused: plans that do not divide the model or the batch.
      too_large: plans beyond the memory.
      reasons: of the refused plans, (what does not divide by what, number of plans), the most frequent first.

    Example:
      >>> from sharding.analysis import Ranking
      >>> Ranking(fits=(), smallest=None, tried=4, refused=4, too_large=0).refused
      4
    """

    fits: tuple[Judged, ...]
    smallest: Judged | None
    tried: int
    refused: int
    too_large: int
    reasons: tuple[tuple[str, int], ...] = ()


def plans(
    devices: int, base: Plan, *, axes: Sequence[str] = MESH_AXES, rounds: Sequence[int] = (1, 2, 4, 8, 16, 32)
) -> Iterator[Plan]:
    """Enumerate all factorings of the devices over the mesh axes, with the other options of `base`.

    Where pp > 1, with `rounds` times as many microbatches as stages; where tp > 1, with sequence parallelism (the same
    communication and less activation memory). An interleaved schedule becomes 1F1B where there is one stage.

    Args:
      devices: their number.
      base: schedule, rules and other options; its sizes are ignored.
      axes: mesh axes that may be larger than 1.
      rounds: microbatches per stage to try.

    Example:
      >>> import sharding
      >>> [plan.axes for plan in sharding.analysis.plans(4, sharding.Plan(), axes=("fsdp", "tp"))]
      ['tp=4', 'fsdp=2, tp=2', 'fsdp=4']
    """
    for sizes in factorings(devices, len(axes)):
        chosen = dict.fromkeys(MESH_AXES, 1) | dict(zip(axes, sizes, strict=True))
        text = ", ".join(f"{axis}={size}" for axis, size in chosen.items() if size > 1)
        stages = chosen["pp"]
        interleaved = base.schedule == "interleaved" and stages > 1
        rest = {
            "axes": text,
            "sequence": chosen["tp"] > 1,
            "schedule": base.schedule if interleaved or base.schedule != "interleaved" else "1f1b",
            "virtual": base.virtual if interleaved else 1,
        }
        for parts in rounds if stages > 1 else (0,):
            yield replace(base, **rest, microbatches=parts * stages if stages > 1 else 0)  # type: ignore[arg-type]


def rank(candidates: Iterable[Plan], judge: Callable[[Plan], Judged], memory: float) -> Ranking:
    """Evaluate plans and rank the ones within the memory.

    Args:
      candidates: plans.
      judge: cost of a plan; raises PlanError for an invalid one, with its `reason`.
      memory: bytes of one device.

    Example:
      >>> import sharding
      >>> from sharding.analysis import Judged, plans, rank
      >>> judge = lambda plan: Judged(plan, memory=64 / plan.size("fsdp"), seconds=float(plan.size("tp")), serial=1.0)
      >>> rank(plans(8, sharding.Plan()), judge, memory=16.0).fits[0].plan.axes
      'fsdp=8'
    """
    fits: list[Judged] = []
    smallest: Judged | None = None
    tried = too_large = 0
    reasons: Counter[str] = Counter()
    for plan in candidates:
        tried += 1
        try:
            judged = judge(plan)
        except PlanError as error:
            reasons[error.reason or str(error)] += 1
            continue
        if smallest is None or judged.memory < smallest.memory:
            smallest = judged
        if judged.memory <= memory:
            fits.append(judged)
        else:
            too_large += 1
    # Times equal to two digits: then least dependence on overlap, then fewer axes.
    fits.sort(key=lambda one: (float(f"{one.seconds:.1e}"), one.serial, len(one.plan.present(*MESH_AXES))))
    return Ranking(tuple(fits), smallest, tried, reasons.total(), too_large, tuple(reasons.most_common()))
