"""Count the collectives of a compiled program from its HLO text: the compiler's result on this backend.

The counterpart of `sharding.analysis.collectives`, which counts the collectives of the traced program. Collectives of
automatic sharding (GSPMD) appear only here.
"""

import math
import re
from collections.abc import Iterator

import numpy as np

from sharding.analysis.collectives import Collective

KINDS = {
    "all-reduce": "all-reduce",
    "all-gather": "all-gather",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "permute",
}
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (?P<type>\(.*?\)|\S+) (?P<op>[a-z][a-z\-]*)\((?P<rest>.*)$")
ARRAY = re.compile(r"\b(pred|bf16|f8\w+|[sufc]\d+)\[([\d,]*)\]")
CALLED = re.compile(r"(?:body|to_apply|calls)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CONSTANT = re.compile(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
LESS = re.compile(r"ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT")


def compiled_collectives(text: str) -> list[Collective]:
    """Count the collectives of one run of a compiled program; groups are sizes only, so `axes` is empty.

    Args:
      text: `jax.jit(f).lower(...).compile().as_text()`.

    Returns:
      As `sharding.analysis.collectives.count_collectives` does; a loop of unknown length counts once, all branches of a
      conditional count.

    Raises:
      ValueError: there is no entry computation in the text, or groups of devices in an unknown format.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sharding.analysis import compiled_collectives
      >>> text = jax.jit(lambda x: x + 1).lower(jnp.zeros(4)).compile().as_text()
      >>> compiled_collectives(text)
      []
    """
    computations: dict[str, list[str]] = {}
    entry, lines = None, []
    for line in text.splitlines():
        head = COMPUTATION.match(line)
        if head:
            lines = computations.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif line.startswith("  "):
            lines.append(line)
    if entry is None:
        raise ValueError("not the text of a compiled module: it has no ENTRY computation")
    # An empty list of groups is one group of all devices.
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
    return list(_walk(computations, entry, 1, math.prod(int(count) for count in counts)))


def _walk(computations: dict[str, list[str]], name: str, trips: int, devices: int) -> Iterator[Collective]:
    for line in computations.get(name, ()):
        found = INSTRUCTION.match(line)
        if found is None:
            continue
        op, rest = found["op"], found["rest"]
        kind = KINDS.get(op.removesuffix("-start"))
        if kind:
            group = devices if "replica_groups={}," in rest else _group(rest)
            if group > 1:
                yield Collective(kind, (), group, trips, _bytes(found["type"], op, group), _scope(rest))
            continue
        times = trips * (_trips(computations, rest) if op == "while" else 1)
        for one, several in CALLED.findall(rest):
            for called in [one] if one else re.findall(r"[\w.\-]+", several):
                yield from _walk(computations, called, times, devices)


def _trips(computations: dict[str, list[str]], rest: str) -> int:
    """Find the trips of a loop: its annotation (CPU, GPU), or the bound of its condition (TPU); else 1.

    Counters of loops made from `lax.scan` and `lax.fori_loop` begin at 0 and go up by 1.
    """
    known = TRIPS.search(rest)
    if known:
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    lines = computations.get(condition.group(1), []) if condition else []
    bounds = {found[1]: int(found[2]) for line in lines if (found := CONSTANT.search(line))}
    names = [found[1] for line in lines if (found := LESS.search(line))]
    return bounds.get(names[0], 1) if names else 1


def _group(rest: str) -> int:
    """Count the devices of a group; a permute has pairs instead, and counts as 2 if any pair crosses devices."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
    if pairs:
        return 2 if any(a != b for a, b in re.findall(r"\{?(\d+),(\d+)", pairs.group(1))) else 1
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    if iota:
        return int(iota.group(2))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return len(listed.group(1).split(","))
    # replica_groups=mesh['dp'=2,'tp'=4] {'tp'}; part of an axis reads 'tp':(1)2. An order of devices may stand between.
    mesh = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\S+)? \{(.*?)\}", rest)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh.group(2))
        return math.prod(int(part or sizes[name]) for name, part in named)
    raise ValueError(f"unknown format of a collective's groups: {rest[:200]}")


def _bytes(result: str, op: str, group: int) -> int:
    """Compute the size of the full array, as `Collective.bytes`, from the type of the result."""
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * _itemsize(dtype) for dtype, dims in ARRAY.findall(result)
    ]
    if op == "ragged-all-to-all-start":
        sizes = [min(sizes[:2])]  # rows and their target buffer, then offsets
    elif op.endswith("-start") and op != "all-reduce-start":
        sizes = [max(sizes)]  # the result is (operand, result, ...)
    return sum(sizes) * (group if op == "reduce-scatter" else 1)


def _itemsize(dtype: str) -> int:
    named = {"pred": 1, "bf16": 2}
    return named.get(dtype) or (1 if dtype.startswith("f8") else max(1, int(np.ceil(int(dtype[1:]) / 8))))


def _scope(rest: str) -> str:
    found = re.search(r'op_name="([^"]*)"', rest)
    return found.group(1) if found else ""
