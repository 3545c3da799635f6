"""The command line of every command: flags, fields, configs by name, and what is refused."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.cli import main as cli
from tessera.infra.config_files import CONFIGS, describe, described, load_config
from tessera.infra.errors import ConfigError
from tessera.infra.schema import assign, parse

ROOT = Path(__file__).parents[3]
BY_SCRIPT = {command.script: name for name, command in cli.COMMANDS.items()}
CASES = [
    (BY_SCRIPT[one.script], f"{one.name}:{variant}" if variant else one.name)
    for one in described()
    if one.script in BY_SCRIPT
    for variant in one.variants or ("",)
]


def schema_of(command):
    return importlib.import_module(cli.COMMANDS[command].module).SCHEMA


def read(command, *argv):
    options, overrides = cli.parse_flags(cli.COMMANDS[command], argv)
    config, name = cli._load(cli.COMMANDS[command], vars(options))
    return cli.invoke(schema_of(command), config, overrides, name, vars(options))


@pytest.mark.parametrize(("command", "text"), CASES)
def test_every_field_of_every_config_has_a_value_and_a_sentence(command, text):
    schema = schema_of(command)
    config = schema.complete(load_config(text)[0])
    for one in schema.fields(config):
        assert one.meaning, f"{text}: config.{one.path} has no sentence under Attributes of {one.owner}"
    unknown = set(_leaves(load_config(text)[0])) - {one.path for one in schema.fields(config)}
    open_groups = {one.path for one in schema.fields(config) if one.path.endswith(".*")}
    unknown = {path for path in unknown if not any(path.startswith(group[:-1]) for group in open_groups)}
    options = {one.path for one in schema.fields(config)}
    assert not {path for path in unknown if path.rpartition(".")[0] not in options}, "settings that no dataclass has"


def _leaves(config, path=""):
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


@pytest.mark.long
def test_thirty_random_fields_are_set_from_the_command_line():
    draw = random.Random(0)
    cases = []
    for command in cli.COMMANDS:
        schema = schema_of(command)
        config = schema.complete(load_config(cli.COMMANDS[command].config)[0])
        cases += [(command, one) for one in schema.fields(config) if not one.path.endswith(".*")]
    cases.remove(next(case for case in cases if (case[0], case[1].path) == ("study", "name")))  # picks the settings
    done = 0
    for command, one in draw.sample(cases, 60):
        text = _other(one)
        if text is None:
            continue
        found = read(command, f"--config.{one.path}={text}").config
        for key in one.path.split("."):
            found = found[key]
        expected = parse(text, one.hint)
        assert _plain(found) == _plain(expected), one.path
        done += 1
    assert done >= 30


def _plain(value):
    value = value.to_dict() if hasattr(value, "to_dict") else value
    return list(value) if isinstance(value, tuple) else value


def _other(one):
    """Text for another value than the default, None where the type has no easy one."""
    if one.chooses:
        return None
    for text in ("7", "true" if one.default is False else "false", "0.25", "1,2", "none", "{'a': 1}", "word"):
        try:
            if parse(text, one.hint) != one.default:
                return text
        except ConfigError:
            continue
    return None


def test_flags_and_names(tmp_path, monkeypatch):
    said = read("train", "--config=lm:small", "--config.lr=3", "--config.model.width", "9", "--workdir=here")
    assert (said.config.lr, said.config.model.width, said.workdir, said.name) == (3.0, 9, "here", "lm-small")
    assert read("train", "--config.log.tensorboard").config.log.tensorboard is True
    assert read("train", "--noconfig.model.tied").config.model.tied is False
    twice = read("find-ticket", "--config.model.hidden=(20, 10)", "--config.model.hidden=(5,)")
    assert tuple(twice.config.model.hidden) == (5,)  # the last one counts
    assert said.defaults["model.norm_eps"] == said.config.model.norm_eps and said.hosts["process"] == -1
    # From anywhere, by name, and by a path relative to the checkout.
    monkeypatch.chdir(tmp_path)
    for text in ("lm", "lm.py", "configs/lm.py", str(CONFIGS / "lm.py")):
        assert read("train", f"--config={text}:base").name == "lm-base"
    (tmp_path / "mine.py").write_text(
        "from ml_collections import ConfigDict\nfrom tessera.configs import lm\n\n"
        "def get_config(size='small'):\n    config = lm.get_config(size)\n    config.lr = 0.5\n    return config\n"
    )
    assert (
        read("train", "--config=mine.py").config.lr == 0.5 and read("train", "--config=mine:tiny").config.steps == 400
    )


def test_settings_of_the_front_door():
    """What the documents promise of searches, with configs that do not mention it."""
    digits = ["--config.search.schedule=cubic", "--config.search.teacher=dense", "--config.train.distill=.5"]
    config = read("find-ticket", *digits, "--config.model.name=conv2", "--config.data.seed=1").config
    assert config.model.name == "conv2" and "hidden" not in config.model and config.search.teacher == "dense"
    assert (
        read("find-ticket", "--config=lottery_mnist", "--config.search.structure=2:4").config.search.structure == "2:4"
    )
    decay = read("train", "--config.optimizer.schedule=wsd", "--config.optimizer.decay=.3")
    assert decay.config.optimizer.decay == 0.3
    routed = read("train", "--config.model.mlp=routed", "--config.model.moe.router.k=1")
    assert routed.config.model.moe.router.k == 1


WRONG = {
    "a misspelt setting": (["--config.lrr=3"], r"--config\.lrr: no such setting; did you mean 'lr'\?"),
    "a misspelt group": (["--config.modle.width=3"], r"--config\.modle: no such setting; did you mean 'model'\?"),
    "not a number": (["--config.lr=abc"], r"--config\.lr: float expected, got 'abc'"),
    "no such config": (["--config=ml:tiny"], r"--config=ml:tiny: no such config; .*There are: .*lm, "),
    "no such variant": (["--config=lm:tny"], r"no such variant; did you mean 'tiny'\?"),
    "another script's": (["--config=lottery_digits"], r"this config is for scripts/find_ticket\.py"),
    "a variant of none": (["--config=serve:x"], r"this config is for scripts/(serve|generate)\.py"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_one_line(case):
    argv, message = WRONG[case]
    with pytest.raises(ConfigError, match=message) as caught:
        read("train", *argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--wrkdir=x"], "error: --wrkdir: no such flag; did you mean --workdir?"),
        (["lr=3"], "error: arguments not understood: lr=3"),
        (["--processes=many"], "error: argument --processes: invalid int value: 'many'"),
    ],
)
def test_wrong_flags_are_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as status:
        cli.parse_flags(cli.COMMANDS["train"], argv)
    assert status.value.code == 2 and capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    ("command", "override"),
    [
        ("train", ("seed", "-1")),
        ("find-ticket", ("seeds", "0,1099511627776")),
        ("serve", ("sampling.seed", "4294967296")),
    ],
)
def test_a_seed_of_any_command_is_checked(command, override):
    with pytest.raises(ConfigError, match=rf"config\.{override[0]}=.*: a seed is a whole number in 0"):
        cli.invoke(schema_of(command), load_config(cli.COMMANDS[command].config)[0], [override], "x", {})


def test_a_config_of_ones_own_that_fails_is_named(tmp_path):
    for text, message in (
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "no function get_config"),
        ("def get_config():\n    return 3", "gave int, not an ml_collections.ConfigDict"),
        ("raise KeyError('gone')", "KeyError: 'gone'"),
    ):
        file = tmp_path / f"c{len(message)}.py"
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(str(file))


def run(*argv, **options):
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=ROOT, timeout=120, **options)


FAILING = """
import dataclasses, sys, threading, types
from tessera.cli import main as cli
from tessera.infra.schema import Schema

def main(invocation):
    {body}

cli.LINGER = 1.0
schema = Schema(dataclasses.make_dataclass("Empty", []))
module = types.SimpleNamespace(SCHEMA=schema, ERRORS=(ZeroDivisionError,), main=main)
sys.modules["failing"] = module
cli._load = lambda command, values: ({{}}, "failing")
cli.run(cli.Command("failing", "failing", "Fail."), ["--workdir=runs/x"])
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "raise OSError(28, 'No space left on device')",
            "error: the disk is full; free space and run the same command",
        ),
        (
            """type("Lost", (), {"__del__": lambda self: exec("raise RuntimeError('Event loop is closed')")})(); """
            "raise OSError(28, 'No space left on device')",
            "error: the disk is full; free space and run the same command",
        ),
        (
            "raise PermissionError(13, 'Permission denied', 'runs/x/a')",
            "error: --workdir=runs/x: Permission denied (runs",
        ),
        ("threading.Thread(target=threading.Event().wait).start(); 1 / 0", "error: division by zero"),
    ],
    ids=["full disk", "full disk, callbacks", "read-only", "a thread that waits for ever"],
)
def test_a_failure_ends_the_program_with_one_line(body, message):
    found = run("-c", FAILING.format(body=body))
    assert found.returncode == 1 and found.stderr.startswith(message) and len(found.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", [*cli.PLAIN, "generate"])
def test_ctrl_c_is_one_line_of_every_command(name, monkeypatch, capsys, request):
    """It comes while the command is imported, which extensions of JAX and NumPy must not see."""
    seen = []
    # A test run in the background of a shell is started with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def slow_import(module):
        os.kill(os.getpid(), signal.SIGINT)
        seen.append(module)

    monkeypatch.setattr(cli.importlib, "import_module", slow_import)
    monkeypatch.setattr(cli, "_load", lambda command, values: ({}, "config"))
    with pytest.raises(SystemExit) as stop:
        cli.main([name])
    said = capsys.readouterr().err
    assert stop.value.code == 130 and said.startswith("interrupted; ") and said.count("\n") == 1
    assert len(seen) == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler


FINISHING = """
import dataclasses, pathlib, sys, types
from tessera.cli import main as cli
from tessera.infra.schema import Schema

def main(invocation):
    workdir = invocation.prepare({"seed": 1}, whole=True)
    print("works")
    (workdir / "report.html").write_text("")
    return 1 if "fails" in sys.argv else 0

schema = Schema(dataclasses.make_dataclass("Empty", [("seed", int, dataclasses.field(default=1))]))
sys.modules["finishing"] = types.SimpleNamespace(SCHEMA=schema, ERRORS=(), main=main)
cli._load = lambda command, values: ({}, "finishing")

def run(*more):
    try:
        cli.run(cli.Command("finishing", "finishing", "Finish."), [f"--workdir={sys.argv[1]}", *more])
    except SystemExit as stop:
        print(stop.code)

sys.argv.append("fails")
run()
sys.argv.pop()
run()
run()
run("--config.seed=2")
pathlib.Path(sys.argv[1], "report.html").unlink()
run()
"""


def test_a_finished_run_says_so_and_ends(tmp_path):
    """Not one that failed, nor with another setting, nor where its report is gone."""
    found = run("-c", FINISHING, str(tmp_path / "run"))
    works = ["works", "0"]
    done = f"already finished: {tmp_path / 'run'}/report.html (remove that file to have it made again)"
    assert found.stdout.splitlines() == ["works", "1", *works, done, "0", *works, *works], found.stderr
    assert found.stderr.splitlines().count(f"finishing: {tmp_path / 'run'}") == 4


def test_what_a_message_adds_for_this_machine(capsys):
    assert cli._more_devices("config.plan: plan 'tp=2': tp=2 makes 2 devices and there are 1; nearest").startswith(
        "; --cpu_devices=2 splits"
    )
    assert cli._more_devices("config.lr: float expected") == ""
    with pytest.raises(SystemExit):
        cli._fail("it needs the extra `hf`: pip install 'tessera-jax[hf]'", 1)
    assert f"pip install -e '{ROOT}[hf]'" in capsys.readouterr().err


def test_help_imports_no_jax_and_lists_configs_and_variants():
    code = (
        "import sys; sys.argv = ['train.py', '--help']\n"
        "from tessera.cli.main import run\n"
        "try: run('train')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "loaded = [m for m in ('jax', 'numpy', 'ml_collections', 'absl') if m in sys.modules]\n"
        "assert not loaded, loaded"
    )
    found = run("-c", code)
    assert found.returncode == 0, found.stderr
    for text in ("  lm ", ":tiny", "  moe_lm ", ":deepseek", "--fields", "--workdir"):
        assert text in found.stdout
    overview = run("-c", "from tessera.cli.main import main; main(['--help'])")
    assert overview.returncode == 0 and all(name in overview.stdout for name in (*cli.COMMANDS, *cli.PLAIN))


def test_every_script_is_a_command_and_every_config_has_one():
    # evidence.py runs commands of the checkout's pages: it has no config, and no use where it is installed.
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"__init__", "evidence"}
    assert scripts == set(BY_SCRIPT)
    for path in sorted(CONFIGS.glob("[a-z]*.py")):
        about = describe(path)
        assert about.script, f"{path.name}: no `Command:` with a script"
        for variant in about.variants:
            load_config(f"{path.stem}:{variant}" if variant else path.stem)


@pytest.mark.long
def test_fields_and_print_config_run_nothing():
    table = run("-m", "scripts.find_ticket", "--fields", "--config.model.name=conv2")
    assert table.returncode == 0, table.stderr
    assert "--config.model.blocks=((64, 64),)" in table.stdout and "--config.search.structure=" in table.stdout
    shown = run("-m", "scripts.train", "--print_config", "--config.lr=0.25")
    assert json.loads(shown.stdout)["lr"] == 0.25 and shown.returncode == 0


def test_an_unknown_command_gets_the_nearest(capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(["trian"])
    assert status.value.code == 2 and "did you mean 'train'?" in capsys.readouterr().err


def test_the_older_of_two_versions_reads_as_defaults():
    """A field that a later version adds is its default where a config does not have it."""
    schema = schema_of("train")
    older = schema.complete(load_config("lm:tiny")[0])
    del older["model"]["norm_eps"], older["log"]
    assert schema.complete(assign(schema, older, [])) == schema.complete(load_config("lm:tiny")[0])
