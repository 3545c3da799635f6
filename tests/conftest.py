"""Every test sees eight CPU devices, checked shapes and types, and compiled programs kept between runs."""

import collections
import functools
import gc
import json
import os
import platform
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest

CPU = os.environ.get("TESSERA_TEST_PLATFORM", "cpu") == "cpu"
# A test compiles a program to run it once on small arrays: without what LLVM and XLA do for speed the suite takes
# half the time. JAX 0.12 generates code with the fusion emitters alone; at level 0 they give NaN gradients of max
# pooling with AVX2 and none with AVX. Child processes read the variable; TESSERA_TEST_OPTIMIZE=1 compiles as users do.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
elif platform.machine() in ("x86_64", "AMD64"):
    FLAGS += " --xla_cpu_max_isa=AVX"
else:
    FLAGS = "--xla_backend_optimization_level=1"
if CPU and not int(os.environ.get("TESSERA_TEST_OPTIMIZE", "0")):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
# Before any other use of JAX: the device count is read once.
if CPU:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many small objects that live: at Python's own thresholds a tenth of the suite's time is the collector's.
gc.set_threshold(50_000, 20, 20)
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".cache" / f"jax-{jax.__version__}"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

# JAX 0.10 makes an MLIR context for each program it lowers, 2.5 ms of processor time; later versions do not. The
# programs of a module of tests share one.
if SHARED_CONTEXT := jax.__version_info__ < (0, 11):
    from jax._src.interpreters import mlir

    mlir.make_ir_context = functools.cache(mlir.make_ir_context)

if not find_spec("jaxtyping"):
    # A GPU machine with only jax, flax, optax, numpy and pytest.
    sys.path.append(str(Path(__file__).parent / "bare"))
# TESSERA_TEST_TYPES=0 runs what users run, without checks, in a fifth less processor time.
if find_spec("beartype") and int(os.environ.get("TESSERA_TEST_TYPES", "1")):
    from jaxtyping import install_import_hook

    install_import_hook(["lottery", "moe", "sharding", "scaling", "tessera"], "beartype.beartype")

if find_spec("hypothesis"):
    from hypothesis import settings

    # An example that compiles, or waits for a busy core, takes longer than any deadline and is not wrong.
    # `make test-faults` draws more examples.
    settings.register_profile("tessera", deadline=None, max_examples=int(os.environ.get("TESSERA_FUZZ", "100")))
    settings.load_profile("tessera")


@pytest.hookimpl(trylast=True)  # of the tests that `-m` and `-k` leave
def pytest_collection_modifyitems(config, items):
    """TESSERA_TEST_ROWS=n keeps the first of every n rows of a parametrized test, and all tests without parameters."""
    every, seen, rows = int(os.environ.get("TESSERA_TEST_ROWS", "1")), collections.Counter(), ([], [])
    for item in items:
        test = item.nodeid.partition("[")[0]
        rows[seen[test] % every > 0].append(item)
        seen[test] += 1
    items[:], dropped = rows
    if dropped:
        config.hook.pytest_deselected(items=dropped)


# Linux allows a process 65,530 memory maps, and a compiled program takes some: those of the whole suite are too many.
MAPS = 30_000


def memory_maps() -> int:
    """Memory maps of this process; 0 where the system does not say."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_let_go():
    """Between modules, when half of `MAPS` is reached."""
    yield
    if SHARED_CONTEXT:
        mlir.make_ir_context.cache_clear()
    if memory_maps() > MAPS // 2:
        jax.clear_caches()
        gc.collect()
    if (left := memory_maps()) > MAPS:
        warnings.warn(f"this process has {left} memory maps, of 65,530 that Linux allows", stacklevel=1)


SHARED_DATA = Path(os.environ.get("TESSERA_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))


@pytest.fixture
def shared_data():
    """Directory of real data sets kept outside the project; a test that needs a file from it skips, naming the file."""

    def find(relative: str) -> Path:
        path = SHARED_DATA / relative
        if not path.exists():
            pytest.skip(f"needs {relative} in {SHARED_DATA} (set TESSERA_DATA to where the data is)")
        return path

    return find


GOLDEN = Path(__file__).parent / "golden"


def _nested(arrays):
    tree: dict = {}
    for path, array in arrays.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    return tree


@pytest.fixture(scope="session")
def golden():
    """What other libraries computed on fixed inputs (`tests/golden/make.py`): a file's arrays as nested mappings."""

    def read(name: str) -> dict:
        assert f"{name}.npz" in json.loads((GOLDEN / "sources.json").read_text()), f"{name}.npz has no source"
        with np.load(GOLDEN / f"{name}.npz") as file:
            return _nested({path: file[path] for path in file.files})

    return read
