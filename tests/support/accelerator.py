"""Where the tests of kernels run: Triton's on a CUDA device if there is one, else in Triton's interpreter; torch's on the CPU.

A file that imports `backends` runs its tests with both paths; one that imports from here is about Triton alone.
"""

import pytest
import torch

from support.backends import TRITON_DEVICE

pytest.importorskip("triton", reason="Triton is not installed (it is optional)")

DEVICE = TRITON_DEVICE
# The interpreter computes with NumPy, which has no bfloat16, and what it returns for it is silently wrong.
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
FLOATS = [dtype for dtype in NAMES if DEVICE.type == "cuda" or dtype != torch.bfloat16]
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=[NAMES[dtype] for dtype in FLOATS])
