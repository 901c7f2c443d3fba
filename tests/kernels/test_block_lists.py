"""The torch path of the lists: against the definition, over sizes, sharing and starts that do not fit the blocks."""

import pytest
import torch

from kvpress.kernels import block_lists, block_sparse_attention
from kvpress.kernels.block_sparse_attention import block_sparse_attention as attend
from kvpress.kernels.block_sparse_attention import block_sparse_attention_reference, listed_keys
from support.attention_inputs import BATCH, KV_HEADS
from support.attention_inputs import prompt_inputs as inputs

SIZE = 16
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


FORMS = [
    ("blocks",),
    ("columns",),
    ("diagonals",),
    ("distances",),
    ("blocks", "columns", "diagonals"),
    ("blocks", "columns", "diagonals", "distances"),
]


def random_blocks(rows, past, lists, share=0.5, key_size=SIZE):
    """Each key block listed with that probability, in any order, later ones than the rows' own too."""
    generator = torch.Generator().manual_seed(1)
    count = -(-(past + rows) // key_size)
    drawn = torch.rand(BATCH, lists, -(-rows // SIZE), count, generator=generator)
    order = drawn.argsort(dim=-1)
    return order.masked_fill(drawn.gather(-1, order) >= share, -1)


@pytest.fixture(autouse=True)
def takes_this_path(monkeypatch, request):
    """Every test here is of this path."""
    calls = []

    def recorded(*args, **kwargs):
        calls.append(args)
        return block_lists.attend_lists(*args, **kwargs)

    monkeypatch.setattr(block_sparse_attention, "attend_lists", recorded)
    yield
    assert calls or any(name in request.node.name for name in ("pairs_are_counted", "rows_read"))


def random_lists(forms, rows, past, lists):
    """Blocks, single entries and distances, about a fifth of all there are; -1 among them."""
    generator, n = torch.Generator().manual_seed(2), rows + past
    chosen = {}
    for form in forms:
        drawn = torch.rand(BATCH, lists, n, generator=generator)
        numbers = torch.arange(n).expand_as(drawn)
        chosen[form] = numbers.masked_fill(drawn > (0.04 if form == "diagonals" else 0.2), -1)
    return chosen | ({"blocks": random_blocks(rows, past, lists)} if "blocks" in forms else {})


@pytest.mark.parametrize(("rows", "past"), [(1, 0), (1, 62), (64, 0), (63, 0), (64, 32), (19, 92), (150, 7)], ids=str)
@pytest.mark.parametrize("group", [1, 3], ids="group-{}".format)
@pytest.mark.parametrize("per_head", [False, True], ids=["kv-head", "head"])
@pytest.mark.parametrize("tile", [1, 1 << 20], ids=["one-by-one", "together"])
@pytest.mark.parametrize(
    "forms",
    FORMS,
    ids="+".join,
)
def test_equals_the_definition(rows, past, group, per_head, tile, forms, monkeypatch):
    """One query block at a time, and all together with shorter lists filled up."""
    monkeypatch.setattr(block_lists, "TILE_NUMBERS", tile)
    monkeypatch.setattr(block_lists, "TILE_MARKS", tile)
    tensors = inputs(rows, past, group)
    lists = random_lists(forms, rows, past, KV_HEADS * group if per_head else KV_HEADS)
    options = {"scale": 0.3, "block_size": SIZE, **lists}
    output, lse = attend(*tensors, **options)
    expected, expected_lse = block_sparse_attention_reference(*tensors, **options)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "past", "skip"), [(1, 0, 0), (64, 0, 0), (64, 32, 9), (19, 93, 3), (150, 7, 0)], ids=str
)
@pytest.mark.parametrize("tile", [1, 1 << 20], ids=["one-by-one", "together"])
@pytest.mark.parametrize("forms", FORMS, ids="+".join)
def test_pairs_are_counted(rows, past, skip, tile, forms, monkeypatch):
    monkeypatch.setattr(block_lists, "TILE_MARKS", tile)
    lists = random_lists(forms, rows, past, 2 * KV_HEADS)
    expected = listed_keys(rows, rows + past, 2 * KV_HEADS, block_size=SIZE, **lists)[:, :, skip:].sum() / (
        2 * KV_HEADS
    )
    found = block_lists.listed_pairs(rows, rows + past, skip=skip, block_size=SIZE, **lists)
    assert found.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("key_size", [2, SIZE])
@pytest.mark.parametrize(("rows", "past"), [(1, 0), (64, 32), (19, 93), (150, 7)], ids=str)
@pytest.mark.parametrize("forms", [form for form in FORMS if form], ids="+".join)
def test_rows_read_what_the_definition_lists(key_size, rows, past, forms):
    """Any rows of a call, up to the last of them; of these pairs the ones after a row are left out."""
    heads, n = KV_HEADS * 3, rows + past
    lists = random_lists(forms, rows, past, heads)
    if "blocks" in lists:
        lists["blocks"] = random_blocks(rows, past, heads, 0.3, key_size)
    options = {"block_size": SIZE, "key_block_size": key_size, **lists}
    expected = listed_keys(rows, n, heads, **options)
    for first, last in {
        (0, rows),
        (0, 1),
        (rows // 3, rows // 3 + 1),
        (rows // 2, rows),
        (rows // 5, rows - rows // 5),
    }:
        found = block_lists.listed_rows(first, last, rows, n, **options)
        assert torch.equal(found, expected[:, :, first:last, : past + last])


@pytest.mark.parametrize("key_size", [1, 2, 8])
@pytest.mark.parametrize(("rows", "past"), [(64, 0), (63, 0), (64, 32), (19, 93), (150, 7)], ids=str)
@pytest.mark.parametrize("tile", [1, 1 << 20], ids=["one-by-one", "together"])
@pytest.mark.parametrize("forms", [form for form in FORMS if "blocks" in form], ids="+".join)
def test_smaller_key_blocks(key_size, rows, past, tile, forms, monkeypatch):
    """What they list is attended and counted, on their own and beside single entries."""
    monkeypatch.setattr(block_lists, "TILE_NUMBERS", tile)
    monkeypatch.setattr(block_lists, "TILE_MARKS", tile)
    tensors, heads = inputs(rows, past, 3), KV_HEADS * 3
    lists = random_lists(forms, rows, past, heads) | {"blocks": random_blocks(rows, past, heads, 0.3, key_size)}
    options = {"block_size": SIZE, "key_block_size": key_size, **lists}
    output, lse = attend(*tensors, scale=0.3, **options)
    expected, expected_lse = block_sparse_attention_reference(*tensors, scale=0.3, **options)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    for skip in (0, 3):
        pairs = listed_keys(rows, rows + past, heads, **options)[:, :, skip:].sum() / heads
        found = block_lists.listed_pairs(rows, rows + past, skip=skip, **options)
        assert found.item() == pytest.approx(pairs.item())


def test_smaller_key_blocks_list_what_larger_ones_do():
    """A block of 16 keys is its eight blocks of two."""
    tensors, large = inputs(70, 30, 3), random_blocks(70, 30, KV_HEADS)
    small = (large[..., None] * 8 + torch.arange(8)).masked_fill(large[..., None] < 0, -1).flatten(3)
    expected = attend(*tensors, scale=0.3, block_size=SIZE, blocks=large)
    found = attend(*tensors, scale=0.3, block_size=SIZE, key_block_size=2, blocks=small)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("some", "other"), [("blocks", "columns"), ("columns", "diagonals"), ("diagonals", "blocks")])
def test_lists_per_head_beside_lists_per_kv_head(some, other):
    tensors = inputs(70, 30, 3)
    chosen = random_lists((some,), 70, 30, KV_HEADS * 3) | random_lists((other,), 70, 30, KV_HEADS)
    output, lse = attend(*tensors, scale=0.3, block_size=SIZE, **chosen)
    expected, expected_lse = block_sparse_attention_reference(*tensors, scale=0.3, block_size=SIZE, **chosen)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("sink", [False, True], ids=["plain", "sinks"])
def test_dtypes_and_sinks(dtype, sink):
    tensors = inputs(90, 40, 3, dtype=dtype)
    sinks = torch.randn(3 * KV_HEADS, generator=torch.Generator().manual_seed(2)) if sink else None
    options = {"scale": 0.3, "blocks": random_blocks(90, 40, KV_HEADS), "block_size": SIZE, "sinks": sinks}
    output, lse = attend(*tensors, **options)
    expected, expected_lse = block_sparse_attention_reference(*(x.float() for x in tensors), **options)
    assert output.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(output.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, expected_lse, rtol=TOLERANCE[dtype] / 4, atol=TOLERANCE[dtype] / 4)


@pytest.mark.parametrize(("rows", "past"), [(64, 48), (70, 40)], ids=str)
@pytest.mark.parametrize("others", [{}, {"columns": [18, 40]}, {"diagonals": [0, 100]}, {"distances": [3]}], ids=str)
def test_what_nobody_lists_is_not_read(rows, past, others):
    """NaN there reaches nothing."""
    query, key, value = inputs(rows, past, 1)
    lists = {name: torch.tensor(numbers).expand(BATCH, KV_HEADS, -1) for name, numbers in others.items()}
    lists["blocks"] = random_blocks(rows, past, KV_HEADS, share=0.05 if others else 0.15)
    options = {"scale": 0.3, "block_size": SIZE, **lists}
    expected = attend(query, key, value, **options)
    read = listed_keys(rows, past + rows, KV_HEADS, block_size=SIZE, **lists).any(2)
    assert not read.all()
    key, value = (x.masked_fill(~read[..., None], float("nan")) for x in (key, value))
    for found, before in zip(attend(query, key, value, **options), expected, strict=True):
        assert torch.equal(found, before)


def test_nothing_listed():
    """A row that lists nothing reads itself."""
    query, key, value = inputs(40, 8, 1)
    output, lse = attend(query, key, value, scale=0.3, blocks=torch.full((BATCH, KV_HEADS, 3, 2), -1), block_size=SIZE)
    torch.testing.assert_close(output, value[:, :, 8:])
    torch.testing.assert_close(lse, (query * key[:, :, 8:]).sum(-1) * 0.3)


def test_strides():
    """K and V that are the front of a larger buffer, a transposed query."""
    query, key, value = inputs(70, 30, 3)
    options = {"scale": 0.3, "blocks": random_blocks(70, 30, KV_HEADS), "block_size": SIZE}
    expected = attend(query, key, value, **options)
    key, value = (torch.cat((x, torch.full_like(x, float("nan"))), dim=2)[:, :, : x.shape[2]] for x in (key, value))
    view = query.transpose(1, 2).contiguous().transpose(1, 2)
    for found, before in zip(attend(view, key, value, **options), expected, strict=True):
        torch.testing.assert_close(found, before)
