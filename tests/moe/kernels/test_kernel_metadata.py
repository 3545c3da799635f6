import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.kernels import block_structure, metadata
from moe.kernels.metadata import contraction_steps, matmul_steps

ROWS, TILE, GROUPS = 45, 8, 5
# Tiles on a grid, and tiles that follow the groups on a finer one.
BUILD = {
    (build, align): jax.jit(lambda sizes, build=build, align=align: build(sizes, rows=ROWS, tile=TILE, align=align))
    for build in (matmul_steps, contraction_steps)
    for align in (None, 1, 2, 4)
}
aligns = st.sampled_from((None, 1, 2, 4))
sizes_lists = st.lists(st.integers(0, 20), min_size=GROUPS, max_size=GROUPS)


def unrolled(build, sizes, align=None):
    """(a, b, o, rows written, live) of every step that is run, and the steps themselves."""
    steps = jax.tree.map(np.asarray, BUILD[build, align](jnp.array(sizes, jnp.int32)))
    run = []
    for s in range(steps.count):
        first = steps.a[s] * (align or TILE)
        rows = range(first + steps.begin[s], first + steps.end[s])
        run.append((int(steps.a[s]), int(steps.b[s]), int(steps.o[s]), rows, bool(steps.live[s])))
    return run, steps


def owner(sizes):
    """Group of each row, -1 past the sum."""
    owners = np.repeat(np.arange(GROUPS), sizes)[:ROWS]
    return np.concatenate([owners, np.full(ROWS - len(owners), -1)])


@settings(deadline=None, max_examples=60)
@given(sizes_lists, aligns)
def test_matmul_steps_write_every_row_once_with_its_own_group(sizes, align):
    run, steps = unrolled(matmul_steps, sizes, align)
    groups, written = owner(sizes), np.zeros(ROWS, int)
    for _, b, _, rows, live in run:
        assert 0 <= b < GROUPS and len(rows) > 0
        for row in rows:
            written[row] += 1
            assert groups[row] == (b if live else -1)
    assert (written == 1).all()
    assert len(run) <= len(steps.a) and (align or len(steps.a) == -(-ROWS // TILE) + GROUPS)
    assert (np.diff(steps.o) >= 0).all()
    # A tile that follows its group owns rows from its first `align` on.
    assert align is None or all(rows.start - a * align < align for a, _, _, rows, _ in run)


@settings(deadline=None, max_examples=60)
@given(sizes_lists, aligns)
def test_contraction_steps_visit_every_group_and_every_row_of_it_once(sizes, align):
    run, steps = unrolled(contraction_steps, sizes, align)
    groups, read = owner(sizes), np.zeros(ROWS, int)
    for a, b, o, rows, live in run:
        assert a == b and 0 <= a < -(-ROWS // (align or TILE)) and live == (len(rows) > 0)
        for row in rows:
            read[row] += 1
            assert groups[row] == o
    assert (read == (groups >= 0)).all()
    assert {o for _, _, o, _, _ in run} == set(range(GROUPS))
    assert (np.diff(steps.o) >= 0).all() and len(run) <= len(steps.a)


def brute_force_count(sizes, rows, tile, align, empty, silent):
    """Steps by counting: tiles that each group touches, walked one by one."""
    ends = np.minimum(np.cumsum(sizes), rows)
    spans = list(zip(np.concatenate([[0], ends[:-1]]), ends, strict=True)) + [(ends[-1], rows)] * silent
    count = 0
    for begin, end in spans:
        first = begin // align * align
        count += len(range(first, end, tile)) if end > begin else empty
    return count


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_no_sizes_take_more_steps_than_there_are(data):
    rows, groups = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 60))
    tile = data.draw(st.sampled_from((1, 2, 4, 8, 16, 64)))
    align = data.draw(st.sampled_from([a for a in (1, 2, 4, 8, 16, 64) if tile % a == 0]))
    # Few groups with rows, many without, sums below, at and above the rows.
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    sizes = np.choose(rng.integers(0, 3, groups), (0, 1, rng.integers(0, 2 * rows + 1, groups))).tolist()
    for empty, silent in ((0, 1), (1, 0)):
        length = metadata._most_steps(groups + silent, empty=empty, rows=rows, tile=tile, align=align)
        count = brute_force_count(sizes, rows, tile, align, empty, silent)
        assert count <= length, f"{count} steps, room for {length}: {sizes}, {rows=}, {tile=}, {align=}"
        # The bound is no guess: no more than a step for each group and tile above what is needed at worst.
        assert length <= -(-rows // tile) + 2 * (groups + silent)


@pytest.mark.parametrize("align", [1, None])
@pytest.mark.parametrize(
    ("rows", "tile", "sizes"),
    [
        (2, 2, [0, 0, 0, 0, 0, 1, 0, 1]),
        (1, 1, [0] * 7 + [1]),
        (16, 16, [0] * 60 + [8, 4, 3, 1]),
        (512, 64, [0] * 200 + [512] + [0] * 55),
        (8, 8, [1, 0, 0] * 10),
    ],
    ids=str,
)
def test_more_groups_than_rows_keep_every_row_and_every_group(rows, tile, sizes, align):
    sizes_G = jnp.array(sizes, jnp.int32)
    steps = jax.tree.map(np.asarray, contraction_steps(sizes_G, rows=rows, tile=tile, align=align))
    met = np.zeros(len(sizes), int)
    np.add.at(met, steps.o[: steps.count], (steps.end - steps.begin)[: steps.count])
    assert met.tolist() == np.diff(np.minimum(np.cumsum([0, *sizes]), rows)).tolist()
    assert set(steps.o[: steps.count].tolist()) == set(range(len(sizes))) and steps.count <= len(steps.o)


@pytest.mark.parametrize("build", [matmul_steps, contraction_steps], ids=lambda build: build.__name__)
@pytest.mark.parametrize("align", [None, 2])
@pytest.mark.parametrize("sizes", [[0] * 5, [45, 0, 0, 0, 0], [0, 0, 0, 0, 45], [8] * 5, [1] * 5, [20] * 5], ids=str)
def test_the_dead_tail_repeats_the_last_step(build, align, sizes):
    run, steps = unrolled(build, sizes, align)
    for field in steps[:-1]:
        assert (field[len(run) :] == field[len(run) - 1]).all()


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_block_steps_meet_each_live_block_once_each_way(block, density):
    rng = np.random.default_rng(0)
    mask = rng.random((7, 5)) < density
    structure = block_structure(mask, block, shape=(6 * block + 3, 5 * block))
    assert structure.live == mask.sum() and structure.grid == (7, 5)
    where = list(zip(structure.k_B.tolist(), structure.n_B.tolist(), strict=True))
    assert sorted(where) == sorted(zip(*(index.tolist() for index in np.nonzero(mask)), strict=True))
    for steps, outputs, side in ((structure.forward, 5, 0), (structure.transposed, 7, 1)):
        met = [steps.b[s] for s in range(len(steps.a)) if steps.live[s]]
        assert sorted(met) == list(range(structure.live))
        assert set(steps.o.tolist()) == set(range(outputs)) and (np.diff(steps.o) >= 0).all()
        for a, b, o, live in zip(steps.a, steps.b, steps.o, steps.live, strict=True):
            assert not live or where[b] == ((a, o), (o, a))[side]
    assert [(a, b) for a, b in zip(structure.contraction.a, structure.contraction.b, strict=True)] == where


def test_an_element_mask_makes_a_block_live_if_any_element_is():
    mask = np.zeros((100, 130), bool)
    mask[70, 129] = True
    structure = block_structure(mask, 64)
    assert structure.shape == (100, 130)
    assert (structure.k_B.tolist(), structure.n_B.tolist()) == ([1], [2])


@pytest.mark.parametrize(
    ("mask", "arguments", "message"),
    [
        (np.ones((4, 4)), {"block": 32}, "blocks of 64 and 128"),
        (np.ones(4), {}, "a matrix"),
        (np.ones((2, 2)), {"shape": (129, 300)}, r"\(2, 3\) is needed"),
    ],
)
def test_a_structure_that_cannot_be_is_refused(mask, arguments, message):
    with pytest.raises(ValueError, match=message):
        block_structure(mask, **arguments)


def test_the_drawing_in_the_docs_is_true():
    text = (Path(__file__).parents[3] / "docs" / "kernels.md").read_text()
    drawn = [[int(v) for v in match] for match in re.findall(r"(\d)    (\d)  (\d)  (\d)    (\d)    (\d)   (\d)", text)]
    assert len(drawn) == 7
    steps = matmul_steps(jnp.array([5, 0, 6], jnp.int32), rows=14, tile=4)
    assert drawn == [[s, *(int(field[s]) for field in steps[:-1])] for s in range(7)]
    assert steps.count == 6
