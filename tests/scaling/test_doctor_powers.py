import numpy as np
import pytest

from scaling import doctor_powers
from scaling.isoflop import Curves, Minimum, PowerLaw, envelope


def minimum(budget, refused="", scatter=0.01, depth=0.1):
    return Minimum(budget, np.nan if refused else 1e6, 3.0, refused, 7, depth, scatter)


def named(findings):
    return {finding.name: finding for finding in findings}


NO_DRAWS = np.zeros((2, 0))


def test_sound_minima_are_fine():
    minima = [minimum(b) for b in (1e18, 1e19, 1e20, 1e21)]
    found = doctor_powers.examine_minima(PowerLaw(0.5, 0.0, 4, 0.01), minima, np.zeros((2, 10)), 2e21)
    assert {finding.verdict for finding in found} == {"fine"}


@pytest.mark.parametrize(
    "name, minima, law, draws, budget",
    [
        ("edge minima", [minimum(1e18), minimum(1e19, "larger sizes")], PowerLaw(0.5, 0, 4, 0), NO_DRAWS, 1e19),
        ("scatter", [minimum(1e18, scatter=0.08)], PowerLaw(0.5, 0, 4, 0), NO_DRAWS, 1e19),
        ("few budgets", [minimum(1e18)], PowerLaw(0.5, 0, 2, 0), NO_DRAWS, 1e19),
        ("lost resamples", [minimum(1e18)], PowerLaw(0.5, 0, 4, 0), np.array([[1, np.nan], [1, np.nan]]), 1e19),
        ("extrapolation", [minimum(1e18), minimum(1e22, "edge")], PowerLaw(0.5, 0, 4, 0), NO_DRAWS, 1e20),
    ],
)
def test_each_trap_is_warned_of(name, minima, law, draws, budget):
    found = named(doctor_powers.examine_minima(law, minima, draws, budget))
    assert found[name].verdict == "warning"


def test_an_envelope_of_edge_sizes_is_warned_of():
    flops = np.geomspace(1e15, 1e18, 50)
    # Four sizes, of which the largest is the lowest from early on.
    losses = np.stack([3 + 0.1 * np.abs(np.log(flops / c)) for c in (1e15, 2e15, 4e15, 8e15)])
    curves = Curves(flops, np.array([1.0, 2.0, 3.0, 4.0]), losses)
    law, found = envelope(curves)
    findings = named(doctor_powers.examine_envelope(found, curves, NO_DRAWS, 1e17, named=False))
    assert findings["edge minima"].verdict == "warning" and findings["edge minima"].numbers["share"] < 0.5
    assert findings["runs"].verdict == "note"
    assert findings["extrapolation"].verdict == "warning"
