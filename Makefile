# make run   trains MiSLAS on a long-tailed digits set, shows the result, writes a report (a minute after installing)
# make test  checks that notebooks and package agree, runs every page and every test
# make check about a minute: notebooks and package agree, names have types and docstrings, and the pages that were
#            touched since the last commit run
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: run test check whole faults audit install lab explore docs dist-check clean
run: install
	$(BIN)/ltbook run mislas digits --profile paper --seed 0
	@$(BIN)/ltbook report

# what pages and tests leave in the folder for temporary files goes with it
test: install
	$(BIN)/python -m pytest -q tests/test_notebooks.py
	@TMPDIR=$$(mktemp -d) && export TMPDIR OMP_NUM_THREADS=1 && trap 'rm -rf "$$TMPDIR"' EXIT && \
	$(BIN)/nbdev_test --n_workers 2 --timing $(if $(wildcard $(LTBOOK_DATA)/cifar100.h5),--flags data) && \
	$(BIN)/python -m pytest -q -rs -n 2 --dist worksteal tests --ignore tests/test_notebooks.py

check: install
	$(BIN)/python -m pytest -q tests/test_notebooks.py tests/test_docstrings.py tests/test_results.py tests/test_types.py
	@for page in $$({ git diff --name-only HEAD; git ls-files -o --exclude-standard; } | grep '^nbs/.*ipynb$$'); do \
	  if [ -f "$$page" ]; then echo "$$page"; OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 0 --path "$$page" || exit 1; fi; done

# a quarter of an hour: large sets and CIFAR as files, with every method, one process and two, and whole epochs
whole: install
	LTBOOK_WHOLE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/test_tree.py tests/test_large.py

# hours: kills, pairs of processes, full disks (as root), damage, a million inputs; writes outputs/faults/table.json
faults: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/watch.py

# a table of licences, and known vulnerabilities of what is installed; the second needs the network, and fails without it
audit: install
	$(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/python -m pip install -q --disable-pip-version-check pip-audit pip-licenses
	$(VENV)/audit/bin/pip-licenses --python=$(BIN)/python --from=mixed --order=license --ignore-packages ltbook
	@$(VENV)/audit/bin/pip-audit --strict --progress-spinner off --path \
	  "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || \
	  { echo 'Not clean: a package above has a known fault, or could not be looked up (is the network there?).'; exit 1; }

install: $(VENV)/.installed

# the versions that were tested; where they can't be had (another Python, another index) the newest, and that is said
$(VENV)/.installed: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' || { \
	  echo 'The versions of constraints.txt are not to be had here: the newest are installed, numbers may differ.' && \
	  $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'; }
	@touch $@

lab: install
	$(BIN)/jupyter lab nbs/explore/82_start.ipynb

# the pages to play with, without their code, in a browser: those in the folder explore; all are served, for their links
explore: install
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[lab]'
	$(BIN)/voila nbs

# the site in _docs, from the notebooks as they are; nothing is run, no network but for installing
docs: install
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]' 2>/dev/null || \
	  $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[docs]'
	$(BIN)/python nbs/site/build.py

# wheel and sdist of the last commit, each into a fresh environment of every Python at hand, run from an empty folder
dist-check: install
	rm -rf dist && d=$$(mktemp -d) && git archive HEAD | tar x -C $$d && $(BIN)/python -m build -q -o dist $$d && rm -rf $$d
	@for p in python3.10 python3.11 python3.12 python3.13 python3.14; do $$p --version >/dev/null 2>&1 || continue; \
	  for f in $(CURDIR)/dist/*.whl $(CURDIR)/dist/*.tar.gz; do \
	    d=$$(mktemp -d); echo "$$p $$(basename $$f)"; $$p -m venv $$d/env && \
	    $$d/env/bin/python -m pip install -q --disable-pip-version-check "$$f[workbook]" && (cd $$d && \
	    for v in bench compare doctor eval export features import list new pack predict report rm run shift show sweep verify; do env/bin/ltbook $$v --help >/dev/null || exit 1; done; \
	    env/bin/ltbook run mislas digits --profile smoke && ls outputs/digits/mislas/*/figures/reliability.png) || exit 1; \
	    rm -rf $$d; done; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis
