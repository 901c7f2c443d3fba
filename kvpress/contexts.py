"""The context managers of torch that a caller may have entered, and the runtime's own work inside them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


def runtime_context(device: torch.device) -> AbstractContextManager[None]:
    """The context that the runtime works in, whatever context the caller is in.

    - Gradients are off: a cache carries none.
    - `torch.inference_mode` is off: a tensor that is made in it cannot be changed in place outside it, and a cache may be filled
      in one context and read in another.
    - `torch.autocast` is off: scores and statistics are float32, and what is stored keeps its dtype.

    What arrives from the model may still have been made in inference mode. So what is kept of it must be a copy, not a view.

    Args:
        device: where the work is done.
    """
    if torch.is_inference_mode_enabled() or torch.is_autocast_enabled(device.type):
        return _outside(device.type)
    return torch.no_grad()


@contextmanager
def _outside(device_type: str) -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield
