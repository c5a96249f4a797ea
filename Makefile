# fieldtune. `make help` lists the targets.
#
# Another build of torch than the one in constraints.txt:
#   make install TORCH=torch EXTRA_INDEX=URL      URL: the index that the install page of PyTorch names for your GPU
#   make install TORCH=torch==2.13.0+cpu EXTRA_INDEX=URL      on a Linux computer without a GPU: saves a few GB

PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
TORCH ?=
EXTRA_INDEX ?=

BIN := .venv/bin
INPUTS := pyproject.toml constraints.txt
# Compiling all of torch takes longer than the rest; using it compiles what is needed, also where
# PYTHONDONTWRITEBYTECODE would have every process compile it anew. torch imports a good part only as it exports.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check \
	$(if $(EXTRA_INDEX),--extra-index-url $(EXTRA_INDEX)) --constraint .venv/constraints.txt
COMPILE = env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -W ignore -c 'import fieldtune.commands.up, trainer.sft, \
	trainer.continual, runtime.server, bridge.backends.metaworld, metaworld, torch.onnx, matplotlib.pyplot, logging; \
	logging.disable(); torch.onnx.export(torch.nn.Linear(1, 1).eval(), (torch.ones(2, 1),), dynamo=True, verbose=False)'

.DEFAULT_GOAL := help
.PHONY: help install install-dev demo test lint bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

install: .venv/.installed-all ## install fieldtune and all it can do into .venv

install-dev: .venv/.installed-dev ## the same with the tools that tests and lint need

demo: install ## install, then the whole loop on one MetaWorld task: minutes, two cores, no GPU
	$(BIN)/fieldtune up $(CONFIG)

test: install-dev ## all tests; under ten minutes on two cores
	@# A short directory: the tests make sockets in theirs, and a socket's path may have 107 bytes.
	@# A worker that crashes is not replaced: with loadfile the run may then wait without end.
	@there=$$(mktemp -d /tmp/ft.XXXX) && \
		env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 \
			--dist loadfile --no-loadscope-reorder --max-worker-restart=0 --basetemp=$$there && rm -rf $$there

lint: install-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

bench: install ## measure serving, rollout, swap and logging
	$(BIN)/fieldtune bench all

clean: ## remove what tools made; .venv and runs stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

.venv/constraints.txt: $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fieldtune needs Python 3.11 or newer; this is $$($(PYTHON) --version): make PYTHON=python3.11 ..."; exit 1; }
	@test -x $(BIN)/python || { echo "making the virtual environment .venv"; $(PYTHON) -m venv .venv; }
	@sed -e '$(if $(TORCH),/^torch==/d)' constraints.txt > $@

.venv/.installed-all: .venv/constraints.txt $(INPUTS)
	@echo "installing fieldtune[all] into .venv (half a minute from a near index, longer from a far one)"
	@$(PIP_INSTALL) --editable '.[all]' $(TORCH)
	@$(COMPILE)
	@touch $@
	@echo "installed; $(BIN)/fieldtune doctor checks this computer"

.venv/.installed-dev: .venv/constraints.txt $(INPUTS)
	@echo "installing fieldtune[dev] into .venv (half a minute from a near index, longer from a far one)"
	@$(PIP_INSTALL) --editable '.[dev]' $(TORCH)
	@$(COMPILE)
	@touch .venv/.installed-all $@
