# Everything that a fresh machine needs: every target installs first. VENV and PYTHON can be set on the command line.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Environment for running an extension with sanitizers in an interpreter without them.
SANITIZED = env PYTHONPATH=build/sanitize:. LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
CXX_SOURCES = $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu')

.PHONY: install demo test fuzz sanitize soak lint format docs bench kernels clean

# Creates .venv; repeated only if one of the files below has changed.
install: $(INSTALLED)

# Editable, with all extras, built in pip's isolated environment. torch and Triton are pinned by constraints.txt.
$(INSTALLED): setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*.* csrc/*/simd/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch triton
	$(BIN)/python -m pip install -c constraints.txt -e ".[all,dev,docs]"
	$(BIN)/amil info
	@touch $@

# Trains a bag classifier and a pose model on synthetic data and writes pictures to demo/.
demo: install
	$(BIN)/amil demo

# PYTEST_ARGS="tests/ops -x" selects tests and options.
test: install
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

# Reads 5,000 damaged files of all formats in child processes. FUZZ_ARGS="--seed 7 --keep failures" selects others.
fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.files $(FUZZ_ARGS)

# The operator tests and 20,000 random calls against an extension with address and undefined-behavior sanitizers, in
# build/sanitize. Left out: kernels of other compilers, and the test that limits the address space, in which the address
# sanitizer deadlocks. SANITIZE=thread cannot be used: libgomp, which runs PyTorch's threads, is not instrumented.
sanitize: install
	AMIL_FAST_SANITIZE=address,undefined AMIL_FAST_CUDA=0 $(BIN)/python setup.py -q build --build-temp build/sanitize.objects \
		--build-lib build/sanitize
	$(SANITIZED) $(BIN)/pytest -q --import-mode=append -o pythonpath=build/sanitize -p no:cacheprovider tests/ops \
		-k "not triton and not aot and not inductor and not ddp and not cuda_on_cpu and not memory_error_in_threads"
	$(SANITIZED) $(BIN)/python -P -W ignore -m tests.fuzz.operators $(FUZZ_ARGS)

# 100,000 calls of random sizes; fails if the resident memory grows. Minutes.
soak: install
	$(BIN)/python -m pytest -q -m slow -s tests/ops/test_soak.py

# Style, formatting and types; changes nothing.
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy

# Fixes what can be fixed automatically.
format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# HTML in build/docs; warnings are errors.
docs: install
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

# Asserts that the results are equal, then times them; add results worth keeping to benchmarks/results/.
bench: install
	$(BIN)/python -m pytest benchmarks/ --benchmark-only -q --benchmark-json=benchmark.json
	$(BIN)/python benchmarks/report.py benchmark.json

# Compiles every shipped Triton configuration for sm_80, sm_90 and sm_100 without a GPU; fails on spills.
kernels: install
	$(BIN)/python -m amil_fast.kernels.aot

# Removes the environment, all builds and the output of the demo.
clean:
	rm -rf build dist *.egg-info $(VENV) demo
	find . -name '*.so' -not -path './$(VENV)/*' -delete
