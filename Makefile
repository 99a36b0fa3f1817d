# Two commands do everything on a fresh machine with python3 (3.11 or newer) and make:
#   make demo   set up, then the main job on the built-in small world
#   make test   set up, then lint, types and tests
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
TRL_VENV ?= benchmarks/.venv-trl
TRL_PPO_VENV ?= benchmarks/.venv-trl-ppo
BIN := $(VENV)/bin
PIP_OPTIONS := --quiet --disable-pip-version-check
STAMP := $(VENV)/.steelyard-ready

.PHONY: setup demo test test-all check format clean bench-env bench-env-ppo

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Steelyard needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_OPTIONS) --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install $(PIP_OPTIONS) --no-compile -c constraints.txt -e '.[dev]'
	# What pip would do on one core. Modules for later versions of Python do not compile, and are never imported.
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib src || true
	touch $(STAMP)

demo: setup
	$(BIN)/steelyard demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-all: check
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m 'slow or not slow' --timeout 1800

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# TRL, which benchmarks/reward_model.py measures against, in an environment of its own.
bench-env:
	test -x $(TRL_VENV)/bin/python || $(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/python -m pip install $(PIP_OPTIONS) -c constraints.txt torch
	$(TRL_VENV)/bin/python -m pip install $(PIP_OPTIONS) -c constraints.txt transformers trl==1.16.0

# The last TRL with PPO, which benchmarks/ppo.py measures against, in another.
bench-env-ppo:
	test -x $(TRL_PPO_VENV)/bin/python || $(PYTHON) -m venv $(TRL_PPO_VENV)
	$(TRL_PPO_VENV)/bin/python -m pip install $(PIP_OPTIONS) -c constraints.txt torch
	$(TRL_PPO_VENV)/bin/python -m pip install $(PIP_OPTIONS) -c constraints.txt transformers trl==1.12.0

clean:
	rm -rf $(VENV) $(TRL_VENV) $(TRL_PPO_VENV) build src/*.egg-info .mypy_cache .pytest_cache .ruff_cache
