"""Random lists for `block_sparse_attention` and its mass, and what they mean pair by pair."""

import pytest
import torch

from support.attention_inputs import BATCH

GROUPS = pytest.mark.parametrize("group", [1, 3], ids="group-{}".format)
SHAPES = pytest.mark.parametrize(("rows", "past"), [(1, 0), (1, 62), (63, 0), (37, 74)], ids=str)
FORMS = [("blocks",), ("columns",), ("diagonals",), ("columns", "diagonals"), ("blocks", "columns", "diagonals")]
EXACT = [("distances",), ("columns", "distances"), ("blocks", "columns", "diagonals", "distances")]
ALL_FORMS = pytest.mark.parametrize("forms", [(), *FORMS, *EXACT], ids=lambda names: "+".join(names) or "none")


def lists(forms, rows, past, heads, block_size=16, seed=1):
    """Random lists of the named forms with -1 among them, each with as many heads as told; diagonals in clusters."""
    generator = torch.Generator().manual_seed(seed)
    n = rows + past

    def some(limit, shape):
        """Per row of the shape: different numbers below the limit in random order, about half replaced by -1."""
        drawn = torch.stack(
            [torch.randperm(limit, generator=generator) for _ in range(shape.numel())]
        )  # fmt: skip
        drawn[torch.rand(drawn.shape, generator=generator) < 0.5] = -1
        return drawn.view(*shape, limit)

    chosen = {}
    if "blocks" in forms:
        chosen["blocks"] = some(-(-n // block_size), torch.Size((BATCH, heads, -(-rows // block_size))))
    if "columns" in forms:
        chosen["columns"] = some(n, torch.Size((BATCH, heads)))[..., : 1 + n // 8]
    if "diagonals" in forms:
        chosen["diagonals"] = torch.cat(
            (
                some(min(n, 3), torch.Size((BATCH, heads))),
                n // 2 + some(n - n // 2, torch.Size((BATCH, heads)))[..., :3],
            ),
            dim=-1,
        )
        chosen["diagonals"][chosen["diagonals"] == n // 2 - 1] = -1  # what -1 became
    if "distances" in forms:
        chosen["distances"] = some(n, torch.Size((BATCH, heads)))[..., : 1 + n // 8]
    return chosen


def reads(
    rows, past, heads, blocks=None, columns=None, diagonals=None, distances=None, block_size=16, key_block_size=None
):
    """Bool [batch, heads, rows, n]: pair by pair, from the operation's description."""
    n = rows + past
    seen = torch.zeros(BATCH, heads, rows, n, dtype=torch.bool)
    for b in range(BATCH):
        for head in range(heads):
            forms = (blocks, columns, diagonals, distances)
            of = [None if x is None else x[b, head * x.shape[1] // heads].tolist() for x in forms]
            for row in range(rows):
                tile = row // block_size
                first = past + tile * block_size
                for j in range(past + row + 1):
                    listed = of[0] is not None and j // (key_block_size or block_size) in of[0][tile]
                    listed |= of[1] is not None and j in of[1]
                    listed |= of[2] is not None and any(0 <= j - first + d < block_size for d in of[2] if d >= 0)
                    listed |= of[3] is not None and past + row - j in of[3]
                    seen[b, head, row, j] = listed or j == past + row
    return seen
