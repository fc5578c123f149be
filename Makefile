# `make` lists the targets. PYTHON and VENV choose the interpreter and the environment:
#     make test PYTHON=python3.13 VENV=.venv313

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV   ?= .venv
DATA   ?=

python     := $(VENV)/bin/python
benchmarks := $(filter-out %/posteriordb.py,$(wildcard tests/benchmarks/[!_]*.py))

# $(call run,scripts): run them one after the other, stop at the first that fails.
run = @set -e; for script in $(1); do printf '\n== %s ==\n' "$$script"; $(python) "$$script"; done

# Every module can be imported, and type checkers find that it is typed.
define IMPORT_ALL
import importlib, pathlib, pkgutil, probbp
names = [m.name for m in pkgutil.walk_packages(probbp.__path__, "probbp.")]
for name in names:
    importlib.import_module(name)
assert (pathlib.Path(probbp.__path__[0]) / "py.typed").exists()
print(len(names), "modules from", probbp.__path__[0])
endef
export IMPORT_ALL

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all lint docs bench papers dist clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed-examples  ## fit a model with a sampler that never backpropagates
	$(python) examples/3_mcmc_and_arviz.py

test: $(VENV)/.installed-test  ## run the tests, but for the slow ones; ARGS goes to pytest
	$(python) -m pytest -n 2 --dist worksteal -m 'not slow' $(ARGS)

test-all: $(VENV)/.installed-test  ## run all tests; ARGS goes to pytest
	$(python) -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev  ## check style, format and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright --pythonpath $(python)

docs: $(VENV)/.installed-docs  ## build the documentation into build/docs, warnings as errors
	$(VENV)/bin/sphinx-build -W --keep-going -q -b html docs build/docs
	@echo 'build/docs/index.html'

bench: $(VENV)/.installed-test  ## print the benchmark tables; DATA=dir adds posteriordb's
	$(call run,$(benchmarks))
ifeq ($(DATA),)
	@printf '\nLeft out: tests/benchmarks/posteriordb.py. It needs data: make bench DATA=dir\n'
else
	@printf '\n== tests/benchmarks/posteriordb.py ==\n'
	@$(python) tests/benchmarks/posteriordb.py --data '$(DATA)'
endif

papers: $(VENV)/.installed-examples  ## run the reproductions that are due; ARGS='--fresh' for all
	$(python) examples/papers $(ARGS)

dist: $(VENV)/.installed-dev  ## build wheel and sdist, and import each from an environment of its own
	rm -rf dist build/clean
	$(python) -m build --outdir dist .
	@set -e; for file in dist/*; do \
	  printf '\n== %s ==\n' "$$file"; \
	  $(PYTHON) -m venv build/clean; \
	  build/clean/bin/pip install --quiet "$$file[models]"; \
	  (cd build && clean/bin/python -I -c "$$IMPORT_ALL"); \
	  rm -rf build/clean; \
	done

clean:  ## remove environments, caches and built packages
	rm -rf $(VENV) .venv* build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The package and one of its extras, installed anew when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(VENV)/bin/pip
	$(python) -m pip install --quiet --editable '.[$*]'
	@touch $@

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)
