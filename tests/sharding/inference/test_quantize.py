import jax.numpy as jnp
import numpy as np
import pytest

from sharding.inference.quantize import (
    QuantConfig,
    Quantized,
    dequantize,
    gptq,
    observe,
    output_error,
    quantize_matrix,
    round_to_nearest,
    stored_bytes,
)

INPUTS, OUTPUTS, ROWS = 32, 12, 200
RNG = np.random.default_rng(0)
W = RNG.normal(size=(INPUTS, OUTPUTS))
# Correlated inputs with a few large channels, as transformers have them.
X = RNG.normal(size=(ROWS, INPUTS)) @ RNG.normal(size=(INPUTS, INPUTS)) * 0.3 + RNG.normal(size=(ROWS, INPUTS))
X[:, :3] *= 8


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [0, 8])
def test_rounding_is_off_by_half_a_step_at_most(bits, group):
    config = QuantConfig(bits, "rtn", group)
    values, scales = round_to_nearest(W, config)
    assert np.abs(values).max() == config.largest
    assert scales.shape == (INPUTS // (group or INPUTS), OUTPUTS)
    assert np.all(
        np.abs(values * np.repeat(scales, group or INPUTS, 0) - W)
        <= np.repeat(scales, group or INPUTS, 0) * 0.5 + 1e-12
    )


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("bits, group", [(4, 8), (4, 0), (8, 0)])
def test_looking_at_the_inputs_loses_less_than_rounding(method, bits, group):
    seen = observe(X)
    lost = {}
    for one in ("rtn", method):
        found = quantize_matrix(W, QuantConfig(bits, one, group), seen)
        assert found.values.dtype == (jnp.int4 if bits == 4 else jnp.int8)
        back = np.asarray(dequantize(Quantized(*(None if x is None else jnp.asarray(x) for x in found))), np.float64)
        lost[one] = np.square(X @ W - X @ back).sum()
        assert output_error(W, back, seen) == pytest.approx(lost[one], rel=1e-6)
    assert lost[method] < lost["rtn"]


def test_gptq_is_the_closed_form_for_two_inputs():
    """The second weight makes up for the first's error by the regression of input 0 on input 1 (the OBS update)."""
    x = np.random.default_rng(1).normal(size=(50, 2)) @ np.array([[10.0, 0.6], [0.0, 0.8]])
    seen = observe(x)
    values, scales = gptq(np.array([[0.36], [1.0]]), seen, QuantConfig(4))
    h = 2 * seen.hessian
    h += 0.01 * np.diag(h).mean() * np.eye(2)
    error = 0.36 - np.round(0.36 * 7) / 7
    assert scales.tolist() == [[1 / 7]]
    second = np.round((1.0 + error * h[0, 1] / h[1, 1]) * 7)
    assert values.ravel().tolist() == [3, second] and second < 7


def test_four_bits_are_half_a_byte_and_wrong_settings_are_refused():
    small = quantize_matrix(W, QuantConfig(4, "rtn", 16))
    assert stored_bytes(small) == INPUTS * OUTPUTS / 2 + 2 * OUTPUTS * 4
    for wrong in ({"bits": 3}, {"method": "spqr"}, {"group": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            QuantConfig(**wrong)
    with pytest.raises(ValueError, match="group=5"):
        quantize_matrix(W, QuantConfig(4, "rtn", 5))
