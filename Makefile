# Every target that needs an environment makes .venv on its first use and leaves it alone afterwards,
# until pyproject.toml, constraints.txt or the native code changes. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test coverage quick lint docs bench gpu sanitize clean

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /make \1	/p' Makefile

demo: $(VENV)/installed-demo ## train a small transformer and watch its matrices freeze (ARGS="--quick" and so on)
	@echo "demo: training a small transformer on the source of Python's standard library"
	@$(BIN)/grades-kernels demo $(ARGS)

# One thread per worker: two workers with two threads each would fight for two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
test: lint ## lint, then run all tests
	@echo "test: running the tests"
	@$(PYTEST)

coverage: $(VENV)/installed-dev ## run all tests in 1.5 to 2 times the time and print what they leave out
	@echo "coverage: running the tests, with coverage"
	@$(PYTEST) --cov=grades_kernels --cov-report=term-missing:skip-covered --cov-fail-under=95

QUICK_TESTS := $(addprefix tests/test_,semantics.py oracle.py contract.py public_api.py)
quick: $(VENV)/installed-dev ## run the tests of the semantics and the contract alone (under 2 minutes on 2 cores)
	@$(PYTEST) -q -m "not slow and not gpu" $(QUICK_TESTS)

lint: $(VENV)/installed-dev ## check style, formatting and types
	@echo "lint: ruff and mypy"
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy

docs: $(VENV)/installed-docs ## build the documentation into site/; a warning is an error
	@echo "docs: building site/"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

bench: $(VENV)/installed-bench ## run the benchmarks on this machine
	@echo "bench: running the benchmarks"
	@$(BIN)/python -m pytest benchmarks $(ARGS)

# No environment is made here: a GPU machine brings the torch that fits its driver.
gpu: ## run the GPU tests and the benchmarks with PYTHON=python3, which must bring torch and pytest
	@$(PYTHON) -m benchmarks.gpu tests benchmarks

# The op is built into build/sanitize, and only its tests load that build. ASan has to come first in
# the process; Python itself never frees all.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: $(VENV)/installed-dev ## run the native op's tests under AddressSanitizer and UBSan (g++)
	@echo "sanitize: building csrc/ with $(SANITIZE)"
	@CC=gcc CXX=g++ CXXFLAGS="$(SANITIZE)" LDFLAGS="-fsanitize=address,undefined" \
		GRADES_KERNELS_NATIVE=require $(BIN)/python setup.py --quiet \
		build --build-base build/sanitize/objects --build-lib build/sanitize/lib
	@PYTHONPATH=build/sanitize/lib ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		$(BIN)/pytest --quiet --capture=no tests/test_native.py

clean: ## remove .venv, caches and build products
	rm -rf $(VENV) build dist site *.egg-info grades_kernels/*.so .coverage* .*_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

# setuptools and torch come first because the package is built without isolation, in the environment
# it runs in: the native op is compiled against that torch, and an isolated build that asked for
# torch would download a second one.
# The set `dev` contains `demo`, `bench` and `docs`, so installing it settles all four.
$(VENV)/installed-%: pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	@echo "install: grades-kernels[$*] into $(VENV) (minutes the first time)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) setuptools torch
	@$(PIP_INSTALL) --no-build-isolation --editable '.[$*]'
	@touch $@ $(if $(filter dev,$*),$(addprefix $(VENV)/installed-,demo bench docs))
