"""Triton kernel of `kvpress.kernels.soft_vote`: each head's softmax weight of a key, summed over the heads.

K is read once, by the kernel of `decode_scores`, which leaves the scores and each head's LSE. The scores, one number per query
head, are a small part of the keys' size, so reading them again is cheaper than K.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.gpu.decode_scores import decode_scores
from kvpress.kernels.gpu.launch import cdiv, launch

BLOCK_H, BLOCK_N = 8, 256
NUM_WARPS = 4


@triton.jit(do_not_specialize=["count", "heads"])
def vote_kernel(p_scores, p_lse, p_votes, count, heads, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of keys of one sequence: the sum over heads of exp(score - LSE).

    p_scores [batch, heads, count] with -inf where there is no vote, p_lse [batch, heads], p_votes [batch, count].
    """
    i_batch = tl.program_id(1).to(tl.int64)
    # [BLOCK_N]
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < count
    b_votes = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, heads, BLOCK_H):
        # [BLOCK_H]
        o_h = start + tl.arange(0, BLOCK_H)
        m_h = o_h < heads
        b_lse = tl.load(p_lse + i_batch * heads + o_h, mask=m_h, other=0.0)
        b_shift = tl.where(b_lse == float("-inf"), 0.0, b_lse)  # a sequence without candidates has scores of -inf only
        # [BLOCK_H, BLOCK_N]
        p_tile = p_scores + (i_batch * heads + o_h)[:, None] * count + o_n[None, :]
        b_scores = tl.load(p_tile, mask=m_h[:, None] & m_n[None, :], other=float("-inf"))
        b_votes += tl.sum(tl.exp(b_scores - b_shift[:, None]), axis=0)
    tl.store(p_votes + i_batch * count + o_n, b_votes, mask=m_n)


def soft_vote(query: Tensor, key: Tensor, candidates: Tensor | None, *, scale: float) -> Tensor:
    """As `kvpress.kernels.soft_vote.soft_vote`, of one row: [batch, heads, 1, head_dim]."""
    batch, heads, _, _ = query.shape
    count = key.shape[2]
    votes = query.new_empty(batch, count, dtype=torch.float32)
    if not votes.numel():
        return votes
    scores, lse = decode_scores(query, key, scale=scale, mask=candidates, with_lse=True)
    launch(
        vote_kernel,
        (cdiv(count, BLOCK_N), batch),
        scores,
        lse,
        votes,
        count,
        heads,
        BLOCK_H=BLOCK_H,
        BLOCK_N=BLOCK_N,
        num_warps=NUM_WARPS,
    )
    return votes
