# Each command sets up what it needs: .venv, the packages, the compiled extension.
#   make demo               prune a network trained on scikit-learn's digits; writes demo_output/
#   make test               lint and all tests
#   make lint               ruff, clang-format, mypy
#   make bench              time the kernels against two rivals
#   make paper              the published experiments and docs/paper.md, in an hour; FASTFISHER_DATA: folder of data
#   make bench-gpu          the same on a GPU; with RESULTS=folder, and COMMIT=hash for a copy of the sources without git
#   make test-gpu           build in place; the ops on a GPU, and its checkers on the CUDA kernels
#   make soak               two hours of use in ten minutes, and what of it stays behind: memory, hooks, threads, files;
#                           on a GPU: python -m tests.soak --device cuda
#   make test-sanitize      C++ tests and fuzzing under address and undefined-behaviour sanitizers
#   make test-integrations  what meets transformers, Lightning, accelerate, TensorBoard and datasets, which it installs
#   make build              compile the extension in place
#   make clean              remove what was built; .venv stays

PYTHON ?= python3
# Used where .venv has no torch yet; for a smaller download: make demo TORCH="torch --index-url <PyTorch's CPU index>"
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
# Without --no-compile pip would compile thousands of Python files that are never imported.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# Ninja compiles only what changed, so this runs before everything that needs the extension.
BUILD := $(BIN)/python setup.py --quiet build_ext --inplace
CXX_FILES = $(shell find csrc tests/cpp tests/cuda -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test lint bench paper soak test-gpu bench-gpu test-sanitize test-integrations build clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	$(BUILD)
	$(BIN)/python examples/digits.py demo_output

test: lint
	$(BUILD)
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadgroup

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

bench: $(VENV)/test.stamp
	$(BUILD)
	$(BIN)/python -m benchmarks.run

paper: $(VENV)/test.stamp
	$(BUILD)
	$(BIN)/python -m benchmarks.paper

soak: $(VENV)/test.stamp
	$(BUILD)
	$(BIN)/python -m tests.soak

# A machine with a GPU has its own torch and perhaps no network, so nothing is installed.
test-gpu bench-gpu: GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
# Most of the time goes into compiling Triton kernels, which pytest-xdist spreads over the processors where it is there.
test-gpu: SPREAD = $(shell $(GPU_PYTHON) -c "import xdist" 2>/dev/null && echo --numprocesses=8)
test-gpu:
	@$(GPU_PYTHON) -m benchmarks.machine
	FASTFISHER_BUILD=cuda $(GPU_PYTHON) setup.py --quiet build_ext --inplace
	$(GPU_PYTHON) -m fastfisher.cli doctor
	FASTFISHER_TEST_DEVICE=cuda $(GPU_PYTHON) -m pytest $(SPREAD) --no-header -q tests/ops/test_conformance.py \
		tests/kernels/test_gpu.py tests/fisher/test_inverse_accuracy.py
	compute-sanitizer --error-exitcode=1 --tool memcheck $(GPU_PYTHON) -m tests.cuda.on_gpu
	compute-sanitizer --error-exitcode=1 --tool racecheck $(GPU_PYTHON) -m tests.cuda.on_gpu

bench-gpu:
	@$(GPU_PYTHON) -m benchmarks.machine
	$(GPU_PYTHON) setup.py --quiet build_ext --inplace
	$(GPU_PYTHON) -m benchmarks.run --table gpu $(RESULTS:%=--out %) $(COMMIT:%=--commit %)

test-sanitize: $(VENV)/build.stamp
	$(BIN)/python tests/cpp/run.py

test-integrations: $(VENV)/integrations.stamp
	$(BUILD)
	$(BIN)/python -m pytest tests/integrations tests/test_readme.py

build: $(VENV)/build.stamp
	$(BUILD)

clean:
	rm -rf build dist *.egg-info demo_output fastfisher/_native*.so fastfisher/_build_info.py
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamps keep the set-up from repeating; each goes stale when pyproject.toml changes.
$(VENV)/build.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" pybind11 ninja
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) $(TORCH)
	touch $@

# FASTFISHER_BUILD=none: the extension is built in place afterwards, and not a second time by pip.
$(VENV)/demo.stamp: $(VENV)/build.stamp
	FASTFISHER_BUILD=none $(PIP) --no-build-isolation --editable ".[cli,viz]" scikit-learn
	touch $@

$(VENV)/test.stamp: $(VENV)/build.stamp
	FASTFISHER_BUILD=none $(PIP) --no-build-isolation --editable ".[dev]"
	touch $@

# torchvision is left out on purpose: beside a torch of another build it breaks what is imported here.
$(VENV)/integrations.stamp: $(VENV)/test.stamp
	FASTFISHER_BUILD=none $(PIP) --no-build-isolation --editable ".[dev,hf,lightning,tensorboard]" datasets
	touch $@
