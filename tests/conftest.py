"""What every test runs under."""

import gc
import os
import sys

import pytest
import torch

# Before anything imports Triton (transformers does): without a CUDA device its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tiny models gain nothing from more threads, and several test processes on one machine would wait for each other.
torch.set_num_threads(1)


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
