# make test, make demo: both set up their environment by themselves. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test,demo

BIN := $(VENV)/bin
# Written last: an environment whose installation failed half-way has no stamp and is not used.
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

# One thread: the networks here are small, and idle OpenMP threads that spin slow everything down.
export OMP_NUM_THREADS := 1
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help venv lint format typecheck pytest quick slow-list test test-matrix demo docs docs-links spelling browser release-check clean distclean

# An environment that stands is kept, so an interpreter that was asked for by name has to be its own.
ifneq ($(origin PYTHON),file)
ifneq ($(wildcard $(BIN)/python),)
version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ifneq ($(call version,$(PYTHON)),$(call version,$(BIN)/python))
ifeq ($(filter clean distclean help,$(MAKECMDGOALS)),)
$(error $(VENV) holds Python $(call version,$(BIN)/python), PYTHON=$(PYTHON) is $(or $(call version,$(PYTHON)),not to be found): run `make distclean` first, or choose another folder with VENV=)
endif
endif
endif
endif

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12   the interpreter that the environment is made with (default: python3)"
	@echo "  VENV=.venv-3.12     the environment's folder (default: .venv)"

venv: $(STAMP)  ## make the virtual environment and install the package with what tests and demo need

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "nad_attr needs Python 3.10 or later; choose one with PYTHON=..." >&2; exit 1; }
	@echo "Installing into $(VENV): about 3 minutes and 6 GB of disk the first time, nearly all of it PyTorch."
	@rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

# What the documentation needs beside that comes when it is first asked for.
$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS),docs]'
	@touch $@

lint: $(STAMP)  ## check style and formatting
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(STAMP)  ## format the code and mend what ruff can mend
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

typecheck: $(STAMP)  ## check the types
	$(BIN)/python -m mypy

pytest: $(STAMP)  ## run the tests and the examples in the docstrings only; ARGS= goes to pytest
	$(BIN)/python -m pytest $(ARGS)

quick: $(STAMP)  ## style, and the tests that are not slow: for daily work; ARGS= goes to pytest
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

slow-list: $(STAMP)  ## run all tests, and write anew which of them `make quick` leaves out
	$(BIN)/python -m pytest --slow-list

test: $(STAMP)  ## run every check: style, types, tests
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest $(ARGS)

# nox makes its own environments; it is installed into this one when it is first asked for.
test-matrix: $(STAMP)  ## the quick tests on Python 3.10 to 3.13, oldest and newest torch; ARGS= goes to nox
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'nox[uv]>=2024.4'
	$(BIN)/python -m nox $(ARGS)

demo: $(STAMP)  ## explain a real ImageNet network on real photos
	$(BIN)/nad-attr demo $(ARGS)

docs: $(DOCS_STAMP)  ## build the documentation, tutorials included; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html $(ARGS)
	@echo "open docs/_build/html/index.html"

docs-links: $(DOCS_STAMP)  ## check the links of the documentation to other sites; needs the network
	NAD_DOCS_RUN= $(BIN)/python -m sphinx -b linkcheck docs docs/_build/linkcheck

spelling: $(DOCS_STAMP)  ## check the spelling of code and pages
	$(BIN)/python -m codespell_lib

# No browser is downloaded: the one on the PATH is used.
browser: $(STAMP)  ## try the report's pages in the Chromium that is installed; ARGS= goes to pytest
	@command -v chromium chromium-browser chrome >/dev/null || { echo "there is no Chromium on the PATH" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'playwright>=1.45'
	$(BIN)/python -m pytest tests/test_report_browser.py $(ARGS)

release-check:  ## build, install into a clean environment, and run README and command line there
	$(PYTHON) scripts/release_check.py $(ARGS)

clean:  ## remove caches and build output
	rm -rf build dist docs/_build docs/reference/pages .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find nad_attr tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## remove the virtual environment as well
	rm -rf $(VENV)
