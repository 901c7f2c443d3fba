"""What only the Triton kernel of block_sparse_attention does: tiles in blocks, runs; ../test_block_sparse_attention.py has
what both paths do. Blocks of 16 where sizes do not matter.
"""

import pytest
import torch

from kvpress.kernels.block_sparse_attention import (
    block_sparse_attention,
    block_sparse_attention_reference,
    listed_keys,
)
from kvpress.kernels.gpu import block_sparse_attention as gpu
from support.accelerator import DEVICE

BATCH, KV_HEADS = 2, 2
FORMS = [("blocks",), ("columns",), ("diagonals",), ("columns", "diagonals"), ("blocks", "columns", "diagonals")]
ALL_FORMS = pytest.mark.parametrize("forms", [(), *FORMS], ids=lambda names: "+".join(names) or "none")


def inputs(rows, past, group, head_dim=16, dtype=torch.float32, batch=BATCH):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, KV_HEADS * group, rows, head_dim, generator=generator)
    key, value = torch.randn(2, batch, KV_HEADS, past + rows, head_dim, generator=generator)
    return tuple(x.to(DEVICE, dtype) for x in (query, key, value))


def lists(forms, rows, past, heads, block_size=16, batch=BATCH):
    """Random lists of the named forms in any order with -1 among them; diagonals in clusters and alone."""
    generator = torch.Generator().manual_seed(1)
    n = rows + past

    def some(limit, *shape):
        drawn = torch.rand(*shape, limit, generator=generator).argsort(dim=-1)
        return drawn.masked_fill_(torch.rand(drawn.shape, generator=generator) < 0.4, -1)

    chosen = {}
    if "blocks" in forms:
        chosen["blocks"] = some(-(-n // block_size), batch, heads, -(-rows // block_size))
    if "columns" in forms:
        chosen["columns"] = some(n, batch, heads)[..., : 1 + n // 6]
    if "diagonals" in forms:
        near, far = some(min(n, 4), batch, heads), some(n, batch, heads)[..., :3]
        chosen["diagonals"] = torch.cat((near, far.masked_fill(far < 4, -1)), dim=-1)
    return {name: x.to(DEVICE) for name, x in chosen.items()}


def compare(tensors, tolerance=None, **options):
    """The kernel's output and LSE are those of the reference on the same numbers in float32."""
    output, lse = block_sparse_attention(*tensors, backend="triton", **options)
    expected, expected_lse = block_sparse_attention_reference(*(x.float() for x in tensors), **options)
    assert output.dtype == tensors[0].dtype and lse.dtype == torch.float32
    tolerance = tolerance or {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[output.dtype]
    torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [3, 4, 8], ids="group-{}".format)
@pytest.mark.parametrize("per_head", [False, True], ids=["kv-head", "head"])
def test_groups(group, per_head):
    """Lists per kv head or per query head."""
    chosen = lists(FORMS[-1], 19, 24, KV_HEADS * group if per_head else KV_HEADS, batch=1)
    compare(inputs(19, 24, group, batch=1), scale=0.3, block_size=16, **chosen)


@pytest.mark.parametrize("block_size", [64, 128], ids="block-{}".format)
@ALL_FORMS
def test_block_sizes(block_size, forms):
    """The sizes in use, where a block is more than one tile."""
    tensors = inputs(70, 150, 1, batch=1)
    compare(tensors, scale=0.3, block_size=block_size, **lists(forms, 70, 150, KV_HEADS, block_size, batch=1))


@pytest.mark.parametrize("head_dim", [128, 256], ids="d-{}".format)
def test_several_tiles_of_rows_in_a_block(head_dim):
    """Wide rows of float32 are attended in tiles that are smaller than a block."""
    assert gpu.config(64, head_dim, 4, torch.device("cpu")).block_m < 64
    tensors = inputs(70, 33, 1, head_dim, batch=1)
    compare(tensors, scale=head_dim**-0.5, block_size=64, **lists(FORMS[-1], 70, 33, KV_HEADS, 64, batch=1))


def test_lists_of_different_heads():
    """Blocks per kv head, columns per query head."""
    tensors = inputs(21, 26, 3)
    chosen = lists(("blocks", "diagonals"), 21, 26, KV_HEADS) | lists(("columns",), 21, 26, 3 * KV_HEADS)
    compare(tensors, scale=0.3, block_size=16, **chosen)


@pytest.mark.parametrize(
    ("size", "rows", "past", "listed"), [(16, 50, 37, [0, 2]), (64, 70, 200, [0, 2]), (128, 130, 270, [1])], ids=str
)
def test_unlisted_keys_are_never_read(size, rows, past, listed):
    """NaN in every key and value that no row reads, in the rest of the buffers, and a transposed query."""
    n = past + rows
    query, key, value = inputs(rows, past, 3)
    chosen = {
        "blocks": torch.tensor(listed, device=DEVICE).expand(BATCH, KV_HEADS, -(-rows // size), len(listed)),
        "columns": torch.tensor([18], device=DEVICE).expand(BATCH, KV_HEADS, 1),
        "diagonals": torch.tensor([0], device=DEVICE).expand(BATCH, KV_HEADS, 1),
    }
    expected, _ = block_sparse_attention(query, key, value, scale=0.3, block_size=size, backend="triton", **chosen)
    unread = ~listed_keys(rows, n, KV_HEADS, **chosen, block_size=size).any(dim=2)
    assert unread.any()
    buffers = torch.full((2, BATCH, KV_HEADS, n + 13, 16), float("nan"), device=DEVICE)
    for buffer, tensor in zip(buffers, (key, value), strict=True):
        buffer[:, :, :n] = tensor.masked_fill(unread[..., None], float("nan"))
    keys, values = buffers[:, :, :, :n]
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    output, lse = block_sparse_attention(query, keys, values, scale=0.3, block_size=size, backend="triton", **chosen)
    assert lse.isfinite().all()
    assert torch.equal(output, expected)


def test_what_comes_after_a_query_block_is_not_read():
    """NaN behind the first query block's last row, in a key block, a run and a column that it lists."""
    query, key, value = inputs(32, 37, 3)
    chosen = {
        "blocks": torch.arange(5, device=DEVICE).expand(BATCH, KV_HEADS, 2, 5),
        "columns": torch.tensor([60], device=DEVICE).expand(BATCH, KV_HEADS, 1),
    }
    expected, _ = block_sparse_attention(query, key, value, scale=0.3, block_size=16, backend="triton", **chosen)
    key[:, :, 53:], value[:, :, 53:] = float("nan"), float("nan")
    output, _ = block_sparse_attention(query, key, value, scale=0.3, block_size=16, backend="triton", **chosen)
    assert torch.equal(output[:, :, :16], expected[:, :, :16])
    assert output[:, :, 16:].isnan().all()


def test_large_logits():
    """Scores in the thousands neither overflow nor become NaN."""
    query, key, value = inputs(21, 26, 3)
    compare((query * 100, key * 100, value), 1e-3, scale=0.3, block_size=16, **lists(FORMS[-1], 21, 26, KV_HEADS))


@pytest.mark.parametrize(
    ("diagonals", "runs"),
    [([0], 1), ([0, 5], 2), ([0, 16], 2), ([3, 0, 2, 24], 3), (list(range(100)), 8), ([7, 40, 23], 3), ([], 0)],
    ids=str,
)
def test_runs_cover_the_diagonals_and_no_more(diagonals, runs):
    """Neighbouring diagonals share runs: m of them side by side take ceil((m + 15) / 16) of 16 distances."""
    listed = torch.tensor([*diagonals, -1], device=DEVICE)[None, None]
    lasts = torch.tensor([15, 1000], device=DEVICE)
    starts, counts, table = gpu._runs(listed, lasts, 1001, 16)
    begun = starts[0, 0, : int(counts[0, 0, 1])].tolist()
    assert len(begun) == runs and int(counts[0, 0, 0]) == sum(start <= 15 for start in begun)
    covered = {d + i for d in diagonals for i in range(16)}
    assert {i for i, yes in enumerate(table[0, 0].tolist()) if yes} == covered
    reached = {start + i for start in begun for i in range(16)}
    assert covered <= reached and begun == sorted(set(begun))
