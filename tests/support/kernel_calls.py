"""A call of each kernel at n entries, and what records the largest tensor of a call: for the tests of memory."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvpress.kernels.antidiagonal_mass import antidiagonal_mass
from kvpress.kernels.attention_mass import attention_mass
from kvpress.kernels.block_sparse_attention import block_sparse_attention
from kvpress.kernels.compact_slots import compact_slots
from kvpress.kernels.decode_attention import decode_attention
from kvpress.kernels.decode_scores import decode_scores
from kvpress.kernels.evict_slot import evict_slot
from kvpress.kernels.gather_slots import gather_slots
from kvpress.kernels.merge_slots import merge_slots
from kvpress.kernels.page_bounds import page_bounds
from kvpress.kernels.page_scores import page_scores
from kvpress.kernels.paged_attention import paged_attention
from kvpress.kernels.rope_shift import rope_shift
from kvpress.kernels.skip_attention import skip_attention
from kvpress.kernels.soft_vote import soft_vote
from kvpress.kernels.topk_select import topk_select
from kvpress.kernels.union_select import union_select
from kvpress.kernels.vertical_slash_mass import vertical_slash_mass
from kvpress.kernels.write_slot import write_slot

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64  # SmolLM2 135M


class Largest(TorchDispatchMode):
    """Records the largest memory behind any operation's result, in float32 numbers (a view adds none)."""

    numbers = 0
    operation = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() / 4 > self.numbers:
                self.numbers, self.operation = tensor.untyped_storage().nbytes() / 4, str(func)
        return result


def qkv(rows, entries, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS, rows, HEAD_DIM, generator=generator).to(dtype)
    key, value = torch.randn(2, 1, KV_HEADS, entries, HEAD_DIM, generator=generator).to(dtype)
    return query, key, value


def places(query):
    """Positions of rows that are all there are."""
    return torch.arange(query.shape[2], dtype=torch.int32, device=query.device)[None]


def slots_of(key):
    """Every slot, int64 [1, kv_heads, n]."""
    return torch.arange(key.shape[2], device=key.device).expand(1, KV_HEADS, -1)


def quarter(key):
    """Every fourth slot, int64 [1, kv_heads, n / 4]."""
    return slots_of(key)[..., ::4].contiguous()


def own_and_half_way(query, size):
    """Blocks: each query block's own, and the one half way before it."""
    own = torch.arange(query.shape[2] // size, device=query.device)
    half = torch.where(own // 2 < own, own // 2, -1)
    return torch.stack([own, half], dim=-1).expand(1, KV_HEADS, -1, -1)


def paged(query, key, value, backend):
    """The kv heads' entries as pages of 16 slots, head after head."""
    keys, values = (x.reshape(1, -1, HEAD_DIM) for x in (key, value))
    owner = torch.arange(KV_HEADS, device=key.device).repeat_interleave(key.shape[2] // 16)[None]
    valid = torch.ones(keys.shape[:2], dtype=torch.bool, device=key.device)
    options = {"kv_heads": KV_HEADS, "scale": 0.1, "with_mass": True, "backend": backend}
    paged_attention(query[:, :, :1], keys, values, owner, valid, **options)


def merged(key, value, backend):
    """Three of four entries go to the fourth."""
    rest = slots_of(key)[..., slots_of(key)[0, 0] % 4 > 0].contiguous()
    weights = torch.ones(key.shape[:3], device=key.device)
    merge_slots(key.clone(), value.clone(), [], weights, quarter(key), rest, rest // 4, backend=backend)


# Kernel -> a call with q [1, heads, n, head_dim] and k, v [1, kv_heads, n, head_dim] that selects a share of the n entries.
LINEAR = {
    "evict_slot": lambda q, k, v, b: evict_slot(
        k[..., 0], k[..., 0].int(), places(k)[0, -1:], places(k)[0, :1], backend=b
    ),
    # Of one block of rows: the result has a number for each pair of blocks.
    "antidiagonal_mass": lambda q, k, v, b: antidiagonal_mass(
        q[:, :, -16:], k, scale=0.1, stride=4, block_size=16, backend=b
    ),
    "attention_mass": lambda q, k, v, b: attention_mass(q, places(q), k, None, scale=0.1, backend=b),
    "block_sparse_attention": lambda q, k, v, b: block_sparse_attention(
        q, k, v, scale=0.1, blocks=own_and_half_way(q, 16), block_size=16, backend=b
    ),
    "compact_slots": lambda q, k, v, b: compact_slots(
        k, v, k[..., 0].int(), quarter(k), quarter(k) >= 0, k.shape[2] // 4, backend=b
    ),
    "decode_attention": lambda q, k, v, b: decode_attention(q[:, :, :1], k, v, scale=0.1, with_mass=True, backend=b),
    "decode_attention-index": lambda q, k, v, b: decode_attention(
        q[:, :, :1], k, v, scale=0.1, index=quarter(k), backend=b
    ),
    "decode_scores": lambda q, k, v, b: decode_scores(q[:, :, :1], k, scale=0.1, backend=b),
    "gather_slots": lambda q, k, v, b: gather_slots(k, quarter(k), backend=b),
    "merge_slots": lambda q, k, v, b: merged(k, v, b),
    "page_bounds": lambda q, k, v, b: page_bounds(k, None, 16, backend=b),
    "page_scores": lambda q, k, v, b: page_scores(q[:, :, :1], k, k + 1, backend=b),
    "paged_attention": paged,
    "rope_shift": lambda q, k, v, b: rope_shift(k, places(k), torch.rand(4), backend=b),
    "skip_attention": lambda q, k, v, b: skip_attention(q, k, v, scale=0.1, skip=0.9, tile=16, backend=b),
    "soft_vote": lambda q, k, v, b: soft_vote(q[:, :, :2], k, scale=0.1, backend=b),
    "topk_select": lambda q, k, v, b: topk_select(k[..., 0], quarter(k)[..., 1], k.shape[2] // 4, backend=b),
    "vertical_slash_mass": lambda q, k, v, b: vertical_slash_mass(q[:, :, -16:], k, scale=0.1, backend=b),
    "write_slot": lambda q, k, v, b: write_slot(
        k.clone(),
        v.clone(),
        k[..., 0].int(),
        [k[..., 1].clone()],
        3,
        k[:, :, :1],
        v[:, :, :1],
        places(k)[0, :1],
        backend=b,
    ),
    "union_select": lambda q, k, v, b: union_select(q[:, :, :, 0] > 0, KV_HEADS, backend=b),
}
