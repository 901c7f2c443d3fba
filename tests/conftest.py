"""What every test runs under."""

import os
import platform
from collections.abc import Generator

import pytest
import torch

# Before anything imports Triton (transformers does): without a CUDA device its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tiny models gain nothing from more threads, and several test processes on one machine would wait for each other.
torch.set_num_threads(1)


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
