import numpy as np
import pytest

from scaling import conventions, flops
from scaling.coverage import EPOCH
from scaling.fitting.fit import FitConfig, fit
from scaling.published import CHINCHILLA
from scaling.rows import make_rows
from scaling.tables import read_csv

SHAPES = conventions.CHINCHILLA_SHAPES


def test_the_table_of_shapes_is_the_papers():
    # Sizes in millions as table A9 gives them.
    published = {0: 44, 2: 74, 13: 306, 17: 552, 25: 1143, 29: 1593, 42: 6796, 49: 16183}
    for index, millions in published.items():
        assert flops.parameters(SHAPES[index]).total / 1e6 == pytest.approx(millions, rel=0.01)
    assert len(SHAPES) == 50


def simulated(convention):
    """Runs whose loss is Chinchilla's law of the parameters that a convention counts."""
    counted = np.array([flops.count(shape, convention).params for shape in SHAPES])
    params = np.array([flops.parameters(shape).total for shape in SHAPES], float)
    rng = np.random.default_rng(0)
    which = rng.integers(0, len(SHAPES), 150)
    tokens = np.exp(rng.uniform(21, 27, 150))
    loss = EPOCH["E"] + EPOCH["A"] / counted[which] ** EPOCH["alpha"] + EPOCH["B"] / tokens ** EPOCH["beta"]
    return make_rows({"params": params[which], "tokens": tokens, "loss": loss})


@pytest.mark.parametrize("convention", ["6ND", "6ND, no embeddings"])
def test_the_convention_that_made_the_losses_is_the_one_that_fits(convention):
    rows = simulated(convention)
    starts = CHINCHILLA.raw(EPOCH)[:, None]
    values = {}
    for name in ("6ND", "6ND, no embeddings"):
        recounted = conventions.recount(rows, SHAPES, name)
        np.testing.assert_array_equal(recounted["tokens"], rows["tokens"])
        found = fit(recounted, CHINCHILLA, FitConfig(objective="normal"), starts=starts)
        values[name] = found.value
        if name == convention:
            assert found.parameters == pytest.approx(EPOCH, rel=1e-4)
            if name == "6ND":
                # Its C is 6 N D, so the counted slope is beta / (alpha + beta).
                slope = conventions.counted_exponent(found, SHAPES, name, (1e19, 1e22))
                assert slope == pytest.approx(EPOCH["beta"] / (EPOCH["alpha"] + EPOCH["beta"]), abs=2e-3)
    assert min(values, key=values.__getitem__) == convention


@pytest.mark.slow
def test_leaving_out_embeddings_raises_the_exponent_of_the_published_runs(shared_data):
    rows = read_csv(shared_data("scaling/chinchilla_figure4.csv")).without_highest_losses(5)
    found = {e.convention: e for e in conventions.effects(rows)}
    # Small models have the larger share of embeddings (Pearce & Song 2024).
    assert found["6ND, no embeddings"].a > found["6ND"].a + 0.03
    assert "6ND, active experts" not in found
    assert found["appendix F"].a == pytest.approx(found["6ND"].a)
