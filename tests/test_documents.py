"""Every command and code block of README and docs: blocks run as they stand, commands run shortened or are parsed.

A command that this file does not know fails, so that none can go stale unseen. Parsing is part of the default suite;
the rest is run by `-m docs`, as `.ci/run` does.
"""

import csv
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tessera.cli import demo
from tessera.cli import main as cli
from tessera.pages import tour

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PROGRAMS = ("python", "make", "tessera", "sbatch", "kubectl", "mpirun", "pip", "source", "curl", "git", "export", "cd")
# A command that begins with one of these is one inside a sentence, too.
INLINE = ("python", "make", "tessera", "sbatch", "kubectl", "mpirun", "pip")


def name_of(document):
    return str(document.relative_to(ROOT))


def blocks(language):
    """(document, number of the block there, text)."""
    return [
        (document, number, text)
        for document in DOCUMENTS
        for number, (kind, text) in enumerate(FENCE.findall(document.read_text(encoding="utf-8")))
        if kind == language
    ]


def console_commands():
    """Every command of a console block, continued lines joined."""
    found = []
    for document, _, text in blocks("console"):
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                found.append((document, line[2:].split("  #")[0].strip()))
    return found


def with_environment(command):
    """Variables that stand before a command, by name, and its words."""
    words, variables = shlex.split(command), {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    return variables, words


def inline_commands():
    """Every command in the text, which names what it is about and need not run as it stands."""
    found = []
    for document in DOCUMENTS:
        plain = FENCE.sub("", document.read_text(encoding="utf-8"))
        for text in re.findall(r"`([^`]+)`", plain):
            text = " ".join(text.split())
            if text.split(" ")[0] in INLINE and len(text.split(" ")) > 1:
                found.append((document, text))
    return found


CONSOLE = console_commands()
COMMANDS = CONSOLE + inline_commands()
SCRIPTS = {command.script: name for name, command in cli.COMMANDS.items()}


def test_there_is_something_to_check():
    assert len(COMMANDS) > 30 and len(blocks("python")) > 5


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=lambda x: x if isinstance(x, str) else name_of(x))
def test_every_command_can_be_parsed(document, command):
    """Scripts and their flags, configs and settings, make targets and files exist."""
    _, words = with_environment(command)
    program = words[0]
    assert program in PROGRAMS, f"{name_of(document)}: what is {command!r}?"
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    scripts = [
        word for word in words if word.endswith((".py", ".sh", ".sbatch", ".yaml")) and word.startswith("scripts/")
    ]
    for script in scripts:
        assert (ROOT / script).is_file(), f"{name_of(document)}: no {script}"
    if program == "tessera" and words[1] not in cli.PLAIN:
        parse(words[1], words[2:])
    elif program == "python" and scripts and Path(scripts[0]).parent.name == "scripts" and "..." not in words:
        if Path(scripts[0]).name != "evidence.py":  # which has no config
            parse(SCRIPTS[Path(scripts[0]).stem], words[words.index(scripts[0]) + 1 :])
    elif program == "python" and words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    elif program == "python" and words[1] == "-m":
        assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_test_that_is_named_exists(document):
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", document.read_text(encoding="utf-8")):
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{name}"


def parse(name, argv):
    import importlib

    command = cli.COMMANDS[name]
    options, overrides = cli.parse_flags(command, argv)
    config, config_name = cli._load(command, vars(options))
    return cli.invoke(importlib.import_module(command.module).SCHEMA, config, overrides, config_name, vars(options))


ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "2",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / f"jax-{jax.__version__}"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
TINY_LM = [
    "--config=lm:tiny",
    "--config.steps=4",
    "--config.batch_size=2",
    "--config.length=16",
    "--config.model.width=16",
]
TINY_LM += [
    "--config.model.heads=2",
    "--config.model.kv_heads=1",
    "--config.data.max_bytes=40000",
    "--config.eval.batches=1",
]

ADAPTED = [word for word in TINY_LM[1:] if "model" not in word]
COMPARED = [word.replace("--config.", "--config.run.") for word in ADAPTED] + ["--config.seeds=0"]


def run(directory, *words, variables=None, **options):
    before = processor_seconds()
    options |= {
        "cwd": directory,
        "env": ENVIRONMENT | (variables or {}),
        "capture_output": True,
        "text": True,
        "timeout": 900,
    }
    done = subprocess.run([sys.executable, *words], **options)
    if "TESSERA_TIMES" in os.environ:  # where `make test-docs` has them from
        with Path(os.environ["TESSERA_TIMES"]).open("a") as file:
            file.write(f"{processor_seconds() - before:7.1f} s  {shlex.join(words).replace(str(ROOT), '.')[:160]}\n")
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def processor_seconds():
    """Of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def script(name):
    return str(ROOT / "scripts" / f"{name}.py")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where the documents' commands run: with a small run in runs/lm, the named blocks, and the data that one makes."""
    made = tmp_path_factory.mktemp("documents")
    run(made, script("train"), *TINY_LM, "--workdir=runs/lm")
    for _, _, text in blocks("python"):
        if named := re.match(r"# (\w+\.py)\n", text):
            (made / named[1]).write_text(text, encoding="utf-8")
    run(made, "make_data.py")
    return made


@pytest.mark.docs
@pytest.mark.parametrize(
    ("document", "number", "text"),
    # The blocks of a tutorial are one program: `test_site.py` runs them.
    [block for block in blocks("python") if block[0].parent.name != "tutorials"],
    ids=lambda x: name_of(x) if isinstance(x, Path) else None,
)
def test_every_python_block_runs(document, number, text, directory):
    """As a program of its own; one that begins with `# name.py` has that name, for others to import."""
    named = re.match(r"# (\w+\.py)\n", text)
    file = directory / (named[1] if named else f"block_{document.stem}_{number}.py")
    file.write_text(text, encoding="utf-8")
    # A module that is only imported by the next block prints nothing.
    assert run(directory, file.name) or (named and "print" not in text)


# Commands of the documents as they run here, with flags that make them short. What is not here needs hours, an
# accelerator, a network or a cluster, and is parsed only.
SHORT = {
    "train": [*TINY_LM, "--workdir=runs/short"],
    "find_ticket": [
        *("--config=lottery_digits", "--config.train.steps=20it", "--config.search.levels=2", "--config.seeds=0,1"),
        "--workdir=runs/ticket",
    ],
    "analyze_ticket": ["--config.search=runs/ticket", "--config.analysis.points=3", "--config.analysis.lanczos=4"],
    "explain": ["--config=lm:base", "--config.plan=fsdp=4, tp=2", "--hardware=H100", "--workdir=runs/explain"],
    "explain_serving": ["--config.model.dir=runs/lm", "--hardware=v5e", "--devices=4"],
    "evaluate": ["--config.model.dir=runs/lm", "--config.texts=*.py", "--config.max_bytes=3000", "--config.stride=100"],
    "generate": ["--config.model.dir=runs/lm", "--config.prompt=def ", "--config.sampling.max_tokens=4"],
    "prune": [
        *("--config.model.dir=runs/lm", "--config.texts=text.py", "--config.calibration.sequences=4"),
        *("--config.calibration.length=16", "--config.length=16", "--workdir=runs/pruned"),
    ],
    "compare_pruning": [
        *("--config=compare_pruning:tiny", "--config.model.dir=runs/lm", "--config.texts=text.py"),
        *("--config.calibration.length=16", "--config.length=16", "--config.tokens=50", "--workdir=runs/ways"),
        "--config.arms.sparsegpt_blocks.structure=4x4",
    ],
    "study": [
        "--config=study_instability:tiny",
        "--config.train.steps=100it",
        "--config.study.steps=0",
        "--workdir=runs/study",
    ],
}


@pytest.mark.docs
@pytest.mark.parametrize("name", SHORT)
def test_commands_run_short(name, directory):
    (directory / "text.py").write_text("x = 1\n" * 300)
    if name == "analyze_ticket" and not (directory / "runs" / "ticket").exists():
        run(directory, script("find_ticket"), *SHORT["find_ticket"])
    run(directory, script(name), *SHORT[name])


@pytest.mark.docs
@pytest.mark.parametrize(
    ("package", "files"),
    [("tensorboardX", "tensorboard/events.out.tfevents.*"), ("wandb", "wandb/offline-run-*/run-*.wandb")],
)
def test_rows_go_to_tensorboard_and_to_wandb(package, files, directory):
    """The commands of howto/logging.md, where the package is installed: what they write has the losses by name."""
    pytest.importorskip(package)
    setting = {"tensorboardX": "tensorboard"}.get(package, package)
    (command,) = (command for _, command in CONSOLE if f"--config.log.{setting}=True" in command)
    variables, (_, *words) = with_environment(command)
    run(directory, "-c", "from tessera.cli.main import main; main()", *words, *TINY_LM[1:], variables=variables)
    (file,) = (directory / words[-1].partition("=")[2]).glob(files)
    assert b"loss" in file.read_bytes()


@pytest.mark.docs
def test_fit_on_a_table_of_runs(directory, shared_data):
    runs = shared_data("scaling/chinchilla_figure4.csv")
    out = run(
        directory,
        script("fit_scaling"),
        "--config=fit:hoffmann",
        f"--config.runs={runs}",
        "--config.resamples=50",
        "--workdir=runs/fit",
    )
    assert "477.8" in out


# Commands of the README with at most three minutes beside them, as they stand but for their data and directory.
STATED = {
    "study_transfer.py --config.data.dir=DATA --workdir=runs/transfer  # 2 min": ("study", ["study_transfer"], 120),
    "lm.py:tiny: 90 s": ("train", ["lm:tiny"], 90),
    "RUNS.csv --workdir=runs/fit  # 10 s": (
        "fit_scaling",
        ["fit", "--config.runs={data}/scaling/chinchilla_figure4.csv"],
        10,
    ),
    "isoflop.py:tiny --workdir=runs/isoflop-tiny  # 2 min": ("sweep", ["isoflop:tiny"], 120),
}


@pytest.mark.slow
@pytest.mark.parametrize("said", STATED)
def test_times_beside_commands_are_true(said, tmp_path, shared_data):
    """Within a factor of two, in processor time, so that a busy machine counts no more than a quiet one."""
    assert said in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split("\n"))
    name, (config, *more), seconds = STATED[said]
    data = shared_data("scaling/chinchilla_figure4.csv").parents[1]
    flags = [flag.format(data=data) for flag in more]
    if name == "study":
        flags.append(f"--config.data.dir={data}")
    before = processor_seconds()
    run(tmp_path, script(name), f"--config={config}", *flags, "--workdir=run")
    assert seconds / 2 <= processor_seconds() - before <= seconds * 2


# What shortens the commands of docs/data.md.
SHORTER = {
    "train": [flag for flag in TINY_LM if not flag.startswith(("--config=", "--config.data"))],
    "find-ticket": ["--config.train.steps=20it", "--config.search.levels=1", "--config.seeds=0,"],
    "study": ["--config.train.steps=40it", "--config.study.steps=0,", "--config.study.densities=1.0,"],
    "tokenize": [],
    "train-images": [],
    "sweep": [
        *("--config.plan.widths=(8, 12)", "--config.plan.budgets=(5e8, 1e9)", "--config.plan.least_steps=10"),
        *("--config.plan.tokens_per_parameter=(0.1, 1e4)", "--config.plan.warmup=4", "--config.train.noise_batches=2"),
        *("--config.train.eval_tokens=4096", "--config.report.resamples=20"),
    ],
}


@pytest.mark.docs
def test_the_commands_on_data_of_ones_own(directory):
    """As they stand, on the files that the document's first block makes."""
    found = [shlex.split(command) for document, command in CONSOLE if document.name == "data.md"]
    console, said = ("-c", "from tessera.cli.main import main; main()"), {}
    for words in found:
        if words[0] == "tessera":
            said[words[-1]] = run(directory, *console, *words[1:], *SHORTER[words[1]])
    assert len(said) == 11 and "test accuracy" in said["--workdir=runs/images"]
    # Of the 507 lines, 7 were planted twice.
    assert "500 documents" in said["--workdir=tokens/corpus"] and "7 duplicates" in said["--workdir=tokens/corpus"]
    assert "bits per byte" in said["--workdir=runs/tokens"]
    with (directory / "runs" / "sweep" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows and all(float(row["bits_per_byte"]) > 0 and int(row["unique_tokens"]) > 0 for row in rows)


@pytest.fixture(scope="module")
def exported(directory):
    """What `export-hf` says that makes models/lm of the small run."""
    return run(directory, "-c", "from tessera.cli.main import main; main()", "export-hf", "runs/lm", "models/lm")


@pytest.mark.docs
def test_a_model_is_adapted(directory, exported):
    """Those of adapting.md, a few steps each, from the directory that `export-hf` made of a tiny run."""
    console, made = ("-c", "from tessera.cli.main import main; main()"), directory / "models"
    for document, command in CONSOLE:
        if document.name == "adapting.md" and command.startswith("tessera "):
            _, *words = shlex.split(command)
            short = {"train": ADAPTED, "compare": COMPARED}.get(words[0], [])
            narrow = [f"--config.arms.{arm}.lora.rank=2" for arm in ("lora", "lora_distill") if "recover" in command]
            run(directory, *console, *words, *short, *(narrow if words[0] == "compare" else []))
    assert (directory / "runs" / "lora" / "adapter" / "adapter_config.json").exists()
    for name, arms in (("recover", 4), ("tickets", 5)):
        with (directory / "runs" / name / "runs.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == arms and all(float(row["validation_loss"]) > 0 for row in rows)
    assert (made / "lora" / "config.json").exists() and (directory / "runs" / "recovered" / "report.html").exists()


# What shortens the commands of docs/pruning.md.
PRUNING = {
    "prune": [
        *("--config.calibration.sequences=8", "--config.calibration.length=16", "--config.calibration.max_bytes=20000"),
        "--config.length=16",
    ],
    "evaluate": ["--config.sizes.length=32"],
    "compare-pruning": [
        *("--config.length=16", "--config.tokens=100", "--config.calibration.length=16"),
        *("--config.calibration.max_bytes=20000", "--config.arms.sparsegpt_blocks.structure=4x4"),
    ],
}


@pytest.mark.docs
def test_the_commands_on_pruning(directory):
    """As they stand, on the small run."""
    (directory / "notes.txt").write_text("Text that is no program, to judge on.\n" * 20)
    console = ("-c", "from tessera.cli.main import main; main()")
    found = [shlex.split(command) for document, command in CONSOLE if document.name == "pruning.md"]
    said = {words[-1]: run(directory, *console, *words[1:], *PRUNING[words[1]]) for words in found}
    assert len(said) == 6 and "notes.txt: sparsegpt is" in said.pop("--workdir=runs/compared")
    assert all("| notes.txt |" in text for text in said.values())
    assert json.loads((directory / "runs" / "sparse" / "result.json").read_text())["density"] == 0.5
    narrow = json.loads((directory / "runs" / "narrow" / "result.json").read_text())
    assert narrow["pruned_parameters"] < narrow["parameters"]


@pytest.mark.docs
def test_the_tutorial_on_pruning(directory, exported):
    """Its commands and its assertion, with a tiny model in the place of SmolLM2."""
    shutil.copytree(directory / "models" / "lm", directory / ".cache" / "smollm2")
    (directory / "notes.txt").write_text("Text that is no program, to judge on.\n" * 20)
    console, ran = ("-c", "from tessera.cli.main import main; main()"), []
    for document, command in CONSOLE:
        if document.stem == "prune_and_serve" and command.startswith("tessera ") and " serve " not in command:
            _, *words = shlex.split(command)
            ran.append(words[0])
            run(directory, *console, *words, *PRUNING.get(words[0], []))
    assert ran == ["prune", "prune", "generate"]
    (text,) = (text for document, _, text in blocks("python") if document.stem == "prune_and_serve")
    assert "density 0.5" in run(directory, "-c", text)


# What makes the tour short: everything of it runs, on less.
FEWER = {
    "find-ticket": ("--config.train.steps=20it", "--config.search.levels=2", "--config.seeds=0,1"),
    "compare": ("--config.run.steps=30", "--config.run.eval.batches=1", "--config.run.data.max_bytes=200000"),
    "train": ("--config.eval.batches=1", "--config.data.max_bytes=200000"),
    "generate": ("--config.sampling.max_tokens=8",),
    "report": (),
    "sweep": (
        *("--config.plan.widths=(8, 12, 16, 20)", "--config.plan.budgets=(2e8, 5e8)", "--config.plan.least_steps=5"),
        *("--config.plan.tokens_per_parameter=(0.1, 1e4)", "--config.plan.warmup=2", "--config.train.eval_tokens=4096"),
        "--config.report.resamples=20",
    ),
}


def shortened(step):
    """The step with the flags of `FEWER`."""
    return step._replace(words=(*step.words, *FEWER[step.words[0]]))


def make_tour(directory):
    """Run the tour with `FEWER`, every command a process as for a user; returns its page."""
    parts = {name: tuple(map(shortened, steps)) for name, steps in demo.PARTS.items()}
    assert demo.carry_out(str(directory), parts) == 0 and demo.finish(str(directory)) == 0
    return directory / "report.html"


@pytest.mark.docs
def test_the_demo(tmp_path):
    """`make demo` to its page, on less; `test_pages.py` looks at the page in a browser."""
    page = make_tour(tmp_path / "tour").read_text(encoding="utf-8")
    assert page.count("<figure") >= 4 and "text colored by expert" in page  # a picture a part
    assert all(f">{title}</h2>" in page for title in tour.TITLES.values())
    assert "tokens that the last weights go on with" in (tmp_path / "tour/experts/moe-0/report.html").read_text()


@pytest.mark.docs
def test_the_commands_on_pages(directory):
    """Those of reports.md on runs that they name; the tour has a test of its own."""
    run(directory, script("train"), *TINY_LM, "--config.model.ff=24", "--workdir=runs/wide")
    run(directory, script("train"), *TINY_LM, "--config.model.mlp=routed", "--workdir=runs/moe")
    if not (directory / "runs" / "ticket").exists():
        run(directory, script("find_ticket"), *SHORT["find_ticket"])
    console = ("-c", "from tessera.cli.main import main; main()")
    for document, command in CONSOLE:
        if document.name == "reports.md" and command.startswith("tessera report"):
            run(directory, *console, *shlex.split(command)[1:])
    pages = {name: (directory / "runs" / f"{name}.html").read_text() for name in ("report", "compared", "moe")}
    assert ">model.ff<" in pages["compared"] and "Searches" in pages["compared"]
    assert "Searches" not in pages["report"]
    assert pages["moe"].count("text colored by expert") == 2  # a text per routed layer


@pytest.mark.docs
def test_a_run_becomes_a_hugging_face_directory(directory, exported):
    console = ("-c", "from tessera.cli.main import main; main()")
    assert "vocabulary 256" in exported and (directory / "models" / "lm" / "tokenizer.json").exists()
    for document, command in CONSOLE:
        if document.name == "inference.md" and command.startswith("tessera merge"):
            out = run(directory, *console, *shlex.split(command)[1:])
            assert "models merged by" in out and (directory / "models" / "merged" / "tokenizer.json").exists()
