"""How much a decode step launches on a GPU in each layer: Triton kernels, and torch's operations that are not views.

Counted in the interpreter, in a step in which nothing grows. What a policy launches beside its model costs a GPU with little to
do more than reading the cache; so a number here may get smaller, and a larger one needs a reason.
"""

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kvpress
from kvpress import attention
from kvpress.compat import CACHE
from kvpress.kernels import backend
from support.matrix import CASES, rows_to_ask
from support.models import tiny_llama, token_ids

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow encountered in exp")

LAYERS = 4
FREE = {
    *("view", "slice", "select", "expand", "transpose", "unsqueeze", "squeeze", "alias", "detach", "as_strided", "permute"),
    *("t", "unflatten", "flatten", "_unsafe_view", "_reshape_alias", "split", "narrow", "unbind", "lift_fresh"),
    *("empty", "new_empty", "empty_like", "empty_strided", "promote_types"),
}  # fmt: skip
# Launches of all layers together, by policy. Two a layer, one that writes the new entry and one that attends, where none is named.
MOST = {
    "h2o": 5,
    "a2sf": 6,
    "tova": 7,
    "h2o_prefill": 4,
    "a2sf_prefill": 5,
    "observed_attention": 4,
    "streaming_llm": 13,
    "ems": 17,
    "keyformer": 21,
    "tidal_decode": 17,
    "quest": 35,
    "recycled": 33,
    "hip": 25,
    "infinite_hip": 136,
    "kascade": 10,
    "lazy_llm": 3,
    "token_select": 58,
    "ada_kv": 9,
    "dual_chunk": 40,
    "finch": 24,
    "packed": 65,
}
FIRST = {case.policy.name: case for case in reversed(CASES)}


class Launches(TorchDispatchMode):
    """Counts what would be launched; within a kernel nothing, as the interpreter works with tensors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.in_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if not self.in_kernel and name not in FREE:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Within the block the attention of decode steps is counted."""
    launches, step = Launches(), attention.decode_step
    for file in (Path(backend.__file__).parent / "gpu").glob("*.py"):
        module = importlib.import_module(f"kvpress.kernels.gpu.{file.stem}")
        if file.stem != "launch" and hasattr(module, "launch"):

            def launch(kernel: Any, *args: Any, real: Any = module.launch, **options: Any) -> None:
                launches.found[kernel.__name__] += 1
                launches.in_kernel = True
                try:
                    real(kernel, *args, **options)
                finally:
                    launches.in_kernel = False

            monkeypatch.setattr(module, "launch", launch)

    def counted(*args: Any) -> Any:
        with launches:
            return step(*args)

    with monkeypatch.context() as patched:
        patched.setattr(attention, "decode_step", counted)
        yield launches


@pytest.mark.parametrize("name", FIRST)
def test_launches_of_a_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(layers=LAYERS, heads=8, kv_heads=2, head_dim=16, attention="eager")
    ids = token_ids(1, 37)
    with torch.no_grad(), kvpress.patch(model, FIRST[name].policy):
        cache = model(ids[:, :32], use_cache=True, **rows_to_ask(model, 32))[CACHE]
        for step in range(32, 36):
            model(ids[:, step : step + 1], **{CACHE: cache})
        for file in Path(backend.__file__).parent.glob("*.py"):
            module = importlib.import_module(f"kvpress.kernels.{file.stem}")
            if file.stem != "backend" and hasattr(module, "use_triton"):
                monkeypatch.setattr(module, "use_triton", lambda chosen, tensor: chosen != "torch")
        with counting(monkeypatch) as launches:
            model(ids[:, 36:], **{CACHE: cache})
    assert launches.found.total() <= MOST.get(name, 2) * LAYERS, dict(launches.found)
