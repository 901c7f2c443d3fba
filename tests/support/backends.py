"""Both paths of a kernel as one parameter: `@BACKENDS def test(backend)` runs torch on the CPU, and Triton where it can."""

import importlib.util
from typing import Any

import pytest
import torch

TRITON_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is optional)"
)
BACKENDS = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])


def on(backend: str, *tensors: Any) -> list[Any]:
    """Tensors where a backend's kernels run; what is no tensor stays as it is."""
    device = TRITON_DEVICE if backend == "triton" else torch.device("cpu")
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in tensors]
