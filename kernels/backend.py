"""Which implementation of an operation runs."""

import importlib.util
import os
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]


@lru_cache(maxsize=1)
def triton_installed() -> bool:
    """Whether Triton can be imported (it is optional, and there is none for Windows and macOS)."""
    return importlib.util.find_spec("triton") is not None


def use_triton(backend: Backend, tensor: Tensor) -> bool:
    """Whether the Triton kernel runs on this tensor: with "auto" if it is on a CUDA device and Triton is installed.

    Not within `torch.compile`, which makes kernels of its own from the torch path.

    Raises:
        ValueError: a backend that does not exist, or "triton" where it cannot run.
    """
    if backend == "auto":
        return tensor.is_cuda and not torch.compiler.is_compiling() and triton_installed()
    if backend == "torch":
        return False
    if backend != "triton":
        raise ValueError(f"backend={backend!r} does not exist; choose 'auto', 'torch' or 'triton'")
    if not triton_installed():
        raise ValueError("backend='triton' needs the package triton; install it, or use 'auto'")
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' cannot run on a tensor on {tensor.device}; move it to CUDA, set TRITON_INTERPRET=1 before "
            "Python starts (slow, for tests), or use 'auto'"
        )
    return True


@torch.compiler.assume_constant_result
def threads() -> int:
    """Threads that torch's operations run on; a constant in a compiled graph."""
    return torch.get_num_threads()


@lru_cache(maxsize=1)
def flash_attn_installed() -> bool:
    """Whether flash-attn can be imported (it is optional)."""
    return importlib.util.find_spec("flash_attn") is not None


def use_flash_attn(query: Tensor, value: Tensor) -> bool:
    """Whether flash-attn attends these tensors: on a CUDA device, in half precision, with heads that it knows."""
    return query.is_cuda and _flash_shaped(query, value) and flash_attn_installed()


def use_torch_flash(query: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's own flash kernel attends these tensors on their CUDA device: from compute capability 8.0 on."""
    if not query.is_cuda or not _flash_shaped(query, value):
        return False
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(query.device) >= (
        8,
        0,
    )


def _flash_shaped(query: Tensor, value: Tensor) -> bool:
    """Whether these are half precision, and heads that flash attention's kernels know."""
    half = query.dtype in (torch.float16, torch.bfloat16) and query.dtype == value.dtype
    return half and query.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0
