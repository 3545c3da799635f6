"""Settings from dataclasses: defaults, meanings, values from text."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.infra.errors import ConfigError
from tessera.infra.schema import (
    Changes,
    Choice,
    Group,
    Schema,
    assign,
    attribute_sentences,
    completed,
    differences,
    parse,
)


@dataclass(frozen=True)
class Router:
    """A router.

    Attributes:
      experts, k: how many there are, and how many
        a token takes.
      name: which.
    """

    experts: int = 8
    k: int = 2
    name: Literal["top_k", "hash"] = "top_k"


@dataclass(frozen=True)
class Model:
    """A model.

    Attributes:
      width: channels.
      router: of the experts.
      moe: None for none.
      options: further arguments.
      scale: any function.
    """

    width: int = 16
    router: Router = Router(k=1)
    moe: Router | None = None
    options: tuple[tuple[str, Any], ...] = ()
    scale: Callable[[float], float] = abs


@dataclass(frozen=True)
class Images:
    """Images.

    Attributes:
      shrink: factor.
    """

    shrink: int = 1


@dataclass(frozen=True)
class Text:
    """Text.

    Attributes:
      length: tokens.
    """

    length: int = 64


@dataclass(frozen=True)
class Top:
    """Top.

    Attributes:
      seeds: of runs.
      lr: rate.
    """

    seeds: tuple[int, ...] = (0,)
    lr: float = 1e-3


DATA = Choice("kind", {"images": Group(Images), "text": Group(Text)}, "images", "which.")
SCHEMA = Schema(Top, model=Group(Model), data=DATA)


def test_what_is_absent_is_its_default():
    found = SCHEMA.complete({"lr": 1.0, "model": {"router": {"k": 3}}})
    assert found["lr"] == 1.0 and found["seeds"] == (0,) and found["data"] == {"kind": "images", "shrink": 1}
    assert found["model"]["width"] == 16 and found["model"]["moe"] is None
    # The field's own default, not the nested class's.
    assert found["model"]["router"] == {"experts": 8, "k": 3, "name": "top_k"}
    assert SCHEMA.complete({})["model"]["router"]["k"] == 1
    assert completed(SCHEMA, found).to_dict() == SCHEMA.complete(found)


def test_every_field_is_listed_with_its_sentence():
    fields = {one.path: one for one in SCHEMA.fields(SCHEMA.complete({}))}
    assert set(fields) == {
        *("seeds", "lr", "data.kind", "data.shrink", "model.width", "model.options", "model.scale", "model.moe"),
        *(f"model.{group}.{name}" for group in ("router", "moe") for name in ("experts", "k", "name")),
    }
    assert fields["model.router.experts"].meaning == "how many there are, and how many a token takes."
    assert all(one.meaning for one in fields.values())
    assert fields["model.router.k"].default == 1 and fields["model.moe.k"].default == 2


OVERRIDES = {
    "number": ([("lr", "3")], ("lr", 3.0)),
    "scientific int": ([("model.width", "1e3")], ("model.width", 1000)),
    "tuple with commas": ([("seeds", "3,4")], ("seeds", (3, 4))),
    "tuple as Python": ([("seeds", "(3,)")], ("seeds", (3,))),
    "empty tuple": ([("seeds", "")], ("seeds", ())),
    "inside a group that is off": ([("model.moe.k", "4")], ("model.moe", {"k": 4, "experts": 8, "name": "top_k"})),
    "a group as a dictionary": ([("model.router", "{'k': 5}")], ("model.router.k", 5)),
    "a group that is off": ([("model.moe", "none")], ("model.moe", None)),
    "pairs": ([("model.options", "{'b2': 0.9}")], ("model.options", {"b2": 0.9})),
    "one pair": ([("model.options.b2", "0.9")], ("model.options", {"b2": 0.9})),
    "the last one counts": ([("seeds", "1,2"), ("seeds", "3")], ("seeds", (3,))),
    "a choice comes first": ([("data.length", "7"), ("data.kind", "text")], ("data", {"kind": "text", "length": 7})),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_text_becomes_the_fields_own_type(case):
    overrides, (path, expected) = OVERRIDES[case]
    found = SCHEMA.complete(assign(SCHEMA, {"data": {"shrink": 2}}, overrides))
    for key in path.split("."):
        found = found[key]
    assert found == expected and type(found) is type(expected)


WRONG = {
    "unknown": ([("lrr", "3")], r"--config\.lrr: no such setting; did you mean 'lr'\?"),
    "unknown inside": ([("model.widht", "3")], r"--config\.model\.widht: .* 'width'\?"),
    "of another choice": ([("data.length", "3")], r"--config\.data\.length: no such setting.*kind, shrink"),
    "unknown group": ([("modle.width", "3")], r"--config\.modle: .* 'model'\?"),
    "not a number": ([("lr", "abc")], r"--config\.lr: float expected, got 'abc'"),
    "not a whole number": ([("model.width", "3.5")], r"--config\.model\.width: int expected, got '3\.5'"),
    "not a choice": ([("model.router.name", "x")], r"one of 'top_k', 'hash' expected, got 'x'"),
    "not a choice of dataclass": ([("data.kind", "sound")], r"one of 'images', 'text' expected"),
    "below a single setting": ([("lr.x", "1")], r"config\.lr is a single setting \(float\)"),
    "no text can say it": ([("model.scale", "abs")], r"no text can express .*set it from Python"),
    "code": ([("seeds", "(__import__('os').getpid(),)")], r"--config\.seeds: tuple"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_one_line(case):
    overrides, message = WRONG[case]
    with pytest.raises(ConfigError, match=message) as caught:
        assign(SCHEMA, {}, overrides)
    assert "\n" not in str(caught.value)


@given(
    st.one_of(
        st.tuples(st.just(int), st.integers(-(10**15), 10**15)),
        st.tuples(st.just(float), st.floats(allow_nan=False)),
        st.tuples(st.just(bool), st.booleans()),
        st.tuples(st.just(str), st.text()),
        st.tuples(st.just(int | None), st.one_of(st.none(), st.integers(-9, 9))),
        st.tuples(st.just(tuple[int, ...]), st.lists(st.integers(-9, 9)).map(tuple)),
        st.tuples(st.just(tuple[float, ...]), st.lists(st.floats(-9, 9)).map(tuple)),
        st.tuples(st.just(dict), st.dictionaries(st.text(), st.integers())),
    )
)
def test_what_python_prints_is_read_back(case):
    hint, value = case
    assert parse(str(value), hint) == value


@given(st.text())
def test_any_text_is_a_value_or_one_line(text):
    for hint in (int, float, bool, tuple[int, ...], Literal["a"], int | None, dict):
        try:
            parse(text, hint, "x")
        except ConfigError as error:
            assert str(error).startswith("--config.x: ")


def test_changes_name_settings_of_another_schema():
    schema = Schema(None, run=SCHEMA, arms=Changes(SCHEMA, "an arm."))
    given = {"arms": {"moe": {"model": {"router": {"k": 4}}}}}
    found = schema.complete(assign(schema, given, [("arms.moe.model.width", "9"), ("run.lr", "2")]))
    assert found["arms"] == {"moe": {"model": {"router": {"k": 4}, "width": 9}}} and found["run"]["lr"] == 2.0
    with pytest.raises(ConfigError, match=r"--config\.arms\.dense: no such setting.*moe"):
        assign(schema, given, [("arms.dense.lr", "1")])


def test_differences_leave_out_defaults():
    assert differences(Top(lr=2.0)) == {"lr": 2.0} and differences(Top()) == {}
    assert differences(Model(router=Router(k=1))) == {}

    @dataclass(frozen=True)
    class Later(Top):
        added: int = 0
        nested: Router = field(default_factory=Router)

    assert differences(Later(lr=2.0)) == {"lr": 2.0}
    assert differences(Later(nested=Router(k=5))) == {"nested": {"k": 5}}


def test_sentences_of_base_classes_count():
    @dataclass(frozen=True)
    class Derived(Top):
        """Derived.

        Attributes:
          more: than that.
        """

        more: int = 0

    assert attribute_sentences(Derived) == {"seeds": "of runs.", "lr": "rate.", "more": "than that."}


def test_pairs_whose_names_have_dots_stay_pairs():
    """Names of files cannot be keys of a group of settings."""
    hint = tuple[tuple[str, float], ...]
    assert parse("{'a.jsonl': 1, 'b': 2}", hint, "x") == (("a.jsonl", 1), ("b", 2))
    assert parse("{'a': 1}", hint, "x") == {"a": 1}
    assert parse("(('a.jsonl', 1),)", hint, "x") == (("a.jsonl", 1),)
