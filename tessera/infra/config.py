"""From the command line to frozen dataclasses: every wrong key or type is one clear message.

`build` turns a `ConfigDict` (or plain mapping) into a frozen dataclass; `run` is the entry point of the scripts: it
reads `--config=configs/lm.py:tiny`, overrides such as `--config.lr=1e-3`, and `--workdir`, and calls the script's main.
"""

import collections.abc
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

T = TypeVar("T")
CONFIGS = Path(__file__).parent.parent / "configs"


class ConfigError(ValueError):
    """A setting that does not exist, is missing or has the wrong type."""


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
            raise ConfigError(f"{path}.{name}: missing ({_describe(hints[name])} expected)")
    converted = {name: _convert(value, hints[name], f"{path}.{name}") for name, value in values.items()}
    return checked(path, cls, **converted)


def checked(path: str, make: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Call `make`, turning its own complaint about values (ValueError, FileNotFoundError) into a ConfigError.

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
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"{path}: {error}") from error


def unknown(path: str, key: str, known: collections.abc.Iterable[str]) -> str:
    """Message for a key that is not among the known ones, with the nearest as a suggestion."""
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{path}: no such setting; {hint}The settings here are: {', '.join(known) or 'none'}"


def _mapping(config: Any, path: str) -> dict[str, Any]:
    if isinstance(config, ConfigDict):
        return {key: config[key] for key in config}
    if isinstance(config, Mapping):
        return dict(config)
    raise ConfigError(f"{path}: a group of settings expected, got {config!r} ({type(config).__name__})")


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _convert(value: Any, hint: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = ConfigError(f"{path}: {_describe(hint)} expected, got {value!r} ({type(value).__name__})")
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


@dataclasses.dataclass(frozen=True)
class Invocation:
    """What the command line said.

    `config`: the resolved settings; `name`: the config's name with its argument ("lm-tiny"); `workdir`: "" for the
    default; `hosts`: the values of the flags `HOSTS`.
    """

    config: ConfigDict
    name: str
    workdir: str
    hosts: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {name: default for name, (default, _) in HOSTS.items()}
    )


# Flags of a run on several hosts, with their defaults and what they say; see `sharding.multihost.distributed`.
HOSTS: dict[str, tuple[Any, str]] = {
    "coordinator": ("", "host:port of the first process of a run on several hosts."),
    "processes": (0, "Number of processes of the run."),
    "process": (-1, "Number of this process, from 0."),
    "join_seconds": (300, "How long to wait for all processes to appear."),
    "silence_seconds": (100, "How long a process may give no sign of life before the others end."),
}


def read_flags(config_file: str, argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> Invocation:
    """Parse a command line with absl and ml_collections.

    Args:
      config_file: the config used without `--config`, relative to the configs directory: "lm.py" or "lm.py:small".
      argv: the command line, program name first.
      values: where the flags are defined.

    Raises:
      ConfigError: for anything wrong with it, in one message.
    """
    default = str(CONFIGS / config_file)
    try:
        flags.DEFINE_string("workdir", "", "Directory of the run; one found there goes on.", values)
        for name, (default_value, words) in HOSTS.items():
            define = flags.DEFINE_string if isinstance(default_value, str) else flags.DEFINE_integer
            define(name, default_value, words, flag_values=values)
        holder = config_flags.DEFINE_config_file(
            "config", default, "Config file, with its argument after a colon.", values, sys_argv=list(argv)
        )
        rest = values(list(argv))
        config, filename = holder.value, str(config_flags.get_config_filename(values["config"]))
    except (AttributeError, KeyError, flags.Error, OSError, ValueError, TypeError) as error:
        raise ConfigError(_explain(error, argv, default)) from error
    if not isinstance(config, ConfigDict):
        found = ", ".join(sorted(f"configs/{path.name}" for path in CONFIGS.glob("*.py") if path.name != "__init__.py"))
        raise ConfigError(f"--config={filename}: no such file, or it gives no ConfigDict (there are: {found})")
    if len(rest) > 1:
        raise ConfigError(f"arguments not understood: {' '.join(rest[1:])} (settings are written --config.key=value)")
    file, _, argument = filename.partition(":")
    name = Path(file).stem + (f"-{argument}" if argument else "")
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    hosts = {name: values[name].value for name in HOSTS}
    return Invocation(config, name, str(values["workdir"].value), hosts)


def _explain(error: Exception, argv: Sequence[str], default: str) -> str:
    """One line on what is wrong with a command line: an unknown setting by its path, else the library's own words."""
    words = [argument.lstrip("-") for argument in argv]
    file = next((word.partition("=")[2] for word in words if word.startswith("config=")), default)
    try:
        config = config_flags.config_flags.ConfigFileFlagParser(name="config").parse(file)
    except Exception:  # whatever is wrong in the file, `error` already says it
        config = None
    for word in words:
        group, path = config, "config"
        for key in word.partition("=")[0].split(".")[1:] if word.startswith("config.") else []:
            path += f".{key}"
            if isinstance(group, ConfigDict) and key not in group:
                return unknown(f"--{path}", key, group)
            group = group[key] if isinstance(group, ConfigDict) else None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def run(
    main: Callable[[Invocation], int | None],
    *,
    config_file: str,
    errors: tuple[type[Exception], ...] = (),
    hosts: bool = False,
) -> typing.NoReturn:
    """Run a script: read the command line, with `hosts` join the other processes of the run, call `main`, exit.

    Wrong settings end the program with status 2 and the exceptions in `errors` with status 1, each with one message
    instead of a traceback.
    """
    invocations: list[Invocation] = []

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            invocations.append(read_flags(config_file, argv))
        except ConfigError as error:
            _fail(error, 2)
        return [argv[0]]

    def start(_: Sequence[str]) -> int | None:
        # Libraries tell of every file they write at the INFO level; --verbosity=0 shows it.
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            if hosts:
                join_processes(invocations[0].hosts)
            return main(invocations[0])
        except ConfigError as error:
            _fail(error, 2)
        except errors as error:
            _fail(error, 1)

    app.run(start, flags_parser=parse)
    raise SystemExit(0)


def join_processes(hosts: Mapping[str, Any]) -> None:
    """Join the other processes of a run, if there are any; call it before anything else of JAX.

    Args:
      hosts: values of the flags `HOSTS`; the environment says what they leave out, see
        `sharding.multihost.distributed.initialize`.

    Raises:
      DistributedError: the others did not appear in time.
    """
    from sharding.multihost.distributed import Limits, initialize

    limits = Limits(join=hosts["join_seconds"], silence=hosts["silence_seconds"])
    initialize(limits, coordinator=hosts["coordinator"], processes=hosts["processes"], index=hosts["process"])


def _fail(error: Exception, status: int) -> typing.NoReturn:
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(status) from None
