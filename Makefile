# The README's two commands are `make demo` and `make test`; `make check` is what must pass before a merge.
# Each target installs what it needs, and no more, into .venv; stamp files there keep the next call from doing it again.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check install -c constraints.txt
# Coverage makes the tests a third slower: `make check` and .ci/run ask for it, and fail below 95 %.
# One process for each processor: the tests take half the time.
PYTEST = $(PY) -m pytest --numprocesses auto --dist worksteal $(if $(COVERAGE),--cov --cov-report=)
# Directories too, so that a deleted file is noticed.
SOURCES := $(shell find src -not -name __pycache__ -not -name '*.pyc')
NOTEBOOKS := $(wildcard examples/notebooks/*.ipynb)
# Passed on to the demo or to pytest: make demo ARGS="--seed 1"; make test ARGS="-k ties"
ARGS ?=

.PHONY: help
help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

# --- environment ---------------------------------------------------------------------------------------------------

# torch comes first and by itself: once it is there, nothing that depends on it can bring another build of it.
$(VENV)/.torch: constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch hatchling
	touch $@

# One stamp for each extra: .extra-examples, .extra-test, .extra-dev
$(VENV)/.extra-%: $(VENV)/.torch pyproject.toml
	$(PIP) --no-build-isolation '.[$*]'
	touch $@ $(VENV)/.package

# Never editable: what is tested is what users get.
$(VENV)/.package: $(VENV)/.torch pyproject.toml README.md $(SOURCES)
	$(PIP) --no-build-isolation --no-deps --force-reinstall .
	touch $@

# --- the two commands ----------------------------------------------------------------------------------------------

.PHONY: demo
demo: $(VENV)/.extra-examples $(VENV)/.package ## backdoor vectors on real images, in minutes
	$(PY) examples/backdoor_vectors.py $(ARGS)

.PHONY: pictures
pictures: demo ## the pictures and tables of the docs, drawn anew; look at them before they are committed
	cp examples/results/injection.png docs/images/
	$(PY) examples/backdoor_vectors.py 2> /dev/null | sed -n '/^One backdoored/,$$p' > docs/tables/demo.txt
	for encoder in vits vit7; do \
		$(PY) examples/experiments/study.py --encoder $$encoder --task animal --tables --pictures docs/images > /dev/null; \
	done
	for part in vectors sbv inherent screening; do $(PY) examples/experiments/study_$$part.py --redraw > /dev/null; done
	$(PY) examples/experiments/badmerging_ladder.py --redraw > /dev/null

.PHONY: test
test: $(VENV)/.extra-test $(VENV)/.package ## the fast tests, against the installed package
	mkdir -p build
	$(PYTEST) -m 'not slow' $(ARGS)

# --- the whole of it -----------------------------------------------------------------------------------------------

.PHONY: check rest
check rest: export COVERAGE := 1
check: test rest ## everything that must pass before a merge
rest: lint types doctest slow coverage notebooks docs dist

.PHONY: lint types doctest slow coverage notebooks docs dist
lint: $(VENV)/.extra-dev ## formatting and lint
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: $(VENV)/.extra-dev ## basedpyright, strict, on src
	$(BIN)/basedpyright

doctest: $(VENV)/.extra-test $(VENV)/.package ## the examples in docstrings
	$(PY) -m pytest --rootdir=. -c pyproject.toml --doctest-modules --pyargs taskvec

slow: $(VENV)/.extra-test $(VENV)/.extra-dask $(VENV)/.package ## the tests that `make test` leaves out
	mkdir -p build
	$(PYTEST) $(if $(COVERAGE),--cov-append) -m slow $(ARGS) || [ $$? -eq 5 ] # 5: no test is marked slow

coverage: $(VENV)/.extra-test ## of the tests that ran last; they must have run both parts
	$(BIN)/coverage report --fail-under=95

notebooks: $(VENV)/.extra-dev $(VENV)/.package ## run, and left as they are
	$(if $(NOTEBOOKS),$(BIN)/jupyter-execute --timeout=1200 $(NOTEBOOKS),@echo no notebooks)

docs: $(VENV)/.extra-dev ## the site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: $(VENV)/.extra-dev ## wheel and sdist, and what is in them
	rm -rf dist
	$(PY) -m build --no-isolation > /dev/null
	@# the wheel: every file of src/taskvec and its own metadata, nothing else
	diff <(cd src && find taskvec -type f -not -path '*/__pycache__/*' | sort) \
	     <($(PY) -m zipfile -l dist/*.whl | awk 'NR > 1 && $$1 !~ /\.dist-info\// { print $$1 }' | sort)
	@# the sdist: installs by itself, and its tests find all they need
	rm -rf build/sdist && mkdir -p build/sdist
	tar -xzf dist/*.tar.gz -C build/sdist --strip-components=1
	$(PIP) --no-build-isolation --no-deps --force-reinstall ./build/sdist
	cd build/sdist && ../../$(PY) -m pytest --numprocesses auto --dist worksteal --quiet -m 'not slow' -x -p no:cacheprovider
	rm -rf build/sdist

.PHONY: lines
lines: $(VENV)/.torch ## how many lines of code each room has
	@$(PY) tests/lines.py

.PHONY: bench
bench: $(VENV)/.extra-examples $(VENV)/.package ## merges from disk to disk, timed (7 GB): make bench ARGS="--mergekit ENV/bin/mergekit-yaml"
	$(PY) examples/benchmarks/streaming.py $(ARGS)

.PHONY: mutants
mutants: $(VENV)/.extra-mutants ## change the library in one place at a time; does a test notice? (an hour)
	OMP_NUM_THREADS=1 $(PY) tests/mutants.py $(ARGS)

.PHONY: format clean
format: $(VENV)/.extra-dev ## format, and mend what can be mended
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## remove everything that was built, but not .venv
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis
	find src tests examples -name __pycache__ -prune -exec rm -rf {} +
