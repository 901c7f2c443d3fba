"""block_sparse_attention on both paths against its reference, a float64 loop and dense attention.

gpu/test_block_sparse_attention.py has what only the Triton kernel does.
"""

import pytest
import torch

from kvpress.kernels.block_sparse_attention import (
    block_sparse_attention,
    block_sparse_attention_reference,
    listed_keys,
)
from kvpress.kernels.prompt_attention import prompt_attention
from support.attention_inputs import BATCH, KV_HEADS
from support.attention_inputs import prompt_inputs as inputs
from support.backends import BACKENDS, BACKENDS_AND_DTYPES, on
from support.block_lists import ALL_FORMS, EXACT, FORMS, GROUPS, SHAPES, lists, reads
from support.brute import attend, causal, eager

NEAR = {"rtol": 1e-5, "atol": 1e-5}
NO_DISTANCES = "distances have no Triton kernel"


def attended(backend, *tensors, scale=0.3, **options):
    """Output and LSE on the CPU, of tensors that go where the path runs."""
    options = dict(zip(options, on(backend, *options.values()), strict=True))
    found = block_sparse_attention(*on(backend, *tensors), scale=scale, **options, backend=backend)
    return tuple(x.cpu() for x in found)


def exact(query, key, value, seen, **chosen):
    """The float64 loop, with K and V repeated to the query heads."""
    group = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (key, value))
    return attend(query, keys, values, seen, **chosen)[0]


@BACKENDS
@SHAPES
@GROUPS
@ALL_FORMS
@pytest.mark.parametrize("per_head", [False, True], ids=["kv-head", "head"])
def test_equals_the_definition(rows, past, group, forms, per_head, backend):
    """Every form alone and together, per kv head or query head, in a prompt and in a chunk that starts anywhere."""
    if backend == "triton" and "distances" in forms:
        pytest.skip(NO_DISTANCES)
    query, key, value = inputs(rows, past, group)
    heads = query.shape[1]
    chosen = lists(forms, rows, past, heads if per_head else KV_HEADS)
    seen = reads(rows, past, heads, **chosen)
    if chosen:
        assert torch.equal(listed_keys(rows, rows + past, heads, **chosen, block_size=16), seen)
    output, lse = attended(backend, query, key, value, scale=0.3, block_size=16, **chosen)
    torch.testing.assert_close(output, exact(query, key, value, seen, scale=0.3).float(), **NEAR)
    expected, expected_lse = block_sparse_attention_reference(query, key, value, scale=0.3, block_size=16, **chosen)
    torch.testing.assert_close(expected, output, **NEAR)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, expected_lse, **NEAR)


@BACKENDS
@pytest.mark.parametrize("features", [("softcap",), ("sinks",), ("softcap", "sinks")], ids="+".join)
def test_softcap_and_sinks(features, backend):
    query, key, value = inputs(50, 37, 3)
    options = {"scale": 0.3} | ({"softcap": 1.5} if "softcap" in features else {})
    if "sinks" in features:
        options["sinks"] = torch.randn(query.shape[1], generator=torch.Generator().manual_seed(2))
    chosen = lists(EXACT[-1] if backend == "torch" else FORMS[-1], 50, 37, KV_HEADS)
    output, lse = attended(backend, query, key, value, block_size=16, **chosen, **options)
    seen = reads(50, 37, query.shape[1], **chosen)
    torch.testing.assert_close(output, exact(query, key, value, seen, **options).float(), **NEAR)
    _, expected = block_sparse_attention_reference(query, key, value, block_size=16, **chosen, **options)
    torch.testing.assert_close(lse, expected, **NEAR)


@BACKENDS
@pytest.mark.parametrize("form", ["blocks", "columns", "diagonals", "distances"])
@pytest.mark.parametrize("block_size", [16, 64, 128], ids="block-{}".format)
def test_everything_listed_is_dense_attention(form, block_size, backend):
    """All blocks, all columns, or all diagonals: each is the exact causal attention."""
    if backend == "triton" and form == "distances":
        pytest.skip(NO_DISTANCES)
    query, key, value = inputs(111, 29, 3)
    number = -(-140 // block_size) if form == "blocks" else 140
    shape = (BATCH, KV_HEADS, -(-111 // block_size), number) if form == "blocks" else (BATCH, KV_HEADS, number)
    listed = {form: torch.arange(number).expand(shape)}
    output, _ = attended(backend, query, key, value, scale=0.3, block_size=block_size, **listed)
    torch.testing.assert_close(output, prompt_attention(query, key, value, scale=0.3)[0], **NEAR)


@BACKENDS_AND_DTYPES
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256], ids="d-{}".format)
def test_is_as_precise_as_eager_attention(head_dim, dtype, backend):
    """The error against float64 is at most twice that of eager attention in that precision."""
    query, key, value = inputs(63, 21, 3, head_dim, dtype)
    chosen = lists(FORMS[-1], 63, 21, KV_HEADS)
    seen = reads(63, 21, query.shape[1], **chosen)
    expected = exact(query, key, value, seen, scale=head_dim**-0.5)
    wide = [x.repeat_interleave(3, dim=1) for x in (key, value)]
    torch_error = (eager(query, *wide, seen, scale=head_dim**-0.5).double() - expected).abs().max()
    output, _ = attended(backend, query, key, value, scale=head_dim**-0.5, block_size=16, **chosen)
    assert output.dtype == dtype
    assert (output.double() - expected).abs().max() <= 2 * torch_error + 1e-6


def test_unlisted_keys_are_never_read():
    """NaN in every key and value that no row of a query block reads: past entries, other blocks' rows, empty buffer."""
    query, key, value = inputs(50, 37, 3)
    chosen = {
        "blocks": torch.tensor([0, 2]).expand(BATCH, KV_HEADS, 4, 2),
        "columns": torch.tensor([18]).expand(BATCH, KV_HEADS, 1),
        "diagonals": torch.tensor([0]).expand(BATCH, KV_HEADS, 1),
    }
    expected, _ = attended("torch", query, key, value, scale=0.3, block_size=16, **chosen)
    unread = ~listed_keys(50, 87, KV_HEADS, **chosen, block_size=16).any(dim=2)
    assert unread.any()
    buffers = torch.full((2, BATCH, KV_HEADS, 100, 16), float("nan"))
    for buffer, tensor in zip(buffers, (key, value), strict=True):
        buffer[:, :, :87] = tensor.masked_fill(unread[..., None], float("nan"))
    output, lse = attended(
        "torch", query, buffers[0, :, :, :87], buffers[1, :, :, :87], scale=0.3, block_size=16, **chosen
    )
    assert lse.isfinite().all()
    torch.testing.assert_close(output, expected, **NEAR)


@BACKENDS
def test_a_block_does_not_read_what_others_list(backend):
    """NaN in a query block's own keys stays in the blocks that list them."""
    query, key, value = inputs(48, 0, 1)
    key[:, :, 3] = float("nan")
    blocks = torch.tensor([[0], [1], [2]]).expand(BATCH, KV_HEADS, 3, 1)
    output, _ = attended(backend, query, key, value, scale=0.3, blocks=blocks, block_size=16)
    assert output[:, :, 3:16].isnan().all() and output[:, :, :3].isfinite().all()
    assert output[:, :, 16:].isfinite().all()


@BACKENDS
def test_a_row_reads_itself(backend):
    """Without any list the output is the row's own value, and the LSE its own score."""
    query, key, value = inputs(63, 21, 3)
    output, lse = attended(backend, query, key, value, scale=0.3)
    own = slice(21, None)
    torch.testing.assert_close(output, value[:, :, own].repeat_interleave(3, dim=1), **NEAR)
    torch.testing.assert_close(lse, 0.3 * (query * key[:, :, own].repeat_interleave(3, dim=1)).sum(-1), **NEAR)


@BACKENDS
def test_chunks_equal_one_pass(backend):
    """Rows fed in chunks of whole query blocks read what they read in one pass."""
    query, key, value = inputs(60, 0, 1)
    chosen = lists(("blocks", "columns", "diagonals"), 60, 0, KV_HEADS)
    output, lse = attended(backend, query, key, value, scale=0.3, block_size=16, **chosen)
    for start, stop in ((0, 32), (32, 48), (48, 60)):
        part = {**chosen, "blocks": chosen["blocks"][:, :, start // 16 : -(-stop // 16)]}
        tensors = query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop]
        chunk, chunk_lse = attended(backend, *tensors, scale=0.3, block_size=16, **part)
        torch.testing.assert_close(chunk, output[:, :, start:stop], **NEAR)
        torch.testing.assert_close(chunk_lse, lse[:, :, start:stop], **NEAR)


@BACKENDS
def test_the_lse_merges_parts(backend):
    """Past and new keys apart, merged by their LSE, are attention over both."""
    query, key, value = inputs(48, 32, 3)
    both, _ = attended(
        backend,
        query,
        key,
        value,
        scale=0.3,
        blocks=torch.arange(5).expand(1, 1, 1, 5).expand(BATCH, KV_HEADS, 3, 5),
        block_size=16,
    )
    diagonal = torch.arange(3).expand(BATCH, KV_HEADS, 3, 3)
    new, new_lse = attended(backend, query, key[:, :, 32:], value[:, :, 32:], scale=0.3, blocks=diagonal, block_size=16)
    scores = 0.3 * query @ key[:, :, :32].repeat_interleave(3, dim=1).transpose(-1, -2)
    old, old_lse = scores.softmax(-1) @ value[:, :, :32].repeat_interleave(3, dim=1), scores.logsumexp(-1)
    weight = (new_lse - old_lse).sigmoid()[..., None]
    torch.testing.assert_close(weight * new + (1 - weight) * old, both, **NEAR)


def test_a_diagonal_takes_whole_runs():
    """Counted by hand: 16 rows in blocks of 4, column 0, diagonals 0 and 5.

    The diagonals give each block its own 4 entries and, of those 5 to 2 before it, whichever there are: blocks from 0, 4, 8
    and 12 have 10, 10 + 3 * 4, 10 + 4 * 4 and 10 + 4 * 4 pairs; column 0 adds 4 to each of the last two.
    With key block 0 also listed where the second diagonal begins it is the 96 pairs of MInference's kernel.
    """
    columns, diagonals = torch.tensor([[[0]]]), torch.tensor([[[0, 5]]])
    mask = listed_keys(16, 16, 1, columns=columns, diagonals=diagonals, block_size=4)
    assert mask.sum() == 10 + 22 + 26 + 4 + 26 + 4
    blocks = torch.tensor([[-1], [0], [-1], [-1]])[None, None]
    assert listed_keys(16, 16, 1, blocks=blocks, columns=columns, diagonals=diagonals, block_size=4).sum() == 96
    assert torch.equal(
        listed_keys(16, 16, 1, blocks=torch.arange(4).expand(1, 1, 4, 4), block_size=4)[0], causal(1, 1, 16, 16)[0]
    )


@pytest.mark.parametrize(("block_size", "rows", "past"), [(1, 13, 7), (2, 13, 7), (4, 13, 7), (8, 13, 7), (16, 40, 31)])
def test_small_blocks(block_size, rows, past):
    """Also rows that begin with the last entry of a block, and values of another head_dim."""
    query, key, value = inputs(rows, past, 2)
    blocks = torch.tensor([-1, 0, 1, 2]).expand(BATCH, KV_HEADS * 2, -(-rows // block_size), 4)
    seen = reads(rows, past, KV_HEADS * 2, blocks=blocks, block_size=block_size)
    for width in (value.shape[-1], value.shape[-1] - 3):
        found, _ = block_sparse_attention(
            query, key, value[..., :width], scale=0.3, blocks=blocks, block_size=block_size
        )
        torch.testing.assert_close(found, exact(query, key, value[..., :width], seen, scale=0.3).float())


@pytest.mark.parametrize(("key_size", "rows", "past"), [(1, 20, 3), (2, 13, 7), (4, 32, 0), (8, 16, 0), (4, 1, 13)])
def test_key_blocks_smaller_than_those_of_rows(key_size, rows, past):
    query, key, value = inputs(rows, past, 2)
    heads, count = KV_HEADS * 2, -(-(rows + past) // key_size)
    drawn = torch.rand(BATCH, heads, -(-rows // 8), count, generator=torch.Generator().manual_seed(3))
    blocks = torch.arange(count).expand_as(drawn).masked_fill(drawn < 0.6, -1)
    sizes = {"block_size": 8, "key_block_size": key_size}
    seen = reads(rows, past, heads, blocks=blocks, **sizes)
    assert torch.equal(listed_keys(rows, rows + past, heads, blocks=blocks, **sizes), seen)
    found, _ = block_sparse_attention(query, key, value, scale=0.3, blocks=blocks, **sizes)
    torch.testing.assert_close(found, exact(query, key, value, seen, scale=0.3).float())


@pytest.mark.parametrize("key_size", [0, 3, 32])
def test_bad_key_block_size(key_size):
    with pytest.raises(ValueError, match=f"key_block_size={key_size} is no power of two up to block_size=16"):
        block_sparse_attention(*inputs(4, 0, 1), scale=1.0, block_size=16, key_block_size=key_size)


def test_triton_has_one_size_for_rows_and_keys():
    with pytest.raises(ValueError, match="key_block_size=8 below block_size=16 is for backend='torch' or 'auto'"):
        block_sparse_attention(*inputs(4, 0, 1), scale=1.0, block_size=16, key_block_size=8, backend="triton")


def test_triton_has_no_small_blocks():
    with pytest.raises(ValueError, match="block_size=8 is too small for backend='triton'"):
        block_sparse_attention(*inputs(4, 0, 1), scale=1.0, block_size=8, backend="triton")


@pytest.mark.parametrize("block_size", [0, 48, 100])
def test_bad_block_size(block_size):
    with pytest.raises(ValueError, match=f"block_size={block_size} is no power of two"):
        block_sparse_attention(*inputs(4, 0, 1), scale=1.0, block_size=block_size)


def test_distances_are_torchs():
    distances = torch.zeros(BATCH, KV_HEADS, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="distances are for backend='torch' or 'auto'"):
        block_sparse_attention(*inputs(4, 0, 1), scale=1.0, block_size=16, distances=distances, backend="triton")
