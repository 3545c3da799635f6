"""The settings of a command as a tree of dataclasses: defaults, meanings, and values from text.

A config file holds what differs; `complete` fills in the defaults of the dataclasses, `assign` sets one field from a
command line's text by its type, `describe` lists every field with its default and the sentence that its docstring has
for it. Nothing here imports JAX.
"""

import ast
import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from tessera.infra.config import ConfigError, describe_type, unknown


class Field(NamedTuple):
    """One setting: dotted path below `config`, type, default (MISSING: it must be given), meaning, dataclass and
    choice.

    `chooses` is true for the setting that picks the dataclass of its group, such as `config.model.name`.
    """

    path: str
    hint: Any
    default: Any
    meaning: str
    owner: str
    chooses: bool = False


class Group:
    """The fields of one dataclass.

    Args:
      cls: the dataclass; fields that are dataclasses themselves are groups inside it.
      without: fields that the program sets and no config may.
      defaults: other defaults than the dataclass's, by field.
      hints: other types than the dataclass's, for what a config writes differently ("10ep" for a number of steps).
    """

    def __init__(
        self,
        cls: type,
        *,
        without: tuple[str, ...] = (),
        defaults: Mapping[str, Any] | None = None,
        hints: Mapping[str, Any] | None = None,
    ):
        self.cls, self.without = cls, without
        self.defaults, self.hints = dict(defaults or {}), dict(hints or {})

    def members(self) -> dict[str, tuple[Any, Any]]:
        """Type and default of every field."""
        hints = _hints(self.cls) | self.hints
        return {
            field.name: (hints[field.name], self.defaults.get(field.name, _default(field)))
            for field in dataclasses.fields(self.cls)
            if field.init and field.name not in self.without
        }

    def child(self, name: str, given: Any) -> "Node | None":
        """The group of a field that is a dataclass, else None."""
        inner = _dataclass(self.members()[name][0])
        if inner is None:
            return None
        default = self.members()[name][1]
        values = _shallow(default) if dataclasses.is_dataclass(default) else {}
        return Group(inner, defaults=values)

    def names(self, given: Mapping[str, Any]) -> list[str]:
        """Settings that may stand here."""
        return list(self.members())

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given` with the defaults of what it lacks."""
        found = dict(given)
        for name, (_, default) in self.members().items():
            value = found.get(name, default)
            inner = self.child(name, given)
            if value is dataclasses.MISSING:
                continue
            if inner is not None and value is not None:
                value = inner.complete(_plain(value))
            found[name] = value
        return found

    def fields(self, given: Mapping[str, Any], path: str) -> Iterator[Field]:
        """Every field, those inside groups too."""
        meanings = attribute_sentences(self.cls)
        for name, (hint, default) in self.members().items():
            inner = self.child(name, given)
            if inner is None or type(None) in typing.get_args(hint):
                shown = None if inner is not None else default
                yield Field(f"{path}{name}", hint, shown, meanings.get(name, ""), self.cls.__name__)
            if inner is not None:
                yield from inner.fields(_plain(given.get(name) or {}), f"{path}{name}.")


class Choice:
    """A group whose dataclass is picked by one of its settings.

    Args:
      key: that setting's name.
      options: value -> group.
      default: the value where the setting is absent.
      meaning: sentence for `key`.
    """

    def __init__(self, key: str, options: Mapping[str, "Node"], default: str, meaning: str):
        self.key, self.options, self.default, self.meaning = key, dict(options), default, meaning

    def chosen(self, given: Mapping[str, Any]) -> "Node":
        """The group that `given` picks.

        Raises:
          ConfigError: no such option.
        """
        name = given.get(self.key, self.default)
        if name not in self.options:
            raise ConfigError(unknown(f"config: {self.key}={name!r}", str(name), self.options))
        return self.options[name]

    def child(self, name: str, given: Any) -> "Node | None":
        """See `Group.child`."""
        return None if name == self.key else self.chosen(given).child(name, given)

    def names(self, given: Mapping[str, Any]) -> list[str]:
        """See `Group.names`."""
        return [self.key, *self.chosen(given).names(given)]

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """See `Group.complete`."""
        return {self.key: given.get(self.key, self.default)} | self.chosen(given).complete(given)

    def fields(self, given: Mapping[str, Any], path: str) -> Iterator[Field]:
        """See `Group.fields`; those of the option that `given` picks."""
        hint = typing.Literal[tuple(self.options)]  # type: ignore[valid-type]
        yield Field(f"{path}{self.key}", hint, self.default, self.meaning, "", chooses=True)
        yield from self.chosen(given).fields(given, path)


class Schema:
    """The settings of a command.

    Args:
      settings: dataclass of the settings that stand at the top; None if there are none.
      **groups: the groups beside them; a function of all settings where another setting picks the dataclass.

    Example:
      >>> from dataclasses import dataclass
      >>> @dataclass
      ... class Model:
      ...     '''A model.
      ...
      ...     Attributes:
      ...       width: channels.
      ...     '''
      ...     width: int = 8
      >>> Schema(None, model=Group(Model)).complete({})
      {'model': {'width': 8}}
    """

    def __init__(self, settings: type | Group | None = None, /, **groups: "Node | type | Callable[[Mapping], Node]"):
        self.top = Group(settings) if isinstance(settings, type) else settings
        self.groups = {name: Group(node) if isinstance(node, type) else node for name, node in groups.items()}

    def group(self, name: str, given: Mapping[str, Any]) -> "Node":
        """The group of a name, for these settings."""
        node = self.groups[name]
        return node if isinstance(node, Node) else node(given)

    def child(self, name: str, given: Any) -> "Node | None":
        """See `Group.child`."""
        if name in self.groups:
            return self.group(name, given)
        return self.top.child(name, given) if self.top is not None else None

    def names(self, given: Mapping[str, Any]) -> list[str]:
        """See `Group.names`."""
        return [*(self.top.names(given) if self.top is not None else ()), *self.groups]

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """See `Group.complete`."""
        found = self.top.complete(given) if self.top is not None else dict(given)
        for name in self.groups:
            found[name] = self.group(name, given).complete(_plain(given.get(name, {})))
        return found

    def defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Default of every setting that has one, by dotted path."""
        return {one.path: one.default for one in self.fields(given) if one.default is not dataclasses.MISSING}

    def fields(self, given: Mapping[str, Any], path: str = "") -> Iterator[Field]:
        """See `Group.fields`."""
        if self.top is not None:
            yield from self.top.fields(given, path)
        for name in self.groups:
            yield from self.group(name, given).fields(_plain(given.get(name, {})), f"{path}{name}.")


class Changes:
    """Named sets of changes to the settings of another schema, such as the arms of a comparison; no defaults are filled
    in.

    Args:
      schema: what is changed.
      meaning: sentence for `--fields`.
    """

    def __init__(self, schema: "Schema", meaning: str):
        self.schema, self.meaning = schema, meaning

    def child(self, name: str, given: Any) -> "Node | None":
        """The schema that every set changes."""
        return _Partial(self.schema)

    def names(self, given: Mapping[str, Any]) -> list[str]:
        """Names of the sets."""
        return list(given)

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given` itself."""
        return {name: dict(_plain(each)) for name, each in given.items()}

    def fields(self, given: Mapping[str, Any], path: str) -> Iterator[Field]:
        """One entry a set."""
        for name in given:
            yield Field(f"{path}{name}.*", dict, {}, self.meaning, "")


class _Partial(Schema):
    """A schema whose defaults are not filled in."""

    def __init__(self, schema: Schema):
        super().__init__(schema.top, **schema.groups)

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return dict(given)


Node = Group | Choice | Schema | Changes


def find(schema: Node, given: Mapping[str, Any], path: str) -> Field:
    """The setting at a dotted path.

    Raises:
      ConfigError: there is none, with the nearest name.
    """
    node: Node | None = schema
    here: Any = given
    keys = path.split(".")
    for depth, key in enumerate(keys):
        where = ".".join(("config", *keys[: depth + 1]))
        assert node is not None
        inside = _plain(here) if isinstance(here, Mapping) or hasattr(here, "items") else {}
        if key not in node.names(inside):
            raise ConfigError(unknown(f"--{where}", key, node.names(inside)))
        last = depth == len(keys) - 1
        child = node.child(key, inside)
        if last:
            fields = {f.path: f for f in node.fields(inside, "")} if not isinstance(node, Changes) else {}
            if key in fields:
                return fields[key]._replace(path=path)
            return Field(path, dict, {}, "a group of settings", "")
        if child is None:
            field = next(f for f in node.fields(inside, "") if f.path == key)
            if _is_pairs(field.hint) or field.hint in (dict, Any):
                hint = typing.get_args(typing.get_args(field.hint)[0])[1] if _is_pairs(field.hint) else Any
                return Field(path, hint, None, field.meaning, field.owner)
            raise ConfigError(
                f"--{'.'.join(('config', *keys))}: {where} is a single setting ({describe_type(field.hint)})"
            )
        here = inside.get(key) or {}
        node = child
    raise AssertionError("a path has at least one key")


def assign(schema: Node, given: Mapping[str, Any], overrides: list[tuple[str, str]]) -> dict[str, Any]:
    """Set fields from text; what picks a group's dataclass comes first, and of one setting the last text counts.

    Args:
      schema: of the config. given: its settings, which are not changed.
      overrides: (dotted path below `config`, text).

    Returns:
      The settings with the overrides, not completed.

    Raises:
      ConfigError: an unknown setting, or text that is not of its type.
    """
    found = _copy(given)
    # As with every flag, the last one counts.
    waiting = list(dict(overrides).items())
    picks = [item for item in waiting if _picks(schema, found, item[0])]
    for path, text in picks:
        _set(found, path, parse(text, find(schema, found, path).hint, path))
        _forget(schema, found, path)
    for path, text in (item for item in waiting if item not in picks):
        _set(found, path, parse(text, find(schema, found, path).hint, path), schema)
    return found


def _picks(schema: Node, given: Mapping[str, Any], path: str) -> bool:
    try:
        return find(schema, given, path).chooses
    except ConfigError:
        return False


def _forget(schema: Node, given: dict[str, Any], path: str) -> None:
    """Drop a group's settings that the dataclass picked instead does not have."""
    node: Node | None = schema
    here: Any = given
    for key in path.split(".")[:-1]:
        assert node is not None
        node, here = node.child(key, here), here.get(key, {})
    assert node is not None
    for key in [key for key in here if key not in node.names(here)]:
        del here[key]


def _set(given: dict[str, Any], path: str, value: Any, schema: Node | None = None) -> None:
    *groups, last = path.split(".")
    for key in groups:
        inner = given.get(key)
        given[key] = inner = dict(_plain(inner)) if inner is not None else {}
        given = inner
    given[last] = value


def parse(text: str, hint: Any, path: str = "") -> Any:
    """A value of a type from a command line's text.

    Numbers, booleans (true, false), strings as they are, `None`, tuples as `(1, 2)` or `1,2`, and groups as Python
    dictionaries.

    Raises:
      ConfigError: the text is no such value; or no text is one, and it says how to set it from Python.

    Example:
      >>> parse("3, 4", tuple[int, ...]), parse("none", int | None), parse("1e-3", float)
      ((3, 4), None, 0.001)
    """
    wrong = ConfigError(f"--config.{path}: {describe_type(hint)} expected, got {text!r}")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        # Strings take any text, so they are tried last.
        for option in sorted(args, key=lambda option: (option is str, option is not type(None))):
            try:
                return parse(text, option, path)
            except ConfigError:
                continue
        raise wrong
    if hint is type(None):
        if text.lower() in ("none", "null"):
            return None
        raise wrong
    if origin is typing.Literal:
        for choice in args:
            if text == str(choice):
                return choice
        raise wrong
    if hint is bool:
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
        raise wrong
    if hint is int:
        return _number(text, int, wrong)
    if hint is float:
        return _number(text, float, wrong)
    if hint is str:
        return text
    if _is_pairs(hint) or hint is dict or origin is dict or dataclasses.is_dataclass(hint) or _is_mapping(origin):
        value = _literal(text, wrong)
        if _is_pairs(hint) and not isinstance(value, dict):
            return _tuple(text, args, path, wrong)
        if not isinstance(value, dict):
            raise wrong
        # No group of settings has dots in its names; files have.
        return tuple(value.items()) if _is_pairs(hint) and any("." in str(key) for key in value) else value
    if hint is tuple or origin in (tuple, list):
        return _tuple(text, args, path, wrong)
    if hint is Any:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
    raise ConfigError(
        f"--config.{path}: no text can express {describe_type(hint)}; set it from Python, in a config file of your own"
    )


def _number(text: str, kind: type, wrong: ConfigError) -> int | float:
    try:
        return kind(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        raise wrong from None
    if kind is int and math.isfinite(value) and value == int(value):
        return int(value)
    raise wrong


def _literal(text: str, wrong: ConfigError) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise wrong from None


def _tuple(text: str, args: tuple, path: str, wrong: ConfigError) -> tuple:
    text = text.strip()
    if text.startswith(("(", "[")):
        value = _literal(text, wrong)
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    variadic = len(args) == 2 and args[1] is Ellipsis
    if not args:
        return tuple(parse(part, Any, path) for part in parts)
    if not variadic and len(parts) != len(args):
        raise wrong
    hints = [args[0]] * len(parts) if variadic else args
    return tuple(parse(part, hint, path) for part, hint in zip(parts, hints, strict=True))


def _is_pairs(hint: Any) -> bool:
    """Whether a type is a tuple of (name, value) pairs, which a config writes as a group."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is not tuple or len(args) != 2 or args[1] is not Ellipsis:
        return False
    inner = typing.get_args(args[0])
    return typing.get_origin(args[0]) is tuple and len(inner) == 2 and inner[0] is str


def _is_mapping(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Mapping)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _dataclass(hint: Any) -> type | None:
    """The dataclass of a type that is one, or one or None."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    found = [option for option in options if dataclasses.is_dataclass(option)]
    return found[0] if len(found) == 1 and isinstance(found[0], type) else None


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else dataclasses.MISSING


def _shallow(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}


def _plain(value: Any) -> dict[str, Any]:
    """A group of settings as a dictionary, whatever holds it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _shallow(value)
    return {key: value[key] for key in value}


def _copy(value: Any) -> Any:
    if hasattr(value, "items"):
        return {key: _copy(value[key]) for key in value}
    return value


def completed(schema: Schema, config: Any) -> ConfigDict:
    """A config of any kind with the defaults of all that it lacks.

    Raises:
      ConfigError: a choice that does not exist.
    """
    return ConfigDict(schema.complete(_copy(config)))


@cache
def attribute_sentences(cls: type) -> dict[str, str]:
    """Field -> what the class's docstring says of it under `Attributes:`.

    Fields that share an entry ("rows, cols: ...") share the sentence; those of base classes count.
    """
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        text = inspect.cleandoc(each.__dict__.get("__doc__") or "")
        match = re.search(r"^(?:Attributes|Fields):\n((?:[ \t]+.*\n?|\n)+)", text, re.MULTILINE)
        if match is None:
            continue
        for entry in re.split(r"\n(?=  \w)", "\n" + match[1].rstrip()):
            names, colon, sentence = entry.strip().partition(":")
            if not colon:
                continue
            # "lr, steps: one sentence", or several "a: x. b: y." in one entry.
            for name in re.split(r"[,\s]+", names):
                found[name] = " ".join(sentence.split())
            for name, rest in re.findall(r"(?<=[.;] )(\w+): ([^.;]*[.;]?)", " ".join(sentence.split())):
                found.setdefault(name, rest)
    return found


def differences(value: Any) -> dict[str, Any]:
    """The fields of a dataclass instance that differ from their defaults, groups inside as dictionaries of theirs.

    Keys of stored results are made from these, so that a field which is added with a default changes none of them.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        mine, default = getattr(value, field.name), _default(field)
        if dataclasses.is_dataclass(mine) and not isinstance(mine, type):
            if type(default) is type(mine) and default == mine:
                continue
            # Against the class's own defaults: a nested group says all that makes it what it is.
            found[field.name] = differences(mine)
        elif default is dataclasses.MISSING or mine != default:
            found[field.name] = mine
    return found
