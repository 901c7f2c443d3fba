"""Where the tests of Triton kernels run: on a CUDA device if there is one, else in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it is optional)")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter computes with NumPy, which has no bfloat16, and what it returns for it is silently wrong.
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
FLOATS = [dtype for dtype in NAMES if DEVICE.type == "cuda" or dtype != torch.bfloat16]
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=[NAMES[dtype] for dtype in FLOATS])
