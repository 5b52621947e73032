# Everything a person types. `make demo` and `make test` work on a clean clone.
PYTHON ?= python3
# The torch build to install. Without a GPU a CPU build that pip can find (2.13.0+cpu) is newer in
# pip's order than the plain 2.13.0 with its CUDA packages, so the plain pin takes it.
TORCH ?= torch==2.13.0
VENV := .venv
VLLM := .venv-vllm
BIN := $(VENV)/bin
NATIVE := setup.py $(wildcard csrc/*/*.h csrc/*/*.cpp)  # built by the pip install of the package
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: help setup demo test check lint type test-distributed test-faults test-vllm test-reference \
	test-interpret test-compile test-sanitize test-gpu smoke bench bench-cpu clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools '$(TORCH)'
	@touch $@

$(VENV)/train: $(VENV)/torch pyproject.toml constraints.txt $(NATIVE)
	$(PIP) --no-build-isolation -e '.[train]'
	@$(BIN)/python -c 'from xopd_kernels.native_library import unavailable_reason as why; print(why() or "", end="")'
	@touch $@

$(VENV)/dev: $(VENV)/train
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

# verl without its dependencies: they pin an older transformers, and the tests need three files.
$(VENV)/peers: $(VENV)/dev
	$(PIP) --no-build-isolation -e '.[peers]'
	$(PIP) --no-deps verl==0.9.1
	@touch $@

setup: $(VENV)/peers  ## .venv with everything, pinned by constraints.txt

demo: $(VENV)/train  ## close the speech/text gap of the bundled model; about 8 minutes
	$(BIN)/xopd demo

test: $(VENV)/peers  ## the tests that need no GPU and no interpreter
	$(BIN)/python -m pytest \
		-m "not interpret and not compile and not distributed and not faults and not vllm"

# More ranks than CI has cores, and ten resumed runs, take minutes: `make check` leaves them out.
ONLY :=
check: ONLY := not ranks4 and not every_cut
test-distributed: $(VENV)/dev  ## the trainer on 2 and 4 ranks (gloo) against one process
	$(BIN)/python -m pytest -m distributed -k "$(ONLY)" tests/trainer/distributed

test-faults: $(VENV)/dev  ## servers that fail, 100 kills during a save, 100 corruptions; prints figures
	$(BIN)/python -m pytest -s -m "faults or server_faults" tests/trainer tests/vllm

# An environment of its own, because vLLM needs other releases of much that the trainer uses.
$(VLLM)/ready: requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile setuptools '$(TORCH)'
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps \
		-r requirements-vllm.txt
	@touch $@

# The whole runs show what the other tests take apart; an engine takes a minute of two busy cores.
VLLM_TESTS := tests/vllm
check: VLLM_TESTS := tests/vllm/test_real_run.py
test-vllm: $(VENV)/train $(VLLM)/ready  ## a real vLLM samples for the trainer and scores for its teacher
	PYTHONPATH=$(CURDIR) $(VLLM)/bin/python -m pytest -m vllm $(VLLM_TESTS)

test-reference: $(VENV)/peers  ## the tests of the operators on REFERENCE, where `test` has NATIVE
	$(BIN)/python -m pytest --reference -m "not interpret and not compile and not gpu" \
		tests/kernels --ignore tests/kernels/test_memory_plan.py \
		--ignore tests/kernels/test_backend.py --ignore tests/kernels/test_vocab_parallel.py

test-interpret: $(VENV)/peers  ## the Triton kernels in Triton's interpreter, on the CPU
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m interpret

test-compile: $(VENV)/dev  ## every tile compiled for sm_80, sm_90 and sm_100, without a GPU
	$(BIN)/python -m pytest -m compile

SANITIZED := build/sanitize_portable.so build/sanitize_native.so
build/sanitize_native.so: WIDTH := -march=native
$(SANITIZED): $(NATIVE)
	@mkdir -p build
	$(CXX) -std=c++17 -g -O1 $(WIDTH) -fPIC -shared -Wall -Wextra -Werror -Icsrc \
		-fsanitize=address,undefined -fno-sanitize-recover -o $@ $(filter %.cpp,$(NATIVE))

test-sanitize: $(VENV)/dev $(SANITIZED)  ## the native kernels under address and UB sanitizers
	for object in $(SANITIZED); do \
		LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
			$(BIN)/python -m pytest -s tests/native --native-library=$$object || exit 1; \
	done

test-gpu: $(VENV)/dev  ## the device lane; skips where CUDA is missing and says so
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/dev  ## ruff (rules and format), clang-format and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*/*.cpp csrc/*/*.h
	$(BIN)/codespell

type: $(VENV)/dev  ## mypy --strict
	$(BIN)/mypy

smoke: $(VENV)/peers  ## every benchmark on tiny shapes
	rm -rf build/smoke
	PYTHON=$(BIN)/python bash benchmarks/gpu.sh build/smoke --smoke
	$(BIN)/xopd bench report build/smoke/bench.jsonl --plots build/smoke/plots > /dev/null
	$(BIN)/python -m benchmarks.sparse plot build/smoke/sparse.jsonl --output build/smoke/plots > /dev/null
	$(BIN)/python -m benchmarks.sparse_training run --smoke
	$(BIN)/python -m benchmarks.train_step --smoke
	$(BIN)/python -m pytest -q benchmarks/test_cpu.py --bench-shape 24x16x300 --benchmark-disable

bench: $(VENV)/peers  ## everything at full size on this machine; goes on where it ended
	$(BIN)/xopd bench --output runs/bench.jsonl

bench-cpu: $(VENV)/peers  ## the tables of this CPU, hours, goes on where it ended; then groups to compare
	$(BIN)/xopd bench --device cpu --output runs/bench_cpu.jsonl
	$(BIN)/python -m pytest benchmarks/test_cpu.py --benchmark-autosave

# The longest lanes first, so that two at a time end together.
check: test test-interpret test-vllm test-distributed test-reference smoke test-compile test-sanitize lint type  ## what CI runs

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) $(VLLM) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build \
		xopd_kernels/*.so
