"""Search over factorings: every way to split so many devices among the axes, judged by a cost given as a function."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from sharding.errors import PlanError
from sharding.plan import MESH_AXES, Plan, factorings


class Judged(NamedTuple):
    """A plan with what it would need: bytes of memory per device, and seconds of a step at best.

    `seconds` has computing and communication overlap, in `serial` they wait for each other.
    """

    plan: Plan
    memory: float
    seconds: float
    serial: float


@dataclass(frozen=True)
class Ranking:
    """Outcome of a search.

    Attributes:
      fits: plans within the memory, fastest first.
      smallest: the plan that needs least memory, None if none could be carried out.
      tried: plans looked at.
      refused: plans that do not divide the model or the batch.
      too_large: plans that need more memory than there is.
    """

    fits: tuple[Judged, ...]
    smallest: Judged | None
    tried: int
    refused: int
    too_large: int


def plans(
    devices: int,
    base: Plan,
    *,
    allowed: Mapping[str, Collection[int]] | None = None,
    rounds: Sequence[int] = (1, 2, 4, 8),
) -> Iterator[Plan]:
    """Every factoring of the devices over the axes, with the rest of `base`.

    Where pp > 1, `rounds` times as many microbatches as stages; where tp > 1, the residual stream is split too (the
    same bytes move and less is kept). An interleaved schedule becomes 1F1B where there is one stage.

    Args:
      devices: their number.
      base: schedule, rules and choices that are kept; its sizes are not looked at.
      allowed: mesh axis -> sizes it may have; an axis that is not named may have any.
      rounds: microbatches per stage to try.
    """
    for sizes in factorings(devices, len(MESH_AXES)):
        chosen = dict(zip(MESH_AXES, sizes, strict=True))
        if allowed and any(chosen[axis] not in sizes for axis, sizes in allowed.items()):
            continue
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
    """Judge plans and sort those that fit.

    Args:
      candidates: plans.
      judge: what a plan would need; raises PlanError for what cannot be carried out.
      memory: bytes of one device.
    """
    fits: list[Judged] = []
    smallest: Judged | None = None
    tried = refused = too_large = 0
    for plan in candidates:
        tried += 1
        try:
            judged = judge(plan)
        except PlanError:
            refused += 1
            continue
        if smallest is None or judged.memory < smallest.memory:
            smallest = judged
        if judged.memory <= memory:
            fits.append(judged)
        else:
            too_large += 1
    # Times within a percent are equal: then that which depends least on overlap, then fewer axes.
    fits.sort(key=lambda one: (float(f"{one.seconds:.1e}"), one.serial, len(one.plan.present(*MESH_AXES))))
    return Ranking(tuple(fits), smallest, tried, refused, too_large)
