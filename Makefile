# Every target makes its own environment first. PYTHON picks the interpreter, VENV where the environment goes.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2

.PHONY: bench demo demo-isoflop test test-all test-kernels test-gpu lint clean

$(VENV)/installed: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tessera needs Python >= 3.11; this is " + sys.version)'
	@echo "making the environment in $(VENV) (once, about a minute) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/python scripts/find_ticket.py --config=configs/lottery_digits.py --workdir=runs/demo-ticket
	$(BIN)/python scripts/train.py --config=configs/lm.py:tiny --workdir=runs/demo-lm

demo-isoflop: $(VENV)/installed
	$(BIN)/python scripts/sweep.py --config=configs/isoflop.py:tiny --workdir=runs/demo-isoflop

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-all: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not gpu and not tpu'

# Every kernel test that needs no accelerator, the slow ones too: interpreted, and compiled for TPUs ahead of time by the libtpu
# that this JAX asks for. It has a directory of its own, as elsewhere JAX would look for a TPU with it; without it those tests
# are skipped.
LIBTPU = import importlib.metadata as m; print(next(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))
$(VENV)/libtpu: | $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ \
	    "$$($(BIN)/python -c '$(LIBTPU)')" || echo "no libtpu here"

test-kernels: $(VENV)/libtpu
	JAX_PLATFORMS=cpu PYTHONPATH=$(VENV)/libtpu $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not gpu' tests/moe/kernels

# On a machine with a GPU, in whatever environment $(PYTHON) has: jax, flax, optax, numpy and pytest are enough. Stand-ins
# for jaxtyping and ml_collections lie in tests/bare. The table goes to runs/bench too.
test-gpu: HAVE = import importlib.util as u; print(all(map(u.find_spec, ("jaxtyping", "ml_collections"))))
test-gpu: export PYTHONPATH = .$(if $(filter False,$(shell $(PYTHON) -c '$(HAVE)')),:tests/bare)
test-gpu:
	@$(PYTHON) -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu" and "test-gpu needs a GPU; JAX sees " + jax.devices()[0].device_kind)'
	TESSERA_TEST_PLATFORM=gpu $(PYTHON) -m pytest -m gpu tests/moe/kernels/test_kernel_gpu.py
	mkdir -p runs
	$(PYTHON) scripts/benchmarks/run.py --config=bench_kernels:hopper --out=runs/bench/kernels-hopper.json

# Every CPU benchmark beside its baselines, in turns; the last table has all ratios.
bench: $(VENV)/installed
	$(BIN)/python scripts/benchmarks/run.py --all

lint: $(VENV)/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf .venv .venv-* .cache build *.egg-info
