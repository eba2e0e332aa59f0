# make run   trains MiSLAS on a long-tailed digits set and shows the result (about a minute after installing)
# make test  checks that notebooks and package agree, runs every page and every test
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: run test install lab dist-check clean
run: install
	$(BIN)/ltbook run mislas digits --profile paper --seed 0

test: install
	$(BIN)/python -m pytest -q tests/test_notebooks.py
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing $(if $(wildcard $(LTBOOK_DATA)/cifar100.h5),--flags data)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests --ignore tests/test_notebooks.py

install: $(VENV)/.installed

$(VENV)/.installed: settings.ini setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

lab: install
	$(BIN)/jupyter lab nbs

# a wheel from a clean copy, into a fresh environment of every Python at hand: help texts, a run with notebook and figures
dist-check: install
	rm -rf build dist && $(BIN)/python -m build -q
	@for p in python3.10 python3.11 python3.12 python3.13 python3.14; do $$p --version >/dev/null 2>&1 || continue; \
	  d=$$(mktemp -d); echo "$$p"; $$p -m venv $$d/env && $$d/env/bin/python -m pip install -q --disable-pip-version-check "$$(ls $(CURDIR)/dist/*.whl)[workbook]" && \
	  (cd $$d && env/bin/ltbook run --help >/dev/null && env/bin/ltbook run mislas digits --profile smoke && ls outputs/digits/mislas/*/figures/reliability.png) || exit 1; \
	  rm -rf $$d; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis
