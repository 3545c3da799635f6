import pytest

from scaling.mup import PARAMETERIZATIONS, ROLES, factors


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_the_base_width_is_left_as_it_is(role, name):
    assert factors(role, 1.0, name) == (1.0, 1.0)


def test_table_3_of_tensor_programs_v():
    """Adam: input and output learning rates constant, hidden ones 1 / width, the output multiplied by 1 / width."""
    assert factors("hidden", 4.0) == (1.0, 0.25)  # variance 1 / fan-in is the reference
    assert factors("table", 4.0) == (2.0, 1.0)  # entries of constant size: sqrt(width) times 1 / sqrt(width)
    assert factors("readout", 4.0) == (0.25, 0.25)
    assert factors("vector", 4.0) == (1.0, 1.0)
    assert factors("hidden", 4.0, "standard") == (1.0, 1.0)


@pytest.mark.parametrize(
    ("args", "message"), [(("bias", 1.0), "role"), (("table", 0.0), "positive"), (("table", 1.0, "ntk"), "mup")]
)
def test_wrong_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        factors(*args)
