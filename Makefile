# fastloss. `make run` and `make test` need Python >= 3.11, a C compiler and make, and nothing prepared: they create
# .venv, build the kernels and install what they need into it. `make help` lists the targets.
#
# What the tests hold:
#   make test      ruff, mypy, stubtest, and all tests but those marked `full`: every line of the numerical contract,
#                  every backend and instruction-set level of this machine on sizes at the edges, training, data,
#                  command line. Of the backend numba, whose kernels take seconds each to compile, a fixed sample, and
#                  of levels below the best all but the longest (see tests/conftest.py). At most 10 minutes on 2 cores,
#                  installation included.
#   make test-all  the same, and what is marked `full`: the full grids, all cases of numba, and the sdist and wheel built
#                  and tried in a fresh environment. It installs PyTorch, JAX, XGBoost and LightGBM, so that the tests
#                  with them run too.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
# What is installed with the package. Whoever needs more than `make run` may name it here, and pip is asked once.
EXTRAS ?= cli
# Processes that share the tests. Each test may use threads too, which must not spin while they wait: others need the core.
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

# The compiled modules that this machine can load: what stubtest can look at.
define list_kernels
from fastloss import list_backends
from fastloss.backends.cython import TYPES
levels = [b.name[7:] for b in list_backends() if b.available and b.name.startswith("cython-")]
print(*(f"fastloss._kernels.{kind}_{level}" for level in levels for kind in TYPES.values()))
endef
export list_kernels

# What extras of the package take from others, one requirement a line.
define list_requirements
import re, sys, tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
def of(names):
    for requirement in (r for name in re.findall(r"[\w-]+", names) for r in extras[name]):
        own = re.match(r"fastloss\[(.*?)\](.*)", requirement)
        yield from (r + own[2] for r in of(own[1])) if own else [requirement]
print(*dict.fromkeys(of(sys.argv[1])), sep="\n")
endef
export list_requirements

# What compiling takes: the backend, and what that asks for here (Cython; CMake and Ninja, unless the system has them).
define list_build_backend
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")
endef
define list_build_requirements
from scikit_build_core.build import get_requires_for_build_editable
print(*get_requires_for_build_editable({}), sep="\n")
endef
export list_build_backend list_build_requirements

.PHONY: help run test test-all bench docs lint peers clean
.DELETE_ON_ERROR:
.NOTPARALLEL: # one pip at a time, but for the first two

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
	@echo 'ARGS="..." passes options on, as in: make run ARGS="--loss softmax --data PATH"'
	@echo 'PYTHON=... names the Python that makes the environment, as in: make run PYTHON=python3.12'

# What trains needs the kernels of this machine alone: a third of the time to compile. If there are all, these.
run: $(or $(wildcard $(VENV)/built),$(VENV)/native) ## train softmax and hinge on real images; models and pictures go to out/
	$(BIN)/fastloss train $(ARGS)

test: lint ## static checks and all tests but the full grids
	$(PYTEST) -m "not full" $(ARGS)

test-all: peers lint ## static checks and all tests
	$(PYTEST) -m "" $(ARGS)

bench: $(VENV)/bench ## time the kernels beside their peers (those installed: see make peers)
	$(BIN)/fastloss bench $(ARGS)

docs: $(VENV)/docs ## build the documentation site into docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

lint: $(VENV)/test ## ruff, mypy, and stubtest on the compiled modules
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest --concise fastloss._kernels.cpu fastloss._kernels.gate $$($(BIN)/python -c "$$list_kernels")

peers: $(VENV)/peers ## install PyTorch, JAX, XGBoost and LightGBM: for tests with them, and for make bench

clean: ## remove the environment and all that was built
	rm -rf $(VENV) build dist out docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The files built (native: with the kernels of this machine's level alone), test, bench, peers and docs in the environment stand for
# what is installed in it. The package is installed in place (editable): changes to Python files count at once, changes to what is
# named here build the kernels again.
# Requirements of the build are installed too: in an environment of pip's own, which is another each time, all would be compiled anew.
$(VENV)/native: export FASTLOSS_LEVELS := native
$(VENV)/built $(VENV)/native: pyproject.toml CMakeLists.txt $(wildcard src_ext/*) | $(BIN)/python
	@for list in "$$list_build_backend" "$$list_build_requirements"; do \
	  $(BIN)/python -c "$$list" >$(VENV)/requirements.txt && $(PIP) install --requirement $(VENV)/requirements.txt || exit 1; done
	@$(BIN)/python -c "$$list_requirements" $(EXTRAS) >$(VENV)/requirements.txt
	@# Unpacking takes one core, beside compilers. What is left then are the package's own requirements, which pip knows by now.
	$(PIP) install --constraint tests/constraints.txt --requirement $(VENV)/requirements.txt & others=$$!; \
	$(PIP) install --no-deps --no-build-isolation --editable . || { kill $$others; exit 1; }; wait $$others
	$(PIP) install --constraint tests/constraints.txt "fastloss[$(EXTRAS)]"
	@touch $@

# fastloss itself is installed by now, so that pip adds only what the extra brings.
$(VENV)/bench $(VENV)/test $(VENV)/peers $(VENV)/docs: $(VENV)/%: $(VENV)/built tests/constraints.txt
	$(PIP) install --constraint tests/constraints.txt "fastloss[$*]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fastloss needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)." \
	       "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
