# Everything a fresh machine needs; `make test` and `make demo` install first. VENV and PYTHON may be set on the command line.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test lint format bench kernels clean

install: $(INSTALLED)

# Editable, with all extras; built in pip's own isolated environment. torch and Triton are pinned by constraints.txt.
$(INSTALLED): setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*.* csrc/*/simd/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch triton
	$(BIN)/python -m pip install -c constraints.txt -e ".[all,dev]"
	$(BIN)/amil info
	@touch $@

demo: install
	$(BIN)/amil demo

test: install
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu')

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu')

# Equality is asserted before anything is timed; results go to benchmarks/results/ under a name of your choice.
bench: install
	$(BIN)/python -m pytest benchmarks/ --benchmark-only -q --benchmark-json=benchmark.json
	$(BIN)/python benchmarks/report.py benchmark.json

# Compiles every shipped Triton configuration and the CUDA sources for sm_80, sm_90 and sm_100, no GPU needed; fails on spills.
kernels: install
	$(BIN)/python -m amil_fast.kernels.aot

clean:
	rm -rf build dist *.egg-info $(VENV) demo
	find . -name '*.so' -not -path './$(VENV)/*' -delete
