"""Triton kernel of `kvpress.kernels.rope_shift`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.gpu.launch import cdiv, launch, power_of_two

NUM_WARPS = 4
TILE = 2048  # channel pairs per program


def blocks(half: int, rest: int) -> tuple[int, int, int]:
    """Tokens per program, channel pairs and channels that pass through, each padded to a power of two."""
    block_h = power_of_two(max(1, half))
    return max(1, min(64, TILE // block_h)), block_h, power_of_two(max(1, rest))


# The number of tokens changes in decode and is never compiled in, nor are strides that change with it; those of x are multiples
# of the head dimension, which has to be known for wide loads.
@triton.jit(do_not_specialize=["tokens", "heads", "stride_sb", "stride_sh", "stride_st"])
def rope_kernel(
    p_x,
    p_shift,
    p_inv_freq,
    p_output,
    tokens,
    heads,
    stride_xb,
    stride_xh,
    stride_xt,
    stride_sb,
    stride_sh,
    stride_st,
    INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """A tile of tokens of one head: HALF pairs of channels are turned by shift * inv_freq, the rest is copied."""
    i_row = tl.program_id(1).to(tl.int64)
    i_batch, i_head = i_row // heads, i_row % heads
    # [BLOCK_T], [BLOCK_H]
    o_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    o_h = tl.arange(0, BLOCK_H)
    m_t, m_h = o_t < tokens, o_h < HALF
    b_shift = tl.load(p_shift + i_batch * stride_sb + i_head * stride_sh + o_t * stride_st, mask=m_t, other=0.0)
    b_angle = b_shift[:, None] * tl.load(p_inv_freq + o_h, mask=m_h, other=0.0)[None, :]
    # [BLOCK_T, BLOCK_H]
    b_cos, b_sin = tl.cos(b_angle), tl.sin(b_angle)
    if INTERLEAVED:
        o_first = 2 * o_h
        o_second = o_first + 1
    else:
        o_first = o_h
        o_second = o_h + HALF
    p_in = p_x + i_batch * stride_xb + i_head * stride_xh + o_t[:, None] * stride_xt
    p_out = p_output + (i_row * tokens + o_t)[:, None] * HEAD_DIM
    m_tile = m_t[:, None] & m_h[None, :]
    b_first = tl.load(p_in + o_first[None, :], mask=m_tile, other=0.0).to(tl.float32)
    b_second = tl.load(p_in + o_second[None, :], mask=m_tile, other=0.0).to(tl.float32)
    b_moved = b_first * b_cos - b_second * b_sin
    tl.store(p_out + o_first[None, :], b_moved.to(p_output.dtype.element_ty), mask=m_tile)
    b_moved = b_second * b_cos + b_first * b_sin
    tl.store(p_out + o_second[None, :], b_moved.to(p_output.dtype.element_ty), mask=m_tile)
    if 2 * HALF < HEAD_DIM:
        # [BLOCK_T, BLOCK_REST]
        o_d = 2 * HALF + tl.arange(0, BLOCK_REST)
        m_rest = m_t[:, None] & (o_d < HEAD_DIM)[None, :]
        tl.store(p_out + o_d[None, :], tl.load(p_in + o_d[None, :], mask=m_rest), mask=m_rest)


def rope_shift(x: Tensor, shift: Tensor, inv_freq: Tensor, interleaved: bool) -> Tensor:
    """As `kvpress.kernels.rope_shift.rope_shift`, with `shift` float32 [batch, heads, tokens], perhaps expanded."""
    batch, heads, tokens, head_dim = x.shape
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not output.numel():
        return output
    x = x if x.stride(-1) == 1 else x.contiguous()
    half = inv_freq.shape[0]
    block_t, block_h, block_rest = blocks(half, head_dim - 2 * half)
    launch(
        rope_kernel,
        (cdiv(tokens, block_t), batch * heads),
        x,
        shift,
        inv_freq.contiguous(),
        output,
        tokens,
        heads,
        *x.stride()[:3],
        *shift.stride(),
        INTERLEAVED=interleaved,
        HALF=half,
        HEAD_DIM=head_dim,
        BLOCK_T=block_t,
        BLOCK_H=block_h,
        BLOCK_REST=block_rest,
        num_warps=NUM_WARPS,
    )
    return output
