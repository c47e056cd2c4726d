# Every target sets up what it needs, from nothing but a CPython 3.10 to 3.13 with venv: see docs/installing.md.
# Once named it stays: make setup PYTHON=python3.12
PYTHON ?= python3
CHOSEN := $(if $(filter-out file default undefined,$(subst command line,command,$(origin PYTHON))),--chosen)
# Optional groups of requirements to install as well: make setup GROUPS="torch"
GROUPS ?=
# More for the program behind a target: make test ARGS="-k align", make results ARGS="--jobs 2"
ARGS ?=

BIN := .venv/bin
# The tests compute on small arrays and start processes of their own: more threads would only get in the way.
TEST_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format results clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Make or update .venv; at once when nothing changed
	@$(PYTHON) tools/bootstrap.py $(CHOSEN) $(GROUPS)

demo: setup ## Train a small detector adaptively; mAP and demo.png
	@$(BIN)/python examples/ssd/demo.py

test: setup ## Run the tests
	@OMP_NUM_THREADS=$(TEST_THREADS) OPENBLAS_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest $(ARGS)

lint: setup ## Check style and types; build the API reference
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python tools/api_reference.py

format: setup ## Bring the code into the style that lint asks for
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

results: setup ## Train with every method and several seeds; write results/README.md
	@$(BIN)/python results/make_results.py $(ARGS)

clean: ## Remove .venv and the caches; data and results stay
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
