# Everything happens in .venv, which is made here. PYTHON, TORCH and TRITON choose other versions.
PYTHON ?= python3
TORCH ?= 2.13.0
TRITON ?= 3.9.0
VENV ?= .venv
RUN := $(VENV)/bin/
# Processes for the tests. Many short tests share cases that are made once per process, so that a file stays in one.
JOBS ?= 2
# Each with one thread of torch: small operations gain nothing from more, and threads of two processes wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(RUN)pytest -q -n $(JOBS)
NATIVE := $(wildcard csrc/*.* csrc/*/*) pyproject.toml

.PHONY: help demo docs test test-slow test-exhaustive test-peers conformance lint format wheel-test bench clean

help:
	@echo "make demo        train small networks, merge them with the command line, compare"
	@echo "make test        the tests"
	@echo "make test-slow   ahead-of-time compilation of every GPU kernel, long sweeps of faults"
	@echo "make test-exhaustive  every case of the Triton kernels under the interpreter"
	@echo "make test-peers  agreement with mergekit, PEFT and TensorLy, installed into a folder of its own"
	@echo "make conformance  mergekit, PEFT, FusionBench and sd-mecha hooked and unhooked, in folders of their own"
	@echo "make docs        docs/methods.md from the descriptions of the methods"
	@echo "make lint        formatting, style and types"
	@echo "make wheel-test  build a wheel and use it away from the tree, without torch"
	@echo "make bench       quick benchmarks of the ops"

$(VENV)/.environment: requirements-dev.txt
	test -x $(RUN)python || $(PYTHON) -m venv $(VENV)
	$(RUN)python -m pip install --quiet --upgrade pip
	$(RUN)python -m pip install --quiet torch==$(TORCH)
	$(RUN)python -c "import triton" 2>/dev/null || test "$$(uname -s)" != Linux || $(RUN)python -m pip install --quiet triton==$(TRITON)
	$(RUN)python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)/.built: $(VENV)/.environment $(NATIVE)
	CMAKE_BUILD_PARALLEL_LEVEL=2 $(RUN)python -m pip install --quiet --no-build-isolation --no-deps \
		--config-settings=build-dir=build/editable -e .
	touch $@

demo: $(VENV)/.built
	PATH="$(abspath $(RUN)):$$PATH" bash examples/demo/run.sh

# Triton decides at import between its interpreter and its compiler: one process each.
test: $(VENV)/.built
	$(PYTEST) --dist loadfile -m "not slow and not peer and not exhaustive"
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow and not exhaustive" tests/interpreter

test-slow: $(VENV)/.built
	$(PYTEST) -m slow
	TRITON_INTERPRET=1 $(PYTEST) -m slow tests/interpreter

test-exhaustive: $(VENV)/.built
	TRITON_INTERPRET=1 $(PYTEST) -m exhaustive tests/interpreter

test-peers: $(VENV)/.built
	bash benchmarks/make_peer_env.sh $(VENV)-peer
	MERGEKERNELS_PEER_ENV=$(abspath $(VENV)-peer) $(RUN)pytest -q -m peer tests/peers

# The tools themselves, hooked and unhooked in one process, each in an environment of its own.
SITE = $(shell $(RUN)python -c "import sysconfig; print(sysconfig.get_path('platlib'))")
conformance: $(VENV)/.built
	bash benchmarks/make_peer_env.sh $(VENV)-peer
	OMP_NUM_THREADS=1 $(VENV)-peer/bin/python tests/hooked/within.py $(SITE) -q -m peer tests/hooked/test_mergekit_*.py tests/hooked/test_peft_*.py
	bash benchmarks/make_peer_env.sh $(VENV)-fusionbench fusionbench
	bash benchmarks/make_peer_env.sh $(VENV)-sd-mecha sd-mecha
	MERGEKERNELS_FUSIONBENCH_ENV=$(abspath $(VENV)-fusionbench) MERGEKERNELS_SD_MECHA_ENV=$(abspath $(VENV)-sd-mecha) \
		$(RUN)pytest -q -m peer tests/peers/test_fusionbench_hooks.py tests/peers/test_sd_mecha_hooks.py

docs: $(VENV)/.built
	$(RUN)python docs/make_methods.py

lint: $(VENV)/.environment
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy
	$(RUN)clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inc' 'csrc/*.cu' 'csrc/*.cuh')

format: $(VENV)/.environment
	$(RUN)ruff check --fix .
	$(RUN)ruff format .
	$(RUN)clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inc' 'csrc/*.cu' 'csrc/*.cuh')

wheel-test: $(VENV)/.environment
	bash tests/wheel_smoke.sh $(RUN)python

bench: $(VENV)/.built
	cd benchmarks && ../$(RUN)pytest -q --quick bench_select.py bench_stream.py bench_methods.py bench_spectral.py
	PATH="$(abspath $(RUN)):$$PATH" $(RUN)python benchmarks/bench_merge.py --small --repeat 1 --folder build/bench --out build/bench/results.json

clean:
	rm -rf build dist $(VENV)/.built .demo
