"""The contexts of torch that a caller may be in, and what the runtime does about them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def lasting_tensors() -> AbstractContextManager[None]:
    """Within the block tensors are made that may be kept: `torch.inference_mode` is off, and gradients are with it.

    What is made in inference mode cannot be changed in place outside it, and a cache may be filled in one and read in the other.
    """
    return _no_inference_mode() if torch.is_inference_mode_enabled() else nullcontext()


@contextmanager
def _no_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Within the block `torch.autocast` changes no dtype on the device: scores and statistics are float32."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
