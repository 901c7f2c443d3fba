"""rope_shift against rotating at the target position directly, on both paths."""

import pytest
import torch
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_halves

from kvpress.kernels.rope_shift import rope_shift
from support.backends import BACKENDS, BACKENDS_AND_DTYPES, on

BATCH, HEADS, TOKENS = 2, 3, 7
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
PARTIAL = pytest.mark.parametrize(
    ("head_dim", "rotary_dim"),
    [(16, 16), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (64, 16), (80, 32), (128, 96)],
    ids=str,
)


def frequencies(rotary_dim):
    return 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


def vectors(head_dim, dtype=torch.float32, seed=0, tokens=TOKENS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, HEADS, tokens, head_dim, generator=generator).to(dtype)


def places(shape, high=100, seed=1):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def rotate(x, positions, inv_freq, interleaved):
    """Each pair of channels as one complex number, turned in float64; channels past the rotary ones stay."""
    half, x = inv_freq.shape[-1], x.double()
    turn = torch.exp(1j * positions.double()[..., None] * inv_freq.double())
    pairs = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    turned = torch.complex(x[..., pairs[0]], x[..., pairs[1]]) * turn
    result = x.clone()
    result[..., pairs[0]], result[..., pairs[1]] = turned.real, turned.imag
    return result


def shifted(backend, x, shift, inv_freq, interleaved):
    """What the backend's kernel makes of tensors on the CPU, there."""
    return rope_shift(*on(backend, x, shift, inv_freq), interleaved, backend=backend).cpu()


@BACKENDS
@LAYOUTS
@PARTIAL
def test_moving_equals_rotating_there(backend, head_dim, rotary_dim, interleaved):
    """A vector rotated at a and moved by b - a is the vector rotated at b, whether b is before or after a."""
    x, inv_freq = vectors(head_dim), frequencies(rotary_dim)
    start, end = places((BATCH, HEADS, TOKENS)), places((BATCH, HEADS, TOKENS), seed=2)
    assert (end < start).any() and (end > start).any()
    moved = shifted(backend, rotate(x, start, inv_freq, interleaved).float(), end - start, inv_freq, interleaved)
    torch.testing.assert_close(moved, rotate(x, end, inv_freq, interleaved).float(), rtol=1e-4, atol=2e-5)


@BACKENDS_AND_DTYPES
@LAYOUTS
@PARTIAL
def test_rounds_once(backend, head_dim, rotary_dim, interleaved, dtype):
    """The angle and the rotation are float32, the result is that rounded; channels past the rotary ones stay to the bit."""
    x, inv_freq, shift = vectors(head_dim, dtype), frequencies(rotary_dim), places((BATCH, HEADS, TOKENS), 4000) - 2000
    angle = shift.float()[..., None] * inv_freq
    moved = shifted(backend, x, shift, inv_freq, interleaved)
    expected = rotate(x, torch.ones_like(shift), angle, interleaved)
    assert moved.dtype == dtype and moved.is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(moved.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(moved[..., rotary_dim:], x[..., rotary_dim:])
    assert (moved[..., :rotary_dim] != x[..., :rotary_dim]).any()


@BACKENDS
@LAYOUTS
@pytest.mark.parametrize("tokens", [1, 63, 111], ids="{}-tokens".format)
def test_shapes_of_the_shift(backend, tokens, interleaved):
    """One per sequence, one per token, one per head and token; a strided x."""
    x, shift, inv_freq = vectors(64, tokens=tokens), places((BATCH, HEADS, tokens)) - 50, frequencies(32)
    behind = torch.full((BATCH, tokens + 3, HEADS, 64), float("nan"))
    behind[:, :tokens] = x.transpose(1, 2)
    view = on(backend, behind)[0][:, :tokens].transpose(1, 2)
    for shifts in (shift[:, 0, 0], shift[:, :1], shift, shift[:1, :1]):
        moved = rope_shift(view, *on(backend, shifts, inv_freq), interleaved, backend=backend).cpu()
        whole = (shifts[:, None, None] if shifts.dim() == 1 else shifts).expand(BATCH, HEADS, tokens)
        torch.testing.assert_close(moved, rotate(x, whole, inv_freq, interleaved).float(), rtol=1e-5, atol=1e-5)


@BACKENDS
@LAYOUTS
def test_far_positions(backend, interleaved):
    """Angles of a million radians are as exact as their float32 product: cos and sin reduce them properly."""
    x, inv_freq, shift = vectors(16, tokens=3), frequencies(16), torch.tensor([1_000_001, -999_999])
    angle = (shift.float()[:, None] * inv_freq)[:, None, None]
    moved = shifted(backend, x, shift, inv_freq, interleaved)
    expected = rotate(x, torch.ones(BATCH, 1, 1), angle, interleaved)
    torch.testing.assert_close(moved.double(), expected, rtol=1e-5, atol=1e-5)


@BACKENDS_AND_DTYPES
@LAYOUTS
def test_zero_shift_is_the_identity(backend, dtype, interleaved):
    """Not a bit changes, and the result is a new tensor."""
    x, shift, inv_freq = on(backend, vectors(64, dtype), torch.zeros(BATCH), frequencies(64))
    moved = rope_shift(x, shift, inv_freq, interleaved, backend=backend)
    assert moved.dtype == dtype and torch.equal(moved, x) and moved.data_ptr() != x.data_ptr()


@BACKENDS
@LAYOUTS
@PARTIAL
def test_inverse(backend, head_dim, rotary_dim, interleaved):
    """There and back again."""
    x, inv_freq, shift = vectors(head_dim), frequencies(rotary_dim), places((BATCH, HEADS, TOKENS))
    back = shifted(backend, shifted(backend, x, shift, inv_freq, interleaved), -shift, inv_freq, interleaved)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


@BACKENDS
@LAYOUTS
def test_scores_depend_on_the_distance_only(backend, interleaved):
    """Moving query and key by the same amount leaves their dot product; moving one does not."""
    query, key, inv_freq = vectors(16), vectors(16, seed=3), frequencies(16)
    shift = torch.tensor([11.0, -4.0])
    moved = shifted(backend, query, shift, inv_freq, interleaved)
    both = (moved * shifted(backend, key, shift, inv_freq, interleaved)).sum(-1)
    torch.testing.assert_close(both, (query * key).sum(-1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose((moved * key).sum(-1), (query * key).sum(-1), atol=1e-2)


@BACKENDS
def test_no_tokens(backend):
    x, shift, inv_freq = on(backend, vectors(64, tokens=0), torch.zeros(BATCH, HEADS, 0), frequencies(64))
    assert rope_shift(x, shift, inv_freq, backend=backend).shape == (BATCH, HEADS, 0, 64)


@BACKENDS
@pytest.mark.parametrize("interleaved", [False, True], ids=["llama", "glm"])
def test_against_transformers(backend, interleaved):
    """A key that the model's own code rotated at a, with YaRN's constant, moves to what it gives at b."""
    x, inv_freq, constant = vectors(16), frequencies(16), 1.2
    apply = rotate_interleaved if interleaved else rotate_halves

    def at(positions):
        angle = positions[:, :, None].float() * inv_freq
        both = torch.cat((angle, angle), dim=-1)
        return apply(x, x, both.cos() * constant, both.sin() * constant)[1]

    start, end = places((BATCH, TOKENS)), places((BATCH, TOKENS), seed=2)
    shift = (end - start)[:, None].expand(BATCH, HEADS, TOKENS)
    torch.testing.assert_close(shifted(backend, at(start), shift, inv_freq, interleaved), at(end), rtol=1e-4, atol=2e-5)
