# Everything sets itself up: a fresh machine needs make and Python 3.11 or newer.
#   make demo    an echo service on three servers, with failures
#   make test    every check and every test
#   make lint    ruff, mypy and pyright alone
#   make bench   the benchmarks, with what users would pick instead beside us

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --quiet --disable-pip-version-check

.PHONY: demo test lint bench clean

demo: $(VENV)/.ready-demo
	$(PY) -m examples.echo

# Modules are compiled once, and not in each of the processes that tests start.
test: export PYTHONDONTWRITEBYTECODE :=
test: lint
	$(PY) -m pytest -n 4 --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.ready-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pyright --pythonpath $(PY)

bench: $(VENV)/.ready-bench
	$(PY) -m benchmarks
	$(PY) -m benchmarks.layers
	$(PY) -m benchmarks.http
	$(PY) -m benchmarks.grpc

$(VENV)/bin/pip:
	sh .ci/system-parts python
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "pip>=25.1"

$(VENV)/.ready-demo: $(VENV)/bin/pip pyproject.toml
	$(PIP) install --editable .
	touch $@

$(VENV)/.ready-test: $(VENV)/bin/pip pyproject.toml .ci/system-parts
	sh .ci/system-parts test
	$(PIP) install --editable ".[uvloop,otel]" --group test --group lint
	touch $@

$(VENV)/.ready-bench: $(VENV)/bin/pip pyproject.toml
	$(PIP) install --editable ".[uvloop,http,httpx2,grpc]" --group bench
	touch $@

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
