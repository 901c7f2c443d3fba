"""How much attention blocks of rows give blocks of entries, estimated by sums over antidiagonals of cells (XAttention)."""

import torch
from torch import Tensor
from torch.nn import functional

from kvpress.kernels.backend import Backend, use_triton

# Scores of one tile of cells, in numbers.
TILE_SCORES = 1 << 24


def antidiagonal_mass_reference(
    query: Tensor, keys: Tensor, *, scale: float, stride: int, block_size: int, softcap: float | None = None
) -> Tensor:
    """The definition of `antidiagonal_mass`: one product of a row and an entry at a time."""
    batch, heads, rows, _ = query.shape
    kv_heads, n = keys.shape[1:3]
    past = n - rows
    first, blocks = past // block_size, -(-n // block_size)
    mass = torch.zeros(batch, heads, blocks - first, blocks, device=query.device)
    for b in range(batch):
        for head in range(heads):
            for cell in range(past // stride, -(-n // stride)):
                scores = torch.zeros(cell + 1, device=query.device)
                for other in range(cell + 1):
                    for place in range(stride):
                        entry, row = other * stride + place, cell * stride + stride - 1 - place - past
                        if 0 <= row < rows and entry < n:
                            key = keys[b, head * kv_heads // heads, entry].float()
                            scores[other] += query[b, head, row].float() @ key
                scores *= scale / stride
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                for other, weight in enumerate(scores.softmax(-1)):
                    mass[b, head, cell * stride // block_size - first, other * stride // block_size] += weight
    return mass


def antidiagonal_mass(
    query: Tensor,
    keys: Tensor,
    *,
    scale: float,
    stride: int,
    block_size: int,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """How much attention blocks of rows give blocks of entries, by the antidiagonals of cells.

    Rows and entries are cut into cells of `stride`, counted from the first entry. The score of a cell of rows with a cell of
    entries up to its own is scale / stride times the sum of q.k along the antidiagonal: its last row with its first entry, and
    so on. Rows and entries that a cell lacks count as zeros. The softmax over cells of entries is summed over blocks.

    Args:
        query: [batch, heads, rows, head_dim], those of the last entries; query head h reads kv head h // (heads / kv_heads).
        keys: [batch, kv_heads, n, head_dim]; K is not repeated.
        scale: factor on q.k.
        stride, block_size: sides of a cell and of a block, in entries: powers of two, the first at most the second; with a
            stride of 1 it is the attention itself.
        softcap: s -> softcap * tanh(s / softcap) on the scores of cells.
        backend: "triton" and "auto" on CUDA run the Triton kernels: products are exact, sums float32, no scores are stored. The
            torch path multiplies in the dtype of `query` on a GPU, in float32 on a CPU.

    Returns:
        float32 [batch, heads, row blocks, blocks]: the row blocks are the last of the blocks, those that hold rows. 0 for a
        block after that of the rows. A row block's sum is the number of its cells that hold rows.

    Raises:
        ValueError: the backend does not exist, or cannot run here.
    """
    if use_triton(backend, query) and query.dtype != torch.float64:
        from kvpress.kernels.gpu import antidiagonal_mass as gpu

        return gpu.antidiagonal_mass(query, keys, scale=scale, stride=stride, block_size=block_size, softcap=softcap)
    batch, heads, rows, _ = query.shape
    kv_heads, n = keys.shape[1:3]
    past, blocks, cells = n - rows, -(-n // block_size), block_size // stride
    first = past // block_size
    before, after = past - first * block_size, blocks * block_size - n
    dtype = torch.float32 if query.device.type == "cpu" else query.dtype
    # A cell of entries side by side, and one of rows in the opposite order: their product is the sum over the antidiagonal.
    key_cells = functional.pad(keys, (0, 0, 0, after)).unflatten(2, (-1, stride)).flatten(3)
    row_cells = functional.pad(query, (0, 0, before, after)).unflatten(2, (-1, stride)).flip(3).flatten(3)
    row_cells = row_cells.unflatten(1, (kv_heads, -1))  # [batch, kv_heads, group, cells, stride * head_dim]
    key_cells = key_cells.to(dtype).transpose(2, 3)
    place = torch.arange(blocks * cells, device=query.device)
    has_rows = ((place + 1) * stride > past) & (place * stride < n)
    mass = query.new_zeros(batch, heads, blocks - first, blocks, dtype=torch.float32)
    step = max(1, TILE_SCORES // (batch * heads * cells * blocks * cells))
    for start in range(first, blocks, step):
        stop = min(blocks, start + step)
        at, seen = slice(start * cells, stop * cells), stop * cells
        tile = row_cells[..., at.start - first * cells : at.stop - first * cells, :].to(dtype) * (scale / stride)
        scores = (tile.flatten(2, 3) @ key_cells[..., :seen]).float().view(batch, heads, at.stop - at.start, seen)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill_(place[:seen] > place[at, None], float("-inf")).softmax(dim=-1)
        weights *= has_rows[at, None]
        blockwise = weights.unflatten(3, (-1, cells)).unflatten(2, (-1, cells)).sum(dim=(3, 5))
        mass[:, :, start - first : stop - first, :stop] = blockwise
    return mass
