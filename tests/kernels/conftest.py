"""Triton kernels run where `support/accelerator.py` says; without a CUDA device that is Triton's interpreter.

tests/conftest.py switches the interpreter on: it has to be on before anything imports Triton, and transformers does.
"""

import importlib.util
import os
from typing import Any

import pytest
import torch

collect_ignore = [] if importlib.util.find_spec("triton") else ["gpu"]  # Triton is optional


@pytest.fixture(autouse=True)
def runs_somewhere() -> None:
    """A kernel that neither a device nor the interpreter can run fails with a reason."""
    assert torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", (
        "no CUDA device: set TRITON_INTERPRET=1"
    )


def numbers_from_arrays() -> None:
    """Let the interpreter of Triton before 3.7 loop over ranges with NumPy from 2.4 on, which it was not made for.

    A scalar is an array of one element there, and such an array is no number to NumPy any more.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    numbers_from_arrays()
