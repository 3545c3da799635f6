"""What one pastes into an issue: versions, devices, what every "auto" would choose, missing extras, caches and disk."""

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

import tessera
from tessera.infra.remote import cache_dir
from tessera.infra.workdir import revision

DISTRIBUTION = "tessera-jax"
CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml-collections", "numpy", "scipy", "grain")
# Extras of other packages, by what they install.
BROUGHT = {"jax[tpu]": "libtpu", "jax[cuda13]": "jax-cuda13-plugin"}
# Variables that change what JAX does; nothing else of the environment is printed.
VARIABLES = re.compile(r"JAX_|XLA_|LIBTPU_|TPU_|CUDA_VISIBLE_|TESSERA_|OMP_NUM_THREADS")
GIB = 2**30


def main(argv: Sequence[str] = ()) -> int:
    """Print the report; returns the exit status 0."""
    description = "Versions, devices, defaults and missing extras, to paste into an issue."
    argparse.ArgumentParser(prog="tessera doctor", description=description).parse_args(list(argv))
    print(report())
    return 0


def report() -> str:
    """All sections as plain text, one fact a line."""
    sections = {
        "tessera": _tessera,
        "machine": _machine,
        "packages": _packages,
        "devices": _devices,
        "auto chooses": lambda: _rows((name, _said(choice)) for name, choice in CHOICES.items()),
        "extras": _extras,
        "caches and disk": _disk,
        "environment": _environment,
    }
    return "\n\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in lines()) for title, lines in sections.items())


def _rows(pairs) -> Iterator[str]:
    pairs = list(pairs)
    width = max((len(name) for name, _ in pairs), default=0)
    return (f"{name:{width}}  {value}" for name, value in pairs)


def _said(function: Callable[[], object]) -> str:
    """What a function returns, or its error: a report must not end in the fault that it is about."""
    try:
        return str(function())
    except Exception as error:
        return f"unknown ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _tessera() -> Iterator[str]:
    commit = revision()
    installed = _version(DISTRIBUTION)
    return _rows(
        [
            ("version", tessera.__version__),
            ("installed", "no, imported by path" if installed == "missing" else installed),
            ("location", Path(tessera.__file__).parent),
            ("revision", commit["revision"] + (", changed since" if commit["changed"] else "")),
        ]
    )


def _machine() -> Iterator[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return _rows(
        [
            ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
            ("system", platform.platform()),
            ("cores", f"{cores} of {os.cpu_count()} usable"),
            ("memory", _said(lambda: f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.1f} GiB")),
        ]
    )


def _packages() -> Iterator[str]:
    return _rows((package, _version(package)) for package in CORE)


def _devices() -> Iterator[str]:
    def listed() -> str:
        kinds: defaultdict[str, int] = defaultdict(int)
        for device in jax.devices():
            limit = (device.memory_stats() or {}).get("bytes_limit")
            kinds[device.device_kind + (f", {limit / GIB:.1f} GiB" if limit else "")] += 1
        return "; ".join(f"{count} x {kind}" for kind, count in kinds.items())

    return _rows(
        [
            ("platform", _said(jax.default_backend)),
            ("devices", _said(listed)),
            ("processes", _said(lambda: f"{jax.process_count()}, this is {jax.process_index()}")),
        ]
    )


def _kernels() -> str:
    from moe.kernels.implementations import choose

    return choose("auto")


# Choices made inside functions are read off the program that "auto" traces to.
def _exchange() -> str:
    from jax.sharding import Mesh, PartitionSpec

    from moe import parallel, route

    def exchange(x_ND):
        routing = route.top_k(x_ND, k=1)
        return parallel.all_to_all(x_ND, routing, lambda rows, sizes: rows, "ep")

    spec = PartitionSpec("ep")
    run = jax.shard_map(exchange, mesh=Mesh(jax.devices()[:1], ("ep",)), in_specs=spec, out_specs=spec)
    return "ragged" if "ragged_all_to_all" in str(jax.make_jaxpr(run)(jnp.ones((4, 2)))) else "padded"


def _convolution() -> str:
    from tessera.models.convolution import conv

    program = str(jax.make_jaxpr(conv)(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))))
    return "conv (XLA's convolution)" if "conv_general_dilated" in program else "patches (one product)"


def _stack() -> str:
    from tessera.tickets.train import over_stack

    program = str(jax.make_jaxpr(over_stack(lambda x: x + 1, "auto"))(jnp.ones(2)))
    return "map (one ticket after the other)" if "scan" in program else "vmap (all tickets at once)"


CHOICES: dict[str, Callable[[], str]] = {
    "kernels of experts": _kernels,
    "exchange of experts": _exchange,
    "convolutions": _convolution,
    "stack of tickets": _stack,
}


def _extras() -> Iterator[str]:
    """Every extra with what it lacks, from the metadata of the installed distribution."""
    try:
        required = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return iter([f"not known: {DISTRIBUTION} is not installed"])
    missing: dict[str, list[str]] = {}
    for line in required:
        match = re.match(r"\s*([\w.-]+(?:\[[\w,-]+\])?).*;.*extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if match:
            package, extra = match.groups()
            lacks = missing.setdefault(extra, [])
            package = BROUGHT.get(package, package.partition("[")[0])
            if _version(package) == "missing":
                lacks.append(package)
    advice = f"pip install '{DISTRIBUTION}[NAME]' adds one"
    return iter(
        [
            *_rows((name, f"lacks {', '.join(lacks)}" if lacks else "installed") for name, lacks in missing.items()),
            advice,
        ]
    )


def _size(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory}, not there yet"
    files = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
    return f"{directory}, {len(files)} files, {sum(files) / GIB:.2f} GiB"


def _disk() -> Iterator[str]:
    compiled = getattr(jax.config, "jax_compilation_cache_dir", None)
    here = Path.cwd()
    return _rows(
        [
            ("data", _said(lambda: _size(cache_dir()))),
            ("compiled programs", _said(lambda: _size(Path(compiled)) if compiled else "no cache")),
            ("free", _said(lambda: f"{shutil.disk_usage(here).free / GIB:.1f} GiB at {here}")),
        ]
    )


def _environment() -> Iterator[str]:
    found = [(name, value) for name, value in sorted(os.environ.items()) if VARIABLES.match(name)]
    return _rows(found or [("none", "of the variables that JAX reads is set")])


if __name__ == "__main__":
    raise SystemExit(main())
