import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lottery import allocation

LENET = {"dense0/kernel": (784, 300), "dense1/kernel": (300, 100), "output/kernel": (100, 10)}
UNITS = {path: k * n for path, (k, n) in LENET.items()}


def test_erk_of_lenet_by_hand():
    """LeNet-300-100 at 10% of 266,200 weights = 26,620.

    epsilon = 26620 / ((784 + 300) + (300 + 100) + (100 + 10)) = 16.70, which gives the output layer 16.70 * 110 / 1000
    = 1.84 > 1: it stays dense. Then epsilon = (26620 - 1000) / (1084 + 400) = 17.264, so the others get 17.264 * 1084 /
    235200 = 0.07957 and 17.264 * 400 / 30000 = 0.23019: 18714 and 6906 weights.
    """
    found = allocation.erk_densities(UNITS, LENET, allocation.ERK(0.1))
    assert found == pytest.approx(
        {"dense0/kernel": 0.079568, "dense1/kernel": 0.230189, "output/kernel": 1.0}, rel=1e-5
    )
    counts = allocation.counts(UNITS, allocation.ERK(0.1), LENET)
    assert counts == {"dense0/kernel": 18714, "dense1/kernel": 6906, "output/kernel": 1000}


def test_erk_of_convolutions_and_stacks_by_hand():
    # Two kernels 3x3x4x8 (18 / 288) and 1x1x8x16 (26 / 128), 416 weights, half of them 208: epsilon = 208 / 44.
    shapes = {"a/kernel": (3, 3, 4, 8), "b/kernel": (1, 1, 8, 16)}
    found = allocation.erk_densities({"a/kernel": 288, "b/kernel": 128}, shapes, allocation.ERK(0.5))
    assert found == pytest.approx({"a/kernel": 208 / 44 * 18 / 288, "b/kernel": 208 / 44 * 26 / 128})
    # A stack of blocks is many kernels of one shape: its length changes nothing.
    for length in (1, 5):
        stack = {f"blocks_{i}/mlp/up/kernel": (6, 12) for i in range(length)}
        found = allocation.erk_densities(dict.fromkeys(stack, 72), stack, allocation.ERK(0.25))
        assert found == pytest.approx(dict.fromkeys(stack, 0.25))


@settings(deadline=None)
@given(
    sides=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    density=st.floats(0, 1),
    power=st.floats(0, 2),
)
def test_erk_keeps_exactly_the_rounded_total_and_no_layer_overflows(sides, density, power):
    shapes = {str(i): side for i, side in enumerate(sides)}
    units = {path: k * n for path, (k, n) in shapes.items()}
    counts = allocation.counts(units, allocation.ERK(density, power), shapes)
    assert sum(counts.values()) == round(density * sum(units.values()))
    assert all(0 <= counts[path] <= units[path] for path in units)


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        (allocation.Everywhere(0.1), {"*": 26620}),
        (allocation.Uniform(0.1), {"dense0/kernel": 23520, "dense1/kernel": 3000, "output/kernel": 100}),
        (allocation.ERK(0.5, power=0.0), {"dense0/kernel": 117600, "dense1/kernel": 15000, "output/kernel": 500}),
        (
            allocation.PerPath((("^output/", 1.0), ("dense", 0.5))),
            {"dense0/kernel": 117600, "dense1/kernel": 15000, "output/kernel": 1000},
        ),
        (
            allocation.PerPath((("^output/", 0.3),), default=0.0),
            {"dense0/kernel": 0, "dense1/kernel": 0, "output/kernel": 300},
        ),
    ],
)
def test_counts(scope, expected):
    assert allocation.counts(UNITS, scope, LENET) == expected


def test_no_layer_is_emptied_unless_it_is_asked_for():
    units, shapes = {"big": 10_000, "small": 4, "tiny": 1}, {"big": (100, 100), "small": (2, 2), "tiny": (1, 1)}
    for scope in (allocation.Uniform(0.01), allocation.PerPath((("big", 0.5),), 0.01)):
        found = allocation.counts(units, scope, shapes)
        assert found["small"] == found["tiny"] == 1
    found = allocation.counts(units, allocation.ERK(0.01, power=0.0), shapes)
    assert found == {"big": 98, "small": 1, "tiny": 1}
    assert allocation.counts(units, allocation.Uniform(0.0), shapes) == dict.fromkeys(units, 0)
    with pytest.raises(ValueError, match="ERK needs the shape of small"):
        allocation.counts(units, allocation.ERK(0.5), {"big": (100, 100)})
