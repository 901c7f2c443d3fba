"""Triton kernels run where `support/accelerator.py` says; without a CUDA device that is Triton's interpreter.

tests/conftest.py switches the interpreter on: it has to be on before anything imports Triton, and transformers does.

With KVPRESS_FEWER_CASES set, as scripts/gpu_check.py does, a test runs with each value of each parameter once and not with all
combinations, and with heads and groups that models have: on a GPU almost all of the time goes into compiling.
"""

import importlib.util
import os
from typing import Any

import pytest
import torch

collect_ignore = [] if importlib.util.find_spec("triton") else ["gpu"]  # Triton is optional
FEWER = {"head_dim": (64, 128), "group": (3, 4)}


def one_of_each(items: list[pytest.Item]) -> list[pytest.Item]:
    """The items that show a value of a parameter that no item of the same test before them has, by `FEWER` where that has some."""
    by_test: dict[str, list[tuple[pytest.Item, dict[str, Any]]]] = {}
    for item in items:
        call = getattr(item, "callspec", None)
        by_test.setdefault(item.nodeid.partition("[")[0], []).append((item, dict(call.params) if call else {}))
    chosen = []
    for cases in by_test.values():
        usual = [case for case in cases if all(case[1].get(name, some[0]) in some for name, some in FEWER.items())]
        seen: set[tuple[str, str]] = set()
        for item, params in usual or cases:
            values = {("", ""), *((name, str(value)) for name, value in params.items())}
            if values - seen:
                chosen.append(item)
                seen |= values
    return chosen


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fewer cases, where they are asked for."""
    if os.environ.get("KVPRESS_FEWER_CASES"):
        chosen = one_of_each(items)
        left = set(map(id, chosen))
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in left])
        items[:] = chosen


@pytest.fixture(autouse=True)
def runs_somewhere() -> None:
    """A kernel that neither a device nor the interpreter can run fails with a reason."""
    assert torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", (
        "no CUDA device: set TRITON_INTERPRET=1"
    )


def numbers_from_arrays() -> None:
    """Let the interpreter of Triton before 3.7 loop over ranges with NumPy from 2.4 on, which it was not made for.

    A scalar is an array of one element there, and such an array is no number to NumPy any more.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    numbers_from_arrays()
