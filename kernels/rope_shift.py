"""Move rotary-encoded vectors to other positions.

Rotations add up: R(a) R(b) x = R(a + b) x, so a query or key that was rotated at position p is moved to p + shift by
rotating it once more, by the shift. A constant that a model multiplies into cos and sin (YaRN) is already in the vector
and is not applied again.
"""

import torch
from torch import Tensor

from kvpress.kernels.backend import Backend, use_triton


def rope_shift(
    x: Tensor, shift: Tensor, inv_freq: Tensor, interleaved: bool = False, *, backend: Backend = "auto"
) -> Tensor:
    """Rotate `x` by `shift` positions.

    Args:
        x: [batch, heads, tokens, head_dim], any floating dtype. Only the first `2 * len(inv_freq)` channels are rotary;
            the rest passes through (partial rotary).
        shift: [batch], or what broadcasts to [batch, heads, tokens], in positions; negative moves towards the start.
        inv_freq: [rotary_dim / 2], the model's own inverse frequencies.
        interleaved: channel pairs are (0, 1), (2, 3), ... instead of the two halves.
        backend: "triton" and "auto" on CUDA run the Triton kernel.

    Returns:
        A new tensor of the shape and dtype of `x`, computed in float32; `x` itself if there are no frequencies.

    Raises:
        ValueError: the backend does not exist, or cannot run here.
    """
    if not inv_freq.numel():
        return x
    if shift.ndim == 1:
        shift = shift[:, None, None]
    shift, inv_freq = (numbers.to(x.device, torch.float32) for numbers in (shift, inv_freq))
    if use_triton(backend, x):
        from kvpress.kernels.gpu import rope_shift as gpu

        return gpu.rope_shift(x, shift.expand(x.shape[:3]), inv_freq, interleaved)
    angle = shift[..., None] * inv_freq
    cos, sin = angle.cos(), angle.sin()
    half = inv_freq.shape[0]
    moved = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        new_first, new_second = moved[..., 0 : 2 * half : 2], moved[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
        new_first, new_second = moved[..., :half], moved[..., half : 2 * half]
    _product(first, cos, new_first).sub_(second * sin)
    _product(second, cos, new_second).add_(first * sin)
    if 2 * half < x.shape[-1]:
        moved[..., 2 * half :] = x[..., 2 * half :]
    return moved.to(x.dtype)


def _product(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """x * y, written into `out`, which may be strided; in a compiled graph without the argument that it cannot have."""
    return out.copy_(x * y) if torch.compiler.is_compiling() else torch.mul(x, y, out=out)
