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

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Triton's interpreter computes with NumPy, which has no bfloat16, and what it returns for it is silently wrong.
BACKENDS_AND_DTYPES = pytest.mark.parametrize(
    ("backend", "dtype"),
    [pytest.param("torch", dtype, id=f"torch-{name}") for dtype, name in DTYPES.items()]
    + [
        pytest.param("triton", dtype, marks=needs_triton, id=f"triton-{name}")
        for dtype, name in DTYPES.items()
        if TRITON_DEVICE.type == "cuda" or dtype != torch.bfloat16
    ],
)


def on(backend: str, *tensors: Any) -> list[Any]:
    """Tensors where a backend's kernels run; what is no tensor stays as it is."""
    device = TRITON_DEVICE if backend == "triton" else torch.device("cpu")
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in tensors]
