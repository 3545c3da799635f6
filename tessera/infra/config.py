"""From settings to frozen dataclasses: every wrong key or type is one clear message.

`build` turns a `ConfigDict` (or plain mapping) into a frozen dataclass. The command line is `tessera.cli.main`, what
can be set `tessera.infra.schema`.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
from ml_collections import ConfigDict

from sharding.errors import PlanError
from tessera.infra.errors import ConfigError, unknown

__all__ = ["ConfigError", "build", "check_seed", "check_seeds", "checked", "describe_type", "unknown"]

T = TypeVar("T")


def build(cls: type[T], config: Mapping[str, Any] | ConfigDict, path: str = "config", /, **extra: Any) -> T:
    """Make the frozen dataclass `cls` from a mapping, recursively.

    Args:
      cls: a dataclass; fields that are dataclasses themselves are built from nested mappings.
      config: settings by field name. An int is accepted where a float is declared and a list where a tuple is; a
        mapping is accepted for a tuple of (name, value) pairs. Nothing else is converted.
      path: where these settings stand, for messages ("config.model").
      **extra: further fields known only to the program, such as a vocabulary size. They may not also be in `config`.

    Raises:
      ConfigError: an unknown setting (with a suggestion), a missing one, or a value of the wrong type.
    """
    values = _mapping(config, path) | extra
    repeated = sorted(set(_mapping(config, path)) & set(extra))
    if repeated:
        raise ConfigError(
            f"{path}.{repeated[0]}: this is set by the program (here {extra[repeated[0]]!r}), not by the config"
        )
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ConfigError(unknown(f"{path}.{key}", key, fields))
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{path}.{name}: missing ({describe_type(hints[name])} expected)")
    # A group that says what its default says is that default: nothing in it is built again.
    values = {name: value for name, value in values.items() if not _is_default(value, fields[name].default)}
    converted = {name: _convert(value, hints[name], f"{path}.{name}") for name, value in values.items()}
    return checked(path, cls, **converted)


def _is_default(value: Any, default: Any) -> bool:
    """Whether a group of settings names every field of a default dataclass with its value."""
    if not dataclasses.is_dataclass(default) or isinstance(default, type):
        return type(value) is type(default) and value == default
    names = {field.name for field in dataclasses.fields(default)}
    if not isinstance(value, Mapping | ConfigDict) or set(value) != names:
        return False
    return all(_is_default(value[name], getattr(default, name)) for name in names)


def checked(path: str, make: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Call `make`, turning its own complaint about values (ValueError, FileNotFoundError) into a ConfigError.

    One about a plan names `config.plan`, whatever was made under it.

    Args:
      path: the settings it is made from, for the message ("config.optimizer").
      make: what to call.
      *arguments: its arguments.
      **named: its keyword arguments.
    """
    try:
        return make(*arguments, **named)
    except ConfigError:
        raise
    except PlanError as error:  # from whatever was made under it
        raise ConfigError(f"config.plan: {error}") from error
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _mapping(config: Any, path: str) -> dict[str, Any]:
    if isinstance(config, ConfigDict):
        return {key: config[key] for key in config}
    if isinstance(config, Mapping):
        return dict(config)
    raise ConfigError(f"{path}: a group of settings expected, got {config!r} ({type(config).__name__})")


def check_seed(name: str, value: object) -> None:
    """Raise ConfigError unless a seed is a whole number in 0..2^32-1, what every generator here takes as it is.

    JAX's keys drop the bits above, so that 0 and 2^40 would be one seed; NumPy's generators refuse a negative one.

    Example:
      >>> check_seed("config.seed", 2**32 - 1)
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < 2**32:
        text = str(value) if not isinstance(value, int) or value.bit_length() < 200 else "a larger number"
        raise ConfigError(f"{name}={text}: a seed is a whole number in 0..{2**32 - 1}")


def check_seeds(settings: Mapping, path: str = "config") -> None:
    """`check_seed` for every setting called `seed` or `seeds`, at any depth."""
    for key, value in settings.items():
        place = f"{path}.{key}"
        if isinstance(value, Mapping):
            check_seeds(value, place)
        elif key in ("seed", "seeds"):
            for one in value if isinstance(value, list | tuple) else [value]:
                check_seed(place, one)


def describe_type(hint: Any) -> str:
    """A type as a message says it."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _convert(value: Any, hint: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = ConfigError(f"{path}: {describe_type(hint)} expected, got {value!r} ({type(value).__name__})")
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, _mapping(value, path), path)  # type: ignore[arg-type]
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _convert(value, option, path)
            except ConfigError:
                continue
        raise wrong
    if origin is typing.Literal:
        if value not in args:
            raise wrong
        return value
    if hint is tuple or origin is tuple:
        return _convert_tuple(value, args, path, wrong)
    if hint in (bool, int, float):
        return _convert_number(value, hint, wrong)
    plain = origin or hint
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if hint is type(None) or plain is type(None):
        plain = type(None)
    if isinstance(plain, type) and not isinstance(value, plain):
        raise wrong
    return value


def _convert_number(value: Any, hint: type, wrong: ConfigError) -> bool | int | float:
    kinds: dict[type, tuple[type, ...]] = {
        bool: (bool, np.bool_),
        int: (int, np.integer),
        float: (float, int, np.floating, np.integer),
    }
    if not isinstance(value, kinds[hint]) or (hint is not bool and isinstance(value, bool)):
        raise wrong
    return hint(value)


def _convert_tuple(value: Any, args: tuple, path: str, wrong: ConfigError) -> tuple:
    variadic = len(args) == 2 and args[1] is Ellipsis
    if isinstance(value, Mapping | ConfigDict):
        # A tuple of (name, value) pairs reads better as a group of settings in a config file.
        if not (variadic and typing.get_origin(args[0]) is tuple and len(typing.get_args(args[0])) == 2):
            raise wrong
        value = sorted(_mapping(value, path).items())
    if not isinstance(value, list | tuple):
        raise wrong
    if not args:
        return tuple(value)
    if not variadic and len(args) != len(value):
        raise wrong
    hints = [args[0]] * len(value) if variadic else args
    return tuple(_convert(item, hint, f"{path}[{i}]") for i, (item, hint) in enumerate(zip(value, hints, strict=True)))
