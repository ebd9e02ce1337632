# Every target sets up what it needs: a fresh clone and `python3` >= 3.11 are enough.

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
INSTALLED := .venv/.installed
FOR_SLOW := .venv/.installed-slow
# constraints.txt is the tested set: what was tested is what is installed.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
TESTED := -c constraints.txt

DEVICE ?= cuda

.PHONY: demo test test-slow test-gpu test-server test-oldest test-newest gpu-check gpu-wheels vllm lint format install clean

demo: $(INSTALLED)
	$(BIN)/tropd demo

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# The second line is quick, but needs a package that is installed for this target alone.
test-slow: $(FOR_SLOW)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow
	$(BIN)/python -m pytest tests/testbeds/test_gym.py

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

# On a GPU with the Python that has its torch, and no environment: the machine may be bare.
gpu-check: $(if $(filter cpu,$(DEVICE)),$(INSTALLED))
	$(if $(filter cpu,$(DEVICE)),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check --device $(DEVICE)

gpu-wheels: | $(BIN)/python
	$(BIN)/python -m benchmarks.gpu_check.wheels

test-server: $(INSTALLED) vllm
	$(BIN)/python -m pytest -m server

test-oldest test-newest: test-%: | $(BIN)/python
	PYTHON=$(BIN)/python scripts/install_compat.sh $*
	.venv-$*/bin/python -m tropd env
	.venv-$*/bin/python -m pytest -n $(JOBS) --dist worksteal -m compat

vllm: | $(BIN)/python
	PYTHON=$(BIN)/python scripts/install_vllm.sh

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tropd needs Python >= 3.11, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Use: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into .venv (a few minutes the first time)"
	@$(PIP) install $(TESTED) -e '.[dev]'
	@touch $@

$(FOR_SLOW): $(INSTALLED)
	@echo "Installing Ray, reasoning-gym and gguf into .venv (a minute or two)"
	@$(PIP) install $(TESTED) -e '.[gguf,gym,ray]'
	@touch $@

clean:
	rm -rf .venv .venv-vllm .venv-oldest .venv-newest build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find tropd tests -name __pycache__ -type d -prune -exec rm -rf {} +
