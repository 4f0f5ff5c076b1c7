# Needs make and Python >= 3.11, nothing else: whatever is installed goes into .venv.
PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUN_DEMO := $(VENV)/installed.stamp
RUN_TESTS := $(VENV)/installed-dev.stamp

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-pipeline test lint format clean

help: ## list the targets
	@awk -F ': .*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile
	@echo "  Options: PYTHON=python3.12 (used when .venv is made: make clean first), PYTEST_ARGS='-k name'"

demo: $(RUN_DEMO) ## install, then plan and run a GPT train step on 8 emulated devices
	$(PY) -m benchmarks.gpt

demo-pipeline: $(RUN_DEMO) ## the same GPT as a pipeline of 4 stages
	$(PY) -m benchmarks.gpt --stages 4 --layers 4 --steps 100

test: lint ## lint, then run the tests
	$(PY) -m pytest $(PYTEST_ARGS)

lint: $(RUN_TESTS) ## ruff and pyright
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PY) -m pyright --pythonpath $(PY)

format: $(RUN_TESTS) ## let ruff sort the imports and lay out the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove .venv, builds and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "alpa_like needs Python 3.11 or newer, but '$(PYTHON) --version' says '$$($(PYTHON) --version 2>&1 || true)':" \
	       "name a newer one, as in 'make $(or $(MAKECMDGOALS),test) PYTHON=python3.12'." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

# setuptools comes first and builds without isolation, so that its version is pinned like the others.
$(RUN_DEMO): pyproject.toml constraints.txt | $(PY)
	@echo "Installing alpa_like into $(VENV) (some minutes the first time)"
	@$(PIP_INSTALL) setuptools
	@$(PIP_INSTALL) --no-build-isolation --editable .
	@touch $@

$(RUN_TESTS): pyproject.toml constraints.txt | $(PY)
	@echo "Installing alpa_like and its development tools into $(VENV) (some minutes the first time)"
	@$(PIP_INSTALL) setuptools
	@$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $(RUN_DEMO) $@
