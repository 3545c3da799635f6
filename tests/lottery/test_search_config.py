import dataclasses

import pytest

from lottery import search_config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ("ticket", "tickets")}, "'tickets' is not one of ticket, continue"),
        ({"arms": ("reinit",)}, "add 'ticket'"),
        ({"arms": ()}, "not empty"),
        ({"seeds": (1, 1)}, "distinct"),
        ({"score": "size"}, "'size' is not one of magnitude, random"),
        ({"scope": "both"}, "not one of layer, global"),
        ({"rate": 1.0}, "rate"),
        ({"rewind_optimizer": True}, "rewind > 0"),
        ({"levels": -1}, "levels"),
    ],
)
def test_wrong_configurations_say_what_would_be_right(change, message):
    with pytest.raises(ValueError, match=message):
        search_config.SearchConfig(**change)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"output": "^output/"}, (0.2, (("^output/", 0.1),))),
        ({"output": "^output/", "output_rate": 0.3}, (0.2, (("^output/", 0.3),))),
        ({"output": "^output/", "output_rate": 0.0}, (0.2, (("^output/", 0.0),))),
        ({}, (0.2, ())),
    ],
)
def test_the_output_layer_is_pruned_at_half_the_rate_unless_told_otherwise(options, expected):
    scope = search_config.RATE_SCOPES["layer"](search_config.SearchConfig(**options), 0.2)
    assert (scope.rate, scope.overrides) == expected


def test_configurations_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        search_config.SearchConfig().rate = 0.5
