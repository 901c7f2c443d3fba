"""The Triton kernel of rope_shift against the torch path and float64."""

import pytest
import torch

from kvpress.kernels.rope_shift import rope_shift
from support.accelerator import DEVICE, DTYPES

BATCH, HEADS = 2, 3
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
DIMS = pytest.mark.parametrize(
    ("head_dim", "rotary_dim"),
    [(16, 16), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (64, 16), (80, 32), (128, 96)],
    ids=lambda d: str(d),
)


def inputs(tokens, head_dim, rotary_dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, HEADS, tokens, head_dim, generator=generator).to(DEVICE, dtype)
    shift = torch.randint(-2000, 2000, (BATCH, HEADS, tokens), generator=generator).to(DEVICE)
    inv_freq = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    return x, shift, inv_freq.to(DEVICE)


@LAYOUTS
@DIMS
@DTYPES
def test_equals_torch(head_dim, rotary_dim, interleaved, dtype):
    """Whole and partial rotary; the rest passes through to the bit."""
    x, shift, inv_freq = inputs(7, head_dim, rotary_dim, dtype)
    moved = rope_shift(x, shift, inv_freq, interleaved, backend="triton")
    expected = rope_shift(x, shift, inv_freq, interleaved, backend="torch")
    assert moved.dtype == dtype and moved.is_contiguous()
    tolerance = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(moved, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(moved[..., rotary_dim:], x[..., rotary_dim:])


@LAYOUTS
@pytest.mark.parametrize("tokens", [1, 63, 111], ids="{}-tokens".format)
def test_shapes_of_the_shift(tokens, interleaved):
    """One per sequence, one per token, one per head and token; a strided x."""
    x, shift, inv_freq = inputs(tokens, 64, 32)
    view = torch.full((BATCH, tokens + 3, HEADS, 64), float("nan"), device=DEVICE)
    view[:, :tokens] = x.transpose(1, 2)
    for shifts in (shift[:, 0, 0], shift[:, :1], shift, shift[:1, :1]):
        moved = rope_shift(view[:, :tokens].transpose(1, 2), shifts, inv_freq, interleaved, backend="triton")
        expected = rope_shift(x, shifts, inv_freq, interleaved, backend="torch")
        torch.testing.assert_close(moved, expected, rtol=2e-6, atol=2e-6)


@LAYOUTS
def test_far_positions(interleaved):
    """Angles of a million radians are as exact as their float32 product: cos and sin reduce them properly."""
    x, _, inv_freq = inputs(3, 16, 16)
    shift = torch.tensor([1_000_001, -999_999], device=DEVICE)
    angle = (shift.float()[:, None] * inv_freq).double()[:, None, None]
    pairs = x.double().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    first, second = (pairs[..., 0], pairs[..., 1]) if interleaved else (pairs[..., 0, :], pairs[..., 1, :])
    parts = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
    expected = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    moved = rope_shift(x, shift, inv_freq, interleaved, backend="triton")
    torch.testing.assert_close(moved.double(), expected, rtol=1e-5, atol=1e-5)


@LAYOUTS
@DTYPES
def test_zero_shift_is_the_identity(dtype, interleaved):
    """Not a bit changes, and the result is a new tensor."""
    x, _, inv_freq = inputs(7, 64, 64, dtype)
    moved = rope_shift(x, torch.zeros(BATCH, device=DEVICE), inv_freq, interleaved, backend="triton")
    assert torch.equal(moved, x) and moved.data_ptr() != x.data_ptr()


def test_no_tokens():
    """Nothing to turn is no launch."""
    x, shift, inv_freq = inputs(0, 64, 64)
    assert rope_shift(x, shift, inv_freq, backend="triton").shape == (BATCH, HEADS, 0, 64)
