"""Causal attention of a prompt pass that skips tiles of entries whose weights are negligible (skip-softmax, BLASST).

Rows and entries are cut into tiles. A tile of rows walks over the tiles of entries from the first one on, and knows of each row the
largest score so far. A tile in which no row has a score near its largest one is skipped: no exponentials, no values, no
product with them. The scores themselves are always computed.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from kvpress.kernels.backend import Backend, use_triton
from kvpress.kernels.exponentials import exp_, softmax_
from kvpress.kernels.prompt_attention import prompt_attention

# Scores of one tile of rows, in float32 numbers (16 MiB).
TILE_SCORES = 1 << 22


def skip_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    skip: float,
    tile: int = 128,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `skip_attention`, one tile after the other in plain float32."""
    heads, rows, n = query.shape[1], query.shape[2], key.shape[2]
    keys, values = (x.float().repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    outputs, lses, counts = [], [], []
    for first in range(0, rows, tile):
        some = query[:, :, first : first + tile].float()
        at = torch.arange(n - rows + first, n - rows + first + some.shape[2], device=query.device)
        largest = torch.full(some.shape[:3], float("-inf"), device=query.device)
        total, skipped = torch.zeros_like(largest), torch.zeros_like(largest[..., 0], dtype=torch.int32)
        output = torch.zeros(*some.shape[:3], value.shape[3], device=query.device)
        for start in range(0, int(at[-1]) + 1, tile):
            scores = some @ keys[:, :, start : start + tile].transpose(-1, -2) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            seen = torch.arange(start, start + scores.shape[3], device=query.device) <= at[:, None]
            scores = scores.masked_fill(~seen, float("-inf"))
            in_tile = scores.amax(-1)
            after = torch.maximum(largest, in_tile)
            counted = (in_tile > float("-inf")) & ((in_tile - after).exp() >= skip)
            taken = counted.any(-1)
            skipped += seen.sum().int() * ~taken
            decay, weights = (largest - after).exp(), (scores - after[..., None]).exp()
            taken = taken[:, :, None]
            total = torch.where(taken, total * decay + weights.sum(-1), total)
            sums = output * decay[..., None] + weights @ values[:, :, start : start + tile]
            output = torch.where(taken[..., None], sums, output)
            largest = torch.where(taken, after, largest)
        lse = largest + total.log()
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.float()[:, None])
        outputs.append(output * (largest - lse).exp()[..., None])
        lses.append(lse)
        counts.append(skipped)
    return torch.cat(outputs, 2).to(query.dtype), torch.cat(lses, 2), torch.stack(counts, 2)


def skip_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    skip: float,
    tile: int = 128,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of the last q of n entries, in order, over all n but the tiles that are skipped.

    Query row r is entry n - q + r. A tile of rows is rows [t * tile, (t + 1) * tile), a tile of entries is entries
    [j * tile, (j + 1) * tile). A tile of rows skips a tile of entries if in each row exp(largest score in the tile - largest
    score so far, this tile included) is below `skip`; rows that see nothing of the tile do not count. So the first tile is never
    skipped, and no skipped tile holds a row's largest score: with a larger `skip` more tiles are skipped.

    What a row loses of its probability mass is at most (skipped tiles) * tile * skip, and its output moves by at most twice that
    times the longest value. The mass itself is 1 - exp(lse - that of the exact attention).

    Source: Yuan et al., "BLASST: Dynamic BLocked Attention Sparsity via Softmax Thresholding", arXiv 2512.12087.

    Args:
        query: [batch, heads, q, head_dim]; query head h reads kv head h // (heads / kv_heads).
        key, value: [batch, kv_heads, n, head_dim]; only the entry dimension may be strided.
        scale: factor on q.k, from the model.
        skip: in [0, 1]; with 0 nothing is skipped, and the attention is `prompt_attention`, bit by bit.
        tile: rows and entries of a tile, a power of two; the Triton kernel has those from 16 to `largest_tile`.
        softcap: s -> softcap * tanh(s / softcap) on the scaled scores.
        sinks: [heads], one logit per head that takes part in the softmax and has no value (gpt-oss).
        backend: "triton" and "auto" on CUDA run the Triton kernel; "auto" does not where it lacks the tile.

    Returns:
        output: [batch, heads, q, head_dim] in the dtype of `query`.
        lse: float32 [batch, heads, q], the natural logarithm of the summed exp of what was not skipped and of the sink.
        skipped: int32 [batch, heads, tiles of rows], pairs of a row and an entry up to it that were skipped.

    Raises:
        ValueError: `skip` is out of range, or the tile no power of two; with backend="triton" a tile that it lacks; the
            backend does not exist, or cannot run here.
    """
    if not 0 <= skip <= 1:
        raise ValueError(f"skip={skip!r} does not work; give a number from 0 (skip nothing) to 1")
    if tile < 1 or tile & (tile - 1):
        raise ValueError(f"tile={tile} is no power of two; choose 64 or 128")
    most = largest_tile(query.shape[-1], query.element_size())
    in_triton = 16 <= tile <= most and query.shape[-1] == value.shape[-1] and query.dtype != torch.float64
    if backend == "triton" and not in_triton:
        raise ValueError(
            f"tile={tile} with heads of {query.shape[-1]} in {query.dtype} is not for backend='triton'; choose one from 16 to "
            f"{most} for keys and values of one width below float64, or 'auto'"
        )
    chosen = use_triton(backend, query)
    if skip == 0:
        output, _, lse = prompt_attention(query, key, value, scale=scale, softcap=softcap, sinks=sinks, with_lse=True)
        assert lse is not None
        return output, lse, lse.new_zeros(*lse.shape[:2], -(-lse.shape[2] // tile), dtype=torch.int32)
    if chosen and in_triton:
        from kvpress.kernels.gpu import skip_attention as gpu

        return gpu.skip_attention(query, key, value, scale=scale, skip=skip, tile=tile, softcap=softcap, sinks=sinks)
    return _walk(query, key, value, scale, skip, tile, softcap, sinks)


def largest_tile(head_dim: int, itemsize: int) -> int:
    """The largest tile of the Triton kernel: 128; less for wide heads, and in float32, which takes more registers."""
    width = head_dim * itemsize
    if itemsize == 2:
        return 128 if width <= 256 else 64
    return 32 if width <= 512 else 16


def tile_weights(query: Tensor, key: Tensor, *, scale: float, tile: int, softcap: float | None = None) -> Tensor:
    """The largest weight that a row has in a tile, beside its largest score so far: what `skip` is compared with.

    Torch on every device.

    Args:
        query, key, scale, tile, softcap: as in `skip_attention`.

    Returns:
        float32 [batch, heads, tiles of rows, tiles of entries], in [0, 1]: a tile is skipped where it is below `skip`. -1 where
        no row sees anything of the tile.
    """
    batch, heads, rows, _ = query.shape
    tiles, past = -(-key.shape[2] // tile), key.shape[2] - rows
    found = torch.full(
        (batch * key.shape[1], heads // key.shape[1], -(-rows // tile), tiles), -1.0, device=query.device
    )
    for some, first, scores in _scored(query, key, scale, tile, softcap):
        weights = _weights(scores, tile)
        count = -(-min(past + first + tile, key.shape[2]) // tile)
        found[some, :, first // tile, :count] = weights[..., :count]
    return found.view(batch, heads, *found.shape[2:])


def _scored(
    query: Tensor, key: Tensor, scale: float, tile: int, softcap: float | None
) -> Iterator[tuple[slice, int, Tensor]]:
    """The scores of tiles of rows, of some kv heads at a time.

    Yields:
        the kv heads, of those of all sequences; the first row; float32 [kv heads, group, rows, whole tiles of entries], -inf
        for what a row does not see.
    """
    batch, heads, rows, head_dim = query.shape
    kv_heads, n = key.shape[1:3]
    past, units = n - rows, batch * kv_heads
    keys, grouped = key.flatten(0, 1), query.reshape(units, heads // kv_heads, rows, head_dim)
    for first in range(0, rows, tile):
        last = min(rows, first + tile)
        seen = past + last
        filled = -seen % tile
        step = max(1, TILE_SCORES // ((heads // kv_heads) * (last - first) * (seen + filled)))
        at = torch.arange(past + first, seen, device=query.device)
        future = torch.arange(seen + filled, device=query.device) > at[:, None]
        for start in range(0, units, step):
            some = slice(start, start + step)
            part = grouped[some, :, first:last].float() * scale
            scores = part.flatten(1, 2) @ keys[some, :seen].float().transpose(1, 2)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = functional.pad(scores, (0, filled)).view(*part.shape[:3], -1)
            yield some, first, scores.masked_fill_(future, float("-inf"))


def _weights(scores: Tensor, tile: int) -> Tensor:
    """`tile_weights` of rows: [..., rows, whole tiles of entries] -> [..., tiles].

    What is skipped holds no row's largest score, so that the largest score so far is that of all tiles so far.
    """
    in_tile = scores.unflatten(-1, (-1, tile)).amax(-1)
    weights = exp_(in_tile - in_tile.cummax(dim=-1).values)
    return weights.masked_fill_(in_tile == float("-inf"), -1.0).amax(-2)


def _walk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    skip: float,
    tile: int,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    kv_heads, past = key.shape[1], key.shape[2] - rows
    values = value.flatten(0, 1)
    shape = (batch * kv_heads, heads // kv_heads, rows)
    output = query.new_empty(*shape, value.shape[-1])
    lse = query.new_empty(shape, dtype=torch.float32)
    skipped = query.new_empty((*shape[:2], -(-rows // tile)), dtype=torch.int32)
    for some, first, scores in _scored(query, key, scale, tile, softcap):
        last = min(rows, first + tile)
        seen = past + last
        gone = _weights(scores, tile) < skip  # of which no row sees anything, too
        scores.unflatten(-1, (-1, tile)).masked_fill_(gone[:, :, None, :, None], float("-inf"))
        starts = torch.arange(0, scores.shape[-1], tile, device=query.device)
        at = torch.arange(past + first, seen, device=query.device)
        pairs = (at[:, None] + 1 - starts).clamp_(0, tile).sum(0)
        skipped[some, :, first // tile] = (gone * pairs).sum(-1).int()
        weights, of_rows = softmax_(scores)
        if sinks is not None:
            column = sinks.float().view(1, kv_heads, -1, 1).expand(batch, -1, -1, -1).flatten(0, 1)
            both = torch.logaddexp(of_rows, column[some])
            weights, of_rows = weights.mul_(exp_(of_rows - both)[..., None]), both
        lse[some, :, first:last] = of_rows
        weights = weights[..., :seen].to(value.dtype)
        part = weights.flatten(1, 2) @ values[some, :seen]
        output[some, :, first:last] = part.view(*weights.shape[:3], -1).to(output.dtype)
    return (
        output.view(batch, heads, rows, -1),
        lse.view(batch, heads, rows),
        skipped.view(batch, heads, skipped.shape[2]),
    )
