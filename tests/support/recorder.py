"""What a CUDA graph would do, on a CPU: the operations of a step are recorded and done again on the same tensors."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# What makes the host wait for a number, or shapes depend on one.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal"}


class Recorder(TorchDispatchMode):
    """Records what a function does while it does it; the first `replay` is what has just been done."""

    def __init__(self, function):
        super().__init__()
        self.done, self.fresh = [], True
        before, torch.compiler.is_compiling = torch.compiler.is_compiling, lambda: True
        try:
            with self:
                function()
        finally:
            torch.compiler.is_compiling = before

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.__name__.split(".")[0]
        assert name not in WAITS, f"the step waits for the host: {operation}"
        result = operation(*args, **(kwargs or {}))
        self.done.append((operation, args, kwargs or {}, result))
        return result

    def replay(self):
        if self.fresh:
            self.fresh = False
            return
        for operation, args, kwargs, result in self.done:
            again = operation(*args, **kwargs)
            for held, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                if isinstance(held, torch.Tensor) and held is not new and held.data_ptr() != new.data_ptr():
                    held.copy_(new)  # a graph writes its results where they were
