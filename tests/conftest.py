"""What every test runs under."""

import gc
import os
import platform
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from support.pairwise import Pairwise, axes_of, by_test, choose

# Before anything imports Triton (transformers does): without a CUDA device its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same numbers in every run: nothing is measured to choose how linear layers run.
os.environ.setdefault("KVPRESS_LINEAR", "bmm")

# Tiny models gain nothing from more threads, and several test processes on one machine would wait for each other.
torch.set_num_threads(1)

# What a change in transformers can break. `make test-versions` runs these with the oldest and the newest.
VERSIONS = (
    "evals/test_runner.py",
    "test_compat.py",
    "test_compiled.py",
    "test_families.py",
    "test_invariants.py",
    "test_lifecycle.py",
    "test_patching.py",
    "test_pipeline.py",
    "test_readme.py",
    "test_scoring.py",
    "test_sharing.py",
    "test_traps.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="every combination of parameters, not just every pair of values"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("full"):
        config.pluginmanager.register(Pairwise(), "pairwise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests in VERSIONS; of one that runs over the cases of tests/support/matrix.py, those that together play every
    role in every way. A policy meets transformers through its roles only, so its name need not be covered."""
    files = {Path(__file__).parent / file for file in VERSIONS}
    for same in by_test([item for item in items if item.path in files]):
        for at in choose([axes_of(item, by_name=False)[0] for item in same]):
            same[at].add_marker(pytest.mark.versions)


def versions() -> str:
    import transformers

    return f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"


def pytest_report_header() -> str:
    return versions()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    """The versions once more, under the list of failures, on the line above pytest's last."""
    yield
    terminalreporter.write_line(versions())


@pytest.fixture
def without_traces():
    """Policies and tasks that a test imports from files, or from modules named mine..., are gone afterwards."""
    from kvpress import outside

    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("kvpress_policy_", "kvpress_task_", "mine")):
            del sys.modules[name]
    outside._files.clear()
    gc.collect()
