"""A decode step never waits for the device, but where what a policy reads has a size that only the device knows."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kvpress
from kvpress.compat import CACHE
from support.matrix import CASES, rows_to_ask
from support.models import tiny_llama, token_ids

# What hands a number of the device, or a shape that depends on one, to the host.
WAITS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.repeat_interleave.Tensor"}
# Per layer: how many entries a group's query heads read together; whether the last vote, or the last set, still serves.
# Which tokens a layer runs on, and how far the rows of those that came back see.
WAITING = {"quest": 1, "tidal_decode": 1, "token_select": 1, "recycled": 1, "hip": 1, "infinite_hip": 1, "lazy_llm": 2}


class Waits(TorchDispatchMode):
    """Notes the module of kvpress that waits for the device, at each wait."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) in WAITS:
            self.found.append(self.caller())
        return func(*args, **(kwargs or {}))

    def caller(self):
        frame = sys._getframe(2)
        while not frame.f_globals.get("__name__", "").startswith("kvpress."):
            frame = frame.f_back
        return frame.f_globals["__name__"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_steps(case):
    layers, steps = 3, 6
    model, ids = tiny_llama(layers=layers), token_ids(1, 24)
    with kvpress.patch(model, case.policy), torch.no_grad():
        cache = model(ids[:, :16], use_cache=True, **rows_to_ask(model, 16))[CACHE]
        for _ in range(2):  # the first may still evict what the prompt left
            model(ids[:, 16:17], **{CACHE: cache})
        with Waits() as waits:
            for step in range(17, 17 + steps):
                model(ids[:, step : step + 1], **{CACHE: cache})
    # On a CPU, where nothing is waited for, the k best are found another way than on a GPU.
    found = [name for name in waits.found if name != "kvpress.kernels.topk_select"]
    assert len(found) <= WAITING.get(case.policy.name, 0) * layers * steps, found
