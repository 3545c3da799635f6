"""Run a command by name: `tessera train --config=lm:tiny`, or `python scripts/train.py --config=lm:tiny`.

`--help` and wrong flags are answered before JAX or a command's module is imported. A command's module has `SCHEMA` (its
settings, see `tessera.infra.schema`), `ERRORS` (exceptions that are one line, not a traceback) and `main(invocation)`,
which returns the exit status.
"""

import argparse
import difflib
import importlib
import os
import re
import signal
import sys
import threading
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

LINGER = 60.0  # seconds until a program that has failed is ended, whatever still runs in it


@dataclass(frozen=True)
class Flag:
    """A flag of one command: name, default (its type is the flag's) and meaning."""

    name: str
    default: Any
    meaning: str


@dataclass(frozen=True)
class Command:
    """What the command line knows of a command before it imports it.

    Attributes:
      module: where `SCHEMA`, `ERRORS` and `main` are.
      script: file under scripts/ that runs it; the configs whose `Command:` names that script are its configs.
      meaning: one line.
      config: the config without `--config`.
      also: further scripts whose configs it takes.
      flags: its own flags, beside those of all commands.
      environment: variables to set where they are not set, before JAX is imported.
      hosts: it runs on several hosts; the processes of a run find each other before `main`.
    """

    module: str
    script: str
    meaning: str
    config: str = ""
    also: tuple[str, ...] = ()
    flags: tuple[Flag, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    hosts: bool = False


COMMANDS: dict[str, Command] = {
    "train": Command(
        "tessera.cli.train",
        "train",
        "Train a language model.",
        "lm",
        also=("explain",),
        flags=(
            Flag("profile", "", "Steps to trace for xprof or TensorBoard, such as 10:12; they go to WORKDIR/profile."),
        ),
        hosts=True,
    ),
    "train-images": Command(
        "tessera.cli.train_images",
        "train_images",
        "Train on class folders that are larger than memory.",
        "images",
        hosts=True,
    ),
    "find-ticket": Command("tessera.cli.find_ticket", "find_ticket", "Search for lottery tickets.", "lottery_digits"),
    "analyze-ticket": Command(
        "tessera.cli.analyze_ticket",
        "analyze_ticket",
        "Connectivity, overlap and sharpness of found tickets.",
        "analyze",
    ),
    "study": Command("tessera.cli.study", "study", "Experiments on tickets.", "study_instability"),
    "tokenize": Command("tessera.cli.tokenize", "tokenize_text", "Tokenize a corpus into a token file.", "tokenize"),
    "fit": Command("tessera.cli.fit", "fit_scaling", "Fit a scaling law to a table of runs.", "fit"),
    "sweep": Command(
        "tessera.cli.sweep",
        "sweep",
        "Train a sweep of model sizes and fit it.",
        "isoflop",
        environment={"JAX_PLATFORMS": "cpu"},
    ),
    "compare": Command(
        "tessera.cli.compare", "compare", "Train arms over seeds and compare them.", "moe_vs_dense", hosts=True
    ),
    "explain": Command(
        "tessera.cli.explain",
        "explain",
        "Explain what a training step under a plan would cost.",
        "lm",
        also=("train",),
        flags=(
            Flag("hardware", "v5p", "What the step would run on, such as v5p or H100."),
            Flag("compile", "", "TPU slice to compile the step for, such as v5p:8x8x8 (extra tpu)."),
            Flag("devices", 0, "Number of devices; 0 takes the plan's (or the slice's)."),
            Flag("search", True, "Look for better plans."),
        ),
    ),
    "explain-serving": Command(
        "tessera.cli.explain_serving",
        "explain_serving",
        "Explain what plans cost a served model per token.",
        "serve",
        also=("serve", "generate"),
        flags=(
            Flag("hardware", "v5e", "What the model would be served on, such as v5e or H100."),
            Flag("devices", 8, "Number of devices; all plans of so many are explained where config.plan is empty."),
            Flag("context", 0, "Tokens of every text in the KV cache; 0 is half of config.sizes.length."),
            Flag("latency", 5.0, "Microseconds that a collective takes beside its bytes; a guess, not measured."),
        ),
    ),
    "serve": Command("tessera.cli.serve", "serve", "Serve a model over HTTP.", "serve", also=("generate",)),
    "generate": Command("tessera.cli.generate", "generate", "Continue a text.", "serve", also=("serve",)),
    "evaluate": Command("tessera.cli.evaluate", "evaluate", "Perplexity and bits per byte of texts.", "evaluate"),
    "prune": Command("tessera.cli.prune", "prune", "Prune a trained language model on text.", "prune"),
    "compare-pruning": Command(
        "tessera.cli.compare_pruning",
        "compare_pruning",
        "Prune a trained language model in several ways and compare them.",
        "compare_pruning",
    ),
    "quantize": Command("tessera.cli.quantize", "quantize", "Loss of a model in 8 and 4 bits.", "quantize"),
}
# Commands without a config.
PLAIN = {
    "demo": ("tessera.cli.demo", "The tour: five ideas on real data in a few minutes, and one page of them."),
    "report": ("tessera.cli.report", "One page from any runs: what differs, curves, tables."),
    "export-hf": ("tessera.cli.export_hf", "Write a run, a ticket of one or a GGUF file as a Hugging Face directory."),
    "merge": ("tessera.cli.merge", "Merge trained models of one shape: soup, task vectors, SLERP, TIES, DARE."),
    "doctor": ("tessera.cli.doctor", "Versions, devices, defaults and missing extras, to paste into an issue."),
}

# Flags of a run on several hosts; see `sharding.multihost.distributed`.
HOSTS = (
    Flag("coordinator", "", "host:port of the first process of a run on several hosts; auto: detected by JAX."),
    Flag("processes", 0, "Number of processes of the run."),
    Flag("process", -1, "Number of this process, from 0."),
    Flag("join_seconds", 300, "How long to wait for all processes to appear."),
    Flag("silence_seconds", 100, "Heartbeat timeout: how long a process may be silent before the others end."),
)
COMMON = (
    Flag("workdir", "", "Directory of the run, or its URL (s3://, gs://); one found there goes on."),
    Flag("upload_seconds", 15.0, "Seconds between two uploads of a --workdir at a URL."),
    Flag("cpu_devices", 0, "Devices that a CPU is split into, to try a plan on one machine; 0 leaves JAX's number."),
    Flag("verbosity", -1, "Log level: -1 warnings, 0 information of all libraries, 1 debugging."),
    *HOSTS,
)


@dataclass(frozen=True)
class Invocation:
    """What the command line said.

    Attributes:
      config: the settings, complete.
      name: the config's name with its argument ("lm-tiny").
      workdir: "" for the default.
      flags: values of all other flags by name.
      defaults: default of every setting that has one, dotted path -> value.
      prepared: directories that `prepare` made or checked, the run's own first, each with a hash of all settings.
    """

    config: Any
    name: str
    workdir: str = ""
    flags: Mapping[str, Any] = field(
        default_factory=lambda: {flag.name: flag.default for flag in COMMON if flag.name != "workdir"}
    )
    defaults: Mapping[str, Any] = field(default_factory=dict)
    prepared: list[tuple[Path, str]] = field(default_factory=list)

    def prepare(
        self, settings: Any = None, *, workdir: str = "", whole: bool = False, grows: Sequence[str] = ()
    ) -> Path:
        """Make or check the run's directory, see `tessera.infra.workdir.prepare`, and say which it is.

        Args:
          settings: what makes this run this run; the config by default.
          workdir: the directory where no `--workdir` is given; "" is that of `tessera.infra.workdir.prepare`.
          grows: see `tessera.infra.workdir.prepare`.
          whole: nothing but these settings decides what the run gives: where it was finished with them, `run` ends.

        Raises:
          AlreadyFinished: it was; see `whole`.
        """
        from tessera.infra import workdir as workdirs
        from tessera.infra.checkpoint import agreed

        settings = self.config if settings is None else settings
        path = workdirs.prepare(self.workdir or workdir, settings, name=self.name, defaults=self.defaults, grows=grows)
        key = workdirs.config_hash({"config": workdirs.resolve(self.config), "run": workdirs.resolve(settings)})
        first = not self.prepared
        self.prepared.append((path, key))
        if first and whole and agreed(workdirs.was_finished(path, key)):
            raise AlreadyFinished(path)
        if first:
            print(f"{self.name}: {path}", file=sys.stderr, flush=True)
        return path

    @property
    def hosts(self) -> dict[str, Any]:
        """Values of the flags `HOSTS`."""
        return {flag.name: self.flags[flag.name] for flag in HOSTS}


class AlreadyFinished(Exception):
    """A run with the same settings came to its end in this directory."""


def main(argv: Sequence[str] | None = None) -> typing.NoReturn:
    """Entry point of the console command `tessera`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        raise SystemExit(0 if argv else 2)
    name, *rest = argv
    if name in PLAIN:
        try:
            raise SystemExit(_import(PLAIN[name][0]).main(rest))
        except KeyboardInterrupt:
            _interrupted("run the same command again")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, [*COMMANDS, *PLAIN], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        _fail(f"tessera {name}: no such command; {hint}The commands are: {', '.join([*COMMANDS, *PLAIN])}", 2)
    run(name, rest)


def overview() -> str:
    """The commands, a line each."""
    rows = [(name, command.meaning) for name, command in COMMANDS.items()]
    rows += [(name, meaning) for name, (_, meaning) in PLAIN.items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:{width}}  {meaning}" for name, meaning in rows]
    return "usage: tessera COMMAND [--config=NAME[:VARIANT]] [--config.KEY=VALUE ...]\n\ncommands:\n" + "\n".join(
        [*lines, "", "tessera COMMAND --help lists its configs and flags, --fields every setting with its meaning."]
    )


def run(name: str | Command, argv: Sequence[str] | None = None) -> typing.NoReturn:
    """Run a command: read its command line, call its `main`, exit with the status.

    Args:
      name: a key of `COMMANDS`, or a command of a script's own.
      argv: the words behind the program's name; those of this process by default.

    Wrong settings end the program with status 2, the module's `ERRORS`, a directory in use and a full disk with 1, each
    with one message instead of a traceback; Ctrl-C with 130.
    """
    command = name if isinstance(name, Command) else COMMANDS[name]
    argv = list(sys.argv[1:] if argv is None else argv)
    options, overrides = parse_flags(command, argv, prog=_program(name, command))
    for variable, value in command.environment.items():
        os.environ.setdefault(variable, value)
    from tessera.infra.errors import ConfigError, DiskFull, RemoteError, WorkdirInUse, disk_full

    errors: tuple[type[BaseException], ...] = ()
    values = vars(options)
    try:
        config, config_name = _load(command, values)
        module = _import(command.module)
        errors = module.ERRORS
        if values.pop("fields") is not None:
            print(fields_table(module.SCHEMA, config, overrides))
            raise SystemExit(0)
        invocation = invoke(module.SCHEMA, config, overrides, config_name, values)
        if values["print_config"]:
            print(_as_text(invocation.config))
            raise SystemExit(0)
        _begin(values)
        if command.hosts:
            join_processes(invocation.hosts)
        raise SystemExit(_carry_out(module, invocation))
    except AlreadyFinished as found:
        path = values["workdir"] or found.args[0]
        print(f"already finished: {path}/report.html (remove that file to have it made again)")
        raise SystemExit(0) from None
    except Exception as error:
        # What failed may have left threads behind that wait for each other, such as a save's.
        last_resort = threading.Timer(LINGER, os._exit, [1])
        last_resort.daemon = True
        last_resort.start()
        if disk_full(error):
            place = "the disk is full; free space and run the same command again"
            print(f"error: {error if isinstance(error, DiskFull) else place}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)  # nothing can be saved any more, and the rest would say so again
        if isinstance(error, ConfigError):
            _fail(f"{error}{_more_devices(str(error))}", 2)
        if isinstance(error, (*errors, WorkdirInUse, RemoteError)):
            _fail(error, 1)
        if isinstance(error, OSError) and values["workdir"] and str(error.filename).startswith(values["workdir"]):
            _fail(f"--workdir={values['workdir']}: {error.strerror} ({error.filename})", 1)
        raise
    except KeyboardInterrupt:
        _interrupted("the same command goes on from what is saved")


def _import(module: str) -> Any:
    """Import a module; Ctrl-C acts when it is done, since extensions make tracebacks and ImportErrors of it."""
    asked: list[int] = []
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda signum, _: asked.append(signum)) if main_thread else None
    try:
        return importlib.import_module(module)
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, before)
        if asked:
            raise KeyboardInterrupt


def _interrupted(then: str) -> typing.NoReturn:
    print(f"interrupted; {then}", file=sys.stderr, flush=True)
    raise SystemExit(130) from None


def _carry_out(module: Any, invocation: Invocation) -> int:
    """The status of a command, whose directory is noted as finished; a directory at a URL is a local one meanwhile."""
    import jax

    from tessera.infra.checkpoint import agreed
    from tessera.infra.remote import mirrored
    from tessera.infra.workdir import mark_finished

    every, process = invocation.flags["upload_seconds"], jax.process_index()
    with mirrored(invocation.workdir, every, process, agreed) as workdir:
        status = module.main(replace(invocation, workdir=workdir)) or 0
        if invocation.prepared and not status:
            mark_finished(*invocation.prepared[0])
    return status


def parse_flags(
    command: Command, argv: Sequence[str], prog: str = "tessera"
) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """The flags of a command line, and its overrides as (path, text); exits with a message if it makes no sense."""
    overrides, rest = split_overrides(argv)
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [--config=NAME[:VARIANT]] [--config.KEY=VALUE ...] [flags]",
        description=command.meaning,
        epilog=configs_help(command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    text = f"Config by name or file, with its variant after a colon; {command.config} by default."
    parser.add_argument("--config", default=command.config, metavar="NAME[:VARIANT]", help=text)
    parser.add_argument(
        "--fields",
        nargs="?",
        const="",
        default=None,
        metavar="PART",
        help="List the settings: path, type, default, meaning.",
    )
    parser.add_argument("--print_config", action="store_true", help="Print the resolved settings and stop.")
    for flag in (*COMMON, *command.flags):
        kind = type(flag.default)
        if kind is bool:
            parser.add_argument(
                f"--{flag.name}", action=argparse.BooleanOptionalAction, default=flag.default, help=flag.meaning
            )
        else:
            parser.add_argument(f"--{flag.name}", type=kind, default=flag.default, help=flag.meaning)
    options = parser.parse_args(rest)
    return options, overrides


class _Parser(argparse.ArgumentParser):
    """argparse with one line for what is wrong, the nearest flag, and status 2."""

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        found, extra = self.parse_known_args(args, namespace)
        for word in extra:
            flag = word.partition("=")[0].lstrip("-")
            if not word.startswith("-"):
                _fail(f"arguments not understood: {word} (settings are written --config.key=value)", 2)
            known = [action.dest for action in self._actions]
            near = difflib.get_close_matches(flag.replace("-", "_"), known, n=1, cutoff=0.5)
            hint = f"; did you mean --{near[0]}?" if near else ""
            _fail(f"--{flag}: no such flag{hint} (--help lists them)", 2)
        return found

    def error(self, message: str) -> typing.NoReturn:
        _fail(message, 2)


def split_overrides(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Settings of a command line as (key, value), a key alone as true, and all words that are none."""
    overrides, rest, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        match = re.match(r"--?(no)?config\.([^=]+)(=(.*))?$", word, re.DOTALL)
        if match is None:
            rest.append(word)
            continue
        negated, path, equals, value = match.groups()
        if negated:
            value = "false"
        elif equals is None:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        overrides.append((path, value))
    return overrides, rest


def invoke(
    schema: Any, config: Mapping[str, Any], overrides: list[tuple[str, str]], name: str, values: Mapping[str, Any]
):
    """The complete settings of a command line as an `Invocation`.

    Raises:
      ConfigError: an override of no setting, or of the wrong type; a seed out of range.
    """
    from ml_collections import ConfigDict

    from tessera.infra import schema as schemas
    from tessera.infra.config import check_seeds

    given = schemas.assign(schema, config, overrides)
    complete = schema.complete(given)
    check_seeds(complete)
    defaults = schema.defaults(complete)
    flags = {key: value for key, value in values.items() if key not in ("config", "workdir", "fields", "print_config")}
    return Invocation(ConfigDict(complete), name, values.get("workdir", ""), flags, defaults)


def fields_table(schema: Any, config: Mapping[str, Any], overrides: list[tuple[str, str]]) -> str:
    """Every setting of a config: path, type, value, and what its docstring says."""
    from tessera.infra import schema as schemas
    from tessera.infra.config import describe_type

    complete = schema.complete(schemas.assign(schema, config, overrides))
    lines = []
    for one in schema.fields(complete):
        value: Any = complete
        for key in one.path.split("."):
            value = value.get(key) if hasattr(value, "get") else None
        lines.append(f"--config.{one.path}={value!r}  ({describe_type(one.hint)})\n      {one.meaning}")
    return "\n".join(lines)


def configs_help(command: Command) -> str:
    """The configs of a command with their variants, read off their source."""
    from tessera.infra.config_files import described

    scripts = (command.script, *command.also)
    found = [one for one in described() if one.script in scripts]
    lines = ["configs:"]
    for one in found:
        lines.append(f"  {one.name:22} {one.title}")
        lines += [f"    :{variant:19} {meaning}" for variant, meaning in one.variants.items() if variant]
    return "\n".join([*lines, "", "--fields lists every setting of a config with its meaning."])


def _load(command: Command, values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    from tessera.infra.config_files import load_config

    return load_config(values["config"], scripts=(command.script, *command.also))


def _begin(values: Mapping[str, Any]) -> None:
    """Logging, devices and the cache of compiled programs, before the first use of JAX."""
    from absl import flags, logging

    # Libraries read absl's flags; none of them are set here.
    flags.FLAGS.mark_as_parsed()
    logging.use_absl_handler()
    logging.get_absl_handler().addFilter(_said_once)
    sys.excepthook = _excepthook
    sys.unraisablehook = _unraisablehook
    # Libraries tell of every file they write at the level of information.
    logging.set_verbosity({-1: logging.WARNING, 0: logging.INFO}.get(values["verbosity"], logging.DEBUG))
    import jax

    if values["cpu_devices"]:
        jax.config.update("jax_num_cpu_devices", values["cpu_devices"])
    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        from tessera.infra.workdir import compiled_dir

        jax.config.update("jax_compilation_cache_dir", str(compiled_dir()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _more_devices(message: str) -> str:
    """How to have the devices that a plan asks for, on a machine without an accelerator."""
    wanted = re.search(r"makes (\d+) devices and there (?:is|are) \d+", message)
    jax = sys.modules.get("jax")
    if wanted is None or jax is None or jax.default_backend() != "cpu":
        return ""
    return f"; --cpu_devices={wanted[1]} splits this machine's CPU into so many, to try it"


def _said_once(record: Any) -> bool:
    """Whether to log a record: not what Orbax's threads say of a failed save, which the program raises itself."""
    return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


def _excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Python's own, but for what callbacks of a failed save say of the event loop that is gone with it."""
    if str(error) != "Event loop is closed":
        sys.__excepthook__(kind, error, trace)


def _unraisablehook(found: Any) -> None:
    """As `_excepthook`, for callbacks of TensorStore's own threads."""
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


def join_processes(hosts: Mapping[str, Any]) -> None:
    """Join the other processes of a run, if there are any; call it before anything else of JAX.

    Args:
      hosts: values of the flags `HOSTS`; JAX detects what they leave out, see
        `sharding.multihost.distributed.initialize`.

    Raises:
      DistributedError: the others did not appear in time.
    """
    from sharding.multihost.distributed import Limits, initialize

    limits = Limits(join=hosts["join_seconds"], silence=hosts["silence_seconds"])
    initialize(limits, coordinator=hosts["coordinator"], processes=hosts["processes"], index=hosts["process"])


def _as_text(config: Any) -> str:
    import json

    return json.dumps(config.to_dict(), indent=2, default=str)


def _program(name: str | Command, command: Command) -> str:
    if os.path.basename(sys.argv[0]) == "tessera" and isinstance(name, str):
        return f"tessera {name}"
    return f"python scripts/{command.script}.py"


def _fail(error: object, status: int) -> typing.NoReturn:
    text, root = str(error), Path(__file__).parents[2]
    if (root / "setup.py").exists():  # a checkout: what is installed is this, not a package of a registry
        text = text.replace("pip install 'tessera-jax[", f"pip install -e '{root}[")
    print(f"error: {text}", file=sys.stderr, flush=True)
    raise SystemExit(status) from None
