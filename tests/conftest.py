"""What every test runs under."""

import gc
import os
import platform
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from support.pairwise import Pairwise

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
    """Mark the tests in VERSIONS; of one that runs over the cases of tests/support/matrix.py, one case of each policy."""
    files = {Path(__file__).parent / file for file in VERSIONS}
    seen = set()
    for item in items:
        if item.path not in files:
            continue
        call = getattr(item, "callspec", None)
        others = dict(call.params) if call else {}
        case = others.pop("case", None)
        test = (item.path, item.originalname, case.policy.name, str(others)) if case else item.nodeid
        if test not in seen:
            item.add_marker(pytest.mark.versions)
        seen.add(test)


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
    """Policies that a test imports from files, or from modules named mine..., are gone afterwards."""
    from kvpress import outside

    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("kvpress_policy_", "mine")):
            del sys.modules[name]
    outside._files.clear()
    gc.collect()
