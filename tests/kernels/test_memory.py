"""No kernel makes a rows x entries matrix: the largest tensor that each operation returns, by its bytes."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kvpress
from kvpress.kernels import antidiagonal_mass as antidiagonal_module
from kvpress.kernels import attention_mass as mass_module
from kvpress.kernels import block_lists
from kvpress.kernels import nearest_centre as centre_module
from kvpress.kernels import placed_attention as placed_module
from kvpress.kernels import prompt_attention as prompt_module
from kvpress.kernels import skip_attention as skip_module
from kvpress.kernels import vertical_slash_mass as slash_module
from kvpress.kernels.attention_mass import attention_mass
from kvpress.kernels.block_means import block_means
from kvpress.kernels.block_sparse_attention import block_sparse_attention
from kvpress.kernels.block_sparse_mass import block_sparse_mass
from kvpress.kernels.decode_attention import decode_attention
from kvpress.kernels.gumbel_noise import gumbel_noise
from kvpress.kernels.nearest_centre import nearest_centre
from kvpress.kernels.placed_attention import placed_attention
from kvpress.kernels.prompt_attention import prompt_attention, prompt_attention_reference
from support.kernel_calls import HEAD_DIM, HEADS, KV_HEADS, LINEAR, Largest, own_and_half_way, places, qkv


def fake_qkv(rows, entries, dtype=torch.float32):
    """Tensors of these shapes without numbers: the operations run through, and compute nothing."""
    return tuple(
        torch.empty(1, h, n, HEAD_DIM, dtype=dtype)
        for h, n in ((HEADS, rows), (KV_HEADS, entries), (KV_HEADS, entries))
    )


def test_the_recorder_sees_a_full_matrix():
    """Control: the reference, which has the matrix, is caught."""
    with FakeTensorMode(), Largest() as largest:
        prompt_attention_reference(*fake_qkv(512, 512), scale=0.1)
    assert largest.numbers >= HEADS * 512 * 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("past", [0, 4096], ids=["prompt", "chunk"])
@pytest.mark.parametrize("with_mass", [False, True], ids=["output", "mass"])
@pytest.mark.parametrize("tokens", [4096, 6000], ids="{}-tokens".format)
def test_prompt_attention(tokens, past, with_mass, dtype):
    """Nothing larger than two tiles, or than a float32 copy of K or of the query."""
    copies = max(HEADS * tokens, KV_HEADS * (past + tokens)) * HEAD_DIM
    with FakeTensorMode():
        tensors = fake_qkv(tokens, past + tokens, dtype)
        valid = torch.ones(1, KV_HEADS, past, dtype=torch.bool) if past else None
        with Largest() as largest:
            prompt_attention(*tensors, valid, scale=0.125, with_mass=with_mass)
    assert 0 < largest.numbers <= max(2 * prompt_module.TILE_SCORES, copies), largest.operation
    assert largest.numbers < tokens * tokens * HEADS / 4 / 2, largest.operation


@pytest.mark.parametrize("with_mass", [False, True], ids=["output", "mass"])
@pytest.mark.parametrize("past", [0, 100], ids=["prompt", "chunk"])
def test_prompt_attention_with_numbers(past, with_mass, monkeypatch):
    """The same on real tensors, with small tiles."""
    monkeypatch.setattr(prompt_module, "TILE_SCORES", 1 << 17)
    tensors = qkv(768, 768 + past)
    with Largest() as largest:
        prompt_attention(*tensors, scale=0.125, with_mass=with_mass)
    copies = HEADS * (768 + past) * HEAD_DIM
    assert 0 < largest.numbers <= max(2 * prompt_module.TILE_SCORES, copies), largest.operation
    assert largest.numbers < 768 * 768 * HEADS / 4, largest.operation


@pytest.mark.parametrize("tokens", [4096, 131072], ids="{}-tokens".format)
def test_attention_mass_of_a_window(tokens):
    """SnapKV's 32 rows over a prompt: nothing larger than two tiles, or than a float32 copy of the keys."""
    with FakeTensorMode():
        query, key, _ = fake_qkv(32, tokens, torch.bfloat16)
        positions = torch.zeros(1, KV_HEADS, tokens, dtype=torch.int32)
        rows = torch.zeros(1, 32, dtype=torch.int32)
        with Largest() as largest:
            attention_mass(query, rows, key, positions, scale=0.125)
    assert 0 < largest.numbers <= max(2 * mass_module.TILE_SCORES, key.numel()), largest.operation


@pytest.mark.parametrize("with_mass", [False, True], ids=["output", "mass"])
def test_decode_attention_repeats_no_keys(with_mass):
    """A step holds one float32 copy of the keys at most, never K or V repeated to the query heads."""
    with FakeTensorMode():
        query, key, value = fake_qkv(1, 4096)
        with Largest() as largest:
            decode_attention(query, key, value, scale=0.125, with_mass=with_mass)
    assert largest.numbers <= key.numel(), largest.operation


@pytest.mark.parametrize("tokens", [1024, 2048], ids="{}-tokens".format)
def test_block_sparse_attention(tokens):
    """No more than a tile of copies: far less than rows by entries."""
    query, key, value = qkv(tokens, tokens)
    blocks = torch.arange(4).expand(1, KV_HEADS, tokens // 64, 4)
    columns = torch.arange(512, 544).expand(1, KV_HEADS, 32)
    with Largest() as largest:
        block_sparse_attention(query, key, value, scale=0.125, blocks=blocks, columns=columns)
    limit = max(query.numel(), block_lists.TILE_NUMBERS)
    assert 0 < largest.numbers <= limit < tokens * tokens * HEADS / 7, largest.operation


def nearest(key, value):
    """A fixed number of centres."""
    slots = torch.arange(key.shape[2]).expand(1, KV_HEADS, -1)
    return nearest_centre(key, value, slots[..., :16], torch.ones(1, KV_HEADS, 16, dtype=torch.bool), slots[..., 16:])


LINEAR_ON_TORCH = {
    "nearest_centre": lambda q, k, v: nearest(k, v),
    "block_sparse_mass": lambda q, k, v: block_sparse_mass(
        q, k, q[..., 0], scale=0.1, blocks=own_and_half_way(q, 16), block_size=16
    ),
    "placed_attention": lambda q, k, v: placed_attention(q, k, v, places(q)[0], places(q)[0], scale=0.1),
    "prompt_attention": lambda q, k, v: prompt_attention(q, k, v, scale=0.1, with_mass=True),
    "block_means": lambda q, k, v: block_means(k, 0, 16),
    "gumbel_noise": lambda q, k, v: gumbel_noise(1, 0, places(q)[:, :1], k[..., 0].long(), HEADS),
}


def grows(call, monkeypatch, sizes=(128, 512), tile=1 << 10):
    """The largest tensor at four times the entries over that at one, tiles small."""
    modules = (antidiagonal_module, mass_module, placed_module, prompt_module, skip_module, slash_module)
    for module in modules:
        monkeypatch.setattr(module, "TILE_SCORES", tile)
    monkeypatch.setattr(block_lists, "TILE_NUMBERS", tile)
    monkeypatch.setattr(block_lists, "TILE_MARKS", tile)
    monkeypatch.setattr(centre_module, "TILE_SIMILARITIES", tile)
    numbers = []
    for entries in sizes:
        tensors = qkv(entries, entries)
        with Largest() as largest:
            call(*tensors)
        numbers.append(largest.numbers)
    return numbers[1] / numbers[0]


def test_a_square_grows_sixteenfold(monkeypatch):
    """Control."""
    assert grows(lambda q, k, v: prompt_attention_reference(q, k, v, scale=0.1), monkeypatch) > 15


@pytest.mark.parametrize("name", [*LINEAR, *LINEAR_ON_TORCH])
def test_memory_grows_with_the_entries(name, monkeypatch):
    """The torch paths: four times the entries, about four times the memory."""
    run = LINEAR_ON_TORCH.get(name) or (lambda q, k, v: LINEAR[name](q, k, v, "torch"))
    assert grows(run, monkeypatch) < 4.5


def test_every_kernel_is_covered():
    """A new file in kernels/ has a case here."""
    files = {file.stem for folder in kvpress.__path__ for file in Path(folder).glob("kernels/*.py")}
    helpers = {"backend", "block_lists", "exponentials", "launch_shapes"}
    assert files - helpers == {name.partition("-")[0] for name in (*LINEAR, *LINEAR_ON_TORCH)}
