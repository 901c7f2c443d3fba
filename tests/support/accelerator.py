"""Where the tests of kernels run: Triton's on a CUDA device if there is one, else in Triton's interpreter; torch's on the CPU.

A file that imports `backends` runs its tests with both paths; one that imports from here is about Triton alone.
"""

import pytest
import torch

from support import backends

pytest.importorskip("triton", reason="Triton is not installed (it is optional)")

DEVICE = backends.TRITON_DEVICE
FLOATS = [dtype for dtype in backends.DTYPES if DEVICE.type == "cuda" or dtype != torch.bfloat16]
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=[backends.DTYPES[dtype] for dtype in FLOATS])
