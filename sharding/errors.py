"""The error of a plan that cannot be carried out, and nearest valid choices for its message."""

import difflib
import itertools
import math
from collections.abc import Iterable, Mapping


class PlanError(ValueError):
    """A plan that cannot be carried out; the message has the numbers and the nearest valid choice.

    Attributes:
      reason: what does not divide by what, without the plan's numbers: the same for all plans that fail alike; "" for
        what is no question of sizes.

    Example:
      >>> import sharding
      >>> try:
      ...     sharding.Plan("fsdp=4, tp=3").fill(8)
      ... except sharding.PlanError as error:
      ...     print(str(error).split("; ")[-1])
      nearest valid: fsdp=4, tp=2
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


def choice(value: object, choices: Iterable[object]) -> str:
    """Format the end of a message about a wrong choice: "did you mean 'x'? One of 'x', 'y'"."""
    known = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.3)
    return (f"did you mean {near[0]!r}? " if near else "") + f"One of {', '.join(known)}"


def nearest_divisor(number: int, size: int) -> int:
    """Find the divisor of `number` closest in ratio to `size`, the smaller of two equally close."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(math.log(d / size)), d))


def nearest_sizes(number: int, sizes: Mapping[str, int]) -> str:
    """Format the largest sizes of the same mesh axes whose product divides `number`, for no more devices than now.

    On a tie the fewest axes change: "dp=2, fsdp=3" for 12 by dp=2, fsdp=4.
    """
    ranges = ([d for d in range(1, size + 1) if number % d == 0] for size in sizes.values())
    valid = (found for found in itertools.product(*ranges) if number % math.prod(found) == 0)
    changed = lambda found: sum(new != old for new, old in zip(found, sizes.values(), strict=True))  # noqa: E731
    best = max(valid, key=lambda found: (math.prod(found), -changed(found)))
    return ", ".join(f"{axis}={size}" for axis, size in zip(sizes, best, strict=True))
