"""How much a decode step launches on a GPU in each layer: Triton kernels, and torch's operations that are not views; and a plan.

Counted in the interpreter, of a step in which nothing grows. What a policy launches beside its model costs a GPU with little to
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
from kvpress.kernels.block_sparse_attention import listed_keys
from kvpress.policies import FlexPrefill, MInference, XAttention
from kvpress.policy import Pattern, View
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
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal", "repeat_interleave"}
# Each with the launches of a layer's plan, however many heads it has.
PLANS = {
    "x_attention": (XAttention(block_size=16, stride=4, threshold=0.6), 26),
    "flex_prefill": (FlexPrefill(block_size=16, min_budget=16, gamma=0.5, tau=0.3), 93),
    "minference": (MInference(default=("vertical_slash", 10, 12), sink=4, recent=8, block_size=16, probe=16), 34),
    "minference of blocks": (MInference(default=("block_sparse", 4), block_size=16), 50),
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


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel is Triton's, and numbers that a device would have to tell are not asked for."""
    for file in Path(backend.__file__).parent.glob("*.py"):
        module = importlib.import_module(f"kvpress.kernels.{file.stem}")
        if file.stem != "backend" and hasattr(module, "use_triton"):
            monkeypatch.setattr(module, "use_triton", lambda chosen, tensor: chosen != "torch")
    for name in ("policy", "policies.x_attention", "policies.flex_prefill"):
        monkeypatch.setattr(f"kvpress.{name}.host_has", lambda tensor: False)


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
        as_on_a_gpu(monkeypatch)
        with counting(monkeypatch) as launches:
            model(ids[:, 36:], **{CACHE: cache})
    assert launches.found.total() <= MOST.get(name, 2) * LAYERS, dict(launches.found)


def view_of(heads: int, kv_heads: int, rows: int = 140, n: int = 200) -> View:
    """The last rows of a prompt, whose queries are near some keys, so that heads tell blocks apart."""
    generator = torch.Generator().manual_seed(heads)
    keys = torch.randn(1, kv_heads, n, 16, generator=generator)
    query = torch.randn(1, heads, rows, 16, generator=generator)
    query += keys.repeat_interleave(heads // kv_heads, dim=1)[:, :, :rows]
    positions = torch.arange(n, dtype=torch.int32).expand(1, kv_heads, n)
    seen = torch.tensor([n], dtype=torch.int32)
    return View(0, 1, query, positions, None, seen, 0.3, None, None, {}, {}, lambda: keys, n, n - 1, n)


def reads_of(pattern: Pattern | None, view: View) -> torch.Tensor:
    """What the rows read, bool [1, heads, rows of whole blocks, n]."""
    assert pattern is not None
    n = view.keys.shape[2]
    rows = n - (n - view.query.shape[2]) // pattern.block_size * pattern.block_size
    return listed_keys(rows, n, view.query.shape[1], block_size=pattern.block_size, **pattern.lists)


@pytest.mark.parametrize("name", PLANS)
def test_launches_of_a_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many for few heads as for many, none of them a wait for the device; what is read is what a CPU reads."""
    policy, most = PLANS[name]
    views = [view_of(4, 2), view_of(16, 4)]
    expected = [reads_of(policy.plan(view), view) for view in views]
    as_on_a_gpu(monkeypatch)
    counts = []
    for view, reads in zip(views, expected, strict=True):
        with monkeypatch.context() as patched, counting(patched) as launches, launches:
            pattern = policy.plan(view)
        assert launches.found.keys() & WAITS == set()
        assert torch.equal(reads_of(pattern, view), reads)
        assert reads.sum() < 0.8 * torch.ones(reads.shape).tril(reads.shape[3] - reads.shape[2]).sum()
        counts.append(launches.found)
    assert counts[0] == counts[1]
    assert counts[0].total() <= most, dict(counts[0])
