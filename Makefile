# Everything happens in .venv, which the first command makes.
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
# Idle OpenMP threads that spin slow training down tenfold when anything else runs.
export OMP_WAIT_POLICY ?= passive
# A seed of Python's hashes or a user's site packages must not change what runs.
export PYTHONNOUSERSITE := 1

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: help install install-triton install-serving quickstart test test-fast test-serving\
	test-bounds soak bench gpu-check gpu-rehearsal docs lint format

help:
	@echo "make quickstart   train, validate and sample a small model (about 5 minutes on 2 cores)"
	@echo "make test         run every test that this machine can run"
	@echo "make test-fast    run the fast tests, in a minute"
	@echo "make test-bounds  run those at the lowest and at the newest versions of what it needs"
	@echo "make install-serving   install vLLM and the plugin for it into .venv-serving (4 GB)"
	@echo "make test-serving      run the plugin's tests there (an hour)"
	@echo "make soak         kill one run at 30 random moments, and compare it with an undisturbed one"
	@echo "make bench        run all benchmarks and compare with those before (under 10 minutes)"
	@echo "make gpu-check    check the kernels and sharding on this machine's GPU"
	@echo "make gpu-rehearsal  go through all that is measured on a GPU, at toy size on the CPU"
	@echo "make docs         make a website of docs/, in build/docs"
	@echo "make lint         check style; make format puts it right"

# What training needs comes first; the tools for tests, pages and style with the commands that use
# them. The end of a failed installation's output is shown, the whole of it lies in .venv.
define install
	@echo "installing $(2) into $(VENV)"
	@$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt \
		--editable '.$(1)' >$(VENV)/install.log 2>&1 || { tail -n 15 $(VENV)/install.log >&2; \
		echo "make: the installation failed: all of its output is in $(VENV)/install.log" >&2; exit 2; }
	@touch $@
endef

install: $(VENV)/installed

define check_python
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or newer is missing: install it, or name it with PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) lacks venv or ensurepip: install them (on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 2; }
endef

$(VENV)/installed: pyproject.toml constraints.txt
	$(check_python)
	@$(PYTHON) -m venv $(VENV)
	$(call install,,bov-lightning (a few minutes the first time))

$(VENV)/installed-%: $(VENV)/installed
	$(call install,[$*],the tools for $*)

# vLLM wants other versions than training, so it has an environment of its own: 4 GB, some ten minutes.
# What it brings for pictures and sound are builds for CUDA, which break the import on a CPU.
SERVING := .venv-serving
SERVING_BUILD := $(if $(shell command -v nvidia-smi),cuda,cpu)

install-serving: $(SERVING)/installed

$(SERVING)/installed: serving/vllm/pyproject.toml serving/vllm/constraints.txt
	$(check_python)
	@echo "installing vLLM ($(SERVING_BUILD)) and bov-vllm into $(SERVING) (4 GB, minutes)"
	@$(PYTHON) -m venv $(SERVING)
	@{ $(SERVING)/bin/python -m pip install --disable-pip-version-check \
		$(if $(filter cpu,$(SERVING_BUILD)),--constraint serving/vllm/constraints.txt) \
		--editable 'serving/vllm[$(SERVING_BUILD),test]' \
		&& $(SERVING)/bin/python -m pip install --disable-pip-version-check --no-deps --editable . \
		&& { [ $(SERVING_BUILD) = cuda ] || $(SERVING)/bin/python -m pip uninstall --yes \
			torchvision torchaudio torchcodec; } \
	} >$(SERVING)/install.log 2>&1 || { tail -n 15 $(SERVING)/install.log >&2; \
		echo "make: the installation failed: all of its output is in $(SERVING)/install.log" >&2; exit 2; }
	@touch $@

# The version that belongs to constraints.txt's torch, whose CUDA builds bring it along.
install-triton: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check triton==3.7.1

quickstart: install
	$(BIN)/bov fit --config recipes/quickstart.yaml
	@echo "--- a sample:"
	$(BIN)/bov generate runs/quickstart --prompt "def read(self, path):" --max-new-tokens 80
	@echo "--- the run lies in runs/quickstart"

# Processes with one thread each, since the tests train tiny models, and two more than cores: a test
# often waits for what it has started. The drills on SLURM clusters wait most of the time, all side
# by side. TESTS='not slurm' rehearses what is measured on a GPU, too.
CORES := $(shell getconf _NPROCESSORS_ONLN)
TEST_PROCESSES ?= $(shell expr $(CORES) + 2)
TESTS ?= not slurm and not rehearsal
test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal -m "$(TESTS)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 7 --dist loadfile tests/slurm

test-fast: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal \
		-m "not slow and not distributed and not slurm"

# The plugin for vLLM, every value source in every way; SERVING_TESTS='-m "not slow"' is what CI runs.
test-serving: $(SERVING)/installed
	OMP_NUM_THREADS=1 $(SERVING)/bin/python -m pytest -c serving/vllm/pyproject.toml \
		$(SERVING_TESTS) serving/vllm/tests

# In environments of their own; torch's builds at the ends take gigabytes and many minutes.
test-bounds:
	$(PYTHON) tests/bounds.py lower newest

# kill -9 at 30 random moments of one run, half of them during a save (about 10 minutes).
soak: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py

# Results go to benchmarks/results, beside the machine and commit that they were measured on.
bench: install
	$(BIN)/python benchmarks/all.py

# What CI cannot: the reference numbers, masks, kernels, bf16 and sharding on this machine's GPU.
gpu-check: $(VENV)/installed-test
	BOV_REQUIRE=gpu $(BIN)/python -m pytest -m gpu

# benchmarks/gpu/run.sh --dry-run, under 3 minutes on two cores.
gpu-rehearsal: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m rehearsal

# keys.md is written from the docstrings; a broken link is an error.
docs: $(VENV)/installed-docs
	$(BIN)/python docs/write_pages.py
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs build/docs
	@echo "build/docs/README.html"

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
