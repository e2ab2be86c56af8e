# `make demo` and `make test` set up everything on a fresh machine: environment, torch, build tools, native code.
# Overridable: TORCH="torch==2.11.0", PYTHON=python3.12, VENV=..., PIP_ARGS="--index-url ...".
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=

# Everything runs from this folder; an inherited PYTHONPATH could bring in another kan_fast.
unexport PYTHONPATH

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check $(PIP_ARGS)
RUN := PATH="$(abspath $(VENV))/bin:$$PATH"
empty :=
# The stamp carries the pin, so that another TORCH is installed over the one that is there.
ENV := $(VENV)/.installed-$(subst /,_,$(subst $(empty) $(empty),_,$(TORCH)))
NATIVE := kan_fast/_native.so
SOURCES := $(wildcard csrc/* csrc/*/* setup.py build_backend.py)

.PHONY: help env build test test-slow test-kernels-full test-sanitize test-sanitize-cuda lint demo bench docs wheel clean cuda-build

help:
	@echo "make demo           train on handwritten digits, fused and reference side by side"
	@echo "make test           build and run the tests"
	@echo "make test-slow      the heavier tests"
	@echo "make test-kernels-full  every configuration of the Triton and CUDA kernels, compiled for all architectures"
	@echo "make test-sanitize  the native tests under the address and undefined-behaviour sanitizers"
	@echo "make test-sanitize-cuda  the emulated CUDA kernels under the address and thread sanitizers"
	@echo "make lint           ruff and mypy"
	@echo "make bench          the benchmarks"
	@echo "make cuda-build     the native code with CUDA, in place"
	@echo "make docs           the API pages in build/docs/"
	@echo "make wheel          sdist and wheel in dist/"

env: $(ENV)

# torch comes first on every line of pip's, so that nothing pulls in another one. The package is linked without native code
# here; the next rule compiles it where its progress can be seen.
$(ENV): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed-*
	$(PIP) "$(TORCH)" "setuptools>=77" wheel ninja "pybind11>=2.13"
	KAN_FAST_BUILD=none $(PIP) "$(TORCH)" --no-build-isolation -e ".[dev]"
	touch "$@"

build: $(NATIVE)

$(NATIVE): $(ENV) $(SOURCES)
	$(RUN) $(PY) setup.py -q build_ext --inplace
	@test -e "$@" || { echo "no native code was built: see the reason above"; exit 1; }
	touch "$@"

cuda-build: $(ENV)
	$(RUN) KAN_FAST_BUILD=cuda $(PY) setup.py -q build_ext --inplace
	touch $(NATIVE)

# A missing native backend must fail the tests, not skip them.
test: build
	KAN_FAST_REQUIRE_NATIVE=1 $(PY) -m pytest -q $(PYTEST_ARGS)

test-slow: build
	KAN_FAST_REQUIRE_NATIVE=1 $(PY) -m pytest -q -m slow $(PYTEST_ARGS)

# Every configuration of the Triton and CUDA kernels, compiled for all architectures: no GPU needed, but patience.
test-kernels-full: build
	$(PY) -m pytest -q -m "slow or not slow" tests/test_triton.py tests/test_triton_offline.py tests/test_triton_ptx.py tests/test_cuda_compile.py tests/test_cuda_ptx.py $(PYTEST_ARGS)

# The interpreter is not instrumented, so the runtime of the sanitizer and the C++ library that it hooks are preloaded; leaks
# are not looked for, since Python and torch keep theirs until the process ends. The reference has no code of its own to check.
test-sanitize: build
	$(RUN) KAN_FAST_SANITIZE=1 $(PY) setup.py -q build_ext
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	KAN_FAST_REQUIRE_NATIVE=1 KAN_FAST_NATIVE_LIBRARY=build/sanitize/_native.so \
	$(PY) -m pytest -q tests/test_native*.py -k "not reference-cpu" $(PYTEST_ARGS)

# The CUDA kernels, run by the emulation of the tests, under the address and thread sanitizers.
test-sanitize-cuda: build
	$(PY) -m pytest -q -m slow tests/test_cuda_sanitized.py $(PYTEST_ARGS)

lint: $(ENV)
	$(PY) -m ruff check .
	$(PY) -m mypy

demo: build
	$(PY) examples/digits.py

# Side by side first, then the same cases one by one under pytest-benchmark.
bench: build
	$(PY) -m benchmarks
	$(PY) -m pytest -q benchmarks $(PYTEST_ARGS)

docs: $(ENV)
	PYTHONPATH=. $(PY) .ci/docs.py build/docs

wheel: $(ENV)
	rm -rf build/lib* build/bdist* dist
	$(RUN) $(PY) -m build --no-isolation

clean:
	rm -rf build dist *.egg-info kan_fast/*.so kan_fast/_build_record.json examples/output
