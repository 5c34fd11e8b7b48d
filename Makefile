# make train   d1's recipe on a small model: SFT, diffu-GRPO, evaluation
# make test    the quick tests (make test-slow: the others, and more examples of those that draw them; make test-long:
#              minutes each, at full size, before a release)
# make lint    ruff and mypy
# make docs    the documentation as a website, in site/
# make setup   the virtual environment alone; JAX=cuda12, cuda13 or tpu brings JAX for that accelerator

VENV ?= .venv
# The first Python of 3.11 or newer.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
RUN = $(VENV)/bin/python
ARGS ?=
JAX ?=
ifneq ($(filter-out cuda12 cuda13 tpu,$(JAX)),)
$(error JAX=$(JAX) is unknown; known: cuda12, cuda13, tpu; without it, JAX uses the CPU)
endif

# Where it is set, each of the many processes of the tests would translate every file anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test test-slow test-long lint docs setup clean

train: setup
	$(RUN) -m d1jax.main --config=configs/grpo.py $(ARGS)

test: $(VENV)/.tests
	$(RUN) -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-slow: $(VENV)/.tests
	$(RUN) -m pytest -n 3 --dist worksteal -m "(slow or hypothesis) and not long" --hypothesis-profile=full $(ARGS)

test-long: $(VENV)/.tests
	$(RUN) -m pytest -n 2 --dist worksteal -m long $(ARGS)

lint: $(VENV)/.tests
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build $(ARGS)
	@echo "open site/index.html, or with the search: $(RUN) -m http.server --directory site"

setup: $(VENV)/.setup $(if $(JAX),$(VENV)/.jax-$(JAX))

$(VENV)/.jax-$(JAX): $(VENV)/.setup
	$(RUN) -m pip install --quiet --disable-pip-version-check -c requirements.txt "jax[$(JAX)]"
	@touch $@

$(VENV)/.setup: requirements.txt
	@test -n "$(PYTHON)" || { echo "d1jax needs Python 3.11 or newer; name it with make PYTHON=..." >&2; exit 2; }
	@echo "installing into $(VENV): 1 GB, a minute or more"
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# Of thousands of files the tests import a few, which Python compiles itself.
$(VENV)/.tests: $(VENV)/.setup tests/requirements.txt docs/requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile -r tests/requirements.txt
	@touch $@

$(VENV)/.docs: $(VENV)/.setup docs/requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis
