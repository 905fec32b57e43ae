# Everything a newcomer needs is `make demo` and `make test`; each target makes what it lacks.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo run try client test fast check docs licences dist mutants bench explore clean help

demo: $(VENV)/run.installed client  ## one teacher and thirty participants join a lesson, on real embedded stores
	$(BIN)/python scripts/demo.py

run: $(VENV)/run.installed client  ## the server, until Ctrl-C
	$(BIN)/lesson-server run

try: $(VENV)/client/node_modules/socket.io-client  ## the Socket.IO client for the page /try of make run; needs npm

client: | $(BIN)/python
	@if command -v npm > /dev/null; then $(MAKE) --silent try || true; fi

$(VENV)/client/node_modules/socket.io-client: | $(BIN)/python
	npm install --prefix $(VENV)/client --no-package-lock --no-audit --no-fund --fetch-timeout 20000 --fetch-retries 1 socket.io-client@4.8.1

test: $(VENV)/dev.installed  ## all tests, with coverage; ARGS="tests/stores -k presence": some, without
	PATH="$(abspath $(BIN)):$$PATH" scripts/test $(ARGS)

fast: $(VENV)/dev.installed  ## the tests that need no stores and start no processes: seconds
	$(BIN)/python -m pytest --numprocesses 2 -m "not stores" $(addprefix --ignore=tests/,cli conf embedded end_to_end faults scripts)

check: $(VENV)/dev.installed  ## style, types, and diagrams that match the charts
	PATH="$(abspath $(BIN)):$$PATH" scripts/check

docs: $(VENV)/docs.installed  ## the documentation as a site, for reading without a server and a network: build/site/index.html
	$(BIN)/mkdocs build

licences: $(VENV)/dev.installed $(VENV)/bench.installed  ## docs/licences.md, from what is installed
	$(BIN)/python scripts/release/licences.py

dist: $(VENV)/dev.installed  ## the sdist and the wheel of the last commit in dist/, after a look for wheels of all dependencies
	$(BIN)/python scripts/release/wheels.py
	rm -rf build/checkout && mkdir -p build/checkout
	git archive HEAD | tar -xC build/checkout
	$(BIN)/python -m build --outdir dist build/checkout

mutants: $(VENV)/dev.installed  ## small defects in the core, one at a time: does a test see each? docs/testing.md; ARGS="--sample 90"
	$(BIN)/python scripts/mutants/mutants.py $(ARGS)

bench: $(VENV)/bench.installed  ## the server and its peers, measured in turn: docs/benchmarks.md; ARGS=--quick
	$(BIN)/python scripts/bench/run.py $(ARGS)

explore: $(VENV)/dev.installed  ## every order of commands in small scenarios, with a fault at each point: minutes; ARGS="twice --limit 10000"
	$(BIN)/python tests/support/explore.py $(ARGS)
	$(BIN)/python -m pytest tests/faults/explore_seats.py

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

clean:  ## what the targets above made, the embedded stores too
	rm -rf $(VENV) .lesson-server .mutants build dist *.egg-info tests/js/node_modules scripts/bench/peers/*/node_modules .coverage* .*_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.installed: setup.py | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[embedded,simulate]'
	touch $@

$(VENV)/dev.installed: setup.py | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

$(VENV)/bench.installed: setup.py | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@

$(VENV)/docs.installed: setup.py | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@
