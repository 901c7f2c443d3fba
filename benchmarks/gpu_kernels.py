"""The Triton kernels at the sizes of Llama-3.1-8B, beside what torch has for the same: the cases of scripts/gpu_check.py.

Each case has the least bytes and operations that its task takes, from which the limit comes. A case compares its result with
a computation of another kind at the same size, so that an error that only large tensors show is seen too.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from gpu import Limits, timing
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvpress.kernels.antidiagonal_mass import antidiagonal_mass
from kvpress.kernels.attention_mass import attention_mass
from kvpress.kernels.block_sparse_attention import block_sparse_attention
from kvpress.kernels.compact_slots import compact_slots
from kvpress.kernels.decode_attention import decode_attention
from kvpress.kernels.decode_scores import decode_scores
from kvpress.kernels.merge_slots import merge_slots
from kvpress.kernels.page_bounds import page_bounds
from kvpress.kernels.page_scores import page_scores
from kvpress.kernels.paged_attention import paged_attention
from kvpress.kernels.rope_shift import rope_shift
from kvpress.kernels.soft_vote import soft_vote
from kvpress.kernels.topk_select import topk_select
from kvpress.kernels.union_select import union_select
from kvpress.kernels.vertical_slash_mass import vertical_slash_mass

OURS = "kvpress"
CACHE_BYTES = 256 << 20  # what the variants of a case touch together: several times an L2 cache
Calls = list[Callable[[], Any]]


@dataclass(frozen=True)
class Sizes:
    """What the cases are made of; `tiny` is for Triton's interpreter."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    n: int = 131072  # entries in the cache
    k: int = 2048  # entries selected
    prompt: int = 32768  # tokens of a prompt whose mass is counted
    block_size: int = 128
    page_size: int = 16
    window: int = 32
    probe: int = 64  # last rows by whose attention a prompt's reads are planned
    stride: int = 16  # side of a cell of antidiagonals
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    most_variants: int = 32

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.heads // self.kv_heads

    @property
    def scale(self) -> float:
        """Factor on q.k."""
        return self.head_dim**-0.5


# What is compiled for `Sizes()` is compiled for these: lengths are never compiled in.
BUILD = Sizes(n=16384, k=256, prompt=512, batches=(1,), most_variants=1)
# The interpreter has no bfloat16.
TINY = Sizes(
    4,
    2,
    16,
    torch.float16,
    n=64,
    k=16,
    prompt=48,
    block_size=16,
    window=4,
    probe=8,
    stride=4,
    batches=(1, 2),
    most_variants=2,
)


@dataclass
class Case:
    """One operation at one size.

    Attributes:
        calls: implementation -> its calls, each on other memory where the case fits the cache.
        bytes_moved, operations: the least that the task takes.
        error: the relative error of ours, computed when called.
        waits: ours waits for the device, and cannot be put into a CUDA graph.
    """

    kernel: str
    batch: int
    size: str
    calls: dict[str, Calls]
    bytes_moved: float
    error: Callable[[], float]
    operations: float = 0.0
    waits: bool = False


class Maker(NamedTuple):
    """Random tensors on the device, and the cases made of them."""

    sizes: Sizes
    device: torch.device

    def random(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers."""
        made = torch.empty(shape, dtype=dtype or self.sizes.dtype, device=self.device)
        return made.normal_(generator=torch.Generator(self.device).manual_seed(seed))

    def qkv(self, batch: int, rows: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """query [batch, heads, rows, head_dim], key and value [batch, kv_heads, n, head_dim]."""
        s = self.sizes
        query = self.random(batch, s.heads, rows, s.head_dim)
        key, value = (self.random(batch, s.kv_heads, n, s.head_dim, seed=seed) for seed in (1, 2))
        return query, key, value

    def variants(self, nbytes: float) -> int:
        """How many calls on different memory it takes to fill the cache."""
        return max(1, min(self.sizes.most_variants, int(CACHE_BYTES / nbytes)))

    def listed(self, batch: int, count: int, seed: int) -> Tensor:
        """Distinct random entries in ascending order, int64 [batch, kv_heads, count]."""
        s = self.sizes
        order = torch.rand(
            batch, s.kv_heads, s.n, device=self.device, generator=torch.Generator(self.device).manual_seed(seed)
        )
        return order.topk(count, dim=-1).indices.sort(dim=-1).values

    # ------------------------------------------------------------------ decode

    def decode(self, batch: int) -> Case:
        """One token over all entries."""
        s = self.sizes
        query, key, value = self.qkv(batch, 1, s.n)
        calls = {OURS: [lambda: decode_attention(query, key, value, scale=s.scale, backend="triton")]}
        calls |= sdpa(query, key, value, causal=False)
        return Case(
            "decode_attention",
            batch,
            f"{s.n}",
            calls,
            2 * key.nbytes,
            lambda: relative(calls[OURS][0]()[0][:1], exact(query[:1], key[:1], value[:1], s.scale)),
        )

    def decode_selected(self, batch: int) -> Case:
        """One token over a list of entries."""
        s = self.sizes
        query, key, value = self.qkv(batch, 1, s.n)
        nbytes = (2 * s.head_dim * key.element_size() + 4) * batch * s.kv_heads * s.k
        lists = [self.listed(batch, s.k, seed) for seed in range(self.variants(nbytes))]
        calls: dict[str, Calls] = {
            OURS: [
                partial(decode_attention, query, key, value, scale=s.scale, index=index, backend="triton")
                for index in lists
            ]
        }
        calls |= sdpa(query, key, value, causal=False)
        wide = lists[0][:1, :, :, None].expand(-1, -1, -1, s.head_dim)

        def error() -> float:
            picked = (x[:1].gather(2, wide) for x in (key, value))
            return relative(calls[OURS][0]()[0][:1], exact(query[:1], *picked, s.scale))

        return Case("decode_attention, selected", batch, f"{s.k} of {s.n}", calls, nbytes, error)

    def paged(self, batch: int) -> Case:
        """One token over as many entries as all kv heads have in `decode`, in pages of 32, most of them the first heads'."""
        s = self.sizes
        query, key, value = self.qkv(batch, 1, s.n)
        key, value = (x.view(batch, -1, s.head_dim) for x in (key, value))
        shares = torch.rand(
            batch, key.shape[1] // 32, device=self.device, generator=torch.Generator(self.device).manual_seed(0)
        )
        owner = (shares.square() * s.kv_heads).long().sort(dim=-1).values
        valid = torch.ones(key.shape[:2], dtype=torch.bool, device=self.device)

        def call(backend: Any) -> Tensor:
            tensors = query, key, value, owner, valid
            return paged_attention(*tensors, kv_heads=s.kv_heads, scale=s.scale, backend=backend)[0]

        calls: dict[str, Calls] = {OURS: [partial(call, "triton")], "torch": [partial(call, "torch")]}
        return Case("paged_attention", batch, f"{s.n} a head", calls, 2 * key.nbytes, against(calls))

    def scores(self, batch: int) -> Case:
        """q.k of one token with all entries."""
        s = self.sizes
        query, key, _ = self.qkv(batch, 1, s.n)
        calls: dict[str, Calls] = {
            OURS: [lambda: decode_scores(query, key, scale=s.scale, backend="triton")],
            "torch": [lambda: decode_scores(query, key, scale=s.scale, backend="torch")],
        }
        nbytes = key.nbytes + 4 * batch * s.heads * s.n
        return Case("decode_scores", batch, f"{s.n}", calls, nbytes, against(calls))

    # ------------------------------------------------------------------ selection

    def topk(self, batch: int) -> Case:
        """The largest scores of each kv head."""
        s = self.sizes
        nbytes = batch * s.kv_heads * (4 * s.n + 9 * s.k)
        rows = [
            self.random(batch, s.kv_heads, s.n, seed=seed, dtype=torch.float32) for seed in range(self.variants(nbytes))
        ]
        counts = torch.full((batch, 1), s.k, device=self.device)
        calls: dict[str, Calls] = {
            OURS: [partial(topk_select, numbers, counts, s.k, backend="triton") for numbers in rows],
            "torch.topk": [partial(numbers.topk, s.k) for numbers in rows],
            "torch.topk, unsorted": [partial(numbers.topk, s.k, sorted=False) for numbers in rows],
        }

        def error() -> float:
            index, chosen = calls[OURS][0]()
            found = rows[0].gather(2, index).sort(dim=-1, descending=True).values
            same = bool(chosen.all()) and torch.equal(index, index.sort(dim=-1).values)
            return relative(found, rows[0].topk(s.k).values) if same else 1.0

        return Case("topk_select", batch, f"{s.k} of {s.n}", calls, nbytes, error)

    def bounds(self, batch: int) -> Case:
        """Bounds of all pages."""
        s = self.sizes
        _, key, _ = self.qkv(batch, 1, s.n)
        calls: dict[str, Calls] = {
            name: [partial(page_bounds, key, None, s.page_size, backend=backend)]
            for name, backend in ((OURS, "triton"), ("torch", "torch"))
        }
        return Case("page_bounds", batch, f"{s.n}", calls, key.nbytes * (1 + 2 / s.page_size), against(calls))

    def pages(self, batch: int) -> Case:
        """Bounds of the scores of all pages."""
        s = self.sizes
        query, key, other = self.qkv(batch, 1, s.n // s.page_size)
        least, greatest = torch.minimum(key, other), torch.maximum(key, other)
        calls: dict[str, Calls] = {
            name: [partial(page_scores, query, least, greatest, backend=backend)]
            for name, backend in ((OURS, "triton"), ("torch", "torch"))
        }
        nbytes = 2 * key.nbytes + 4 * batch * s.heads * key.shape[2]
        return Case("page_scores", batch, f"{key.shape[2]} pages", calls, nbytes, against(calls))

    def vote(self, batch: int) -> Case:
        """All heads' votes on the keys."""
        s = self.sizes
        query, key, _ = self.qkv(batch, 1, s.n)
        calls: dict[str, Calls] = {
            name: [partial(soft_vote, query, key, scale=s.scale, backend=backend)]
            for name, backend in ((OURS, "triton"), ("torch", "torch"))
        }
        return Case("soft_vote", batch, f"{s.n}", calls, key.nbytes + 4 * batch * s.n, against(calls))

    def union(self, batch: int) -> Case:
        """What a group reads together, of heads that each read k entries."""
        s = self.sizes
        generator = torch.Generator(self.device).manual_seed(0)
        reads = torch.rand(batch, s.heads, s.n, device=self.device, generator=generator) < s.k / s.n
        calls: dict[str, Calls] = {
            name: [partial(union_select, reads, s.kv_heads, backend=backend)]
            for name, backend in ((OURS, "triton"), ("torch", "torch"))
        }
        return Case("union_select", batch, f"{s.k} of {s.n}", calls, reads.nbytes, against(calls), waits=True)

    # ------------------------------------------------------------------ moving entries

    def compact(self, batch: int) -> Case:
        """A tenth of a cache into new buffers."""
        s = self.sizes
        _, key, value = self.qkv(batch, 1, s.n)
        count = s.n // 10
        index = self.listed(batch, count, 0)
        positions = torch.arange(s.n, dtype=torch.int32, device=self.device).expand(batch, s.kv_heads, -1).contiguous()
        chosen = torch.ones_like(index, dtype=torch.bool)
        wide = index[..., None].expand(-1, -1, -1, s.head_dim)
        tensors = (key, value, positions, index, chosen, count)
        calls: dict[str, Calls] = {
            OURS: [partial(compact_slots, *tensors, backend="triton")],
            "torch.gather": [lambda: (key.gather(2, wide), value.gather(2, wide), positions.gather(2, index))],
        }
        nbytes = batch * s.kv_heads * count * (4 * s.head_dim * key.element_size() + 8 + 9)
        return Case("compact_slots", batch, f"{count} of {s.n}", calls, nbytes, against(calls, "torch.gather"))

    def rope(self, batch: int) -> Case:
        """All keys to other positions."""
        s = self.sizes
        _, key, _ = self.qkv(batch, 1, s.n)
        inv_freq = 1e4 ** -(torch.arange(0, s.head_dim, 2, device=self.device) / s.head_dim)
        shift = torch.arange(s.n, device=self.device).expand(batch, s.kv_heads, -1) % 100
        calls: dict[str, Calls] = {
            name: [partial(rope_shift, key, shift, inv_freq, backend=backend)]
            for name, backend in ((OURS, "triton"), ("torch", "torch"))
        }
        return Case("rope_shift", batch, f"{s.n}", calls, 2 * key.nbytes + 4 * shift.numel(), against(calls))

    def merge(self, batch: int) -> Case:
        """Every entry that is not kept goes to a kept one (EMS)."""
        s = self.sizes
        _, key, value = self.qkv(batch, 1, s.n)
        count = s.n // 10
        kept = torch.zeros(batch, s.kv_heads, s.n, dtype=torch.uint8, device=self.device)
        kept.scatter_(2, self.listed(batch, count, 0), 1)
        order = kept.argsort(dim=-1, descending=True, stable=True)
        centres, rest = order[..., :count].contiguous(), order[..., count:].contiguous()
        generator = torch.Generator(self.device).manual_seed(1)
        target = torch.randint(count, rest.shape, device=self.device, generator=generator)
        weights = torch.rand(kept.shape, device=self.device, generator=generator) + 0.1

        def merged(keys: Tensor, values: Tensor, backend: Any) -> tuple[Tensor, Tensor]:
            merge_slots(keys, values, [], weights, centres, rest, target, backend=backend)
            return keys, values

        def error() -> float:
            """Of two runs on copies: a merge is in place."""
            found, expected = (merged(key.clone(), value.clone(), backend) for backend in ("triton", "torch"))
            return relative(found, expected)

        # Every entry is read once, the kept ones are written.
        nbytes = (2 * key.nbytes) * 1.1 + 12 * kept.numel()
        other_key, other_value = key.clone(), value.clone()
        calls: dict[str, Calls] = {
            OURS: [lambda: merged(other_key, other_value, "triton")],
            "torch": [lambda: merged(other_key, other_value, "torch")],
        }
        return Case("merge_slots", batch, f"{s.n} to {count}", calls, nbytes, error)

    # ------------------------------------------------------------------ prompts

    def mass(self, batch: int) -> Case:
        """Column sums of a prompt's softmax, its LSE known and not."""
        s = self.sizes
        query, key, value = self.qkv(batch, s.prompt, s.prompt)
        at = torch.arange(s.prompt, device=self.device).expand(batch, -1)
        given = self.lse(query, key)
        calls: dict[str, Calls] = {
            OURS: [
                lambda: attention_mass(query, at, key, None, scale=s.scale, lse=given, backend="triton"),
            ],
            "kvpress, LSE not given": [
                lambda: attention_mass(query, at, key, None, scale=s.scale, backend="triton"),
            ],
        }
        calls |= sdpa(query, key, value, causal=True)

        def error() -> float:
            """Of one kv head, against the torch path."""
            some = attention_mass(query[:1, : s.group], at[:1], key[:1, :1], None, scale=s.scale, backend="torch")
            return max(relative(call()[:1, :1], some) for name in list(calls)[:2] for call in calls[name])

        operations = batch * s.heads * float(s.prompt) ** 2 * s.head_dim
        return Case("attention_mass", batch, f"{s.prompt} rows", calls, key.nbytes, error, operations)

    def window(self, batch: int) -> Case:
        """The last rows' mass on a whole prompt (SnapKV)."""
        s = self.sizes
        query, key, _ = self.qkv(batch, s.window, s.n)
        at = torch.arange(s.n - s.window, s.n, device=self.device).expand(batch, -1)
        calls: dict[str, Calls] = {
            name: [partial(attention_mass, query, at, key, None, scale=s.scale, backend=backend)]
            for name, backend in ((OURS, "triton"), ("torch", "torch"))
        }
        # K once for the LSE, once for the sums.
        nbytes = 2 * key.nbytes + 4 * batch * s.kv_heads * s.n
        return Case("attention_mass, window", batch, f"{s.window} rows of {s.n}", calls, nbytes, against(calls))

    def slashes(self, batch: int) -> Case:
        """The last rows' attention by entry and by distance (MInference, FlexPrefill)."""
        s = self.sizes
        query, key, _ = self.qkv(batch, s.probe, s.n)
        calls: dict[str, Calls] = {
            name: [partial(vertical_slash_mass, query, key, scale=s.scale, backend=backend)]
            for name, backend in ((OURS, "triton"), ("torch", "torch"))
        }
        # K once for the LSE, once for the sums of both kinds.
        nbytes = 2 * key.nbytes + 8 * batch * s.heads * s.n
        size = f"{s.probe} rows of {s.n}"
        operations = 4.0 * batch * s.heads * s.probe * s.n * s.head_dim

        def error() -> float:
            """Of one kv head, against the torch path in float32."""
            some = query[:1, : s.group].float(), key[:1, :1].float()
            expected = vertical_slash_mass(*some, scale=s.scale, backend="torch")
            return relative(tuple(one[:1, : s.group] for one in calls[OURS][0]()), expected)

        return Case("vertical_slash_mass", batch, size, calls, nbytes, error, operations)

    def antidiagonals(self, batch: int) -> Case:
        """A prompt's attention by blocks, estimated by the antidiagonals of cells (XAttention)."""
        s = self.sizes
        query, key, _ = self.qkv(batch, s.n, s.n)
        options: dict[str, Any] = {"scale": s.scale, "stride": s.stride, "block_size": s.block_size}
        calls: dict[str, Calls] = {
            name: [partial(antidiagonal_mass, query, key, **options, backend=backend)]
            for name, backend in ((OURS, "triton"), ("torch", "torch"))
        }
        # Each pair of cells up to the diagonal once: half of the pairs, `stride` products of `head_dim` numbers for each.
        operations = batch * s.heads * float(s.n) ** 2 * s.head_dim / s.stride

        def error() -> float:
            """Of one kv head, against the torch path in float32."""
            some = query[:1, : s.group].float(), key[:1, :1].float()
            expected = antidiagonal_mass(*some, **options, backend="torch")
            return relative(calls[OURS][0]()[:1, : s.group], expected)

        nbytes = query.nbytes + key.nbytes
        return Case("antidiagonal_mass", batch, f"{s.n} rows", calls, nbytes, error, operations)

    def block_sparse(self, batch: int) -> Case:
        """A prompt that reads a tenth of the blocks that causal attention reads."""
        s = self.sizes
        query, key, value = self.qkv(batch, s.n, s.n)
        blocks = self.blocks(batch, 0.1)
        options: dict[str, Any] = {"scale": s.scale, "block_size": s.block_size, "backend": "triton"}
        calls: dict[str, Calls] = {
            OURS: [lambda: block_sparse_attention(query, key, value, blocks=blocks, **options)],
        }
        calls |= sdpa(query, key, value, causal=True)
        size = s.block_size
        some = [0, blocks.shape[2] // 2, blocks.shape[2] - 1]

        def error() -> float:
            """Of three query blocks of the first kv head, one by one."""
            output = calls[OURS][0]()[0]
            errors = []
            for block in some:
                rows = slice(block * size, (block + 1) * size)
                listed = blocks[0, 0, block]
                listed = listed[listed >= 0].sort().values
                entries = (listed[:, None] * size + torch.arange(size, device=self.device)).flatten()
                visible = entries <= torch.arange(s.n, device=self.device)[rows, None]
                keys, values = (x[:1, :1, entries] for x in (key, value))
                expected = exact(query[:1, : s.group, rows], keys, values, s.scale, visible)
                errors.append(relative(output[:1, : s.group, rows], expected))
            return max(errors)

        pairs = float((blocks >= 0).sum()) * s.group * size * size
        return Case(
            "block_sparse_attention", batch, f"10 % of {s.n}", calls, 2 * key.nbytes, error, 4 * pairs * s.head_dim
        )

    def flex_block_sparse(self, batch: int) -> Case:
        """The same by FlexAttention, which has to be compiled first."""
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        s = self.sizes
        query, key, value = self.qkv(batch, s.n, s.n)
        blocks = self.blocks(batch, 0.1).repeat_interleave(s.group, dim=1)
        count = blocks.shape[2]
        own = torch.arange(count, device=self.device).expand(batch, s.heads, -1)
        whole = (blocks >= 0) & (blocks != own[..., None])
        first = blocks.gather(3, whole.to(torch.uint8).argsort(dim=-1, descending=True, stable=True))
        listed = torch.zeros(*own.shape, count, dtype=torch.int32, device=self.device)
        listed[..., : first.shape[3]] = first.clamp(min=0)
        partial_blocks = torch.zeros_like(listed)
        partial_blocks[..., 0] = own
        mask = BlockMask.from_kv_blocks(
            torch.ones_like(own, dtype=torch.int32),
            partial_blocks,
            whole.sum(-1, dtype=torch.int32),
            listed,
            BLOCK_SIZE=s.block_size,
            mask_mod=lambda b, h, row, column: row >= column,
        )
        run = torch.compile(flex_attention) if self.device.type == "cuda" else flex_attention
        options: dict[str, Any] = {"scale": s.scale, "block_size": s.block_size, "backend": "triton"}
        lists = self.blocks(batch, 0.1)
        calls: dict[str, Calls] = {
            OURS: [lambda: block_sparse_attention(query, key, value, blocks=lists, **options)],
            "FlexAttention": [lambda: run(query, key, value, block_mask=mask, scale=s.scale, enable_gqa=True)],
        }
        pairs = float((lists >= 0).sum()) * s.group * s.block_size**2

        def error() -> float:
            """Of ours against FlexAttention; without a GPU that one ignores the list, as it is not compiled."""
            return relative(calls[OURS][0]()[0], calls["FlexAttention"][0]()) if self.device.type == "cuda" else 0.0

        return Case(
            "block_sparse_attention, flex",
            batch,
            f"10 % of {s.n}",
            calls,
            2 * key.nbytes,
            error,
            4 * pairs * s.head_dim,
        )

    def blocks(self, batch: int, density: float) -> Tensor:
        """Blocks of each query block, int64 [batch, kv_heads, blocks, m], -1 for none: its own and others before it."""
        s = self.sizes
        count = s.n // s.block_size
        generator = torch.Generator(self.device).manual_seed(0)
        order = torch.rand(batch, s.kv_heads, count, count, device=self.device, generator=generator)
        place = torch.arange(count, device=self.device)
        order.masked_fill_(place > place[:, None], -1.0)
        order[..., place, place] = 2.0
        wanted = ((place + 1) * density).round().clamp(min=1)
        found = order.topk(int(wanted.max()), dim=-1).indices
        return found.masked_fill_(torch.arange(found.shape[-1], device=self.device) >= wanted[:, None], -1)

    def lse(self, query: Tensor, key: Tensor) -> Tensor:
        """LSE of causal attention, float32 [batch, heads, rows]: the one that block_sparse_attention returns for all blocks."""
        s = self.sizes
        size = s.block_size
        count = -(-query.shape[2] // size)
        place = torch.arange(count, device=self.device)
        listed = place.expand(count, -1).masked_fill(place > place[:, None], -1)
        blocks = listed.expand(query.shape[0], s.kv_heads, -1, -1)
        return block_sparse_attention(query, key, key, scale=s.scale, blocks=blocks, block_size=size, backend="triton")[
            1
        ]


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """Textbook attention in float32; `visible` [rows, n]."""
    group = query.shape[1] // key.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (key, value))
    scores = (query.float() @ keys.transpose(-1, -2)) * scale
    if visible is not None:
        scores = scores.masked_fill_(~visible, float("-inf"))
    return scores.softmax(dim=-1) @ values


def relative(found: Any, expected: Any) -> float:
    """Norm of the difference over that of the expected, the largest over tensors; NaN and other shapes count as 1."""
    if isinstance(expected, tuple):
        return max(relative(one, other) for one, other in zip(found, expected, strict=True))
    if found.shape != expected.shape:
        return 1.0
    found, expected = found.double(), expected.double()
    error = ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    return error if error == error else 1.0


def against(calls: dict[str, Calls], other: str = "torch") -> Callable[[], float]:
    """The error of our first call against the same by another implementation."""
    return lambda: relative(calls[OURS][0](), calls[other][0]())


def sdpa(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> dict[str, Calls]:
    """SDPA's backends, each by name; whether one takes these tensors shows when it is called."""

    def run(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)

    named = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
    return {name: [partial(run, backend)] for name, backend in named.items()}


def makers(maker: Maker) -> Iterator[Callable[[], Case]]:
    """What makes each case, those that goals are about first."""
    batches = maker.sizes.batches
    large = max(batch for batch in batches if batch <= 8)
    for batch in reversed(batches):
        yield partial(maker.decode_selected, batch)
    for batch in (1, large):
        yield partial(maker.decode, batch)
    for batch in (1, large):
        yield partial(maker.topk, batch)
    yield partial(maker.mass, 1)
    yield partial(maker.block_sparse, 1)
    for name in (
        "paged",
        "scores",
        "bounds",
        "pages",
        "vote",
        "union",
        "window",
        "slashes",
        "antidiagonals",
        "compact",
        "rope",
        "merge",
    ):
        yield partial(getattr(maker, name), 1)
    yield partial(maker.flex_block_sparse, 1)


def measure(case: Case, limits: Limits, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row per implementation: ms, ratio to ours, and for ours the share of the limit and the error."""
    common = {"kernel": case.kernel, "batch": case.batch, "size": case.size}
    limit = limits.milliseconds(case.bytes_moved, case.operations)
    ours, how = timing(case.calls[OURS], device, case.waits)
    yield {
        **common,
        "implementation": OURS,
        "ms": ours,
        "timed": how,
        "ratio": 1.0,
        "floor_ms": limit,
        "of_limit": limit / ours,
        "gigabytes_per_s": case.bytes_moved / ours * 1e-6,
        "error": case.error(),
    }
    for name, calls in case.calls.items():
        if name == OURS:
            continue
        try:
            ms, how = timing(calls, device, case.waits)
            yield {
                **common,
                "implementation": name,
                "ms": ms,
                "timed": how,
                "ratio": ms / ours,
                "floor_ms": limit,
                "of_limit": limit / ms,
            }
        except Exception as error:  # a backend that does not take these tensors says so by raising
            yield {**common, "implementation": name, "failed": first_line(error)}


def first_line(error: BaseException) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


def rows(
    device: torch.device, limits: Limits, sizes: Sizes, in_time: Callable[[], bool] = lambda: True
) -> Iterator[dict[str, Any]]:
    """All cases; one that fails is a row that says so, and what there is no time for is left out."""
    maker = Maker(sizes, device)
    for make in makers(maker):
        name = make.func.__name__  # type: ignore[attr-defined]
        if not in_time():
            yield {"left_out": f"no time for {name} and what comes after it"}
            return
        try:
            yield from measure(make(), limits, device)
        except Exception as error:
            yield {"kernel": name, "batch": make.args[0], "failed": first_line(error)}  # type: ignore[attr-defined]
        if device.type == "cuda":
            torch.cuda.empty_cache()


def build(device: torch.device, sizes: Sizes, place: int, count: int) -> Iterator[str]:
    """Call what every `count`-th case calls of ours, from number `place` on: so its kernels are compiled, and kept on disk."""
    for make in list(makers(Maker(sizes, device)))[place::count]:
        case = make()
        for name, calls in case.calls.items():
            if name.startswith(OURS):
                calls[0]()
        yield case.kernel
