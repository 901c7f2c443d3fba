"""rope_shift against rotating at the target position directly."""

import pytest
import torch
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_halves

from kvpress.kernels.rope_shift import rope_shift

BATCH, HEADS, TOKENS = 2, 3, 7
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
PARTIAL = pytest.mark.parametrize(
    ("head_dim", "rotary_dim"),
    [(16, 16), (80, 80), (64, 16), (80, 32)],
    ids=["16", "80", "16-of-64", "32-of-80"],
)


def frequencies(rotary_dim):
    return 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


def vectors(head_dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, HEADS, TOKENS, head_dim, generator=generator).to(dtype)


def places(shape, high=100, seed=1):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def rotate(x, positions, inv_freq, interleaved):
    """Each pair of channels as one complex number, turned in float64; channels past the rotary ones stay."""
    half, x = len(inv_freq), x.double()
    turn = torch.exp(1j * positions.double()[..., None] * inv_freq.double())
    pairs = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    turned = torch.complex(x[..., pairs[0]], x[..., pairs[1]]) * turn
    result = x.clone()
    result[..., pairs[0]], result[..., pairs[1]] = turned.real, turned.imag
    return result


@LAYOUTS
@PARTIAL
def test_moving_equals_rotating_there(head_dim, rotary_dim, interleaved):
    """A vector rotated at a and moved by b - a is the vector rotated at b, whether b is before or after a."""
    x, inv_freq = vectors(head_dim), frequencies(rotary_dim)
    start, end = places((BATCH, HEADS, TOKENS)), places((BATCH, HEADS, TOKENS), seed=2)
    assert (end < start).any() and (end > start).any()
    moved = rope_shift(rotate(x, start, inv_freq, interleaved).float(), end - start, inv_freq, interleaved)
    torch.testing.assert_close(moved, rotate(x, end, inv_freq, interleaved).float(), rtol=1e-4, atol=2e-5)


@LAYOUTS
@PARTIAL
def test_one_shift_per_sequence(head_dim, rotary_dim, interleaved):
    """A shift of shape [batch] is that shift for every head and token."""
    x, inv_freq, shift = vectors(head_dim), frequencies(rotary_dim), torch.tensor([-5.0, 12.0])
    everywhere = shift[:, None, None].expand(BATCH, HEADS, TOKENS)
    moved = rope_shift(x, shift, inv_freq, interleaved)
    torch.testing.assert_close(moved, rotate(x, everywhere, inv_freq, interleaved).float())
    assert torch.equal(moved, rope_shift(x, everywhere, inv_freq, interleaved))


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_zero_shift_is_the_identity(dtype, interleaved):
    """Not a bit changes, and the result is a new tensor."""
    x = vectors(16, dtype)
    moved = rope_shift(x, torch.zeros(BATCH), frequencies(16), interleaved)
    assert moved.dtype == dtype and torch.equal(moved, x) and moved.data_ptr() != x.data_ptr()


@LAYOUTS
@PARTIAL
def test_inverse(head_dim, rotary_dim, interleaved):
    """There and back again."""
    x, inv_freq, shift = vectors(head_dim), frequencies(rotary_dim), places((BATCH, HEADS, TOKENS))
    back = rope_shift(rope_shift(x, shift, inv_freq, interleaved), -shift, inv_freq, interleaved)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


@LAYOUTS
def test_channels_past_the_rotary_ones_pass_through(interleaved):
    """Partial rotary: the rest is the same to the bit."""
    x = vectors(64, torch.bfloat16)
    moved = rope_shift(x, torch.tensor([3.0, -9.0]), frequencies(16), interleaved)
    assert torch.equal(moved[..., 16:], x[..., 16:])
    assert (moved[..., :16] != x[..., :16]).any()


@LAYOUTS
def test_scores_depend_on_the_distance_only(interleaved):
    """Moving query and key by the same amount leaves their dot product; moving one does not."""
    query, key, inv_freq = vectors(16), vectors(16, seed=3), frequencies(16)
    shift = torch.tensor([11.0, -4.0])
    moved = rope_shift(query, shift, inv_freq, interleaved)
    both = (moved * rope_shift(key, shift, inv_freq, interleaved)).sum(-1)
    torch.testing.assert_close(both, (query * key).sum(-1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose((moved * key).sum(-1), (query * key).sum(-1), atol=1e-2)


@pytest.mark.parametrize("interleaved", [False, True], ids=["llama", "glm"])
def test_against_transformers(interleaved):
    """A key that the model's own code rotated at a, with YaRN's constant, moves to what it gives at b."""
    x, inv_freq, constant = vectors(16), frequencies(16), 1.2
    apply = rotate_interleaved if interleaved else rotate_halves

    def at(positions):
        angle = positions[:, :, None].float() * inv_freq
        both = torch.cat((angle, angle), dim=-1)
        return apply(x, x, both.cos() * constant, both.sin() * constant)[1]

    start, end = places((BATCH, TOKENS)), places((BATCH, TOKENS), seed=2)
    shift = (end - start)[:, None].expand(BATCH, HEADS, TOKENS)
    torch.testing.assert_close(rope_shift(at(start), shift, inv_freq, interleaved), at(end), rtol=1e-4, atol=2e-5)


@LAYOUTS
def test_half_precision_rounds_once(interleaved):
    """The angle and the rotation are float32: a bfloat16 result is the exact one, rounded."""
    x, inv_freq = vectors(16, torch.bfloat16), frequencies(16)
    shift = torch.tensor([1001.0, -999.0])
    exact = rotate(x, shift[:, None, None].expand(BATCH, HEADS, TOKENS), inv_freq, interleaved)
    moved = rope_shift(x, shift, inv_freq, interleaved)
    assert moved.dtype == torch.bfloat16
    torch.testing.assert_close(moved.double(), exact, rtol=2**-8, atol=1e-3)
