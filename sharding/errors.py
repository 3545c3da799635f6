"""The error of a plan that cannot be carried out, and nearest valid choices for its message."""

import difflib
import math
from collections.abc import Iterable


class PlanError(ValueError):
    """A plan that cannot be carried out; the message has the numbers and the nearest valid choice.

    Example:
      >>> import sharding
      >>> try:
      ...     sharding.Plan("fsdp=4, tp=3").fill(8)
      ... except sharding.PlanError as error:
      ...     print(str(error).split("; ")[-1])
      nearest valid: fsdp=4, tp=2
    """


def choice(value: object, choices: Iterable[object]) -> str:
    """Format the end of a message about a wrong choice: "did you mean 'x'? One of 'x', 'y'"."""
    known = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.3)
    return (f"did you mean {near[0]!r}? " if near else "") + f"One of {', '.join(known)}"


def nearest_divisor(number: int, size: int) -> int:
    """Find the divisor of `number` closest in ratio to `size`, the smaller of two equally close."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(math.log(d / size)), d))
