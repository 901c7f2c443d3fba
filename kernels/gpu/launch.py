"""What every launch of a Triton kernel goes through, and the whole numbers that grids and tiles are made of.

Triton launches on the current device, which need not be the one where the tensors are: a model that `device_map` spreads over
several GPUs runs all its layers with the first one current.
"""

from functools import lru_cache
from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on the device of its first argument, which is a tensor, whichever device is the current one."""
    device = args[0].device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*args, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*args, **options)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; those of an H100 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def cdiv(number: int, by: int) -> int:
    """The quotient rounded up; Triton's own takes microseconds outside of a kernel."""
    return -(-number // by)


def power_of_two(number: int) -> int:
    """The least power of two that is at least the number, which is at least 1."""
    return 1 << (number - 1).bit_length()
