"""Every launch of a Triton kernel that the supported shapes lead to, noted from the operations themselves.

An operation runs on tensors that have shapes and no numbers, with stand-ins for its kernels that note what they would be launched
with. So the list cannot differ from what is launched. The compile tests put what `CALLS` leads to through the compiler, in a
process of its own (`python gpu_launches.py`), since the interpreter has to be off there.
"""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import kvpress
from kvpress.kernels import launch_shapes
from kvpress.kernels.attention_mass import Perturbation
from kvpress.kernels.gumbel_noise import gumbel_table_on
from kvpress.kernels.skip_attention import largest_tile

MODULES = sorted(file.stem for folder in kvpress.__path__ for file in Path(folder).glob("kernels/gpu/*.py"))
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.bool: "i1", torch.uint8: "u8"}
NAMES |= {torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}

KV_HEADS = 8
HEAD_DIMS = (64, 80, 96, 128, 256)
MANY_HEADS = ((64, 71), (128, 48))  # head dimension and query heads of models with one kv head
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NOISE = Perturbation(2.0, seed=20_260, layer=3)  # a seed that no test has


class Launch(NamedTuple):
    """What the compiler needs to know of a launch.

    Attributes:
        types: every argument that is no constexpr, as ("p_key", "*bf16:16") or ("n", "i32"); ":16" says that Triton compiles
            for a multiple of 16 (wide loads as a rule, which take the most shared memory).
        constexprs: the other arguments.
    """

    module: str
    kernel: str
    types: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int

    @property
    def settings(self) -> tuple[Any, ...]:
        """What its shared memory and registers depend on most: block sizes, warps, stages and the width of Q and K."""
        blocks = tuple((name, value) for name, value in self.constexprs if "BLOCK" in name)
        kinds = dict(self.types)
        first = next(kinds[name] for name in ("p_query", "p_key", "p_x", "p_scores", *kinds) if name in kinds)
        return (
            self.module,
            self.kernel,
            blocks,
            self.num_warps,
            self.num_stages,
            first.partition(":")[0].replace("bf16", "fp16"),
        )


def as_launched(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """The launch as Triton specialises it: None and 1 are compiled in, multiples of 16 are told apart."""
    settings = {name: options.pop(name, default) for name, default in (("num_warps", 4), ("num_stages", 3))}
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    assert set(values) == set(kernel.arg_names), (kernel.__name__, set(values) ^ set(kernel.arg_names))
    alike = getattr(kernel, "do_not_specialize", None) or ()
    types, constexprs = {}, {}
    for name, parameter in inspect.signature(kernel.fn).parameters.items():
        value, special = values[name], name not in alike
        if isinstance(value, Tensor):
            wide = value.storage_offset() * value.element_size() % 16 == 0
            types[name] = f"*{NAMES[value.dtype]}" + ":16" * wide
        elif (
            "constexpr" in str(parameter.annotation) or value is None or (type(value) is int and value == 1 and special)
        ):
            constexprs[name] = value
        elif type(value) is int:
            types[name] = ("i32" if value < 1 << 31 else "i64") + ":16" * (special and value % 16 == 0)
        else:
            assert type(value) is float, (kernel.__name__, name, value)
            types[name] = "fp32"
    module = kernel.fn.__module__.rpartition(".")[2]
    return Launch(module, kernel.__name__, tuple(types.items()), tuple(constexprs.items()), **settings)


class StandIn:
    """Takes a kernel's place: notes its launches, and that their grids are none that CUDA refuses."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(0 < size < (1 << 16 if axis else 1 << 31) for axis, size in enumerate(grid)), (self.kernel, grid)
        return lambda *args, **options: self.launches.append(as_launched(self.kernel, args, options))


@contextmanager
def noting() -> Iterator[list[Launch]]:
    """Nothing is launched meanwhile; the list says what would be."""
    launches: list[Launch] = []
    gumbel_table_on(NOISE.seed or 0, torch.device("cpu"))  # made with its numbers, and kept so
    with ExitStack() as stack:
        for name in MODULES:
            module = importlib.import_module(f"kvpress.kernels.gpu.{name}")
            for kernel in [x for x in vars(module) if x.endswith("_kernel")]:
                stack.enter_context(mock.patch.object(module, kernel, StandIn(getattr(module, kernel), launches)))
        yield launches


def tuned_gpus(architecture: int | None) -> list[str]:
    """Names of the GPUs of an architecture, or of all, that have launch shapes of their own."""
    names = [json.loads(file.read_text())["gpu"] for file in sorted(launch_shapes.TUNED.glob("*.json"))]
    return [name for name in names if architecture in (None, 80 if "A100" in name else 90)]


def noted(calls: Iterable[Callable[[], Any]], architecture: int | None = None) -> list[Launch]:
    """The different launches of calls on tensors without numbers: with the heuristics' shapes, and with those that were tuned."""
    calls, gpus = list(calls), ["", *tuned_gpus(architecture)]
    with noting() as launches, FakeTensorMode(allow_non_fake_inputs=True):
        for name in gpus:
            with mock.patch.object(launch_shapes, "gpu_name", lambda device, name=name: name):
                launch_shapes.forget_plans()
                for call in calls:
                    call()
    launch_shapes.forget_plans()
    return list(dict.fromkeys(launches))


def gpu(module: str) -> Any:
    return importlib.import_module(f"kvpress.kernels.gpu.{module}")


def cache(head_dim: int, dtype: torch.dtype, n: int) -> tuple[Tensor, Tensor]:
    """K and V: the slots in use of buffers with room for more."""
    return tuple(torch.empty(1, KV_HEADS, n + 16, head_dim, dtype=dtype)[:, :, :n] for _ in range(2))


def per_head(n: int, dtype: torch.dtype = torch.int64, heads: int = KV_HEADS) -> Tensor:
    return torch.empty(1, heads, n, dtype=dtype)


def decode(head_dim: int, dtype: torch.dtype, group: int, form: str, n: int = 4096, warm: bool = False) -> None:
    """One token over all slots, or with every feature over listed slots or pages; a second query for the first, or marked."""
    heads = KV_HEADS * group
    options: dict[str, Any] = dict.fromkeys(("softcap", "sinks", "moved", "perturbed"))
    options |= {"page_size": 1, "with_mass": False, "per_head": False, "with_lse": False, "scale": 0.1}
    valid = index = None
    other = torch.empty(1, heads, 1, head_dim, dtype=dtype)
    if form == "first moved":
        options["moved"] = other, 4
    elif form != "plain":
        valid = per_head(n, torch.bool, heads)
        options |= {"softcap": 30.0, "sinks": torch.empty(heads, dtype=dtype), "with_mass": True}
    if form == "listed":
        index = per_head(n)
        options["moved"] = other, per_head(n, torch.bool)
        noise = replace(NOISE, temperature=torch.empty(())) if warm else NOISE
        options["perturbed"] = noise, torch.empty(1, 1, dtype=torch.int32), per_head(n, torch.int32)
    if form == "pages":
        index, valid, options["page_size"] = per_head(n // 16), per_head(n // 16, torch.bool, heads), 16
        options["per_head"] = True
    if form == "slots":
        valid = per_head(n, torch.bool)
    gpu("decode_attention").decode_attention(
        torch.empty(1, heads, 1, head_dim, dtype=dtype), *cache(head_dim, dtype, n), valid, index, **options
    )


def paged(head_dim: int, dtype: torch.dtype, group: int, full: bool, n: int = 4096) -> None:
    """One token over n slots of the kv heads in pages of 32, plain or with every feature."""
    heads, slots = KV_HEADS * group, KV_HEADS * n // 32 * 32 or 32
    options: dict[str, Any] = {"softcap": None, "sinks": None, "with_mass": False}
    if full:
        options = {"softcap": 30.0, "sinks": torch.empty(heads, dtype=dtype), "with_mass": True}
    gpu("paged_attention").paged_attention(
        torch.empty(1, heads, 1, head_dim, dtype=dtype),
        *(torch.empty(1, slots, head_dim, dtype=dtype) for _ in range(2)),
        torch.empty(1, slots // 32, dtype=torch.int64),
        torch.empty(1, slots, dtype=torch.bool),
        kv_heads=KV_HEADS,
        scale=0.1,
        **options,
    )


def scores(head_dim: int, dtype: torch.dtype, group: int, form: str, n: int = 4096) -> None:
    """Decode scores, also with a second query for the first keys or for marked ones, page scores and soft votes."""
    query = torch.empty(1, KV_HEADS * group, 1, head_dim, dtype=FP32 if form == "raw keys" else dtype)
    key, least = cache(head_dim, dtype, n)
    if form in ("votes", "raw keys"):
        gpu("soft_vote").soft_vote(query, key, torch.empty(1, n, dtype=torch.bool), scale=1.0)
    else:
        moved = {"moved": (query, per_head(n, torch.bool)), "first moved": (query, 4)}.get(form)
        options = {"moved": moved, "least": least if form == "pages" else None}
        gpu("decode_scores").decode_scores(query, key, scale=0.1, **options)


def mass(head_dim: int, dtype: torch.dtype, group: int, rows: int, full: bool, n: int = 4096) -> None:
    """Column sums of a prompt's rows, or of a window with every feature."""
    heads = KV_HEADS * group
    options: dict[str, Any] = dict.fromkeys(("softcap", "sinks", "row_weights", "perturbation", "lse"))
    positions = None
    if full:
        positions = per_head(n, torch.int32)
        options |= {"softcap": 30.0, "sinks": torch.empty(heads, dtype=dtype), "perturbation": NOISE}
        options["row_weights"] = torch.empty(1, rows)
    gpu("attention_mass").attention_mass(
        torch.empty(1, heads, rows, head_dim, dtype=dtype),
        torch.empty(1, rows, dtype=torch.int32),
        cache(head_dim, dtype, n)[0],
        positions,
        scale=0.1,
        **options,
    )


def antidiagonals(
    head_dim: int,
    dtype: torch.dtype,
    group: int,
    stride: int,
    rows: int,
    n: int = 4096,
    softcap: float | None = None,
) -> None:
    """The estimate of XAttention, of a prompt's last rows."""
    query = torch.empty(1, KV_HEADS * group, rows, head_dim, dtype=dtype)
    gpu("antidiagonal_mass").antidiagonal_mass(
        query, cache(head_dim, dtype, n)[0], scale=0.1, stride=stride, block_size=128, softcap=softcap
    )


def slashes(head_dim: int, dtype: torch.dtype, group: int, rows: int, softcap: float | None, n: int = 4096) -> None:
    """The last rows' attention by entry and by distance."""
    query = torch.empty(1, KV_HEADS * group, rows, head_dim, dtype=dtype)
    gpu("vertical_slash_mass").vertical_slash_mass(query, cache(head_dim, dtype, n)[0], scale=0.1, softcap=softcap)


def sparse(head_dim: int, dtype: torch.dtype, group: int, block_size: int, full: bool, n: int = 4096) -> None:
    """A chunk of a prompt over blocks, or over blocks, columns and diagonals."""
    heads, rows = KV_HEADS * group, n // 2
    options: dict[str, Any] = dict.fromkeys(("columns", "diagonals", "softcap", "sinks"))
    options["blocks"] = torch.empty(1, KV_HEADS, rows // block_size, 8, dtype=torch.int64)
    if full:
        options |= {"columns": per_head(100), "diagonals": per_head(30), "softcap": 30.0}
        options["sinks"] = torch.empty(heads, dtype=dtype)
    query = torch.empty(1, heads, rows, head_dim, dtype=dtype)
    key, value = cache(head_dim, dtype, n)
    gpu("block_sparse_attention").block_sparse_attention(query, key, value, scale=0.1, block_size=block_size, **options)


def skipping(head_dim: int, dtype: torch.dtype, group: int, tile: int, full: bool, n: int = 4096) -> None:
    """A chunk of a prompt that skips tiles."""
    heads, rows = KV_HEADS * group, n // 2
    options: dict[str, Any] = {"softcap": 30.0 if full else None}
    options["sinks"] = torch.empty(heads, dtype=dtype) if full else None
    query = torch.empty(1, heads, rows, head_dim, dtype=dtype)
    key, value = cache(head_dim, dtype, n)
    gpu("skip_attention").skip_attention(query, key, value, scale=0.1, skip=0.01, tile=tile, **options)


def gather(width: int | None, dtype: torch.dtype, form: str, n: int = 4096) -> None:
    """K, V and positions into new buffers, or one tensor alone."""
    index = per_head(n // 4)
    if form == "all":
        keys, values = cache(width or 1, dtype, n)
        positions, chosen = per_head(n, torch.int32), per_head(n // 4, torch.bool)
        gpu("gather_slots").compact_slots(keys, values, positions, index, chosen, n // 4 + 1)
    else:
        slots = per_head(n, dtype) if width is None else cache(width, dtype, n)[0]
        gpu("gather_slots").gather_slots(slots, index, n // 4)


def rope(head_dim: int, dtype: torch.dtype, half: int, interleaved: bool, n: int = 4096) -> None:
    gpu("rope_shift").rope_shift(
        cache(head_dim, dtype, n)[0], torch.empty(1, 1, n).expand(1, KV_HEADS, n), torch.empty(half), interleaved
    )


def bounds(head_dim: int, dtype: torch.dtype, page_size: int, counted: bool, n: int = 4096) -> None:
    """All pages, then one more entry."""
    keys = cache(head_dim, dtype, n)[0]
    counts = torch.empty(1, KV_HEADS, dtype=torch.int64) if counted else None
    least, greatest = gpu("page_bounds").page_bounds(keys, counts, page_size)
    rank, new = torch.empty(1, KV_HEADS, dtype=torch.int64), torch.empty(1, KV_HEADS, dtype=torch.bool)
    gpu("page_bounds").add_to_page_bounds(least, greatest, keys[:, :, -1], rank, new if counted else None, page_size)


def merge(head_dim: int, dtype: torch.dtype, value_norms: bool, n: int = 4096) -> None:
    keys, values = cache(head_dim, dtype, n)
    stats = [torch.empty(1, KV_HEADS, n + 16)[..., :n], torch.empty(1, KV_HEADS, 32, n + 16)[..., :n]]
    weights, centres, rest, target = per_head(n, FP32), per_head(n // 2), per_head(n // 2), per_head(n // 2)
    gpu("merge_slots").merge_slots(
        keys, values, stats, weights, centres, rest, target, value_norms=value_norms, tiny=1e-38, cancelled=1e-6
    )


def topk(n: int, dtype: torch.dtype, heads: int = 32) -> None:
    gpu("topk_select").topk_select(per_head(n, dtype, heads), torch.empty(1, 1, dtype=torch.int64), min(n, 64))


def union(n: int, group: int) -> None:
    gpu("union_select").union_select(torch.empty(1, KV_HEADS * group, n, dtype=torch.bool), KV_HEADS, n // 2 + 1)


def write(head_dim: int, dtype: torch.dtype, own: bool, n: int = 4096) -> None:
    """A new entry into a slot of all heads, or into each one's own, with two statistics."""
    keys, values = cache(head_dim, dtype, n)
    stats = [torch.empty(1, KV_HEADS, n), torch.empty(1, KV_HEADS, 32, n)]
    slot = torch.empty(1, KV_HEADS, dtype=torch.int64) if own else 3
    new = (torch.empty(1, 1, KV_HEADS, head_dim, dtype=dtype).transpose(1, 2) for _ in range(2))
    gpu("write_slot").write_slot(
        keys, values, per_head(n, torch.int32), stats, slot, *new, torch.empty(1, 1, dtype=torch.int32)
    )


def evict(n: int, dtype: torch.dtype, limited: bool) -> None:
    numbers = torch.empty(1, dtype=torch.int32)
    gpu("evict_slot").evict_slot(
        per_head(n, dtype), per_head(n, torch.int32), numbers, numbers, numbers if limited else None
    )


def decode_calls() -> Iterator[Callable[[], None]]:
    for head_dim in HEAD_DIMS:
        yield partial(decode, head_dim, BF16, 4, "plain")
        yield partial(decode, head_dim, BF16, 4, "listed")
        yield partial(decode, head_dim, BF16, 4, "first moved")
        yield partial(decode, head_dim, FP32, 4, "listed")
    yield partial(decode, 128, FP16, 4, "listed")
    yield partial(decode, 128, BF16, 4, "listed", warm=True)  # the temperature lies on the device
    yield partial(decode, 128, FP32, 4, "plain")
    yield partial(decode, 128, BF16, 4, "pages")
    yield partial(decode, 128, BF16, 4, "plain", n=100)  # one split, which writes the result itself
    for (head_dim, group), dtype in product(MANY_HEADS, (FP32, BF16)):
        yield partial(decode, head_dim, dtype, group, "listed")
    # What comes after the splits has tiles of both, channels and query heads; of one split it gets nothing to merge.
    every = [*product((64, 128, 256), (1, 2, 4, 8, 16)), *MANY_HEADS]
    for (head_dim, group), n in product(every, (4096, 100)):
        yield partial(decode, head_dim, BF16, group, "slots", n=n)


def paged_calls() -> Iterator[Callable[[], None]]:
    for head_dim, dtype in product(HEAD_DIMS, (FP32, BF16)):
        yield partial(paged, head_dim, dtype, 4, True)
    for head_dim in HEAD_DIMS:
        yield partial(paged, head_dim, BF16, 4, False)
    yield partial(paged, 128, FP16, 4, True)
    for (head_dim, group), dtype in product(MANY_HEADS, (FP32, BF16)):
        yield partial(paged, head_dim, dtype, group, True)
    for group in (1, 2, 8, 16):
        yield partial(paged, 64, BF16, group, True)


def score_calls() -> Iterator[Callable[[], None]]:
    for head_dim, dtype in product((64, 80, 128, 256), (FP32, BF16)):
        yield partial(scores, head_dim, dtype, 4, "pages")
    for head_dim in (64, 80, 128, 256):
        yield partial(scores, head_dim, BF16, 4, "votes")
    yield partial(scores, 128, FP32, 4, "votes")
    for head_dim in HEAD_DIMS:
        yield partial(scores, head_dim, BF16, 4, "raw keys")
    for head_dim, group in MANY_HEADS:
        yield partial(scores, head_dim, BF16, group, "raw keys")
    for form in ("plain", "moved", "first moved"):
        yield partial(scores, 128, BF16, 4, form)
    for head_dim in (80, 256):
        yield partial(scores, head_dim, FP32, 4, "moved")
    for (head_dim, group), dtype in product(MANY_HEADS, (FP32, BF16)):
        yield partial(scores, head_dim, dtype, group, "moved")
    yield partial(scores, 128, FP16, 4, "pages")
    for (head_dim, group), dtype in product(MANY_HEADS, (FP32, BF16)):
        yield partial(scores, head_dim, dtype, group, "pages")


def mass_calls() -> Iterator[Callable[[], None]]:
    for head_dim, dtype in product((64, 128, 256), (FP32, BF16)):
        yield partial(mass, head_dim, dtype, 4, 1, True)
        for rows in (8, 16, 2048):
            yield partial(mass, head_dim, dtype, 4, rows, False)
    yield partial(mass, 80, BF16, 4, 2048, False)
    yield partial(mass, 128, BF16, 4, 2048, True)
    yield partial(mass, 128, FP16, 4, 2048, False)


def antidiagonal_calls() -> Iterator[Callable[[], None]]:
    for head_dim, dtype in product((64, 80, 128, 256), (FP32, BF16)):
        yield partial(antidiagonals, head_dim, dtype, 4, 16, 2048)
    for stride, dtype in ((1, FP32), (1, BF16), (8, BF16), (128, FP32)):
        yield partial(antidiagonals, 128, dtype, 4, stride, 4096)
    yield partial(antidiagonals, 128, FP16, 4, 16, 2048)
    yield partial(antidiagonals, 256, BF16, 4, 1, 2048, softcap=50.0)
    # Few rows: tiles of fewer cells.
    for head_dim, dtype, group in product((80, 128), (FP32, BF16), (1, 4, 8)):
        yield partial(antidiagonals, head_dim, dtype, group, 16, 16)
    for head_dim, rows in product((80, 128), (16, 1024, 2048, 4096)):  # a cell is a block
        yield partial(antidiagonals, head_dim, BF16, 4, 128, rows)


def slash_calls() -> Iterator[Callable[[], None]]:
    for head_dim, dtype in product(HEAD_DIMS, (FP32, BF16)):
        yield partial(slashes, head_dim, dtype, 4, 64, None)
    for head_dim, dtype, rows in product((64, 128, 256), (FP32, BF16), (8, 32)):
        yield partial(slashes, head_dim, dtype, 4, rows, None)
    yield partial(slashes, 128, FP16, 4, 128, None)
    yield partial(slashes, 256, BF16, 4, 64, 50.0)


def sparse_calls() -> Iterator[Callable[[], None]]:
    for head_dim, dtype, block_size in product((64, 128, 256), (FP32, BF16), (64, 128)):
        yield partial(sparse, head_dim, dtype, 4, block_size, head_dim == 128)
    yield partial(sparse, 80, BF16, 4, 64, True)
    yield partial(sparse, 128, BF16, 4, 64, False)
    yield partial(sparse, 128, FP16, 4, 64, True)
    for block_size in (16, 32):
        yield partial(sparse, 128, BF16, 4, block_size, False)


def skipping_calls() -> Iterator[Callable[[], None]]:
    for head_dim, dtype in product(HEAD_DIMS, (FP32, BF16)):
        most = largest_tile(head_dim, dtype.itemsize)
        for tile in {most, max(16, most // 2)}:
            yield partial(skipping, head_dim, dtype, 4, tile, head_dim == 128)
    yield partial(skipping, 128, FP16, 4, 128, True)
    for tile in (16, 32):
        yield partial(skipping, 128, BF16, 4, tile, False)


CALLS: dict[str, list[Callable[[], None]]] = {
    "antidiagonal_mass": list(antidiagonal_calls()),
    "attention_mass": list(mass_calls()),
    "block_sparse_attention": list(sparse_calls()),
    "decode_attention": list(decode_calls()),
    "decode_scores": list(score_calls()),
    "evict_slot": [
        partial(evict, n, dtype, limited)
        for n in (100, 300, 600, 1200, 2400, 4800)
        for dtype in (FP32, BF16)
        for limited in (False, True)
    ],
    "gather_slots": [
        *(partial(gather, width, BF16, form) for width in (64, 80, 128, 256) for form in ("all", "one")),
        *(partial(gather, width, FP32, "all") for width in (64, 128, 256)),
        *(partial(gather, None, dtype, "one") for dtype in (FP32, torch.bool, torch.int64)),
    ],
    "merge_slots": [
        partial(merge, d, dtype, norms) for d in (64, 80, 128, 256) for dtype in (FP32, BF16) for norms in (False, True)
    ],
    "paged_attention": list(paged_calls()),
    "page_bounds": [
        *(
            partial(bounds, d, t, size, True)
            for d in (64, 128)
            for t in (FP32, BF16)
            for size in (1, 2, 4, 8, 16, 32, 64)
        ),
        *(partial(bounds, d, BF16, 16, False) for d in (80, 256)),
    ],
    "rope_shift": [partial(rope, d, BF16, d // 2, mixed) for d in (64, 80, 128, 256) for mixed in (False, True)]
    + [partial(rope, d, dtype, half, False) for d, dtype, half in ((128, BF16, 32), (80, BF16, 16))]
    + [partial(rope, d, FP32, d // 2, False) for d in (64, 128, 256)],
    "skip_attention": list(skipping_calls()),
    "soft_vote": [],  # with decode_scores
    "topk_select": [
        partial(topk, n, dtype) for n in (100, 300, 600, 1200, 2400, 4800, 131072) for dtype in (FP32, BF16)
    ],
    "union_select": [partial(union, n, group) for n in (4096,) for group in (1, 4)],
    "vertical_slash_mass": list(slash_calls()),
    "write_slot": [
        partial(write, d, t, own) for d in (64, 80, 96, 128, 256) for t in (FP32, BF16) for own in (False, True)
    ],
}


# What follows runs in a process of its own, without the interpreter.


def compiled(launch: Launch, kernel: Any, architecture: int) -> Any:
    """The launch's kernel for an architecture, made without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, constexprs = kernel.arg_names, dict(launch.constexprs)
    types = {name: "constexpr" if name in constexprs else dict(launch.types)[name].partition(":")[0] for name in names}
    wide = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in launch.types if ":16" in kind}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    source = ASTSource(kernel, types, constexprs, wide)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(kernel: Any) -> dict[str, int]:
    """Bytes of shared memory of a block of threads, registers of a thread and bytes that these do not hold, and whether there
    are loads of 16 bytes.
    """
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(part.split(":")[:2] for part in usage.split() if part.count(":") == 1 and part[-1].isdigit())
    spilled = int(found["STACK"]) + int(found["LOCAL"])
    wide = re.search(r"ld\.global[\w.:]*\.v4|cp\.async\.cg\.shared\.global [^;]*0x10", kernel.asm["ptx"]) is not None
    return {"shared": kernel.metadata.shared, "registers": int(found["REG"]), "spilled": spilled, "wide": wide}


def examined(launch: Launch, architecture: int) -> dict[str, Any]:
    """A launch, what it takes, and its intermediate form."""
    made = compiled(launch, getattr(gpu(launch.module), launch.kernel), architecture)
    return {"launch": launch._asdict(), **resources(made), "form": made.asm["ttir"]}


def main(architecture: int, *modules: str) -> None:
    """Compile every launch, or those of the modules named, and print what `examined` finds as JSON."""
    launches = noted((call for name in modules or CALLS for call in CALLS[name]), architecture)
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        print(json.dumps(list(pool.map(partial(examined, architecture=architecture), launches))))


@lru_cache
def compiled_for(architecture: int, *modules: str) -> list[dict[str, Any]]:
    """What `main` prints: made once, in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command, folder = [sys.executable, __file__, str(architecture), *modules], Path(__file__).parent
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def described(launch: dict[str, Any]) -> tuple[str, str]:
    """Dtypes of the pointers, and the settings of a launch."""
    dtypes = sorted({kind.strip("*").partition(":")[0] for _, kind in launch["types"] if kind.startswith("*")})
    settings = [f"{name}={value}" for name, value in launch["constexprs"] if value is not None]
    return "/".join(dtypes), " ".join((*settings, f"warps={launch['num_warps']}", f"stages={launch['num_stages']}"))


def heading(architecture: int) -> str:
    """Above the lines of a table of `compiled_for`."""
    return f"{'sm_' + str(architecture):<43} {'shared':>7} {'regs':>5} {'spilled':>7}  dtypes, settings"


def line(row: dict[str, Any]) -> str:
    """What a launch takes, for people: bytes of shared memory, registers of a thread, and bytes that these do not hold."""
    name = f"{row['launch']['module']}.{row['launch']['kernel']}"
    taken = f"{row['shared']:>7} {row['registers']:>5} {row['spilled']:>7}"
    return f"{name:<43} {taken}  {', '.join(described(row['launch']))}"


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
