# make demo    two banks and two hospitals on this machine, from a bare clone
# make test    the whole test suite, linter and type checker included
# make soak    daemons killed in every phase, cut networks, keys renewed: an hour; before a release
# make lint    only the linter, the formatter and the type checker; mends what can be mended
# make clean   removes the environment and every cache

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip
# -qq keeps pip's chatter away and lets its errors through
INSTALL := $(PIP) install -qq --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test soak lint clean

help:
	@sed -n 's/^# make /make /p' Makefile

demo: $(VENV)/.installed-demo
	$(VENV)/bin/fedseek simulate simulations/scenarios/demo.toml

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

soak: $(VENV)/.installed-dev
	FEDSEEK_KILLS=5 FEDSEEK_RANDOM_KILLS=50 $(VENV)/bin/python -m pytest -m soak

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: a second run installs nothing unless the pins or the ranges changed.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "FedSeek needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	         "Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "1/3  environment in $(VENV) ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch by itself and first: packages that ask for an open range of it then take the one that is here.
$(VENV)/.torch: constraints.txt | $(VENV)/.python
	@echo "2/3  $$(grep '^torch==' constraints.txt) (the largest download)"
	@$(INSTALL) torch
	@touch $@

$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(VENV)/.torch
	@echo "3/3  FedSeek and the $$(grep -c == constraints.txt) packages pinned in constraints.txt; this takes a minute or two"
	@$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.torch
	@echo "3/3  FedSeek, its test tools and the packages pinned in constraints.txt; this takes a minute or two"
	@$(INSTALL) -e '.[demo,dev]'
	@touch $@ $(VENV)/.installed-demo
