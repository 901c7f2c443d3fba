"""Soft vote of all heads on the keys of a layer: each head has one vote and spreads it by a softmax (TokenSelect)."""

import torch
from einops import repeat
from torch import Tensor

from kvpress.kernels.backend import Backend, use_triton
from kvpress.kernels.decode_scores import decode_scores


def soft_vote_reference(query: Tensor, key: Tensor, candidates: Tensor | None = None, *, scale: float) -> Tensor:
    """The definition of `soft_vote`, in plain float32 with K repeated to the query heads."""
    mean = query.float().mean(dim=2, keepdim=True)
    keys = repeat(key.float(), "b h n d -> b (h g) n d", g=query.shape[1] // key.shape[1])
    scores = (mean @ keys.transpose(-1, -2) * scale)[:, :, 0]
    if candidates is not None:
        scores = scores.masked_fill(~candidates[:, None], float("-inf"))
    return scores.softmax(dim=-1).nan_to_num().sum(dim=1)


def soft_vote(
    query: Tensor, key: Tensor, candidates: Tensor | None = None, *, scale: float, backend: Backend = "auto"
) -> Tensor:
    """votes[j] = sum over heads h of softmax_j(scale * mean over rows of q_h . k_j).

    Reads K once per kv head. Temporary memory is a few float32 numbers per head and key, whatever the number of rows.

    Args:
        query: [batch, heads, rows, head_dim]; head h votes on the keys of kv head h // (heads / kv_heads).
        key: [batch, kv_heads, n, head_dim]; only the n dimension may be strided.
        candidates: bool [batch, n], the keys that are voted on; None for all.
        scale: factor on q.k.
        backend: "triton" and "auto" on CUDA run the Triton kernels: one float32 number per head and key, in two passes.

    Returns:
        float32 [batch, n], 0 where there is no candidate; sums to the number of heads.

    Raises:
        ValueError: the backend does not exist, or cannot run here.
    """
    mean = query if query.shape[2] == 1 else query.mean(dim=2, keepdim=True, dtype=torch.float32)
    if use_triton(backend, query) and query.dtype != torch.float64:
        from kvpress.kernels.gpu import soft_vote as gpu

        return gpu.soft_vote(mean, key, candidates, scale=scale)
    scores = decode_scores(mean, key, scale=scale, backend="torch")
    if candidates is not None:
        # The lowest finite number instead of -inf: without any candidate the result is zeros, not NaN.
        scores = scores.masked_fill_(~candidates[:, None], torch.finfo(torch.float32).min)
    votes = scores.softmax(dim=-1).sum(dim=1)
    return votes if candidates is None else votes.masked_fill_(~candidates, 0.0)
