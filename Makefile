# One environment, .venv, made on first use and again when pyproject.toml or constraints.txt change;
# test-lowest makes .venv-lowest in the same way, from constraints-lowest.txt.
# Commands run as `.venv/bin/python -m ...`, so that nothing needs to be activated.

PYTHON ?= python3
ARGS ?=

VENV := .venv
CONSTRAINTS := constraints.txt
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv install demo test test-lowest test-slow test-all lint types check clean FORCE

help: ## list the targets
	@echo "Targets (PYTHON=$(PYTHON) makes .venv; ARGS=... is passed on by demo and tests):"
	@sed -n 's/^\([a-z -]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | \
		while IFS='|' read -r name text; do printf '%-12s %s\n' "$$name" "$$text"; done

venv install: $(STAMP) ## make .venv and install the package with its development tools

demo: $(STAMP) ## train a small teacher and distil it into a student on synthetic pictures
	$(RUN) -m kd_trainer.commands.demo $(ARGS)

test: $(STAMP) ## run the quick tests, on two cores
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile -m "not slow and not distributed and not browser" $(ARGS)

test-lowest: ## run the quick tests with the lowest versions that are allowed
	@$(MAKE) VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt test

test-slow: $(STAMP) ## run the others: long ones, several processes, browser
	$(RUN) -m pytest -m "slow or distributed or browser" $(ARGS)

test-all: $(STAMP) ## run all tests
	$(RUN) -m pytest $(ARGS)

lint: $(STAMP) ## check style and formatting
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(STAMP) ## check the types of the package
	$(RUN) -m mypy

check: lint types test ## lint, types and the quick tests

clean: ## remove caches and build output, keep environments and runs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

# The stamp names the folder it was written in: a copied .venv still points to the other one.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Expected Python 3.11 or newer, got '$$($(PYTHON) --version 2>&1)'." \
			"Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@[ ! -e $@ ] || [ "$$(cat $@)" = "$(CURDIR)" ] || rm -rf $(VENV)
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
		echo "Expected python3 -m venv to work, but it failed." \
			"On Debian and Ubuntu: apt install python3-venv." >&2; exit 1; }
	@echo "Installing into $(VENV); the first time takes some minutes."
	$(RUN) -m pip install -c $(CONSTRAINTS) -e '.[dev]'
	@printf '%s\n' "$(CURDIR)" > $@
