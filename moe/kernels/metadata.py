"""Step metadata of the grouped and block-sparse kernels (group offsets and tile schedule, as in megablox).

A kernel runs the steps in order. Step s multiplies tile a[s] of A by tile b[s] of B into tile o[s] of the output; steps
with the same o are adjacent and share an accumulator. Indices by product:

| product                                | a            | b                    | o              | built             |
|----------------------------------------|--------------|----------------------|----------------|-------------------|
| grouped matmul (rows of x, by expert)  | row tile     | group                | row tile       | on device, a step |
| ragged contraction (weight gradient)   | row tile     | row tile             | group          | on device, a step |
| block-sparse matmul (x by live blocks) | block column | live block           | output column  | on host, once     |
| its weight gradient                    | block column | output column        | live block     | on host, once     |

`begin` and `end` are the step's rows of the tile, counted from the tile's start: only those are multiplied and written.
`live` is 0 for a step without products, which writes zeros to its rows or column.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Steps(NamedTuple):
    """Step table, int32, one entry per step; entries from `count` on repeat the last step and are not run."""

    a: Int[Array, " S"]
    b: Int[Array, " S"]
    o: Int[Array, " S"]
    begin: Int[Array, " S"]
    end: Int[Array, " S"]
    live: Int[Array, " S"]
    count: Int[Array, ""]  # type: ignore[assignment]  # tuple.count is not needed


def matmul_steps(group_sizes_G: Int[Array, " G"], *, rows: int, tile: int, align: int | None = None) -> Steps:
    """Make the steps of a grouped matmul over `rows` rows in tiles of `tile`.

    Every row tile has one step for each group with rows in it. Rows past the sum of the sizes form a last group whose
    steps have live 0 (b stays in range), so every row of the output is written by exactly one step.

    Args:
      group_sizes_G: rows of each group, in order; what goes past `rows` is cut off.
      rows: rows of x, at least 1.
      tile: rows of a tile; the last tile may reach past `rows`.
      align: None: tiles are on the grid of `tile` rows. Else the first tile of a group begins at the group's first row
        rounded down to a multiple of `align` (which divides `tile`), the others follow it, and a and o count units of
        `align` rows: fewer tiles are shared between groups.

    Returns:
      Steps of fixed length (on the grid ceil(rows / tile) + G), of which the first `count` are to be run.
    """
    groups = group_sizes_G.shape[0]
    begins, ends = group_bounds(group_sizes_G, rows)
    begins, ends = jnp.append(begins, ends[-1]), jnp.append(ends, rows)
    shape = {"rows": rows, "tile": tile, "align": align or tile}
    group, tiles, begin, end, count = _unroll(begins, ends, empty=0, **shape)
    live = (group < groups).astype(jnp.int32)
    return Steps(tiles, jnp.minimum(group, groups - 1), tiles, begin, end, live, count)


def contraction_steps(group_sizes_G: Int[Array, " G"], *, rows: int, tile: int, align: int | None = None) -> Steps:
    """Make the steps of the ragged contraction x^T dy, group by group: o is the group.

    An empty group has one step with live 0, which writes its zeros. Rows past the sum have no steps. Arguments as in
    `matmul_steps`; the length is ceil(rows / tile) + G - 1 on the grid.
    """
    begins, ends = group_bounds(group_sizes_G, rows)
    shape = {"rows": rows, "tile": tile, "align": align or tile}
    group, tiles, begin, end, count = _unroll(begins, ends, empty=1, **shape)
    return Steps(tiles, tiles, group, begin, end, (end > begin).astype(jnp.int32), count)


def group_bounds(group_sizes_G: Int[Array, " G"], rows: int) -> tuple[Int[Array, " G"], Int[Array, " G"]]:
    """First row of every group, and one past its last; sizes beyond `rows` are cut off, those below 0 are 0."""
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes_G.astype(jnp.int32), 0)), rows)
    return jnp.append(jnp.zeros_like(ends[:1]), ends[:-1]), ends


def _most_steps(groups: int, *, empty: int, rows: int, tile: int, align: int) -> int:
    """Bound the steps of `groups` groups over all sizes that sum to at most `rows`.

    On the grid there are ceil(rows / tile) tiles, and each group but the first shares its first tile with another or
    has one empty step. Where tiles follow the groups, n groups with rows have at most
    (rows + n (align + tile - 2)) / tile steps together, as each pads up to align - 1 rows in front and tile - 1 behind;
    the others have `empty` each. That is linear in n, so its maximum is at the smallest or the largest n.
    """
    if align == tile:
        return -(-rows // tile) + groups - 1
    return max((rows + n * (align + tile - 2)) // tile + empty * (groups - n) for n in (1, min(groups, rows)))


def _unroll(begins, ends, *, empty, rows, tile, align):
    """Expand groups to steps: (group, first row in units of `align`, begin and end within the tile, count).

    A group without rows has `empty` steps.
    """
    length = _most_steps(begins.shape[0], empty=empty, rows=rows, tile=tile, align=align)
    firsts = begins // align * align
    visits = jnp.where(ends > begins, -((firsts - ends) // tile), empty)
    after = jnp.cumsum(visits).astype(jnp.int32)
    count = after[-1]
    step = jnp.minimum(jnp.arange(length, dtype=jnp.int32), count - 1)
    group = jnp.searchsorted(after, step, side="right").astype(jnp.int32)
    row = firsts[group] + (step - (after - visits)[group]) * tile
    # An empty group at the end would index a tile past the last.
    units = jnp.minimum(row // align, -(-rows // align) - 1).astype(jnp.int32)
    begin = jnp.clip(begins[group] - units * align, 0, tile).astype(jnp.int32)
    end = jnp.clip(ends[group] - units * align, begin, tile).astype(jnp.int32)
    return group, units, begin, end, count
